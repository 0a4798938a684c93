"""The backward pass of causal attention on a GPU in BF16 against FP64, beside the same formula in BF16."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels import causal_hopper
from kernels.causal_backward import causal_backward
from kernels.scored import scored_forward

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# query heads, KV heads, D, D', lengths of the documents; six layouts, since each is compiled anew
CASES = {
    "80B": (64, 4, 128, 128, (300, 1, 1, 257, 64, 78)),
    "80B, one document": (64, 4, 128, 128, (1024,)),
    "7B": (32, 8, 128, 128, (777, 230)),
    "192 wide": (32, 2, 192, 128, (300, 77)),
    "256 wide, no groups": (2, 2, 256, 256, (211,)),
    "tiny": (4, 2, 32, 32, (63, 2, 128)),
    "one KV head, a group larger than a tile": (128, 1, 64, 64, (150,)),
    "one token": (64, 4, 128, 128, (1,)),
    "documents of one token": (32, 8, 128, 128, (1,) * 7),
}


def document_starts(lengths: tuple[int, ...]) -> Tensor:
    lengths = torch.tensor(lengths)
    return (lengths.cumsum(0) - lengths).repeat_interleave(lengths).int().cuda()[None]


def example(name: str) -> tuple[Tensor, ...]:
    """q, k, v as slices of one projection, document_start, grad_output that is transposed."""
    H, K, D, DV, lengths = CASES[name]
    S = sum(lengths)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, S, H * D + K * (D + DV), device="cuda").bfloat16().split([H * D, K * D, K * DV], dim=2)
    grad_output = torch.randn(1, H, S, DV, device="cuda").bfloat16().transpose(1, 2)
    return q.view(1, S, H, D), k.view(1, S, K, D), v.view(1, S, K, DV), document_starts(lengths), grad_output


def formula(dtype: torch.dtype, q, k, v, start, grad_output, sink=None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, log-sum-exp and gradients, every step in `dtype`."""
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, sink) if x is not None]
    q, k, v, *sink = leaves
    B, S, H, D = q.shape
    group = H // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    t = torch.arange(S, device="cuda")
    visible = (t <= t[:, None]) & (t >= start[:, None, :, None])
    logits = (torch.einsum("bshd,bthd->bhst", q, k) * D**-0.5).masked_fill(~visible, -torch.inf)
    if sink:
        logits = torch.cat([logits, sink[0][:, None, None].expand(B, H, S, 1)], -1)
    output = torch.einsum("bhst,bthd->bshd", logits.softmax(-1)[..., :S], v)
    return (
        output.detach(),
        logits.logsumexp(-1).detach(),
        list(torch.autograd.grad(output, leaves, grad_output.to(dtype))),
    )


def ours(q, k, v, start, grad_output, output, lse, **options) -> list[Tensor]:
    for x in (q, k, v):  # NaN where the allocator places the results
        poison = [torch.full(x.shape, torch.nan, device="cuda", dtype=q.dtype) for _ in range(2)]
        del poison
    output, lse = output.to(q.dtype), lse.float()
    return [x for x in causal_backward(q, k, v, output, lse, grad_output, start, **options) if x is not None]


def assert_as_exact(found: list[Tensor], exact: list[Tensor], dense: list[Tensor]) -> None:
    for name, x, truth, peer in zip(("dq", "dk", "dv", "dsink"), found, exact, dense, strict=False):
        error, allowed = ((y.double() - truth).norm() / truth.norm().clamp(min=1e-12) for y in (x, peer))
        assert error <= 2 * allowed + 1e-6, f"{name}: {error:.2e} against {allowed:.2e}"  # 1e-6: both may be exact


def with_additions(exact: list[Tensor], dense: list[Tensor], dk_add, dv_add) -> list[list[Tensor]]:
    """Both sets of gradients with what comes from elsewhere, rounded once."""
    return [[dq, (dk + dk_add).to(dk.dtype), (dv + dv_add).to(dv.dtype)] for dq, dk, dv in (exact, dense)]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_as_exact_as_those_of_dense_attention_and_repeat_bitwise(name):
    x = example(name)
    output, lse, exact = formula(torch.float64, *x)
    found = ours(*x, output, lse)
    if name in ("one token", "documents of one token"):  # nothing flows back to q and k: P = 1
        assert_close(found[2], exact[2].bfloat16(), rtol=2**-7, atol=2**-7)
        assert found[0].abs().max() < 0.1 and found[1].abs().max() < 0.1  # from the rounding of the output
    else:
        assert_as_exact(found, exact, formula(torch.bfloat16, *x)[2])
    assert all(torch.equal(a, b) for a, b in zip(found, ours(*x, output, lse), strict=True))


def test_a_sink_gets_its_gradient():
    x = example("80B")
    sink = torch.randn(64, device="cuda").bfloat16().float()
    output, lse, exact = formula(torch.float64, *x, sink)
    assert_as_exact(ours(*x, output, lse, sink=sink), exact, formula(torch.bfloat16, *x, sink)[2])


def test_gradients_from_elsewhere_are_added_before_rounding():
    q, k, v, *_ = x = example("80B")
    dk_add, dv_add = (torch.randn(y.shape, device="cuda") for y in (k, v))
    output, lse, exact = formula(torch.float64, *x)
    dense = formula(torch.bfloat16, *x)[2]
    found = ours(*x, output, lse, dk_add=dk_add, dv_add=dv_add)
    assert_as_exact(found, *with_additions(exact, dense, dk_add, dv_add))


def test_chunks_of_queries_give_what_the_whole_sequence_gives():
    q, k, v, start, grad_output = x = example("80B")
    output, lse, exact = formula(torch.float64, *x)
    dq, dk, dv = [], 0, 0
    for first, stop in ((0, 301), (301, q.shape[1])):
        chunk = slice(first, stop)
        mine = q[:, chunk], k, v, start[:, chunk], grad_output[:, chunk], output[:, chunk], lse[:, :, chunk]
        found = ours(*mine, query_start=first)
        dq.append(found[0])
        dk, dv = dk + found[1].float(), dv + found[2].float()
    assert_as_exact([torch.cat(dq, 1), dk, dv], exact, formula(torch.bfloat16, *x)[2])


TURNS = {  # query heads, KV heads, dtype, lengths of the documents of each sequence
    "one document": (64, 4, torch.bfloat16, [(16384,)]),
    "documents": (64, 4, torch.bfloat16, [(5000, 1, 3000, 8383)]),
    "two sequences in FP16": (32, 8, torch.float16, [(700, 300, 1048), (1, 2047)]),
    "eight heads, three at a time": (32, 8, torch.bfloat16, [(9000,)]),
    "a group that fills a tile": (64, 1, torch.bfloat16, [(1500, 500)]),
    "no groups": (4, 4, torch.bfloat16, [(1500, 500)]),
}


@pytest.mark.parametrize("name", TURNS)
def test_many_programs_that_add_to_one_place_take_turns(name, monkeypatch):
    """Bits repeat, and gradients are those of the kernels in which every sum has one owner."""
    H, K, dtype, documents = TURNS[name]
    start = torch.cat([document_starts(lengths) for lengths in documents])
    (B, S), D = start.shape, 128
    torch.manual_seed(0)
    q, grad_output = (torch.randn(B, S, H, D, device="cuda", dtype=dtype) for _ in range(2))
    k, v = (torch.randn(B, S, K, D, device="cuda", dtype=dtype) for _ in range(2))
    if torch.cuda.get_device_capability() == (9, 0):
        assert causal_hopper.supported(q, v, K)
    output, lse, *_ = scored_forward(q, k, v, start, block=64, selected=0)
    found, *again = (ours(q, k, v, start, grad_output, output, lse) for _ in range(3))
    for other in again:
        assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True))
    monkeypatch.setattr(causal_hopper, "supported", lambda *_: False)
    for x, y in zip(found, ours(q, k, v, start, grad_output, output, lse), strict=True):
        assert (x.float() - y.float()).norm() < 2**-8 * y.float().norm()  # the same BF16 products, in another order


def test_offsets_past_two_billion_elements():
    """The last document of two long sequences gets the gradients that it gets on its own."""
    S, tail = 131_200, 200
    torch.manual_seed(0)
    q, output, grad_output = (torch.randn(2, S, 64, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k, v = (torch.randn(2, S, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lse = 5 + torch.rand(2, 64, S, device="cuda")
    assert q.numel() > 2**31
    start = (torch.arange(S, device="cuda") // tail * tail).int().expand(2, S).contiguous()
    found = causal_backward(q, k, v, output, lse, grad_output, start)[:3]
    q, k, v, output, grad_output = (x[1:, -tail:] for x in (q, k, v, output, grad_output))
    start = torch.zeros(1, tail, dtype=torch.int32, device="cuda")
    alone = causal_backward(q, k, v, output, lse[1:, :, -tail:], grad_output, start)[:3]
    for x, y in zip(found, alone, strict=True):
        error = (x[1:, -tail:].float() - y.float()).norm() / y.float().norm()
        assert error < 2**-8  # the same BF16 products, summed over other tiles
