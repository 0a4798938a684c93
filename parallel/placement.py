"""Pipeline placement: contiguous layers for each stage, cut between blocks of layers only, balanced by cost.

Blocks, costs and stages are plain numbers here; what a block is and what a layer costs is the caller's knowledge.
`stages` always means pipeline stages times virtual chunks, in model order: with P pipeline stages, chunk v of pipeline
stage p is entry v * P + p, as megatron-core reads a layout. Costs have any unit, the same for all arguments.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, pairwise
from math import fsum

BALANCED = 1.25  # imbalance up to which a placement is recommended: a fifth of the pipeline's throughput is lost


class PlacementError(ValueError):
    """No placement with this number of stages exists. The message names the numbers that work."""


def place(
    block_sizes: Sequence[int],
    layer_costs: Sequence[float],
    stages: int,
    first_cost: float = 0,
    last_cost: float = 0,
) -> tuple[range, ...]:
    """The layers of each stage: whole blocks, at least one a stage, the costliest stage as cheap as possible.

    `first_cost` comes on top of the first stage (embedding), `last_cost` on top of the last (head and loss). Among
    equals the second costliest stage decides, and so on; then earlier stages get fewer layers, since they hold the
    activations of more micro-batches.
    """
    possible = possible_stages(block_sizes)
    if stages not in possible:
        raise PlacementError(
            f"{stages} stages (pipeline x virtual chunks) cannot share {len(block_sizes)} blocks of "
            f"{', '.join(map(str, block_sizes))} layers, which are never cut; use {_either(possible)}"
        )
    return next(islice(_placements(block_sizes, layer_costs, first_cost, last_cost), stages - 1, None))


def place_as_given(block_sizes: Sequence[int], blocks: Sequence[int]) -> tuple[range, ...]:
    """The layers of each stage, `blocks` of them on each, in model order."""
    if min(blocks, default=0) < 1 or sum(blocks) != len(block_sizes):
        raise PlacementError(f"{list(blocks)} must be numbers of 1 or more that add up to {len(block_sizes)} blocks")
    bounds, cuts = [0, *accumulate(block_sizes)], [0, *accumulate(blocks)]
    return tuple(range(bounds[begin], bounds[end]) for begin, end in pairwise(cuts))


def possible_stages(block_sizes: Sequence[int]) -> range:
    """Numbers of stages that give each stage at least one block."""
    return range(1, len(block_sizes) + 1)


def balanced_stages(
    block_sizes: Sequence[int], layer_costs: Sequence[float], first_cost: float = 0, last_cost: float = 0
) -> list[int]:
    """Numbers of stages whose best placement has an imbalance of at most BALANCED; 1 is always among them."""
    placements = _placements(block_sizes, layer_costs, first_cost, last_cost)
    return [
        stages
        for stages, placement in enumerate(placements, start=1)
        if imbalance(placement, layer_costs, first_cost, last_cost) <= BALANCED
    ]


def imbalance(
    stage_ranges: Sequence[range], layer_costs: Sequence[float], first_cost: float = 0, last_cost: float = 0
) -> float:
    """Cost of the costliest stage over the mean of all stages: 1 is perfect."""
    costs = [fsum(layer_costs[layers.start : layers.stop]) for layers in stage_ranges]
    costs[0] += first_cost
    costs[-1] += last_cost
    return max(costs) * len(costs) / fsum(costs)


def megatron_layout(stage_ranges: Sequence[range]) -> list[list[str]]:
    """The placement as megatron-core's PipelineParallelLayerLayout takes it: one list of layer types a stage."""
    layout = [["decoder"] * len(layers) for layers in stage_ranges]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def _placements(
    block_sizes: Sequence[int], layer_costs: Sequence[float], first_cost: float, last_cost: float
) -> Iterator[tuple[range, ...]]:
    """The best placement on 1, 2, 3 … stages, as many as there are blocks.

    Dynamic programming from the end of the model: the best split of blocks i … on n stages is a first stage and the
    best split of what remains on n - 1. "Best" compares the stage costs in falling order, and adding one stage to two
    splits never changes which of them is better, so keeping one split for each i is enough.
    """
    blocks = len(block_sizes)
    bounds = [0, *accumulate(block_sizes)]
    if bounds[-1] != len(layer_costs):
        raise ValueError(f"{len(layer_costs)} layer costs for blocks of {bounds[-1]} layers")

    def cost(begin: int, end: int) -> float:
        """Of a stage that holds the blocks begin … end-1; fsum makes it independent of the order of the layers."""
        ends = [first_cost] * (begin == 0) + [last_cost] * (end == blocks)
        return fsum([*layer_costs[bounds[begin] : bounds[end]], *ends])

    costs = {(begin, end): cost(begin, end) for end in range(1, blocks + 1) for begin in range(end)}
    best = {begin: ((costs[begin, blocks],), (begin, blocks)) for begin in range(blocks)}
    while True:
        _, cuts = best[0]
        yield tuple(range(bounds[begin], bounds[end]) for begin, end in pairwise(cuts))
        starts = range(len(best) - 1)  # one more stage needs one more block
        if not starts:
            return
        best = {
            begin: min(
                (tuple(sorted((costs[begin, cut], *best[cut][0]), reverse=True)), (begin, *best[cut][1]))
                for cut in range(begin + 1, len(best))
            )
            for begin in starts
        }


def _either(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
