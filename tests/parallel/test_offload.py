"""Optimizer states in host memory change where an update is computed, and nothing else.

Without a GPU host memory and the device's are one; the copies between them are made all the same. `tests/gpu` has the
rest, and `layouts.py` the ranks.
"""

import pytest
import torch

from hysparse.estimate import PINNED, Cluster, Layout
from hysparse.plan import Plan, pipeline_stages
from parallel import checkpoint
from tests.conftest import run_processes
from tests.models import ROPE_BASE, packed_batch, small_config
from tests.parallel import layouts
from tests.parallel.offloading import host_bytes, moved, states, train_beside_adamw
from tests.parallel.test_engine import make_engine

RATE = 1e-2


def batches(first: int, last: int) -> list[list[dict]]:
    return [[packed_batch(small_config(), seed=step)] for step in range(first, last)]


def train(engine, first: int, last: int) -> list[tuple[float, float]]:
    done = [engine.step(step, RATE, rope_base=ROPE_BASE) for step in batches(first, last)]
    return [(step.loss, step.gradient_norm) for step in done]


@pytest.mark.parametrize("bf16", [False, True], ids=["FP32", "BF16"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_every_update_is_adamws_of_the_clipped_gradients(megatron, share, bf16):
    results = train_beside_adamw(make_engine(megatron, moe=True, bf16=bf16, offload=share), batches(0, 5), RATE)
    assert max(norm for _, norm in results) > 1  # some were clipped


def test_losses_are_those_of_an_optimizer_that_stays(megatron):
    expected, *others = (train(make_engine(megatron, moe=True, offload=share), 0, 5) for share in (0.0, 0.5, 1.0))
    for found in others:
        assert found == [pytest.approx(step, rel=1e-5) for step in expected]  # roundings


@pytest.mark.parametrize(
    "writer, reader, bf16, tolerance",
    [
        (0.0, 1.0, False, 1e-5),  # roundings
        (1.0, 0.0, False, 1e-5),
        (0.5, 0.5, True, 0),  # bit for bit
        (0.0, 1.0, True, 1e-2),  # roundings, after which a few weights go to their other neighbour in BF16
    ],
)
def test_a_checkpoint_goes_on_with_another_share(megatron, writer, reader, bf16, tolerance, tmp_path):
    """Four steps, not one: a step count that stands still shows from the second step on."""
    one, other = (make_engine(megatron, moe=True, bf16=bf16, offload=share) for share in (writer, reader))
    train(one, 0, 3)
    path = checkpoint.save(tmp_path, 3, one.state(), {})
    other.load_state(checkpoint.load(path, lambda: other.state(is_loading=True)))
    written = states(one)
    for name, held in states(other).items():
        assert all(torch.equal(held[part], written[name][part]) for part in held), name
    expected, found = train(one, 3, 7), train(other, 3, 7)
    assert found == [pytest.approx(step, rel=tolerance, abs=0) for step in expected]


def test_a_checkpoint_of_an_optimizer_that_has_not_stepped_has_zero_moments(megatron, tmp_path):
    engine = make_engine(megatron, moe=True, offload=0.5)
    path = checkpoint.save(tmp_path, 0, engine.state(), {})
    expected = train(engine, 0, 2)
    engine.load_state(checkpoint.load(path, lambda: engine.state(is_loading=True)))
    assert not any(held[part].any() for held in states(engine).values() for part in ("exp_avg", "exp_avg_sq"))
    assert train(engine, 0, 2) == expected


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_share_is_that_of_the_weights_to_within_one_of_each_kind(megatron, share):
    engine = make_engine(megatron, moe=True, offload=share)
    weights, total = moved(engine)
    largest = max(parameter.numel() for parameter in engine.modules[0].parameters())
    assert share * total <= sum(weight.numel() for weight in weights) <= share * total + 2 * largest
    assert all(weight.dtype == torch.float32 for weight in weights)


@pytest.mark.parametrize("split", ["expert", "tensor"])
def test_two_ranks_hold_as_much_host_memory_as_the_planner_says(split):
    layout = {split: 2, "offload_optimizer": 1.0}
    ranks = run_processes(host_bytes, 2, layout)
    held = {name: sum(rank[name] for rank in ranks) for name in ranks[0]}
    config = layouts.config_of(layout)
    plan = Plan(config.model, config.attention)
    estimate = Layout(config, plan, pipeline_stages(config, plan), Cluster(2)).host_memory()
    assert estimate.optimizer == held["moments"] + PINNED * held["pinned"]
    assert estimate.checkpoint == pytest.approx(held["written"], rel=0.01)  # the routers' biases are no weights
