"""The Hopper version of the scored attention against FP64 on the same inputs, and against itself."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]

BLOCK, SELECTED, D = 64, 16, 128
SHAPES = {"80b": (64, 4), "7b": (32, 8)}


def example(H: int, K: int, S: int, B: int = 1, T: int | None = None, dtype: torch.dtype = torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(S + H)
    q, k, v = (
        torch.randn(B, length, heads, D, device="cuda", generator=generator).to(dtype)
        for length, heads in ((S, H), (T or S, K), (T or S, K))
    )
    return q, k, v, torch.zeros(B, S, dtype=torch.int32, device="cuda")


def poison(*sizes: int) -> None:
    """NaN (as floats) in the memory that the allocator hands out next."""
    kept = [torch.full((size,), -1, dtype=torch.int32, device="cuda") for size in sizes]
    del kept


def run(q, k, v, start, **options):
    from kernels.scored_hopper import scored_forward

    poison(q.numel(), q.numel() // 2, start.numel() * q.shape[2], start.numel() * k.shape[2] * SELECTED, 2**24)
    return scored_forward(q, k, v, start, **options)


def truth(q: Tensor, k: Tensor, v: Tensor, start: Tensor, query_start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and group scores [B, K, S, blocks] in FP64."""
    B, S, H, _ = q.shape
    T, K = k.shape[1:3]
    logits = torch.einsum("bskgd,btkd->bkgst", q.double().view(B, S, K, H // K, D), k.double()) / math.sqrt(D)
    key = torch.arange(T, device="cuda")
    position = query_start + torch.arange(S, device="cuda")
    visible = (key <= position[:, None]) & (key >= start[..., None])  # [B, S, T]
    logits.masked_fill_(~visible[:, None, None], -torch.inf)
    lse = logits.logsumexp(-1)
    output = torch.einsum("bkgst,btkd->bskgd", (logits - lse[..., None]).exp(), v.double()).reshape(B, S, H, D)
    padded = F.pad(logits, (0, -T % BLOCK), value=-torch.inf)
    score = (padded.unflatten(-1, (-1, BLOCK)).amax(-1) - lse[..., None]).amax(2)
    return output, lse.reshape(B, H, S), score


def check(q, k, v, start, query_start: int = 0) -> None:
    output, lse, blocks = run(q, k, v, start, query_start=query_start)
    wanted, wanted_lse, score = truth(q, k, v, start, query_start)
    error = (output - wanted).norm() / wanted.norm()
    # BF16 rounds each weight and the result by 2**-9 at most; errors of both stay below twice that
    assert error < 2**-8
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=0, atol=1e-4)  # FP32 sums and approximate exp2, log2

    value, _ = score.sort(dim=-1, descending=True)
    value = F.pad(value[..., :SELECTED], (0, max(0, SELECTED - value.shape[-1])), value=-torch.inf)
    assert torch.equal(blocks >= 0, value > -torch.inf)  # as many as there are, the rest at the end
    assert blocks.max() < score.shape[-1]
    found = score.gather(-1, blocks.clamp(min=0).long()).masked_fill(blocks < 0, -torch.inf)
    torch.testing.assert_close(found, value, rtol=0, atol=1e-4)  # by falling score; equal to FP32 they may swap
    different = blocks.sort(dim=-1)[0].diff(dim=-1)
    assert ((different > 0) | (blocks.sort(dim=-1)[0][..., 1:] < 0)).all()


@pytest.mark.parametrize("S", [1, 64, 257, 1500])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_selection_are_those_of_fp64(shape, S):
    check(*example(*SHAPES[shape], S))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (64, 1)])
def test_any_power_of_two_of_heads_a_group_works(heads):
    check(*example(*heads, 300, B=2))


def test_documents_hide_what_came_before_them():
    q, k, v, start = example(32, 8, 1600, B=2)
    for first in (3, 4, 130, 700, 1025):
        start[0, first:] = first
    start[1] = torch.arange(1600, device="cuda")  # documents of length 1
    check(q, k, v, start)


def test_a_chunk_of_queries_sees_the_keys_before_it():
    q, k, v, start = example(64, 4, 200, T=1533)
    start[:, 100:] = 1433
    check(q, k, v, start, query_start=1333)


def test_views_and_fp16_work():
    q, k, v, start = example(32, 8, 700, B=2, dtype=torch.float16)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    check(q, k, v, start)


def test_selection_among_many_blocks_takes_the_best():
    """More spans of blocks than can be selected: the last queries of a long sequence."""
    q, k, v, start = example(32, 8, 64, T=20000)
    check(q, k, v, start, query_start=19936)


def test_equal_scores_go_to_the_lower_block():
    q, k, v, start = (torch.zeros_like(x) for x in example(8, 2, 256, T=20000))
    blocks = run(q, k, v, start, query_start=19744)[2]
    assert (blocks == torch.arange(SELECTED, device="cuda")).all()


def test_two_runs_agree_to_the_bit_and_scores_change_nothing():
    arguments = example(64, 4, 4096)
    first, second, plain = run(*arguments), run(*arguments), run(*arguments, selected=0)
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(first[0], plain[0]) and torch.equal(first[1], plain[1]) and plain[2] is None
