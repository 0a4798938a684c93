"""The plan against formulas written out by hand, loops over tokens, and the plain model."""

import re
from dataclasses import replace
from itertools import product

import pytest

from hysparse.choices import Gate, Source
from hysparse.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
)
from hysparse.plain import PlainModel
from hysparse.plan import LayerKind, Plan, mean_visible
from hysparse.report import bytes_, count, flops, plan_report
from parallel.placement import place

DENSE_7B = ModelConfig(name="dense7b", layers=36, hidden=4096, heads=32, kv_heads=8, ffn=11008)
MOE_80B = ModelConfig(
    name="moe80b",
    layers=49,
    hidden=2048,
    heads=64,
    kv_heads=4,
    moe=MoEConfig(),
    hybrid_ratio=11,
    full_attention_gate=Gate.elementwise,
)
TINY = ModelConfig(name="tiny", layers=6, hidden=24, heads=4, kv_heads=2, head_dim=8, ffn=40, vocabulary=96)
TINY_MOE = replace(TINY, moe=MoEConfig(experts=6, active=2, ffn=10))
SHARED = replace(TINY, moe=MoEConfig(experts=6, active=2, ffn=10, shared_ffn=14))
DENSE_FIRST = replace(TINY, moe=MoEConfig(experts=6, active=2, ffn=10, first_dense_layers=2))
BRANCHES = [pair for pair in product(Source, Source) if pair != (Source.none, Source.none)]


def hysparse(ratio, **changes):
    return AttentionConfig(name="hysparse", ratio=ratio, **changes)


# The pattern


def test_7b_at_one_to_three_has_ten_full_layers_of_36():
    plan = Plan(DENSE_7B, hysparse(3))
    assert plan.pattern == "FSSS" * 8 + "FSSF"
    assert plan.full_layers == (0, 4, 8, 12, 16, 20, 24, 28, 32, 35)
    assert plan.compressed_pattern == "F3S ×8, F2S, F"


def test_80b_at_one_to_eleven_has_five_full_layers_of_49():
    plan = Plan(MOE_80B, hysparse(11))
    assert plan.full_layers == (0, 12, 24, 36, 48)
    assert plan.block_sizes == (12, 12, 12, 12, 1)
    assert plan.compressed_pattern == "F11S ×4, F"


@pytest.mark.parametrize(
    "layers, changes, pattern",
    [
        (5, dict(ratio=0), "FFFFF"),
        (5, dict(ratio=3), "FSSSF"),
        (5, dict(ratio=2), "FSSFF"),
        (5, dict(ratio=2, last_full=False), "FSSFS"),
        (4, dict(ratio=11), "FSSF"),
        (1, dict(ratio=3), "F"),
        (2, dict(ratio=3, last_full=False), "FS"),
        (4, dict(ratio=3, pattern="FSFS"), "FSFS"),
    ],
)
def test_pattern_follows_ratio_unless_it_is_given(layers, changes, pattern):
    assert Plan(replace(TINY, layers=layers), AttentionConfig(name="any", **changes)).pattern == pattern


def test_blocks_and_layers_say_what_the_pattern_says():
    plan = Plan(TINY, hysparse(1, pattern="FSSFFS"))
    assert plan.blocks == (range(0, 3), range(3, 4), range(4, 6))
    assert [layer.block for layer in plan.layers] == [0, 0, 0, 1, 2, 2]
    assert "".join(layer.kind.value[0].upper() for layer in plan.layers) == plan.pattern
    assert [layer.index for layer in plan.layers] == list(range(6))
    assert plan.compressed_pattern == "F2S, F, FS"


def test_a_pattern_of_another_length_is_refused_with_both_keys():
    with pytest.raises(ConfigError, match=r"attention\.pattern=FSSF has 4 .*model\.layers=6.*set model\.layers=4"):
        Plan(TINY, hysparse(3, pattern="FSSF"))


def test_sparse_layers_without_a_branch_are_refused():
    nothing = dict(sparse_kv=Source.none, window_kv=Source.none)
    with pytest.raises(ConfigError, match=r"attention\.sparse_kv=none and attention\.window_kv=none"):
        Plan(TINY, hysparse(3, **nothing))
    assert Plan(TINY, hysparse(0, **nothing)).pattern == "FFFFFF"


# Parameters


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("gate", Gate)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("sparse_kv, window_kv", BRANCHES)
@pytest.mark.parametrize("model", [TINY, TINY_MOE, SHARED, DENSE_FIRST], ids=["dense", "moe", "shared", "dense first"])
def test_parameters_equal_those_of_the_plain_model(model, sparse_kv, window_kv, sinks, gate, qk_norm):
    model = replace(model, qk_norm=qk_norm)
    attention = hysparse(2, sparse_kv=sparse_kv, window_kv=window_kv, sinks=sinks, gate=gate, output_gate=gate)
    built = PlainModel(model, attention)
    plan = Plan(model, attention)
    assert plan.parameters() == sum(weight.numel() for weight in built.parameters())
    for layer, module in zip(plan.layers, built.layers, strict=True):
        assert plan.layer_parameters(layer.kind, model.is_dense(layer.index)).total == sum(
            weight.numel() for weight in module.parameters()
        )


def test_7b_parameters_written_out_by_hand():
    plan = Plan(DENSE_7B, hysparse(3))
    qkvo = 4096 * (4096 + 1024 + 1024) + 4096 * 4096
    gates_and_sinks = 2 * 4096 * 32 + 2 * 32
    ffn = 3 * 4096 * 11008
    everything = 2 * 151_680 * 4096 + 36 * (qkvo + ffn + 2 * 4096) + 26 * gates_and_sinks + 4096
    assert plan.parameters() == plan.active_parameters() == everything
    assert 7e9 < everything < 8e9


def test_80b_parameters_written_out_by_hand():
    plan = Plan(MOE_80B, hysparse(11))
    qkvo = 2048 * (8192 + 512 + 512) + 8192 * 2048
    gates_and_sinks = 2 * 2048 * 64 + 2 * 64
    router = 512 * 2048
    expert = 3 * 2048 * 512
    shared = 2 * 151_680 * 2048 + 49 * (qkvo + router + 2 * 2048) + 44 * gates_and_sinks + 2048
    assert plan.parameters() == shared + 49 * 512 * expert
    assert plan.active_parameters() == shared + 49 * 8 * expert
    assert plan.parameters() == pytest.approx(80e9, rel=0.03)
    assert 3e9 < plan.active_parameters() < 4e9


# FLOPs


def counted_flops(plan, length):
    """Multiply-adds of every matmul, token by token, layer by layer, two FLOPs each; forward only."""
    model, attention = plan.model, plan.attention
    width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
    gate_width = {Gate.none: 0, Gate.headwise: model.heads, Gate.elementwise: width}
    macs = 0
    for token in range(length):
        for layer, letter in enumerate(plan.pattern):
            macs += 2 * model.hidden * width  # query and output
            if letter == "F":
                keys = token + 1
                macs += 2 * model.hidden * kv_width + model.hidden * gate_width[attention.output_gate]
            else:
                keys = 0
                if attention.sparse_kv is not Source.none:
                    keys += min(token + 1, attention.tokens)
                    macs += model.hidden * gate_width[attention.gate]
                if attention.window_kv is not Source.none:
                    keys += len(range(max(0, token - attention.window + 1), token + 1))
                    macs += model.hidden * gate_width[attention.gate]
                if Source.own in (attention.sparse_kv, attention.window_kv):
                    macs += 2 * model.hidden * kv_width
            for _ in range(keys):
                macs += model.heads * 2 * model.head_dim  # q·k and p·v
            if model.moe and layer >= model.moe.first_dense_layers:
                macs += model.hidden * model.moe.experts + model.moe.active * 3 * model.hidden * model.moe.ffn
            else:
                macs += 3 * model.hidden * model.ffn
        macs += model.hidden * model.vocabulary
    return 2 * macs


@pytest.mark.parametrize("length", [1, 5, 24, 61])
@pytest.mark.parametrize("sparse_kv, window_kv", BRANCHES)
@pytest.mark.parametrize("model", [TINY, TINY_MOE, DENSE_FIRST], ids=["dense", "moe", "dense first"])
def test_flops_equal_a_count_of_all_operations(model, sparse_kv, window_kv, length):
    attention = hysparse(2, sparse_kv=sparse_kv, window_kv=window_kv, block=8, tokens=24, window=5)
    attention.output_gate = Gate.elementwise
    plan = Plan(model, attention)
    counted = counted_flops(plan, length)
    assert plan.flops_per_token(length).forward * length == pytest.approx(counted, rel=1e-12)
    assert plan.flops_per_token(length).training == pytest.approx(3 * counted / length, rel=1e-12)
    assert sum(plan.layer_costs(length)) + plan.head_flops() == pytest.approx(counted / length, rel=1e-12)


@pytest.mark.parametrize("length, most", [(1, 1), (7, 3), (7, 7), (7, 100), (64, 16)])
def test_mean_of_visible_tokens_equals_the_mean_of_a_list(length, most):
    assert mean_visible(length, most) == pytest.approx(sum(min(t + 1, most) for t in range(length)) / length)


def test_dense_flops_are_six_per_weight_plus_attention():
    """The rule of thumb 6N, for all weights that multiply something (not the input table, norms or sinks)."""
    plan = Plan(DENSE_7B, hysparse(0))
    multiplied = plan.parameters() - 151_680 * 4096 - (2 * 36 + 1) * 4096
    attention = 12 * 36 * 4096 * (8192 + 1) / 2
    assert plan.flops_per_token(8192).training == pytest.approx(6 * multiplied + attention, rel=1e-12)


# KV cache


def test_80b_cache_is_nine_times_smaller_than_with_full_attention():
    plan = Plan(MOE_80B, hysparse(11))
    twin = plan.full_attention_twin()
    value = 2 * 4 * 128 * 2  # K and V, KV heads, D, bytes of BF16
    assert plan.kv_bytes(32_768) == value * (5 * 32_768 + 44 * 128)
    assert twin.kv_bytes(32_768) == value * 49 * 32_768
    assert twin.kv_bytes(32_768) >= 9 * plan.kv_bytes(32_768)
    assert plan.kv_bytes_per_token(32_768) * 32_768 == plan.kv_bytes(32_768)


@pytest.mark.parametrize(
    "sparse_kv, window_kv, own",
    [
        (Source.none, Source.own, 5),
        (Source.shared, Source.own, 5),
        (Source.own, Source.none, 30),
        (Source.own, Source.own, 30),
        (Source.shared, Source.shared, 0),
    ],
)
def test_a_sparse_layer_keeps_what_it_owns_and_may_read_again(sparse_kv, window_kv, own):
    plan = Plan(TINY, hysparse(2, sparse_kv=sparse_kv, window_kv=window_kv, window=5))
    assert plan.pattern == "FSSFSF"
    assert plan.kv_bytes(30, bytes_per_value=1) == 2 * 2 * 8 * (3 * 30 + 3 * own)
    assert plan.kv_bytes(3) == 2 * 2 * 2 * 8 * (3 * 3 + 3 * min(own, 3))


def test_the_full_attention_twin_is_the_baseline_of_the_paper():
    """All layers full; the 80B's carries an element-wise output gate (section 4.1), the 7B's none."""
    for model, ratio, gate in ((DENSE_7B, 3, Gate.none), (MOE_80B, 11, Gate.elementwise)):
        twin = Plan(model, hysparse(ratio)).full_attention_twin()
        assert twin.pattern == "F" * model.layers
        assert twin.attention.output_gate is gate
        assert twin.full_attention_twin() is twin
    assert Plan(TINY, hysparse(1, pattern="FSFFFS")).full_attention_twin().pattern == "FFFFFF"


# The report


def config_of(model, attention, parallel, *lengths):
    phases = {
        f"phase{length}": PhaseConfig(tokens=10**12, sequence_length=length, global_batch=256, learning_rate=1e-3)
        for length in lengths
    }
    return Config(
        model=model,
        attention=attention,
        phases=phases,
        data=DataConfig(),
        parallel=parallel,
        optim=OptimConfig(),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
        run=RunConfig(name="test", dir="runs/test"),
    )


def report_of(model, attention, parallel, *lengths, ranks=None):
    plan = Plan(model, attention)
    stages = parallel.pipeline * parallel.virtual
    placement = place(plan.block_sizes, plan.layer_costs(lengths[-1]), stages, last_cost=plan.head_flops())
    return plan, placement, plan_report(config_of(model, attention, parallel, *lengths), plan, placement, ranks)


def numbers(text):
    """ "1-3, 5" as [1, 2, 3, 5]."""
    spans = [list(map(int, part.split("-"))) for part in text.split(", ")]
    return [number for span in spans for number in range(span[0], span[-1] + 1)]


CASES = [
    (DENSE_7B, hysparse(3), ParallelConfig(tensor=2, pipeline=2, virtual=2), (8192, 32_768)),
    (MOE_80B, hysparse(11), ParallelConfig(pipeline=4, expert=8), (32_768,)),
    (MOE_80B, hysparse(0), ParallelConfig(pipeline=7, expert=8), (32_768,)),
    (TINY, hysparse(1, pattern="FSFFFS"), ParallelConfig(), (16, 32, 64)),
    (TINY, hysparse(1, pattern="FSFFFS"), ParallelConfig(pipeline=3), (16, 32, 64)),
]


@pytest.mark.parametrize("model, attention, parallel, lengths", CASES)
def test_the_report_answers_for_each_layer_which_kind_block_and_stage_it_is(model, attention, parallel, lengths):
    plan, placement, text = report_of(model, attention, parallel, *lengths)
    table = text.split("\n\n")[1].splitlines()
    header = table[1].split()
    found = {}
    for line in table[3:-1]:  # between embedding and head
        row = dict(zip(header, line.split(), strict=False))
        blocks, layers, full = numbers(row["block"]), numbers(row["layers"]), numbers(row["full"])
        assert int(row["sparse"]) == len(layers) - len(full)
        stage = int(row["stage"]) + int(row.get("chunk", 0)) * parallel.pipeline
        for layer in layers:
            block = blocks[sum(start <= layer for start in full) - 1]
            found[layer] = (LayerKind.full if layer in full else LayerKind.sparse, block, stage)
    stage_of = {layer: stage for stage, layers in enumerate(placement) for layer in layers}
    assert found == {layer.index: (layer.kind, layer.block, stage_of[layer.index]) for layer in plan.layers}


@pytest.mark.parametrize("model, attention, parallel, lengths", CASES)
def test_the_report_fits_a_terminal_and_its_shares_add_up(model, attention, parallel, lengths):
    _, _, text = report_of(model, attention, parallel, *lengths, ranks=64 * parallel.pipeline)
    lines = text.split("\n\n")[1].splitlines()
    assert max(map(len, text.splitlines())) <= 80
    assert len(lines) <= 15
    shares = [float(re.findall(r"([\d.]+)%", line)[-1]) for line in lines[2:]]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))  # each is rounded to 0.1


def test_the_report_of_the_80b_names_its_figures():
    _, _, text = report_of(MOE_80B, hysparse(11), ParallelConfig(pipeline=4, expert=8), 32_768, ranks=64)
    for figure in (
        "moe80b, attention hysparse: F11S ×4, F",
        "49, 5 of them full",
        "81.35 B in total, 3.664 B active (621.3 M in embedding and head)",
        "331 MiB  10.34 KiB  3.062 GiB     98 KiB      9.47 ×",
        "tensor 1 × pipeline 4 × context 1 × data 16 = 64 ranks",
        "64 of 512 experts",
        "119,210",  # steps
        "better on 1-2, 5 stages",
    ):
        assert figure in text


def test_the_report_says_how_much_host_memory_is_needed_where_it_is_more_than_a_gib():
    """14 bytes of each weight, and of half the optimizer 8 bytes and 8 that may take twice as much, over two nodes."""
    half = ParallelConfig(tensor=4, offload_optimizer=0.5)
    plan, _, text = report_of(DENSE_7B, hysparse(3), half, 8192)
    states = 0.5 * 24 * plan.parameters()
    assert f"host memory of all nodes: up to {bytes_(states)} offloaded" in text
    _, _, text = report_of(DENSE_7B, hysparse(3), half, 8192, ranks=16)
    line = text.splitlines()[-1]
    offloaded, saved = map(
        float, re.search(r"8 ranks: up to ([\d.]+) GiB offloaded, ([\d.]+) GiB to save", line).groups()
    )
    # Norms and their like are not split
    assert offloaded * 2**30 == pytest.approx(states / 2, rel=1e-3)
    assert saved * 2**30 == pytest.approx(14 * plan.parameters() / 2, rel=1e-3)
    assert len(line) <= 80
    _, _, text = report_of(TINY, hysparse(1), ParallelConfig(offload_optimizer=1), 16, ranks=8)
    assert "offloaded" not in text and "to save" not in text


@pytest.mark.parametrize(
    "text, expected",
    [
        (count(0), "0"),
        (count(999), "999"),
        (count(999_960), "1 M"),
        (count(7_621_000_000), "7.621 B"),
        (count(2.5e15), "2500 T"),
        (bytes_(1023), "1023 B"),
        (bytes_(1.25 * 2**30), "1.25 GiB"),
        (flops(57.3e12), "57.3 TFLOP"),
    ],
)
def test_numbers_carry_the_unit_that_keeps_them_short(text, expected):
    assert text == expected
