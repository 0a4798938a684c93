"""The window kernels on a GPU in BF16 against FP64, beside the same formula in BF16: ragged, packed, poisoned, huge."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels.window import window_backward, window_forward, window_key_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAMES = "output", "dq", "dk", "dv", "dsink"
# query heads, KV heads, D, D', window, lengths of the documents; six layouts, since each is compiled anew
CASES = {
    "80B": (64, 4, 128, 128, 128, (300, 1, 1, 257, 64, 78)),
    "7B": (32, 8, 128, 128, 128, (1000,)),
    "192 wide": (32, 2, 192, 128, 128, (300, 77)),
    "256 wide, no groups": (2, 2, 256, 256, 300, (411,)),
    "tiny": (4, 2, 32, 32, 16, (63, 2, 128)),
    "one KV head, a group larger than a tile": (128, 1, 64, 64, 100, (150,)),
    "one token": (64, 4, 128, 128, 128, (1,)),
    "documents of one token": (32, 8, 128, 128, 128, (1,) * 7),
}


def document_starts(lengths: tuple[int, ...]) -> Tensor:
    lengths = torch.tensor(lengths)
    return (lengths.cumsum(0) - lengths).repeat_interleave(lengths).int().cuda()[None]


def example(name: str) -> tuple[Tensor, ...]:
    """q, k, v as slices of one projection, a sink that BF16 can hold, document_start, a transposed grad_output."""
    H, K, D, DV, _, lengths = CASES[name]
    S = sum(lengths)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, S, H * D + K * (D + DV), device="cuda").bfloat16().split([H * D, K * D, K * DV], dim=2)
    grad_output = torch.randn(1, H, S, DV, device="cuda").bfloat16().transpose(1, 2)
    sink = torch.randn(H, device="cuda").bfloat16().float()
    return q.view(1, S, H, D), k.view(1, S, K, D), v.view(1, S, K, DV), sink, document_starts(lengths), grad_output


def formula(dtype: torch.dtype, q, k, v, sink, start, grad_output, window: int, gate=None) -> list[Tensor]:
    """Output and gradients, the sink being a key without a value, every step in `dtype`."""
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, sink)]
    q, k, v, sink = leaves
    B, S, H, D = q.shape
    group = H // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    t = torch.arange(S, device="cuda")
    visible = (t <= t[:, None]) & (t > t[:, None] - window) & (t >= start[:, None, :, None])
    logits = (torch.einsum("bshd,bthd->bhst", q, k) * D**-0.5).masked_fill(~visible, -torch.inf)
    p = torch.cat([logits, sink[:, None, None].expand(B, H, S, 1)], -1).softmax(-1)[..., :-1]
    output = torch.einsum("bhst,bthd->bshd", p, v)
    branch = output if gate is None else output * gate.to(dtype)[..., None]
    return [output.detach(), *torch.autograd.grad(branch, leaves, grad_output.to(dtype))]


def kernels(q, k, v, sink, start, grad_output, window: int) -> list[Tensor]:
    for shape in (q.shape, k.shape, v.shape, grad_output.shape):  # NaN where the allocator places the results
        poison = [torch.full(shape, torch.nan, device="cuda", dtype=q.dtype) for _ in range(2)]
        del poison
    output, lse = window_forward(q, k, v, sink, start, window=window)
    return [output, *window_backward(q, k, v, sink, start, output, lse, grad_output, window=window)]


def assert_as_exact(found: list[Tensor], exact: list[Tensor], dense: list[Tensor], names=NAMES) -> None:
    for name, x, truth, peer in zip(names, found, exact, dense, strict=True):
        error, allowed = ((y.double() - truth).norm() / truth.norm() for y in (x, peer))
        assert error <= 2 * allowed + 1e-6, f"{name}: {error:.2e} against {allowed:.2e}"  # 1e-6: both may be exact


@pytest.mark.parametrize("name", CASES)
def test_results_are_as_exact_as_dense_attention_and_repeat_bitwise(name):
    x, window = example(name), CASES[name][4]
    found = kernels(*x, window)
    assert_as_exact(found, formula(torch.float64, *x, window), formula(torch.bfloat16, *x, window))
    assert all(torch.equal(a, b) for a, b in zip(found, kernels(*x, window), strict=True))


def test_a_gate_reaches_keys_and_values():
    q, k, v, sink, start, grad_output = x = example("80B")
    gate = torch.rand(1, 64, q.shape[1], device="cuda").bfloat16().transpose(1, 2)
    exact, dense = (formula(dtype, *x, 128, gate)[2:4] for dtype in (torch.float64, torch.bfloat16))
    output, lse = window_forward(q, k, v, sink, start, window=128)
    delta = (output.float() * grad_output.float()).sum(-1).transpose(1, 2)
    found = window_key_gradients(q, k, v, start, lse, delta, grad_output, gate, window=128, out_dtype=torch.float32)
    assert_as_exact(list(found), exact, dense, ("dk", "dv"))


def test_chunks_of_queries_give_what_the_whole_sequence_gives():
    q, k, v, sink, start, grad_output = x = example("80B")
    output, dq, dk, dv, dsink = formula(torch.float64, *x, 128)
    dense = formula(torch.bfloat16, *x, 128)
    parts = []
    for first, stop in ((0, 301), (301, q.shape[1])):
        rows = q[:, first:stop], k, v, sink, start[:, first:stop]
        found, lse = window_forward(*rows, window=128, query_start=first)
        gradients = window_backward(*rows, found, lse, grad_output[:, first:stop], window=128, query_start=first)
        parts.append((found, *gradients))
    (output_a, dq_a, *others_a), (output_b, dq_b, *others_b) = parts
    found = [torch.cat([output_a, output_b], 1), torch.cat([dq_a, dq_b], 1)]
    found += [a.float() + b.float() for a, b in zip(others_a, others_b, strict=True)]
    assert_as_exact(found, [output, dq, dk, dv, dsink], dense)


def test_offsets_past_two_billion_elements():
    """The last tokens of two long sequences are what they are on their own."""
    S, tail = 131_200, 300
    torch.manual_seed(0)
    q, grad_output = (torch.randn(2, S, 64, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(2, S, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert q.numel() > 2**31
    start = torch.zeros(2, S, dtype=torch.int32, device="cuda")
    start[:, -tail:] = S - tail  # one document, so that nothing before it matters
    sink = torch.randn(64, device="cuda")
    output, lse = window_forward(q, k, v, sink, start, window=128)
    found = window_backward(q, k, v, sink, start, output, lse, grad_output, window=128)[:3]
    q, k, v, grad_output = (x[1:, -tail:] for x in (q, k, v, grad_output))
    start = torch.zeros(1, tail, dtype=torch.int32, device="cuda")
    alone, lse = window_forward(q, k, v, sink, start, window=128)
    gradients = window_backward(q, k, v, sink, start, alone, lse, grad_output, window=128)[:3]
    for x, y in zip((output, *found), (alone, *gradients), strict=True):
        assert_close(x[1:, -tail:], y, rtol=2**-6, atol=2**-6)  # BF16 sums over other tiles
