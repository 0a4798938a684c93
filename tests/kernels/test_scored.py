"""The scored forward in Triton's interpreter against equations 2 and 3 in FP64."""

import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.testing import assert_close

from kernels import reference
from kernels.errors import KernelError
from kernels.scored import scored_forward
from kernels.scored_schedule import pairs_at_once, place, turns
from tests.kernels.test_reference import document_starts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted in FP32; tests/gpu runs it compiled")

FP32 = dict(rtol=1e-5, atol=1e-5)  # sums of up to 300 terms of size 1, in another order


def inputs(
    *, heads=(4, 2), D=(32, 32), documents=((150,),), queries: slice = slice(None), integers=False, seed=0
) -> list[Tensor]:
    """q, k, v, document_start; of the queries only some, as a rank of context parallelism has them."""
    start = document_starts(documents)
    (B, S), (H, K) = start.shape, heads
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, S, *s, generator=generator) for s in ((H, D[0]), (K, D[0]), (K, D[1])))
    if integers:
        q, k = q.round(), k.round()
    return [q[:, queries], k, v, start[:, queries]]


def expected(q, k, v, start, block: int, selected: int, sink=None, query_start=0) -> list[Tensor]:
    """Output, log-sum-exp, blocks and log-scores, each from its definition."""
    (B, S, H, D), (_, T, K, _) = q.shape, k.shape
    logits = torch.einsum("bskgd,btkd->bkgst", q.double().view(B, S, K, H // K, D), k.double()) / math.sqrt(D)
    key, position = torch.arange(T), query_start + torch.arange(S)[:, None]
    visible = (key <= position) & (key >= start[:, :, None])
    logits = logits.masked_fill(~visible[:, None, None], -torch.inf)
    lse = logits.logsumexp(-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink.double().view(K, H // K, 1))
    output = torch.einsum("bkgst,btkd->bskgd", (logits - lse[..., None]).exp(), v.double())
    blocks = -(-T // block)
    maxima = F.pad(logits, (0, blocks * block - T), value=-torch.inf).unflatten(-1, (blocks, block)).amax(-1)
    scores = (maxima - lse[..., None]).amax(2)
    best, index = scores.sort(dim=-1, descending=True, stable=True)
    index = F.pad(index.masked_fill(best == -torch.inf, -1), (0, max(0, selected - blocks)), value=-1)
    return [output.flatten(2, 3), lse.flatten(1, 2), index[..., :selected], scores]


CASES = {  # arguments of inputs, then of scored_forward
    "groups of 2": (dict(), dict(block=16, selected=4)),
    "groups of 16": (dict(heads=(16, 1), documents=[(131,)]), dict(block=16, selected=3)),
    "no groups": (dict(heads=(2, 2), documents=[(140,)]), dict(block=32, selected=2)),
    "the paper's block": (dict(heads=(8, 1), documents=[(300,)]), dict(block=64, selected=2)),
    "large blocks": (dict(heads=(2, 1), documents=[(40, 260)]), dict(block=128, selected=2)),
    "values narrower than keys, no powers of two": (dict(D=(48, 16), documents=[(70,)]), dict(block=64, selected=1)),
    "keys of 192": (dict(D=(192, 128), documents=[(70,)]), dict(block=64, selected=1)),
    "documents": (dict(documents=[(1, 1, 30, 70), (102,)]), dict(block=16, selected=3)),
    "documents of one token": (dict(documents=[(1,) * 37]), dict(block=16, selected=3)),
    "one token": (dict(documents=[(1,)]), dict(block=64, selected=16)),
    "some of the queries": (
        dict(documents=[(30, 90, 40), (160,)], queries=slice(57, 101)),
        dict(block=16, selected=5, query_start=57),
    ),
}


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_results_are_those_of_the_definition(case, with_sink):
    x, options = inputs(**CASES[case][0]), CASES[case][1]
    sink = torch.randn(x[0].shape[2], generator=torch.Generator().manual_seed(1)) if with_sink else None
    output, lse, blocks, scores = scored_forward(*x, sink=sink, dense_scores=True, **options)
    expected_output, expected_lse, expected_blocks, expected_scores = expected(*x, sink=sink, **options)
    assert (output.dtype, lse.dtype, blocks.dtype, scores.dtype) == (torch.float32,) * 2 + (torch.int32, torch.float32)
    assert_close(output, expected_output.float(), **FP32)
    assert_close(lse, expected_lse.float(), **FP32)
    assert_close(scores, expected_scores.float(), **FP32)
    assert_close(blocks.long(), expected_blocks, rtol=0, atol=0)


def test_blocks_are_those_of_the_reference_operator():
    x = inputs(documents=[(100, 30)])
    output, blocks = reference.scored_attention(*x, 16, 3)
    found = scored_forward(*x, block=16, selected=3)
    assert_close(found[0], output, **FP32)
    assert_close(found[2], blocks, rtol=0, atol=0)
    assert found[3] is None


@pytest.mark.parametrize("selected", [1, 3, 16])
def test_ties_among_hundreds_of_blocks_go_to_the_lower_one(selected):
    """Whole numbers make many scores equal, and enough blocks that spans are selected before blocks are."""
    x = inputs(heads=(1, 1), D=(16, 16), documents=[(300, 4900)], queries=slice(5180, 5200), integers=True)
    *_, blocks, _ = scored_forward(*x, block=16, selected=selected, query_start=5180)
    _, _, expected_blocks, scores = expected(*x, 16, selected, query_start=5180)
    assert scores[scores > -torch.inf].unique().numel() < 0.8 * (scores > -torch.inf).sum()
    assert_close(blocks.long(), expected_blocks, rtol=0, atol=0)


def test_with_equal_scores_everywhere_the_first_blocks_are_selected():
    q, k, v, start = inputs(heads=(2, 1), D=(16, 16), documents=[(5200,)], queries=slice(5190, 5200))
    blocks = scored_forward(q * 0, k, v, start, block=16, selected=7, query_start=5190)[2]
    assert (blocks == torch.arange(7)).all()


@triton.jit
def _deal(tiles, pairs, query_tiles, at_once, kv_heads, TOKENS: tl.constexpr):
    for turn in range(0, turns(pairs, query_tiles)):
        b, head, first = place(turn, pairs, query_tiles, at_once, kv_heads, TOKENS)
        into = tiles + (turn * tl.num_programs(0) + tl.program_id(0)) * 3
        tl.store(into, b)
        tl.store(into + 1, head)
        tl.store(into + 2, first)


@pytest.mark.parametrize(
    "sequences, kv_heads, at_once, query_tiles, programs, most",
    [(1, 8, 8, 64, 33, 1.05), (3, 2, 3, 20, 11, 1.1), (2, 3, 4, 7, 5, 1.3), (1, 2, 1, 1, 2, 1)],
)
def test_every_tile_is_dealt_once_and_programs_get_as_much(sequences, kv_heads, at_once, query_tiles, programs, most):
    """`most`: the most work of a program, in averages. The first case is a quarter of the 7B model at 8,192 tokens."""
    dealt = torch.full((sequences * kv_heads * query_tiles, 3), -1, dtype=torch.int32)
    _deal[(programs,)](dealt, sequences * kv_heads, query_tiles, at_once, kv_heads, TOKENS=1)
    tiles = torch.cartesian_prod(*(torch.arange(n, dtype=torch.int32) for n in (sequences, kv_heads, query_tiles)))
    assert dealt.unique(dim=0).equal(tiles)
    work = F.pad(dealt[:, 2] + 1, (0, -len(dealt) % programs)).view(-1, programs).sum(0).double()
    assert work.max() <= most * work.mean()


def test_pairs_that_fit_the_cache_go_side_by_side_in_equal_numbers_and_long_ones_alone():
    assert [pairs_at_once(8, size * 2**20) for size in (1, 4, 5, 8, 16, 64)] == [8, 8, 4, 4, 1, 1]


def test_scores_cost_no_accuracy():
    """Without scores the same kernel returns the same bits."""
    x = inputs(documents=[(90, 60)])
    sink = torch.randn(4, generator=torch.Generator().manual_seed(1))
    with_scores = scored_forward(*x, block=64, selected=2, sink=sink)
    output, lse, blocks, scores = scored_forward(*x, block=64, selected=0, sink=sink)
    assert (blocks, scores) == (None, None)
    assert_close([output, lse], list(with_scores[:2]), rtol=0, atol=0)


def test_views_give_what_copies_give():
    q, k, v, start = inputs(documents=[(75, 30)])
    expected = scored_forward(q, k, v, start, block=16, selected=3)
    qkv = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], dim=2)
    q, k, v = (x.unflatten(2, (-1, 32)) for x in qkv.split([128, 64, 64], dim=2))
    start = torch.stack([start, start], dim=2)[..., 0]
    assert not any(x.is_contiguous() for x in (q, k, v, start))
    assert_close(scored_forward(q, k, v, start, block=16, selected=3)[:3], expected[:3], rtol=0, atol=0)


def test_a_document_does_not_see_what_precedes_it():
    q, k, v, start = inputs(documents=[(70, 50)])
    expected = scored_forward(q, k, v, start, block=16, selected=4)
    k[:, :64], v[:, :64] = 1e4, 1e4  # up to a tile's edge: in the next tile the first document still has keys
    found = scored_forward(q, k, v, start, block=16, selected=4)
    for x, y, dimension in zip(found[:3], expected[:3], (1, 2, 2), strict=True):
        assert_close(x.narrow(dimension, 70, 50), y.narrow(dimension, 70, 50), rtol=0, atol=0)


@pytest.mark.parametrize(
    "shapes, options, message",
    [
        (dict(heads=(6, 2)), {}, "q has 6 heads for 2 of k"),
        (dict(heads=(5, 2)), {}, "q has 5 heads, no multiple of the 2"),
        (dict(D=(20, 32)), {}, "head dimensions 20 and 32"),
        ({}, dict(block=48), "block=48"),
        ({}, dict(query_start=1), "query_start=1"),
    ],
)
def test_what_the_kernel_lacks_is_named(shapes, options, message):
    with pytest.raises(KernelError, match=message):
        scored_forward(*inputs(documents=[(9,)], **shapes), **(dict(block=16, selected=2) | options))
