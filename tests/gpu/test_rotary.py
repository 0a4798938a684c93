"""The pass between the input projection and attention on a GPU: BF16 against FP64, and the same bits in every run."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels.rotary import rotary_split_backward, rotary_split_forward
from tests.kernels.test_rotary import document_starts, flat, split_and_rotate, tables

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LAYOUTS = {  # group, head dimension, own key and value, gates, KV heads
    "80B sparse layer": (16, 128, True, 2, 4),
    "80B full layer": (16, 128, True, 0, 4),
    "7B sparse layer": (4, 128, True, 2, 8),
    "192 wide": (4, 192, True, 2, 2),
    "tiny": (2, 32, True, 2, 2),
    "no key of its own": (8, 64, False, 1, 2),
}
ROUNDED_ONCE = dict(rtol=2**-8, atol=1e-5)  # computed in FP32, then rounded to BF16


def poison(*like: Tensor) -> None:
    """Leave NaN where the allocator will place the next tensors of these sizes."""
    for x in [torch.full_like(x, torch.nan) for x in like]:
        del x


def example(layout: str, S: int, B: int):
    group, head_dim, own_kv, gates, K = LAYOUTS[layout]
    rows = group * head_dim + 2 * head_dim * own_kv + gates * group
    starts = document_starts(S, B, "cuda")
    return torch.randn(S, B, K, rows, device="cuda").bfloat16(), starts, tables(starts, head_dim)


@pytest.mark.parametrize("S, B", [(1, 1), (333, 2), (1000, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_are_those_of_complex_multiplication(layout, S, B):
    group, head_dim, own_kv, gates, _ = LAYOUTS[layout]
    y, starts, (cos, sin) = example(layout, S, B)
    poison(y, y)
    found = rotary_split_forward(y, cos, sin, group, own_kv, gates)

    exact = y.double().requires_grad_()
    expected = flat(split_and_rotate(exact, starts, group, head_dim, own_kv, gates))
    assert_close([x.double() for x in flat(found)], expected, **ROUNDED_ONCE)

    grads = [torch.randn(B, S, *x.shape[2:], device="cuda").bfloat16().transpose(0, 1) for x in expected]
    (expected_grad,) = torch.autograd.grad(expected, exact, [x.double() for x in grads])
    key_grad, value_grad = grads[1:3] if own_kv else (None, None)
    arguments = (grads[0], key_grad, value_grad, tuple(grads[1 + 2 * own_kv :]), found[3], cos, sin, group)
    poison(y)
    y_grad = rotary_split_backward(*arguments)
    ungated = y.shape[3] - gates * group
    assert_close(y_grad[..., :ungated].double(), expected_grad[..., :ungated], **ROUNDED_ONCE)
    # g (1 - g) of a gate that was rounded to BF16: off by half a step of it, times gradients of up to 6
    assert_close(y_grad[..., ungated:].double(), expected_grad[..., ungated:], rtol=2**-8, atol=6 * 2**-9)
    assert torch.equal(y_grad, rotary_split_backward(*arguments))
    again = rotary_split_forward(y, cos, sin, group, own_kv, gates)
    assert all(torch.equal(*two) for two in zip(flat(found), flat(again), strict=True))


def test_offsets_beyond_two_billion_numbers():
    group, head_dim, K, S = 16, 128, 4, 240_000  # 240,000 x 4 x 2,336 > 2^31
    y = torch.randn(1, 1, K, 2336, device="cuda").bfloat16().expand(S, 1, K, 2336).contiguous()
    angle = torch.arange(S, device="cuda").float()[:, None, None, None].expand(S, 1, 1, head_dim) * 1e-3
    cos, sin = angle.cos(), angle.sin()
    outputs = rotary_split_forward(y, cos, sin, group, True, 2)
    y_grad = rotary_split_backward(*outputs, outputs[3], cos, sin, group)

    y, cos, sin = (x[-1:].contiguous() for x in (y, cos, sin))
    expected = rotary_split_forward(y, cos, sin, group, True, 2)
    assert_close([x[-1:] for x in flat(outputs)], flat(expected), rtol=0, atol=0)
    expected_grad = rotary_split_backward(*expected, expected[3], cos, sin, group)
    assert_close(y_grad[-1:], expected_grad, rtol=0, atol=0)


def test_far_positions_turn_as_pytorch_turns_them():
    """Position 131,071 of a document: the angle has few bits left, and both paths must lose the same ones."""
    from hysparse.attention import rotary_positions
    from kernels.reference import rotate

    starts = torch.zeros(1, 131_072, dtype=torch.int32, device="cuda")
    whole = SimpleNamespace(places=lambda tokens, device: torch.arange(tokens, device=device))  # no context parallelism
    positions = rotary_positions(starts, 128, 640_000.0, whole)
    y = torch.randn(131_072, 1, 1, 128, device="cuda").bfloat16()
    query, *_ = rotary_split_forward(y, positions.cos, positions.sin, 1, False, 0)
    # Products fused or not may round to neighbours, which are up to 2^-7 apart.
    assert_close(query, rotate(y, positions.cos, positions.sin), rtol=2**-7, atol=1e-6)
