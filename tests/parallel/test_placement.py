"""Pipeline placement against enumeration of every possible cut, and against megatron-core's reading of a layout."""

import random
from itertools import accumulate, combinations, pairwise

import pytest

from parallel.placement import (
    BALANCED,
    PlacementError,
    balanced_stages,
    imbalance,
    megatron_layout,
    place,
    place_as_given,
    possible_stages,
)

MOE_80B = [12, 12, 12, 12, 1]


def every_placement(sizes, stages):
    bounds = [0, *accumulate(sizes)]
    for inner in combinations(range(1, len(sizes)), stages - 1):
        yield tuple(range(bounds[a], bounds[b]) for a, b in pairwise((0, *inner, len(sizes))))


def stage_costs(placement, costs, first, last):
    sums = [sum(costs[layer] for layer in layers) for layers in placement]
    sums[0] += first
    sums[-1] += last
    return sums


@pytest.mark.parametrize("seed", range(60))
def test_placement_equals_the_best_of_all_possible_cuts(seed):
    """Whole-number costs from a small range, so that there are many ties to break."""
    draw = random.Random(seed)
    sizes = [draw.randint(1, 4) for _ in range(draw.randint(1, 8))]
    costs = [draw.randint(1, 3) for _ in range(sum(sizes))]
    first, last = draw.randint(0, 4), draw.randint(0, 9)
    for stages in possible_stages(sizes):
        every = list(every_placement(sizes, stages))
        found = place(sizes, costs, stages, first, last)
        assert max(stage_costs(found, costs, first, last)) == min(
            max(stage_costs(p, costs, first, last)) for p in every
        )
        preferred = min(
            every,
            key=lambda p: (sorted(stage_costs(p, costs, first, last), reverse=True), [layers.start for layers in p]),
        )
        assert found == preferred


def test_no_hybrid_block_of_the_80b_is_cut():
    starts = [0, *accumulate(MOE_80B)]
    for stages in possible_stages(MOE_80B):
        placement = place(MOE_80B, [1] * 49, stages, last_cost=5)
        assert [layer for layers in placement for layer in layers] == list(range(49))
        assert len(placement) == stages and all(layers.start in starts and len(layers) for layers in placement)


def test_80b_is_balanced_on_one_two_four_or_five_stages():
    assert balanced_stages(MOE_80B, [1] * 49) == [1, 2, 4, 5]
    assert imbalance(place(MOE_80B, [1] * 49, 3), [1] * 49) == pytest.approx(24 / (49 / 3))


def test_balanced_stages_are_those_whose_placement_is_balanced():
    sizes, costs = [4] * 8 + [3, 1], [5 if layer % 4 == 0 else 3 for layer in range(36)]
    balanced = balanced_stages(sizes, costs, 1, 20)
    for stages in possible_stages(sizes):
        assert (imbalance(place(sizes, costs, stages, 1, 20), costs, 1, 20) <= BALANCED) == (stages in balanced)


def test_embedding_and_head_move_the_cuts():
    sizes, costs = [1] * 6, [1] * 6
    assert place(sizes, costs, 2) == (range(0, 3), range(3, 6))
    assert place(sizes, costs, 2, last_cost=2) == (range(0, 4), range(4, 6))
    assert place(sizes, costs, 2, first_cost=2) == (range(0, 2), range(2, 6))


def test_of_equal_placements_the_one_with_short_early_stages_is_taken():
    assert place([1] * 5, [0.1] * 5, 3) == (range(0, 1), range(1, 3), range(3, 5))


def test_stages_beside_a_costly_one_are_balanced_too():
    assert place([1] * 7, [1, 1, 1, 1, 1, 1, 10], 3) == (range(0, 3), range(3, 6), range(6, 7))


@pytest.mark.parametrize("stages", [0, 6])
def test_an_impossible_request_names_the_sizes_that_work(stages):
    with pytest.raises(PlacementError, match=rf"^{stages} stages .* 12, 12, 12, 12, 1 layers.*use 1, 2, 3, 4 or 5$"):
        place(MOE_80B, [1] * 49, stages)


def test_a_given_placement_is_taken_and_one_that_does_not_add_up_is_refused():
    assert place_as_given(MOE_80B, [1, 1, 1, 2]) == (range(12), range(12, 24), range(24, 36), range(36, 49))
    for wrong in ([1, 1, 1, 1], [0, 5], []):
        with pytest.raises(PlacementError, match="add up to 5 blocks"):
            place_as_given(MOE_80B, wrong)


def test_costs_of_another_number_of_layers_are_refused():
    with pytest.raises(ValueError, match="48 layer costs for blocks of 49 layers"):
        place(MOE_80B, [1] * 48, 2)


def test_megatron_reads_the_layout_in_model_order():
    """Two pipeline stages with two chunks each: stage 0 holds entries 0 and 2, stage 1 holds 1 and 3."""
    layouts = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    sizes = [4] * 4 + [2, 1]
    placement = place(sizes, [1] * 19, 4, last_cost=2)
    layout = layouts.PipelineParallelLayerLayout(megatron_layout(placement), pipeline_model_parallel_size=2)
    layout.validate_layer_layout(num_layers=19, mtp_num_layers=0)
    for entry, layers in enumerate(placement):
        chunk, rank = divmod(entry, 2)
        held = [layer_type.name for layer_type in layout.layout[rank][chunk]]
        assert held.count("decoder") == len(layers)
        assert ("embedding" in held, "loss" in held) == (entry == 0, entry == 3)


def test_one_stage_holds_everything():
    assert megatron_layout(place([2, 1], [1, 1, 1], 1)) == [["embedding", "decoder", "decoder", "decoder", "loss"]]
