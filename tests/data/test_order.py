"""The order of samples: permutations that are permutations, blends that are exact."""

from collections import Counter

import pytest

from data import CYCLE, DataError, SampleOrder
from data.order import permute, quotas


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 100, 1023, 1024, 1025, 4096, 20_011])
def test_a_permutation_hits_every_index_once(size):
    assert sorted(permute(i, size, ("key",)) for i in range(size)) == list(range(size))


def test_permutations_of_different_keys_are_unrelated():
    size = 4001
    a, b = ([permute(i, size, (seed, "epoch", 0, 0)) for i in range(size)] for seed in (0, 1))
    assert sum(x == y for x, y in zip(a, b, strict=True)) < 10  # 1 is expected by chance, more than 9 once in a million
    jumps = sum(abs(x - y) for x, y in zip(a, a[1:], strict=False)) / (size - 1) / size
    assert abs(jumps - 1 / 3) < 0.02  # of a random order; its standard deviation is 0.004


def test_every_window_comes_once_per_epoch_of_each_source():
    order = SampleOrder([501, 97], [3, 1], seed=11)
    seen = Counter(order[g] for g in range(4 * CYCLE))
    assert set(seen.values()) == {1}
    for source, windows in enumerate(order.windows):
        epochs = Counter(place.epoch for place in seen if place.source == source)
        last = max(epochs)
        assert last > 10 and all(epochs[epoch] == windows for epoch in range(last))
        assert {place.window for place in seen if place.source == source and place.epoch == 3} == set(range(windows))


def test_blend_shares_are_exact_in_every_cycle():
    order = SampleOrder([10**6, 10**5, 10**4], [0.7, 0.25, 0.05], seed=0)
    for cycle in (0, 1, 10**7):
        drawn = Counter(order[g].source for g in range(cycle * CYCLE, (cycle + 1) * CYCLE))
        assert drawn == {0: 2867, 1: 1024, 2: 205}  # of 4096: 2867.2, 1024, 204.8
    assert quotas([1, 1, 1]) == (1366, 1365, 1365)
    assert quotas([7, 2.5, 0.5]) == quotas([0.7, 0.25, 0.05])


def test_the_order_is_a_function_of_the_seed():
    """These values are part of the format: a run that resumes under later code must go on with the same samples."""
    order = SampleOrder([1000, 300], [0.8, 0.2], seed=1234)
    assert [order[g] for g in (0, 1, 4096, 10**11)] == [(0, 2, 620), (0, 1, 872), (0, 4, 24), (0, 80004883, 226)]
    assert [SampleOrder([1000, 300], [0.8, 0.2], seed=1235)[g] for g in range(9)] != [order[g] for g in range(9)]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_no_share_is_refused(weight):
    with pytest.raises(DataError, match="must be positive numbers"):
        quotas([1.0, weight])


def test_a_share_too_small_for_a_cycle_is_refused():
    with pytest.raises(DataError, match="less than one sample in 4096; raise it to at least 0.000244"):
        quotas([1.0, 1e-6])
