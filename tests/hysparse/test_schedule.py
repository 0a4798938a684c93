"""The learning rate at hand-computed points, and the way through the phases."""

import pytest

from hysparse.choices import DecayShape
from hysparse.config import PhaseConfig
from hysparse.schedule import Progress, learning_rate, steps


def phase(**changes) -> PhaseConfig:
    """Ten steps of 100 tokens: warm-up over 2, stable for 4, decay over 4."""
    settings = {
        "tokens": 1000,
        "sequence_length": 50,
        "global_batch": 2,
        "learning_rate": 1.0,
        "minimum_learning_rate": 0.1,
        "warmup_tokens": 200,
        "decay_tokens": 400,
    }
    return PhaseConfig(**settings | changes)


def rates(phase: PhaseConfig) -> list[float]:
    return [learning_rate(phase, position.samples) for position in steps([phase], Progress())]


def test_warm_up_stable_and_linear_decay_count_tokens():
    expected = [0.5, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1]
    assert rates(phase()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "middle"), [(DecayShape.linear, 0.5), (DecayShape.cosine, 0.5), (DecayShape.sqrt, 1 - 0.5**0.5)]
)
def test_every_decay_shape_ends_at_the_minimum(shape, middle):
    found = rates(phase(decay_shape=shape))
    assert found[-1] == pytest.approx(0.1)
    assert found[7] == pytest.approx(0.1 + 0.9 * middle)
    assert found == sorted(found[:2]) + sorted(found[2:], reverse=True)


def test_without_warm_up_and_decay_the_rate_is_constant():
    assert set(rates(phase(warmup_tokens=0, decay_tokens=0))) == {1.0}


def test_the_step_that_reaches_the_budget_ends_the_phase():
    phases = [phase(tokens=250, warmup_tokens=0, decay_tokens=0), phase(sequence_length=100)]
    assert [p.steps for p in phases] == [3, 5]
    way = list(steps(phases, Progress()))
    assert [(p.phase, p.samples) for p in way] == [(0, 0), (0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (1, 6), (1, 8)]
    assert [p.tokens for p in way] == [0, 100, 200, 300, 500, 700, 900, 1100]
    assert [p.step for p in way] == list(range(8))


def test_a_run_can_start_from_any_position_of_another():
    phases = [phase(), phase(sequence_length=100)]
    way = list(steps(phases, Progress()))
    assert list(steps(phases, way[6])) == way[6:]
    assert Progress(**way[6].as_dict()) == way[6]
