"""Context parallelism as communication: who has which tokens, what a gather and a halo bring, and their gradients."""

import pytest
import torch

from parallel.context import Context
from parallel.start import Sizes, start, stop
from tests.conftest import run_processes

RANKS, CHUNK, HALO = 3, 4, 3


class Place:
    """A process group as far as a `Context` that exchanges nothing sees it."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = lambda: rank, lambda: size


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_token_is_on_one_rank_and_all_ranks_see_equally_many_keys(size):
    sequence = torch.arange(24 * size)
    parts = [Context(Place(rank, size)).part(sequence, 0) for rank in range(size)]
    assert torch.cat(parts).sort().values.equal(sequence)
    assert {len(part) for part in parts} == {24}
    assert len({int(part.sum()) for part in parts}) == 1  # a token at position t sees t + 1 keys
    for rank, part in enumerate(parts):
        context = Context(Place(rank, size))
        assert context.places(24, sequence.device).equal(part)
        for rows, first in context.chunks(24):
            assert part[rows].equal(torch.arange(first, first + 24 // len(context.chunks(24))))


def sequences() -> list[torch.Tensor]:
    """Two tensors of a whole sequence that differ in their last dimension, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2 * RANKS * CHUNK, 2, width, generator=generator) for width in (3, 5)]


def weights(*shape: int, seed: int) -> torch.Tensor:
    """What a rank multiplies its results by, so that its gradients differ from those of other ranks."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exchanged() -> dict[str, list]:
    """Everything that one rank gets, and the gradients that its own tokens end up with."""
    start(Sizes(context=RANKS))
    from megatron.core import parallel_state

    context = Context(parallel_state.get_context_parallel_group())
    mine = [context.part(x, 0).requires_grad_() for x in sequences()]
    whole = context.gather(*mine)
    sum((x * weights(*x.shape, seed=context.rank)).sum() for x in whole).backward()
    found = {"whole": [x.detach() for x in whole], "of gather": [x.grad for x in mine]}

    known = context.gather(*mine, known=tuple(x.detach() for x in whole))
    assert all(torch.equal(a, b) for a, b in zip(whole, known, strict=True))
    for x in mine:
        x.grad = None
    chunks = context.with_halo(*mine, halo=HALO)
    sum((x * weights(*x.shape, seed=context.rank)).sum() for chunk in chunks for x in chunk).backward()
    found |= {"chunks": [[x.detach() for x in chunk] for chunk in chunks], "of halo": [x.grad for x in mine]}
    assert [x[0].shape[0] for x in context.with_halo(*mine, halo=0)] == [CHUNK, CHUNK]
    stop()
    return {name: _as_arrays(value) for name, value in found.items()}  # tensors would die with their process


def _as_arrays(value):
    return [_as_arrays(x) for x in value] if isinstance(value, list) else value.numpy()


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_processes(exchanged, RANKS)


def test_a_gather_brings_the_sequence_in_its_order_and_adds_up_the_gradients_of_all_ranks(ranks):
    for index, x in enumerate(sequences()):
        gradient = sum(weights(*x.shape, seed=rank) for rank in range(RANKS))
        for rank, found in enumerate(ranks):
            assert torch.equal(torch.from_numpy(found["whole"][index]), x)
            expected = Context(Place(rank, RANKS)).part(gradient, 0)
            torch.testing.assert_close(torch.from_numpy(found["of gather"][index]), expected)


def test_a_halo_is_what_stands_before_each_chunk_and_its_gradient_goes_back_there(ranks):
    for index, x in enumerate(sequences()):
        padded = torch.cat([torch.zeros(HALO, *x.shape[1:]), x])
        gradient = torch.zeros_like(padded)
        for rank, found in enumerate(ranks):
            for number, (_, first) in enumerate(Context(Place(rank, RANKS)).chunks(2 * CHUNK)):
                rows = slice(first, first + HALO + CHUNK)
                assert torch.equal(torch.from_numpy(found["chunks"][number][index]), padded[rows])
                gradient[rows] += weights(*padded[rows].shape, seed=rank)
        for rank, found in enumerate(ranks):
            expected = Context(Place(rank, RANKS)).part(gradient[HALO:], 0)
            torch.testing.assert_close(torch.from_numpy(found["of halo"][index]), expected)
