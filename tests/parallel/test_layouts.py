"""Any layout trains the same model: tensor, pipeline, expert and data parallelism against one rank, over gloo.

The small model has packed documents, a MoE with a strong balance loss, and full recomputation in some layouts.
"""

from pathlib import Path

import pytest

from hysparse.config import Recompute
from tests.conftest import run_processes
from tests.parallel.layouts import one_rank, under_layouts

STEPS = 3
TWO_RANKS = {
    "data": {},
    "data, two sequences a micro-batch": {"micro_batch": 2},
    "tensor": {"tensor": 2},
    "tensor, recomputed": {"tensor": 2, "recompute": Recompute.full},
    "pipeline": {"pipeline": 2},
    "pipeline, recomputed": {"pipeline": 2, "recompute": Recompute.full},
    "pipeline of two chunks a rank": {"pipeline": 2, "virtual": 2},
    "expert": {"expert": 2},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple:
    """(one rank's (fresh, resumed)), and for each layout and rank the same."""
    folder = tmp_path_factory.mktemp("checkpoints")
    [reference] = run_processes(one_rank, 1, folder, STEPS)
    per_rank = run_processes(under_layouts, 2, list(TWO_RANKS.values()), Path(folder), STEPS)
    return reference, dict(zip(TWO_RANKS, zip(*per_rank, strict=True), strict=True))


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_a_layout_gives_the_losses_and_gradient_norms_of_one_rank(runs, layout):
    (fresh, _), layouts = runs
    for rank_fresh, _ in layouts[layout]:
        assert_same(rank_fresh, fresh)


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_a_checkpoint_of_one_rank_goes_on_under_another_layout(runs, layout):
    """Three steps, not one: Adam's states and its step count show only from the second step on."""
    (_, resumed), layouts = runs
    for _, rank_resumed in layouts[layout]:
        assert_same(rank_resumed, resumed)


def assert_same(ours: list, expected: list) -> None:
    for step, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
        # FP32 sums in another order; Adam's sign-like updates at a learning rate of 0.01 magnify them step by step
        assert mine == pytest.approx(theirs, rel=1e-5 * 10**step), f"step {step}"
