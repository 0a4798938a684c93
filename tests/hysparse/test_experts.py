"""The experts as Megatron's dispatchers see them, the bias that balances them, and what a run says of their load."""

import json
import subprocess
import sys

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from hysparse.ledger import Ledger
from hysparse.plot import plot_run_folder
from tests.forks import ROOT, Fork
from tests.models import ROPE_BASE, packed_batch, small_config

EXPERTS, HIDDEN, FFN = 4, 48, 32  # of the small model


@pytest.fixture
def layer(megatron):
    """One layer with random weights, in training."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.spec_utils import build_module

    from hysparse.ffn import ffn_spec
    from hysparse.model import transformer_config
    from kernels import reference

    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # as a training step does
    config = small_config()
    layer = build_module(ffn_spec(config.model, 0, reference.moe), config=transformer_config(config, [], bf16=False))
    layer.set_layer_number(1)
    generator = torch.Generator().manual_seed(0)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return layer.train()


def one_by_one(experts, rows, counts, weights):
    """The definition."""
    outputs = []
    for e, (part, weight) in enumerate(zip(rows.split(counts), weights.split(counts), strict=True)):
        gate, up = F.linear(part, experts.fc1[e]).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up * weight[:, None], experts.fc2[e]))
    return torch.cat(outputs)


@pytest.mark.parametrize("counts", [[3, 1, 5, 2], [0, 4, 0, 3], [0, 0, 7, 0], [0, 0, 0, 0]])
def test_experts_equal_one_after_the_other_in_value_and_all_gradients(layer, counts):
    generator = torch.Generator().manual_seed(1)
    rows, grad = (torch.randn(sum(counts), HIDDEN, generator=generator) for _ in range(2))
    weights = torch.rand(sum(counts), generator=generator)
    results = []
    for compute in (layer.experts, lambda *inputs: (one_by_one(layer.experts, inputs[0], counts, inputs[2]), None)):
        layer.zero_grad()
        leaves = rows.clone().requires_grad_(), weights.clone().requires_grad_()
        output, bias = compute(leaves[0], torch.tensor(counts), leaves[1])
        assert bias is None
        output.backward(grad)
        parameters = [parameter.grad.clone() for parameter in layer.experts.parameters()]
        results.append([output.detach(), *(leaf.grad for leaf in leaves), *parameters])
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected, rtol=1e-5, atol=1e-5)  # FP32 sums in another order


def test_rows_that_arrive_by_rank_are_regrouped_by_expert():
    from hysparse.experts import regrouped

    counts = torch.tensor([[2, 0, 1], [1, 0, 3]])  # of two ranks for three experts
    arrived = torch.tensor([0, 0, 2, 0, 2, 2, 2])  # the expert of each row
    place = regrouped(counts, 7)
    assert place.flatten().tolist() == [0, 1, 3, 2, 4, 5, 6]
    assert torch.empty(7, dtype=torch.int64).scatter(0, place.flatten(), arrived).tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert regrouped(torch.zeros(2, 3, dtype=torch.int64), 0).shape == (0, 1)


def test_load_counts_training_passes_and_neither_evaluation_nor_recomputation(layer):
    from megatron.core.tensor_parallel import checkpoint

    x = torch.randn(9, 2, HIDDEN, requires_grad=True)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    assert layer.router.load.sum() == 0
    layer.train()
    checkpoint(lambda x: layer(x)[0], False, x).sum().backward()
    assert layer.router.load.sum() == 9 * 2 * 2


def test_the_bias_steps_up_for_experts_below_the_mean_load_and_down_for_those_above(megatron):
    from tests.parallel.test_engine import make_engine

    engine = make_engine(megatron, moe=True)
    batches = [packed_batch(small_config(), seed=seed) for seed in (0, 1)]
    routers = [layer.mlp.router for layer in engine.modules[0].decoder.layers]
    before = [torch.randn(EXPERTS, generator=torch.Generator().manual_seed(layer)) * 0.01 for layer in range(5)]
    for router, bias in zip(routers, before, strict=True):
        router.expert_bias.copy_(bias)
    engine.step(batches, 0.0, rope_base=ROPE_BASE)
    for router, bias in zip(routers, before, strict=True):
        assert router.load.sum() == 2 * 2 * 64 * 2  # batches, rows, tokens, active experts
        expected = bias + 1e-3 * torch.sign(router.load.double().mean() - router.load).float()
        assert torch.equal(router.expert_bias, expected)


def test_rows_over_the_capacity_are_dropped_in_training_and_counted(layer):
    """The layer's output without them is what it is with their weights set to zero."""
    x = torch.randn(9, 2, HIDDEN)
    expected = layer.eval()(x)[0]
    layer.router.capacity_factor = 0.75  # of 18 x 2 / 4 = 9 rows: at most 7 of an expert
    assert torch.equal(layer(x)[0], expected)  # evaluation drops nothing
    layer.train()
    output = layer(x)[0]
    counts, dropped = layer.router.load, layer.router.dropped
    assert counts.sum() == 36 and dropped == (counts - 7).clamp(min=0).sum() > 0

    layer.router.capacity_factor = 0
    routing, _ = layer.router.choose(x)
    room = {expert: 7 for expert in range(EXPERTS)}
    for token in range(18):  # the definition: first come, first served
        for place, expert in enumerate(routing.experts[token].tolist()):
            room[expert] -= 1
            if room[expert] < 0:
                routing.weights.data[token, place] = 0
    layer.router.choose = lambda hidden: (routing, hidden)
    assert_close(output, layer(x)[0], rtol=1e-5, atol=1e-5)  # FP32 sums in another order


def test_load_is_measured_by_layer_and_starts_again(megatron):
    from hysparse.expert_load import Load, measure, summary
    from tests.parallel.test_engine import make_engine

    engine = make_engine(megatron, moe=True)
    engine.step([packed_batch(small_config())], 0.0, rope_base=ROPE_BASE)
    load = measure(engine.modules, range(5), EXPERTS)
    assert torch.equal(load.rows.sum(1), torch.full((5,), 2 * 64 * 2)) and load.bias.abs().max() <= 1.001e-3
    assert measure(engine.modules, range(5), EXPERTS).rows.sum() == 0 and not load.dropped.any()
    rows, bias = torch.tensor([[2, 2, 2, 2], [8, 0, 0, 0]]), torch.tensor([[0.0, 0, 0, 0], [-0.5, 0, 0.25, 0]])
    told = summary(Load(rows, torch.tensor([0, 2]), bias))
    assert told["dropped"] == [0.0, 0.25]
    assert told["max_over_mean"] == [1.0, 4.0] and told["idle"] == [0.0, 0.75]
    assert told["evenness"] == [1.0, 0.0] and told["bias_spread"] == [0.0, 0.75]
    assert told["load"] == [[100] * 4, [400, 0, 0, 0]]


def test_the_heat_map_is_drawn_where_the_ledger_has_loads(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.write("step", 1, tokens=1, phase="only", loss=1.0, learning_rate=1e-3)
    assert plot_run_folder(tmp_path) == [tmp_path / "curves.png"]
    for step in (10, 20):
        ledger.write("experts", step, max_over_mean=[1.5, 3.0], load=[[150, 50], [0, 300]])
    ledger.close()
    assert plot_run_folder(tmp_path) == [tmp_path / "curves.png", tmp_path / "experts.png"]
    assert matplotlib.image.imread(tmp_path / "experts.png").shape == (800, 1200, 4)


@pytest.mark.slow
def test_a_run_of_64_experts_on_the_quick_start_corpus_keeps_their_load_below_twice_the_mean(tmp_path):
    """About 40 seconds. In 200 steps the bias must be able to cross the range of scores: ten times the default rate."""
    prepare = ["-m", "data.prepare", "input=stdlib", f"output={tmp_path}/corpus", "tokenizer=train:512"]
    subprocess.run([sys.executable, *prepare], cwd=ROOT, capture_output=True, check=True)
    process = Fork(
        [
            *"+experiment=tiny ~phases.long_context model.layers=4 model.hidden=64 model.heads=2".split(),
            *"model.kv_heads=1 model.moe.experts=64 model.moe.active=4 model.moe.ffn=32".split(),
            *"model.moe.bias_update_rate=1e-2 attention.tokens=32 attention.block=16 attention.window=32".split(),
            *"phases.pretrain.sequence_length=128 phases.pretrain.global_batch=4 checkpoint.every=200".split(),
            *"logging.validate_every=0 logging.tensorboard=false logging.experts_every=50 max_steps=200".split(),
            *(f"data.path={tmp_path}/corpus", f"run.dir={tmp_path}/run"),
        ]
    )
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-2000:]
    records = [json.loads(line) for line in (tmp_path / "run/ledger.jsonl").read_text().splitlines()]
    loads = [record for record in records if record["kind"] == "experts"]
    assert [record["step"] for record in loads] == [50, 100, 150, 200]
    assert max(loads[-1]["max_over_mean"]) < 2
    assert (tmp_path / "run/experts.png").exists()
