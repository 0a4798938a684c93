"""The scored forward on a GPU in BF16 against FP64, beside PyTorch's dense attention in BF16; memory is poisoned."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from kernels.scored import scored_forward

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Logarithms of probabilities: sums of up to 256 FP32 products of size 1 in another order, and the logarithms of sums.
FP32 = dict(rtol=1e-5, atol=2e-5)

# query heads, KV heads, D, D', block, selected, whether there is a sink, lengths of the documents
CASES = {
    "80B": (64, 4, 128, 128, 64, 16, True, (1000, 1, 1, 57, 512, 364)),
    "80B, one token": (64, 4, 128, 128, 64, 16, True, (1,)),
    "7B": (32, 8, 128, 128, 64, 16, False, (1937,)),
    "7B, documents of one token": (32, 8, 128, 128, 64, 16, False, (1,) * 70),
    "blocks of 16, spans selected first": (32, 8, 128, 128, 16, 16, False, (100, 2900)),
    "blocks of 32, no groups": (4, 4, 64, 64, 32, 5, False, (700,)),
    "blocks of 128": (64, 4, 128, 128, 128, 8, True, (30, 1500)),
    "192 wide": (32, 2, 192, 128, 64, 16, True, (300, 1377)),
    "256 wide, blocks of 128": (8, 2, 256, 256, 128, 4, False, (711,)),
    "tiny": (4, 2, 32, 32, 16, 4, True, (63, 2, 128)),
    "one KV head for all": (128, 1, 64, 64, 64, 3, False, (350,)),
}


def example(name: str) -> tuple[Tensor, ...]:
    """q, k, v as slices of one projection, document_start, and the sink."""
    H, K, D, DV, _, _, with_sink, lengths = CASES[name]
    S = sum(lengths)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, S, H * D + K * (D + DV), device="cuda").bfloat16().split([H * D, K * D, K * DV], dim=2)
    lengths = torch.tensor(lengths)
    start = (lengths.cumsum(0) - lengths).repeat_interleave(lengths).int().cuda()[None]
    sink = torch.randn(H, device="cuda") if with_sink else None
    return q.view(1, S, H, D), k.view(1, S, K, D), v.view(1, S, K, DV), start, sink


def visible(start: Tensor, query_start: int, keys: int) -> Tensor:
    """[B, S, T]"""
    position = query_start + torch.arange(start.shape[1], device="cuda")[:, None]
    key = torch.arange(keys, device="cuda")
    return (key <= position) & (key >= start[:, :, None])


def exact(q, k, v, start, sink, block: int, query_start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, S, H, D'], log-sum-exp [B, H, S] and log-scores [B, K, S, T/block] in FP64."""
    (B, S, H, D), (_, T, K, _) = q.shape, k.shape
    logits = torch.einsum("bskgd,btkd->bkgst", q.double().view(B, S, K, H // K, D), k.double()) * D**-0.5
    logits.masked_fill_(~visible(start, query_start, T)[:, None, None], -torch.inf)
    lse = logits.logsumexp(-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink.double().view(K, H // K, 1))
    output = torch.einsum("bkgst,btkd->bskgd", (logits - lse[..., None]).exp(), v.double()).flatten(2, 3)
    logits = F.pad(logits, (0, -T % block), value=-torch.inf).unflatten(-1, (-1, block))
    return output, lse.flatten(1, 2), (logits.amax(-1) - lse[..., None]).amax(2)


def dense(q, k, v, start) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mask = visible(start, 0, k.shape[2])[:, None]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def poisoned(function, q: Tensor, **options):
    """function(q, ...) with NaN where the allocator places the results and the scratch memory."""
    sizes = q.numel(), 4 * q.shape[1] * q.shape[2], 1 << 22, 1 << 25
    poison = [
        torch.full((size,), torch.nan, device="cuda", dtype=t) for size in sizes for t in (q.dtype, torch.float32)
    ]
    del poison
    return function(q, **options)


def assert_best(blocks: Tensor, scores: Tensor, selected: int) -> None:
    """They are the best blocks in FP64, in order, up to what FP32 can tell apart; -1 where none is left."""
    best = F.pad(scores, (0, selected), value=-torch.inf).sort(dim=-1, descending=True)[0][..., :selected]
    chosen = scores.gather(-1, blocks.long().clamp(min=0)).masked_fill(blocks < 0, -torch.inf)
    assert_close(chosen, best, **FP32)
    ordered = blocks.sort(dim=-1)[0]
    assert not ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()  # none twice


@pytest.mark.parametrize("name", CASES)
def test_results_are_as_exact_as_dense_attention(name):
    q, k, v, start, sink = example(name)
    block, selected = CASES[name][4:6]
    options = dict(k=k, v=v, document_start=start, block=block, selected=selected, sink=sink, dense_scores=True)
    output, lse, blocks, scores = poisoned(scored_forward, q, **options)
    truth, true_lse, true_scores = exact(q, k, v, start, sink, block)
    plain = truth if sink is None else exact(q, k, v, start, None, block)[0]
    allowed = 2 * (dense(q, k, v, start).double() - plain).norm() / plain.norm()
    # A single visible key is copied exactly without a sink: allow the rounding of the result.
    assert (output.double() - truth).norm() / truth.norm() <= max(allowed, 2**-8)
    assert_close(lse, true_lse.float(), **FP32)
    assert_close(scores, true_scores.float(), **FP32)
    assert_best(blocks, true_scores, selected)
    again = poisoned(scored_forward, q, **options)
    assert all(torch.equal(x, y) for x, y in zip(again, (output, lse, blocks, scores), strict=True))


def test_without_scores_the_results_are_as_exact():
    q, k, v, start, sink = example("80B")
    options = {"k": k, "v": v, "document_start": start, "sink": sink, "block": 64, "selected": 0}
    output, lse, *_ = poisoned(scored_forward, q, **options)
    truth, true_lse, _ = exact(q, k, v, start, sink, 64)
    assert (output.double() - truth).norm() / truth.norm() < 2**-8
    assert_close(lse, true_lse.float(), **FP32)


def test_some_of_the_queries_are_those_of_the_whole_sequence():
    """Context parallelism: a rank has some queries and all keys."""
    q, k, v, start, sink = example("80B")
    whole = scored_forward(q, k, v, start, block=64, selected=16, sink=sink)
    part = slice(777, 1500)
    found = scored_forward(q[:, part], k, v, start[:, part], block=64, selected=16, sink=sink, query_start=777)
    assert_close(found[0], whole[0][:, part], rtol=2**-7, atol=2**-9)  # other tiles, sums in another order
    assert_close(found[1], whole[1][..., part], **FP32)
    differing = (found[2] != whole[2][:, :, part]).float().mean()
    assert differing < 1e-3  # neighbours whose scores FP32 cannot tell apart


@pytest.mark.parametrize("with_sink", [True, False])  # on Hopper two kernels
def test_131072_tokens_whose_tensors_have_more_than_2_to_the_31_elements(with_sink):
    torch.manual_seed(0)
    S, H = 131072, 136
    q, k, v = (torch.empty(1, S, H, 128, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(3))
    start = torch.zeros(1, S, dtype=torch.int32, device="cuda")
    start[:, 100000:] = 50000
    sink = torch.randn(H, device="cuda") if with_sink else None
    output, lse, blocks, _ = scored_forward(q, k, v, start, block=64, selected=16, sink=sink)
    for t in (5000, 70001, S - 1):
        row, some = slice(t, t + 1), slice(H - 2, H)
        inputs = q[:, row, some], k[:, :, some], v[:, :, some], start[:, row], None if sink is None else sink[some]
        truth, true_lse, scores = exact(*inputs, 64, query_start=t)
        assert (output[:, row, some].double() - truth).norm() / truth.norm() < 2**-7
        assert_close(lse[:, some, row], true_lse.float(), **FP32)
        assert_best(blocks[:, some, row], scores, 16)
