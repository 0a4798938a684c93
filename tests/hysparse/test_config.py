"""The configuration as a user meets it: what composes, what is refused and how, and where each value came from."""

import copy
import re
import subprocess
import sys
from dataclasses import asdict
from functools import cache

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from hysparse.compose import CONF, provenance, register, resolve
from hysparse.config import Config, ConfigError, DecayShape, Gate, Recompute, Source
from hysparse.mistakes import HEAD_START, PATIENCE, mistakes_without_traceback
from hysparse.plan import Plan

ROOT = CONF.parent
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
MODELS = {"tiny": 2, "dense7b_1to3": 3, "moe80b_1to11": 11}  # experiment: its ratio
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")

ONE_PHASE = (  # numbers that the table below builds on, whatever conf/ says
    "+experiment=tiny",
    "~phases.long_context",
    "model.layers=7",
    "phases.pretrain.tokens=1000000",
    "phases.pretrain.sequence_length=256",
    "phases.pretrain.global_batch=16",
    "phases.pretrain.micro_batch=2",
    "phases.pretrain.warmup_tokens=0",
    "phases.pretrain.decay_tokens=0",
)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")


@cache
def composed(*overrides: str, with_hydra: bool = False) -> DictConfig:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=with_hydra)


def resolved(*overrides: str) -> Config:
    return resolve(composed(*overrides))


def one_phase(*overrides: str) -> Config:
    """ONE_PHASE with overrides: groups by composing, keys in the way Hydra applies them, in a tenth of the time."""
    groups = [word for word in overrides if word.split("=")[0] in ("model", "attention")]
    config = copy.deepcopy(composed(*ONE_PHASE, *groups))
    for override in OverridesParser.create().parse_overrides([word for word in overrides if word not in groups]):
        OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=override.is_add())
    return resolve(config)


def message(capsys, *overrides: str) -> str:
    """What a user sees of a mistake: one sentence and exit code 2."""
    with pytest.raises(SystemExit) as exit, mistakes_without_traceback():
        resolved(*overrides)
    assert exit.value.code == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith("error: ") and errors.count("\n") == 1
    return errors


def command_line(*arguments: str, interpreter: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """`python train.py ...` in the root of the project."""
    command = [sys.executable, *interpreter, "train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


# What there is


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_passes_the_checks(experiment):
    config = resolved(f"+experiment={experiment}")
    assert config.phases and config.run.dir == f"runs/{config.model.name}-{config.attention.name}"
    assert Plan(config.model, config.attention).pattern.endswith("F")


def test_a_run_without_an_experiment_composes_too():
    config = resolved()
    assert (config.model.name, config.attention.name) == ("tiny", "hysparse")


@pytest.mark.parametrize(
    "attention, sparse_kv, window_kv, gate",
    [
        ("hybrid_swa", Source.none, Source.own, Gate.none),
        ("hysparse", Source.shared, Source.own, Gate.headwise),
        ("hysparse_no_swa", Source.own, Source.none, Gate.headwise),
        ("hysparse_own_kv", Source.own, Source.own, Gate.headwise),
        ("hysparse_shared_swa", Source.shared, Source.shared, Gate.headwise),
    ],
)
@pytest.mark.parametrize("experiment", MODELS)
def test_one_word_switches_the_variant_and_the_ratio_stays_the_models(
    experiment, attention, sparse_kv, window_kv, gate
):
    chosen = resolved(f"+experiment={experiment}", f"attention={attention}").attention
    assert (chosen.name, chosen.ratio, chosen.last_full) == (attention, MODELS[experiment], True)
    assert (chosen.sparse_kv, chosen.window_kv, chosen.gate) == (sparse_kv, window_kv, gate)
    assert chosen.output_gate is Gate.none
    assert (chosen.block, chosen.tokens, chosen.window) == ((16, 64, 32) if experiment == "tiny" else (64, 1024, 128))


@pytest.mark.parametrize("experiment", MODELS)
def test_the_full_baseline_has_an_output_gate_in_the_80b_only(experiment):
    config = resolved(f"+experiment={experiment}", "attention=full")
    assert set(Plan(config.model, config.attention).pattern) == {"F"}
    assert config.attention.output_gate is (Gate.elementwise if experiment == "moe80b_1to11" else Gate.none)


def test_every_variant_is_an_ablation_of_the_7b_and_nothing_else_differs():
    sevenb = asdict(resolved("+experiment=dense7b_1to3"))
    for attention in sorted(path.stem for path in (CONF / "attention").glob("*.yaml")):
        ablation = resolved(f"+experiment=ablation_{attention}")
        assert ablation.attention == resolved("+experiment=dense7b_1to3", f"attention={attention}").attention
        for section in sevenb.keys() - {"attention", "run"}:
            assert asdict(ablation)[section] == sevenb[section]


def test_the_recipes_are_the_papers():
    """Section 4.1."""
    dense, moe = resolved("+experiment=dense7b_1to3"), resolved("+experiment=moe80b_1to11")
    stages = [(name, phase.tokens, phase.sequence_length, phase.learning_rate) for name, phase in dense.phases.items()]
    assert stages == [("pretrain", 10**12, 8192, 8.3e-4), ("long_context", 2 * 10**11, 32768, 3.0e-5)]
    assert dense.phases["long_context"].rope_base == 640_000
    (only,) = moe.phases.values()
    assert (only.tokens, only.sequence_length, only.learning_rate) == (5 * 10**11, 32768, 1e-3)
    assert only.rope_base == 640_000
    for config in (dense, moe):
        optim = config.optim
        assert (optim.beta1, optim.beta2, optim.epsilon, optim.weight_decay) == (0.9, 0.95, 1e-10, 0.1)
        assert optim.clip == 1.0
        assert config.parallel.recompute is Recompute.selective


def test_the_command_line_wins_over_experiment_and_groups():
    config = resolved("+experiment=tiny", "attention.block=32", "model.hidden=64", "run.name=mine", "max_steps=7")
    assert (config.attention.block, config.model.hidden, config.max_steps) == (32, 64, 7)
    assert config.run.dir == "runs/mine"


@pytest.mark.parametrize("launcher", [("RANK", "WORLD_SIZE", "LOCAL_RANK"), LAUNCHER_VARIABLES[3:]])
def test_all_ranks_see_the_same_configuration_and_run_folder(monkeypatch, launcher):
    seen = []
    for rank in (0, 5, 7):
        for name in launcher:
            monkeypatch.setenv(name, "8" if name in ("WORLD_SIZE", "SLURM_NTASKS") else str(rank))
        seen.append(asdict(resolved("+experiment=tiny", "phases.pretrain.micro_batch=1", "~phases.long_context")))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0]["run"]["dir"] == "runs/tiny-hysparse"


# Contradictions

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
        "parallel.tensor=2|phases.pretrain.sequence_length=255|use a multiple of 2",
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
        2,
        "parallel.pipeline=2 parallel.virtual=2 model.layers=10 phases.pretrain.global_batch=6",
        "parallel.virtual=2|3 micro-batches|parallel.pipeline=2|use phases.pretrain.global_batch=4 or a multiple",
        "phases.pretrain.global_batch=4",
    ),
    (1, "max_steps=0", "max_steps=0|null for the whole schedule", "max_steps=null"),
    (
        1,
        "logging.validate_every=50 data.validation_samples=0",
        "data.validation_samples=0|logging.validate_every=50",
        "data.validation_samples=16 logging.validate_every=0",
    ),
    (1, "model.moe.ffn=100", "model.moe.ffn=100|multiple of 8|use model.moe.ffn=104", "model.moe.ffn=104"),
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


def test_deepspeed_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("hysparse.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed here; pip install deepspeed==0.19.8, or use"):
        one_phase("engine=deepspeed")
    one_phase("engine=deepspeed", "plan=true")  # starts nothing


@pytest.mark.parametrize(
    "override",
    [
        "model.layers=0",
        "model.moe.ffn=-1",
        "attention.window=0",
        "attention.ratio=-1",
        "phases.pretrain.tokens=0",
        "phases.pretrain.learning_rate=0.0",
        "phases.pretrain.warmup_tokens=-1",
        "phases.pretrain.minimum_learning_rate=-0.001",
        "parallel.tensor=0",
        "run.timeout=0",
        "optim.beta2=1.0",
        "optim.epsilon=0.0",
        "optim.clip=-1.0",
        "checkpoint.every=0",
        "checkpoint.keep=-1",
        "logging.every=0",
        "logging.validate_every=-5",
        "logging.experts_every=-1",
        "model.moe.shared_ffn=-1",
        "model.moe.capacity_factor=-1",
        "model.moe.first_dense_layers=-1",
        "model.moe.groups=0",
        "attention.pattern=SFFFFFF",
        "attention.pattern=FSXFSSF",
    ],
)
def test_a_value_out_of_range_is_named(override):
    with pytest.raises(ConfigError, match=re.escape(override)):
        one_phase(override)


def test_a_path_may_have_any_characters_in_quotes():
    assert resolved('run.dir="/tmp/~Jürgen/a=b, c"').run.dir == "/tmp/~Jürgen/a=b, c"


@pytest.mark.parametrize("key", ["run.name", "run.dir"])
def test_an_empty_run_folder_is_not_the_current_one(key):
    with pytest.raises(ConfigError, match=f"{key} is empty; .*run.dir=runs/"):
        one_phase(f"{key}=")


def test_a_run_without_phases_is_refused():
    with pytest.raises(ConfigError, match="phases is empty.*phases=tiny"):
        resolved("+experiment=tiny", "~phases.pretrain", "~phases.long_context")


def test_a_plan_needs_no_processes():
    config = resolved("+experiment=dense7b_1to3", "parallel.tensor=8", "parallel.pipeline=2", "plan=true")
    assert config.parallel.tensor == 8
    with pytest.raises(ConfigError, match="= 16 does not divide the 1 processes"):
        resolved("+experiment=dense7b_1to3", "parallel.tensor=8", "parallel.pipeline=2")


# Typing mistakes


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ("model.layer=3", "model.layer is no key of the configuration; did you mean model.layers"),
        ("atention=full", "atention is no key of the configuration; did you mean attention"),
        ("+new=1", "new is no key"),
        ("++resum=never", "resum is no key of the configuration; did you mean resume"),
        ("+model.moe.expert=4", "model.moe.expert is no key of the configuration; did you mean model.moe.experts?"),
        ("+optim.betas=1", "optim.betas is no key .* optim.beta[12]"),
        ("phases.pretrain.token=1", "phases.pretrain.token is no key .* did you mean phases.pretrain.tokens"),
        ("+phases.pretrain.rope=1", "phases.pretrain.rope is no key .* phases.pretrain.rope_base"),
        ("+phases.more.tokens=1", "phases.more does not exist, .* conf/phases/NAME.yaml"),
        ("phases.more={tokens:1}", "phases.more does not exist, .* conf/phases/NAME.yaml"),
        ("data.blend={corpus/a:1}", r"corpus/a is a new entry, which takes a plus: \+data.blend={"),
        ("model=dense7b model.moe.experts=8", "model.moe is null .*choose an MoE model, such as model=tiny"),
        ("model=dense7b model.moe={experts:8}", "model.moe is null .*choose an MoE model, such as model=tiny"),
        ("model.layers=three", "model.layers: .*'three'.* Integer"),
        ("model.layers=1.5", "model.layers: .*'1.5'.* Integer"),
        ("optim.beta1=x", "optim.beta1: .*'x'.* Float"),
        ("logging.wandb=maybe", "logging.wandb: .*'maybe'.* bool"),
        ("model.layers=null", "model.layers has no value and needs one; give model.layers=VALUE"),
        ("phases.pretrain.tokens=???", "phases.pretrain.tokens has no value and needs one"),
        ("~phases.pretrain.tokens", "phases.pretrain.tokens has no value and needs one"),
        ("phases.pretrain.tokens=1e9", "phases.pretrain.tokens must be a whole number; write .*=1_000_000_000$"),
        ("kernels=fast", "kernels: Invalid value 'fast', expected one of .auto, triton, reference"),
        ("phases.pretrain.decay_shape=exp", r"decay_shape: Invalid value 'exp', expected one of .linear, cosine, sqrt"),
        ("attention.sparse_kv=shard", "attention.sparse_kv: Invalid value 'shard', expected one of .none, own, shared"),
        ("run.dir=${nowhere}", "run.dir: .*nowhere"),
        ("run.name=${run.dir}", "run.(name|dir): .*[Rr]ecursive"),
        ("model=null", "group=option"),
        ("attention=hysparce", "attention=hysparce does not exist; did you mean attention=hysparse.* hybrid_swa"),
        ("+experiment=tinny", "experiment=tinny does not exist; did you mean experiment=tiny.* moe80b_1to11"),
        ("experiment=tiny", r"\+experiment=tiny"),
        ("model.layers", "model.layers is no override; write key=value"),
        ("run.dir=/tmp/~me", """/tmp/~me cannot be read; .*: 'run.dir="/tmp/~me"'"""),
    ],
)
def test_a_typing_mistake_gets_one_sentence_that_helps(capsys, overrides, expected):
    assert re.search(expected, message(capsys, *overrides.split()))


@pytest.mark.parametrize(
    "content, expected",
    [
        ("model: {moe: {expert: 4}}", "experiment/mine.yaml: model.moe.expert is no key .* model.moe.experts"),
        ("modle: {layers: 4}", "experiment/mine.yaml: modle is no key .* did you mean model"),
        ("phases: {pretrain: {token: 4}}", "experiment/mine.yaml: .*did you mean phases.pretrain.tokens"),
        ("model: {layers: four}", "experiment/mine.yaml: model.layers: .*'four'"),
        ("model: {layers: 4", "mine.yaml"),
        ("defaults: [override /model: huge]", "model=huge does not exist; model is one of dense7b, moe80b, tiny"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(capsys, tmp_path, content, expected):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(f"# @package _global_\n{content}\n")
    assert re.search(expected, message(capsys, f"hydra.searchpath=[file://{tmp_path}]", "+experiment=mine"))


def test_other_ranks_leave_the_first_one_time_to_speak_and_repeat_nothing(capsys, monkeypatch):
    """A launcher kills all ranks when the first of them ends; the one that prints must not be killed before it has."""
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"), mistakes_without_traceback():
        resolved("model.layers=0")
    assert capsys.readouterr().err == "" and slept == [PATIENCE]


def test_the_first_of_several_ranks_speaks_and_leaves_the_others_time_to_come_as_far(capsys, monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    for ranks in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", ranks)
        with pytest.raises(SystemExit, match="2"), mistakes_without_traceback():
            resolved("model.layers=0")
        assert capsys.readouterr().err.startswith("error: model.layers=0")
    assert slept == [HEAD_START] and HEAD_START < PATIENCE  # alone it ends at once


def test_what_only_another_rank_has_met_is_said_by_that_rank(capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit, match="2"), mistakes_without_traceback(KeyError):
        raise KeyError("shard")
    assert capsys.readouterr().err == "error: rank 3: 'shard'\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="ours"), mistakes_without_traceback():
        raise ValueError("ours")


# Where values come from


@pytest.fixture
def sources():
    """sources(override, ...) as the run would print them."""

    def of(*overrides: str) -> dict[str, dict]:
        config = copy.deepcopy(composed(*overrides, with_hydra=True))
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        return provenance(resolve(config))

    yield of
    HydraConfig.instance().cfg = None


def test_each_value_is_found_where_it_was_set_last(sources):
    found = sources("+experiment=tiny", "attention=full", "max_steps=20", "model.moe.experts=16", "attention.window=8")
    assert list(found) == [
        "command line",
        "experiment=tiny",
        "phases=tiny",
        "attention=full",
        "model=tiny",
        "conf/config.yaml",
    ]
    assert found["command line"] == {"model.moe.experts": 16, "attention.window": 8, "max_steps": 20}
    assert found["experiment=tiny"]["attention.block"] == 16 and "attention.window" not in found["experiment=tiny"]
    assert found["attention=full"] == {"attention.name": "full", "attention.ratio": 0}
    assert found["model=tiny"]["model.hidden"] == 128 and "model.moe.experts" not in found["model=tiny"]
    assert found["phases=tiny"]["phases.pretrain.sequence_length"] == 256
    assert found["conf/config.yaml"] == {"run.name": "tiny-full", "run.dir": "runs/tiny-full"}


def test_each_value_that_is_no_default_is_named_once(sources):
    overrides = ["+experiment=ablation_hybrid_swa", "phases.pretrain.decay_shape=sqrt", "optim.clip=1.0"]
    found = sources(*overrides)
    keys = [key for values in found.values() for key in values]
    assert len(keys) == len(set(keys))
    config = OmegaConf.structured(resolved(*overrides))
    assert all(OmegaConf.select(config, key) == value for values in found.values() for key, value in values.items())
    assert found["command line"] == {"phases.pretrain.decay_shape": DecayShape.sqrt}  # optim.clip=1.0 is the default
    assert found["experiment=ablation_hybrid_swa"] == {"parallel.recompute": Recompute.selective}  # from its parent


def test_a_whole_section_on_the_command_line_is_found_there(sources):
    found = sources("phases.pretrain={learning_rate:1e-3,rope_base:500}", "+data.blend={corpus/a:1,corpus/b:3}")
    assert found["command line"]["phases.pretrain.learning_rate"] == 1e-3
    assert found["command line"]["data.blend"] == {"corpus/a": 1, "corpus/b": 3}


def test_an_experiment_in_a_folder_of_the_users_own_is_found(sources, tmp_path):
    (tmp_path / "experiment").mkdir()
    last = "{tokens: 4096, sequence_length: 256, global_batch: 8, learning_rate: 1e-4}"
    mine = f"defaults: [tiny]\noptim: {{clip: 0.5}}\nmodel: {{hidden: 64}}\nphases: {{last: {last}}}\n"
    (tmp_path / "experiment/mine.yaml").write_text(f"# @package _global_\n{mine}")
    found = sources(f"hydra.searchpath=[file://{tmp_path}]", "+experiment=mine")
    assert found["experiment=mine"]["optim.clip"] == 0.5
    assert found["experiment=mine"]["model.hidden"] == 64 and "model.hidden" not in found["model=tiny"]
    assert found["experiment=mine"]["phases.last.tokens"] == 4096
    assert found["experiment=mine"]["attention.block"] == 16


# The real command line


def test_help_lists_every_experiment_sweep_and_group_and_names_keys_that_exist():
    shown = command_line("--help")
    assert shown.returncode == 0 and shown.stderr == ""
    lines = shown.stdout.splitlines()
    for name in EXPERIMENTS:
        headline = (CONF / f"experiment/{name}.yaml").read_text().splitlines()[1]
        assert headline.startswith("# ") and f"  {name:<30}{headline.removeprefix('# ')}" in lines
    experiments = lines.index("Experiments")
    assert lines[experiments + len(EXPERIMENTS) + 1] == ""  # and no others
    sweeps = sorted((CONF / "sweep").glob("*.yaml"))
    headlines = [f"  {path.stem:<30}{path.read_text().splitlines()[1].removeprefix('# ')}" for path in sweeps]
    at = next(number for number, line in enumerate(lines) if line.startswith("Sweeps"))
    assert lines[at + 1 : at + len(sweeps) + 2] == [*headlines, ""]
    elsewhere = ("experiment", "sweep", "hydra")  # the last is Hydra's own
    for group in (folder for folder in CONF.iterdir() if folder.is_dir() and folder.name not in elsewhere):
        options = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
        assert f"  {group.name:<12}{options}" in lines
    schema = OmegaConf.structured(resolved())
    often_used = "\n".join(lines[lines.index("Often used") :])
    keys = re.findall(r"^ +([a-z_.]+)=|(?<=N )([a-z.]+)=N", often_used, re.MULTILINE)
    assert len(keys) > 8
    for key in map("".join, keys):
        OmegaConf.select(schema, key, throw_on_missing=True)
        assert OmegaConf.select(schema, key, default="no such key") != "no such key"


def test_the_whole_configuration_can_be_printed():
    shown = command_line("+experiment=moe80b_1to11", "--cfg", "job", "--resolve")
    assert shown.returncode == 0 and shown.stderr == ""
    config = OmegaConf.structured(resolved("+experiment=moe80b_1to11"))
    assert yaml.safe_load(shown.stdout) == OmegaConf.to_container(config, enum_to_str=True)


@pytest.mark.parametrize("experiment, layers, full", [("dense7b_1to3", 36, 10), ("moe80b_1to11", 49, 5)])
def test_a_plan_prints_the_papers_numbers_without_importing_torch(experiment, layers, full):
    shown = command_line(f"+experiment={experiment}", "plan=true", interpreter=("-X", "importtime"))
    assert shown.returncode == 0
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert "hysparse.plan" in imported
    assert not imported & {"torch", "megatron", "megatron.core", "triton", "numpy", "data", "kernels"}
    assert f"Layers: {layers}, {full} of them full" in shown.stdout
    total, active = map(float, re.search(r"Parameters: ([\d.]+) B in total, ([\d.]+) B active", shown.stdout).groups())
    smaller = [float(times) for times in re.findall(r"([\d.]+) ×$", shown.stdout, re.MULTILINE)]
    if experiment == "dense7b_1to3":
        assert 7 <= total <= 8 and active == total
        assert len(smaller) == 2 and min(smaller) > 3  # 26 of 36 layers keep 128 tokens only
    else:
        assert total == pytest.approx(80, rel=0.03) and 3 <= active <= 4
        assert min(smaller) >= 9


def test_a_mistake_ends_with_exit_code_2_and_one_line():
    shown = command_line("+experiment=tiny", "model.layer=3", "plan=true")
    assert shown.returncode == 2 and shown.stdout == ""
    assert shown.stderr.startswith("error: model.layer is no key") and shown.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ("dry_run=0", "dry_run=0 must be the number of ranks"),
        ("dry_run=8 plan=true", "plan=true and dry_run=8: .*leave out plan=true"),
        (
            "dry_run=500 parallel.tensor=4 parallel.pipeline=4",
            "= 16 does not divide the 500 .* or set dry_run=256 or 512$",
        ),
        ("dry_run=512", "global_batch=256; .*parallel.pipeline of 2 or more; or set dry_run=256$"),
        (
            "dry_run=96 parallel.tensor=2 parallel.pipeline=4 parallel.expert=32",
            "parallel.expert=32 x parallel.pipeline=4 does not divide the 96 .* or set dry_run=128$",
        ),
    ],
)
def test_a_dry_run_that_cannot_work_names_the_nearest_that_would(overrides, expected):
    with pytest.raises(ConfigError, match=expected):
        resolved("+experiment=moe80b_1to11", *overrides.split())


def test_a_dry_run_takes_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="dry_run=4 takes one process, not 2; .*without torchrun"):
        resolved("+experiment=tiny", "dry_run=4")
