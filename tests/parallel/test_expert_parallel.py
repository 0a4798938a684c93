"""Expert parallelism beyond equal losses: ranks without a token, and checkpoints there and back."""

from pathlib import Path

import pytest
import torch

from parallel import checkpoint
from parallel.start import stop
from tests.conftest import run_processes
from tests.models import small_config
from tests.parallel.layouts import FOUR_BLOCKS, make_engine, one_rank, train

STEPS = 3


def starved(expert: int) -> list[float]:
    """Losses and gradient norms where the bias sends every token to the first two of four experts."""
    config = small_config(**FOUR_BLOCKS, expert=expert)
    config.model.moe.bias_update_rate = 1e-3
    engine = make_engine(config)
    for layer in engine.modules[0].decoder.layers:
        layer.mlp.router.expert_bias[:2] = 10.0
    results = train(engine, config, 2)
    load = torch.stack([layer.mlp.router.load for layer in engine.modules[0].decoder.layers])
    assert load[:, :2].all() and not load[:, 2:].any()
    stop()
    return results


def load_and_save(expert: int, source: Path, target: Path) -> None:
    """A checkpoint written by one layout, as another one writes it."""
    engine = make_engine(small_config(**FOUR_BLOCKS, expert=expert))
    engine.load_state(checkpoint.load(source, lambda: engine.state(is_loading=True)))
    checkpoint.save(target, STEPS, engine.state(), {})
    stop()


def continued(source: Path) -> list:
    config = small_config(**FOUR_BLOCKS)
    engine = make_engine(config)
    engine.load_state(checkpoint.load(source, lambda: engine.state(is_loading=True)))
    results = train(engine, config, STEPS)
    stop()
    return results


def test_a_rank_whose_experts_get_no_token_trains_on():
    """Rank 1 holds the experts that nobody chooses."""
    [expected] = run_processes(starved, 1, 1)
    for found in run_processes(starved, 2, 2):
        for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert ours == pytest.approx(theirs, rel=1e-5 * 10**step)  # as in test_layouts


def test_a_checkpoint_goes_from_one_rank_to_two_of_half_the_experts_and_back_bit_by_bit(tmp_path):
    [(_, expected)] = run_processes(one_rank, 1, tmp_path / "one", STEPS)
    name = f"step-{STEPS:08d}"
    run_processes(load_and_save, 2, 2, tmp_path / "one" / name, tmp_path / "two")
    [found] = run_processes(continued, 1, tmp_path / "two" / name)
    assert found == expected
