"""The Hopper version of the scored forward against FP64 on the same inputs, and against itself."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels import scored_hopper
from kernels.scored import scored_forward
from tests.gpu.test_scored import FP32, assert_best, exact, poisoned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

BLOCK, SELECTED = 64, 16
SHAPES = {"80B": (64, 4), "7B": (32, 8)}


def example(heads: tuple[int, int], S: int, B: int = 1, T: int | None = None, dtype=torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(S)
    shapes = ((S, heads[0]), (T or S, heads[1]), (T or S, heads[1]))
    q, k, v = (torch.randn(B, *shape, 128, device="cuda", generator=generator).to(dtype) for shape in shapes)
    return [q, k, v, torch.zeros(B, S, dtype=torch.int32, device="cuda")]


def run(q: Tensor, k: Tensor, v: Tensor, start: Tensor, selected: int = SELECTED, query_start: int = 0) -> list[Tensor]:
    assert scored_hopper.supported(q, v, k.shape[2], BLOCK, selected)
    options = dict(block=BLOCK, selected=selected, query_start=query_start)
    return poisoned(scored_forward, q, k=k, v=v, document_start=start, **options)[:3]


def check(q: Tensor, k: Tensor, v: Tensor, start: Tensor, query_start: int = 0) -> None:
    output, lse, blocks = run(q, k, v, start, query_start=query_start)
    truth, true_lse, scores = exact(q, k, v, start, None, BLOCK, query_start)
    # BF16 rounds each weight and the result by 2**-9 at most; errors of both stay below twice that
    assert (output - truth).norm() / truth.norm() < 2**-8
    assert_close(lse, true_lse.float(), **FP32)
    assert_best(blocks, scores, SELECTED)


@pytest.mark.parametrize("S", [1, 64, 257, 1500])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_selection_are_those_of_fp64(shape, S):
    check(*example(SHAPES[shape], S))


@pytest.mark.parametrize("heads, dtype", [((4, 4), torch.float16), ((64, 1), torch.bfloat16)])
def test_the_smallest_and_the_largest_group_work_and_views_and_fp16_do(heads, dtype):
    q, k, v, start = example(heads, 300, B=2, dtype=dtype)
    check(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), start)


def test_documents_hide_what_came_before_them():
    q, k, v, start = example(SHAPES["7B"], 1600, B=2)
    for first in (3, 4, 130, 700, 1025):
        start[0, first:] = first
    start[1] = torch.arange(1600, device="cuda")  # documents of length 1
    check(q, k, v, start)


def test_a_chunk_of_queries_sees_the_keys_before_it():
    q, k, v, start = example(SHAPES["80B"], 200, T=1533)
    start[:, 100:] = 1433
    check(q, k, v, start, query_start=1333)


def test_selection_among_many_blocks_takes_the_best():
    """More spans of blocks than can be selected: the last queries of a long sequence."""
    check(*example(SHAPES["7B"], 64, T=20000), query_start=19936)


def test_equal_scores_go_to_the_lower_block():
    q, k, v, start = (torch.zeros_like(x) for x in example(SHAPES["7B"], 256, T=20000))
    blocks = run(q, k, v, start, query_start=19744)[2]
    assert (blocks == torch.arange(SELECTED, device="cuda")).all()


def test_two_runs_agree_to_the_bit_and_scores_change_nothing():
    arguments = example(SHAPES["7B"], 4096, B=3)  # 24 pairs of a sequence and a KV head: not all fit the cache at once
    first, second, plain = run(*arguments), run(*arguments), run(*arguments, selected=0)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert torch.equal(first[0], plain[0]) and torch.equal(first[1], plain[1]) and plain[2] is None
