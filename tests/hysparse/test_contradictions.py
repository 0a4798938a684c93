"""What contradicts what in a configuration: each is refused by a sentence whose fix works."""

import re

import pytest

from hysparse.config import ConfigError
from tests.hysparse.composing import one_phase

pytestmark = pytest.mark.usefixtures("one_process")

CONTRADICTIONS = [  # (processes, overrides, fragments of the message: the keys with their values and the way out, fix)
    (
        1,
        "phases.pretrain.warmup_tokens=600_000 phases.pretrain.decay_tokens=500_000",
        "phases.pretrain.warmup_tokens=600_000|phases.pretrain.decay_tokens=500_000|phases.pretrain.tokens=1_000_000",
        "phases.pretrain.decay_tokens=400_000",
    ),
    (
        1,
        "phases.pretrain.learning_rate=1e-3 phases.pretrain.minimum_learning_rate=2e-3",
        "phases.pretrain.minimum_learning_rate=0.002|phases.pretrain.learning_rate=0.001|goes down",
        "phases.pretrain.minimum_learning_rate=1e-4",
    ),
    (
        1,
        "attention.sparse_kv=none attention.window_kv=none",
        "attention.sparse_kv=none|attention.window_kv=none|or use attention=full",
        "attention=full",
    ),
    (
        1,
        "attention.sparse_kv=none attention.window_kv=none",
        "give one of them own or shared",
        "attention.window_kv=shared",
    ),
    (
        1,
        "attention.pattern=FSSSF",
        "attention.pattern=FSSSF has 5 layers|model.layers=7|make them equal",
        "model.layers=5",
    ),
    (
        1,
        "attention.output_gate=elementwise",
        "attention.output_gate=elementwise|attention.ratio=2|use attention.output_gate=none",
        "attention.output_gate=none",
    ),
    (
        1,
        "attention=full attention.output_gate=headwise attention.pattern=FSSFSSF",
        "attention.output_gate=headwise|attention.pattern=FSSFSSF has sparse layers",
        "attention.pattern=null",
    ),
    (
        4,
        "model.kv_heads=2 model.heads=6 parallel.tensor=4",
        "parallel.tensor=4|neither divides model.kv_heads=2|divides model.heads=6|use one of 1, 2",
        "parallel.tensor=2",
    ),
    (
        2,
        "parallel.expert=2 parallel.dispatcher=deepep",
        "parallel.dispatcher=deepep needs the package deep_ep",
        "parallel.dispatcher=alltoall",
    ),
    (
        1,
        "parallel.dispatcher=deepep",
        "parallel.dispatcher=deepep needs experts on other ranks|parallel.expert=1",
        "parallel.dispatcher=alltoall",
    ),
    (
        2,
        "parallel.pipeline=2 parallel.layout=[1,1,1]",
        "parallel.layout=.1, 1, 1. has 3 entries|parallel.pipeline=2 x parallel.virtual=1 = 2 stages|example .1, 2.",
        "parallel.layout=[1,2]",
    ),
    (
        2,
        "parallel.pipeline=2 parallel.layout=[1,1]",
        "parallel.layout=.1, 1.|the 3 hybrid blocks, 3, 3, 1 layers long|example .1, 2.",
        "parallel.layout=[2,1]",
    ),
    (
        2,
        "model.vocabulary=1025 parallel.tensor=2",
        "parallel.tensor=2|model.vocabulary=1025|use one of 1",
        "parallel.tensor=1",
    ),
    (
        2,
        "model=dense7b model.layers=7 model.ffn=11009 parallel.tensor=2",
        "parallel.tensor=2|model.ffn=11009|use one of 1",
        "parallel.tensor=1",
    ),
    (
        1,
        "parallel.virtual=2",
        "parallel.virtual=2|parallel.pipeline of at least 2, not 1|use parallel.virtual=1",
        "parallel.virtual=1",
    ),
    (
        4,
        "parallel.pipeline=4",
        "parallel.pipeline=4 x parallel.virtual=1 = 4 stages|attention.ratio=2 gives 3 hybrid blocks of 3, 3, 1 layers"
        "|use at most 3 stages",
        "parallel.pipeline=2",
    ),
    (
        2,
        "parallel.pipeline=2 attention.pattern=FSSSSSS",
        "parallel.pipeline=2|attention.pattern=FSSSSSS gives 1 hybrid blocks of 7 layers|use at most 1 stages",
        "parallel.pipeline=1",
    ),
    (
        2,
        "parallel.context=2 phases.pretrain.sequence_length=288",
        "parallel.context=2 cuts phases.pretrain.sequence_length=288 into 4 chunks|multiples of attention.block=16|"
        "use phases.pretrain.sequence_length=256 or 320, or parallel.context=1 or 3$",
        "phases.pretrain.sequence_length=320",
    ),
    (
        8,
        "parallel.context=8 attention.block=32",
        "parallel.context=8|phases.pretrain.sequence_length=256|attention.block=32|sequence_length=512, or parallel."
        "context=4$",
        "phases.pretrain.sequence_length=512",
    ),
    (
        2,
        "attention=full parallel.context=2 phases.pretrain.sequence_length=254",
        "parallel.context=2|sequence_length=254|which must be equal; use .*=252 or 256, or parallel.context=1",
        "phases.pretrain.sequence_length=252",
    ),
    (
        4,
        "parallel.context=4 attention.window=34",
        "attention.window=34 reaches 33 tokens back|a chunk of 32|parallel.context=4|use parallel.context=2"
        "|attention.window=33 or less|phases.pretrain.sequence_length=384",
        "attention.window=33",
    ),
    (
        8,
        "attention=full parallel.context=4 parallel.tensor=2 phases.pretrain.sequence_length=252",
        "parallel.context=4 cuts phases.pretrain.sequence_length=252|parallel.context=3 or 6",
        "phases.pretrain.sequence_length=256",
    ),
    (
        2,
        "model=dense7b model.layers=7 parallel.expert=2",
        "parallel.expert=2|model.moe is null|use parallel.expert=1",
        "parallel.expert=1",
    ),
    (
        3,
        "parallel.expert=3",
        "parallel.expert=3|model.moe.experts=8|use one of 1, 2, 4, 8",
        "parallel.expert=1 phases.pretrain.global_batch=12",
    ),
    (
        1,
        "phases.pretrain.sequence_length=200",
        "phases.pretrain.sequence_length=200|attention.block=16|use 192 or 208",
        "phases.pretrain.sequence_length=208",
    ),
    (
        1,  # the explicit pattern decides, not the ratio
        "attention.ratio=0 attention.pattern=FSSFSSF phases.pretrain.sequence_length=200",
        "phases.pretrain.sequence_length=200|attention.block=16|use 192 or 208",
        "phases.pretrain.sequence_length=192",
    ),
    (
        1,
        "attention.window=300",
        "attention.window=300|phases.pretrain.sequence_length=256|use attention.window=256 or less",
        "attention.window=256",
    ),
    (
        2,
        "attention=full parallel.tensor=2 phases.pretrain.sequence_length=255",
        "parallel.tensor=2|phases.pretrain.sequence_length=255|use 254 or 256",
        "phases.pretrain.sequence_length=256",
    ),
    (
        3,
        "parallel.tensor=2 phases.pretrain.global_batch=12",
        "parallel.tensor=2 x parallel.pipeline=1 x parallel.context=1 = 2 does not divide the 3 processes"
        "|start 2 or 4 processes",
        "parallel.tensor=1",
    ),
    (
        2,
        "parallel.expert=4",
        "parallel.expert=4 x parallel.pipeline=1|the 2 processes|use parallel.expert=2",
        "parallel.expert=2",
    ),
    (
        1,
        "phases.pretrain.micro_batch=3",
        "phases.pretrain.micro_batch=3 x 1 data-parallel ranks|phases.pretrain.global_batch=16"
        "|use phases.pretrain.global_batch=15 or 18",
        "phases.pretrain.global_batch=18",
    ),
    (
        8,
        "phases.pretrain.micro_batch=4",
        "phases.pretrain.micro_batch=4 x 8 data-parallel ranks|phases.pretrain.global_batch=16"
        "|use phases.pretrain.global_batch=32 or 64",
        "phases.pretrain.global_batch=32",
    ),
    (
        32,
        "parallel.context=2",
        "phases.pretrain.global_batch=16|use phases.pretrain.global_batch=32 or 64, or parallel.tensor x "
        "parallel.pipeline of 2 or more",
        "parallel.tensor=2",
    ),
    (
        2,
        "parallel.pipeline=2 parallel.virtual=2 model.layers=10 phases.pretrain.global_batch=6",
        "parallel.virtual=2|3 micro-batches|parallel.pipeline=2|use phases.pretrain.global_batch=4 or 8",
        "phases.pretrain.global_batch=8",
    ),
    (1, "max_steps=0", "max_steps=0|null for the whole schedule", "max_steps=null"),
    (
        1,
        "logging.validate_every=50 data.validation_samples=0",
        "data.validation_samples=0|logging.validate_every=50",
        "data.validation_samples=16 logging.validate_every=0",
    ),
    (1, "model.moe.ffn=100", "model.moe.ffn=100|multiple of 8|use model.moe.ffn=104", "model.moe.ffn=104"),
    (
        1,
        "parallel.recompute_layers=2 parallel.recompute=selective",
        "parallel.recompute_layers=2|parallel.recompute=selective|use parallel.recompute=full",
        "parallel.recompute=full",
    ),
    # the engine
    *(
        (
            2,
            f"engine=deepspeed parallel.{key}=2{more}",
            f"parallel.{key}=2: engine=deepspeed has data parallelism and ZeRO only|use parallel.{key}=1",
            f"{fix} deepspeed.zero=2",
        )
        for key, more, fix in (
            ("tensor", "", "parallel.tensor=1"),
            ("pipeline", "", "parallel.pipeline=1"),
            ("virtual", " parallel.pipeline=1", "parallel.virtual=1"),
            ("expert", "", "parallel.expert=1"),
            ("context", "", "parallel.context=1"),
        )
    ),
    (
        1,
        "deepspeed.zero=3",
        "deepspeed.zero=3 means nothing to engine=megatron|add engine=",
        "engine=deepspeed",
    ),
    (
        1,
        "engine=deepspeed parallel.offload_optimizer=0.5",
        "parallel.offload_optimizer=0.5 is for engine=megatron|use deepspeed.offload_optimizer=cpu",
        "parallel.offload_optimizer=0 deepspeed.offload_optimizer=cpu",
    ),
    (
        1,
        "parallel.offload_optimizer=50",
        "parallel.offload_optimizer=50|share|use 0 for none, 1 for all",
        "parallel.offload_optimizer=0.5",
    ),
    (1, "engine=deepspeed dry_run=2", "dry_run=2|engine=deepspeed|use plan=true", "dry_run=null plan=true"),
    (1, "engine=deepspeed deepspeed.zero=4", "deepspeed.zero=4|use 1, 2 or 3", "deepspeed.zero=3"),
    (
        1,
        "engine=deepspeed deepspeed.zero=2 deepspeed.offload_parameters=cpu",
        "deepspeed.offload_parameters=cpu needs deepspeed.zero=3, not 2|or deepspeed.offload_parameters=none",
        "deepspeed.zero=3",
    ),
    (
        1,
        "engine=deepspeed deepspeed.zero=1 deepspeed.offload_optimizer=nvme deepspeed.nvme=/disk",
        "deepspeed.offload_optimizer=nvme needs deepspeed.zero=3, not 1|or deepspeed.offload_optimizer=cpu",
        "deepspeed.offload_optimizer=cpu",
    ),
    (
        1,
        "engine=deepspeed deepspeed.zero=3 deepspeed.offload_optimizer=nvme",
        "deepspeed.offload_optimizer=nvme needs a folder|add deepspeed.nvme=FOLDER",
        "deepspeed.nvme=/disk",
    ),
    # inside one group
    (
        1,
        "precision=fp8 experts=grouped",
        "experts=grouped computes in BF16|precision=fp8|use experts=auto",
        "experts=auto model.heads=8 model.kv_heads=4",
    ),
    (
        1,
        "precision=fp8 model.heads=8 model.kv_heads=4 model.moe.ffn=56",
        "precision=fp8|multiples of 16|model.moe.ffn is 56",
        "model.moe.ffn=64",
    ),
    (1, "precision=fp8", "multiples of 16|rows of a sparse layer's queries.* is 264", "model.heads=8 model.kv_heads=4"),
    (
        1,
        "model=dense7b model.layers=7 experts=te",
        "experts=te needs experts|model.moe is null|use experts=auto",
        "experts=auto",
    ),
    (
        1,
        "model.moe.first_dense_layers=2",
        "model.moe.first_dense_layers=2|model.ffn=0|model.ffn=256, as wide",
        "model.ffn=256",
    ),
    (
        1,
        "model.moe.first_dense_layers=7 model.ffn=64",
        "model.moe.first_dense_layers=7|model.layers=7|use model.moe.first_dense_layers=6 or less",
        "model.moe.first_dense_layers=6",
    ),
    (1, "model.moe.groups=3", "model.moe.groups=3|model.moe.experts=8", "model.moe.groups=4"),
    (
        1,
        "model.moe.groups=2 model.moe.active_groups=4",
        "model.moe.active_groups=4|model.moe.groups=2|use model.moe.active_groups=2 or less",
        "model.moe.active_groups=2",
    ),
    (
        1,
        "model.moe.groups=4 model.moe.active=3 model.moe.active_groups=2",
        "model.moe.active=3|model.moe.active_groups=2|at most 2 experts",
        "model.moe.active=4",
    ),
    (1, "model.heads=6 model.kv_heads=4", "model.heads=6|model.kv_heads=4", "model.kv_heads=3"),
    (
        1,
        "model.moe.active=9",
        "model.moe.active=9|model.moe.experts=8|use model.moe.active=8 or less",
        "model.moe.active=8",
    ),
    (
        1,
        "model.moe.score=softmax",
        "model.moe.bias_update_rate=0.001|model.moe.score=sigmoid, not softmax|use model.moe.bias_update_rate=0",
        "model.moe.bias_update_rate=0",
    ),
    (1, "model.head_dim=33", "model.head_dim=33|use 34", "model.head_dim=34"),
    (
        1,
        "attention.tokens=100",
        "attention.tokens=100|attention.block=16|use attention.tokens=96 or 112",
        "attention.tokens=112",
    ),
    (1, "model=dense7b model.layers=7 model.ffn=0", "model.ffn=0|no model.moe", "model.ffn=64"),
    (
        1,
        "data.path=corpus/a +data.blend={corpus/b:0.5}",
        "data.path=corpus/a|data.blend=.'corpus/b': 0.5.|one of the two",
        "data.path=null",
    ),
]


@pytest.mark.parametrize(
    "processes, overrides, fragments, fix", CONTRADICTIONS, ids=[f"{case[1]}→{case[3]}" for case in CONTRADICTIONS]
)
def test_a_contradiction_names_keys_and_values_and_the_fix_works(monkeypatch, processes, overrides, fragments, fix):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ConfigError) as error:
        one_phase(*overrides.split())
    for fragment in fragments.split("|"):
        assert re.search(fragment.replace("(", r"\("), str(error.value)), str(error.value)
    one_phase(*overrides.split(), *fix.split())
