"""The pass between the input projection and attention, against complex multiplication and autograd."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels.errors import KernelError
from kernels.rotary import rotary_split_backward, rotary_split_forward

BASE = 10000.0
LAYOUTS = {  # group, head dimension, own key and value, gates
    "full layer": (2, 32, True, 0),
    "full layer with a gate": (4, 16, True, 1),
    "sparse layer": (4, 32, True, 2),
    "sparse layer without window": (2, 16, False, 1),
    "multi-head": (1, 32, True, 2),
    "odd sizes": (3, 24, True, 2),
}
TOLERANCE = dict(rtol=1e-6, atol=1e-6)  # FP32: two products and a sum of numbers of size 1


def document_starts(S: int, B: int, device: str = "cpu") -> Tensor:
    """[B, S]: documents of length 1 and longer, cut elsewhere in each sequence."""
    starts = torch.zeros(B, S, dtype=torch.int32)
    for b in range(B):
        for cut in (3 + b, 4 + b, 11 + 2 * b):
            starts[b, cut:] = cut
    return starts.to(device)


def tables(document_start: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [S, B, 1, D], number by number."""
    B, S = document_start.shape
    frequency = torch.tensor([BASE ** (-2 * i / head_dim) for i in range(head_dim // 2)] * 2, dtype=torch.float64)
    place = torch.arange(S) - document_start.cpu()
    angle = (place.t()[:, :, None, None] * frequency).to(document_start.device)
    return angle.cos().float(), angle.sin().float()


def split_and_rotate(y: Tensor, document_start: Tensor, group: int, head_dim: int, own_kv: bool, gates: int):
    """What the kernel computes, with complex numbers: a pair turned by an angle is a product with exp(i angle)."""
    S, B, K, _ = y.shape
    sizes = [group * head_dim, *([head_dim] * 2 * own_kv), *([group] * gates)]
    query, *rest = y.split(sizes, dim=-1)
    frequency = torch.exp(
        -math.log(BASE) * torch.arange(0, head_dim, 2, device=y.device, dtype=torch.float64) / head_dim
    )
    place = torch.arange(S, device=y.device) - document_start
    turn = torch.polar(torch.ones_like(frequency), place.t()[:, :, None, None] * frequency)

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.complex(*x.double().chunk(2, dim=-1)) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    query = rotated(query.reshape(S, B, K * group, head_dim))
    key = value = None
    if own_kv:
        key, value, *rest = rest
        key, value = rotated(key), value.double()
    return query, key, value, tuple(gate.double().reshape(S, B, K * group).sigmoid() for gate in rest)


def example(layout: str, S: int = 37, B: int = 2, K: int = 2, seed: int = 0):
    group, head_dim, own_kv, gates = LAYOUTS[layout]
    rows = group * head_dim + 2 * head_dim * own_kv + gates * group
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(S, B, K, rows, generator=generator), document_starts(S, B)


def flat(outputs) -> list[Tensor]:
    query, key, value, gates = outputs
    return [x for x in (query, key, value, *gates) if x is not None]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splitting_and_rotating_is_complex_multiplication(layout):
    group, head_dim, own_kv, gates = LAYOUTS[layout]
    y, starts = example(layout)
    found = rotary_split_forward(y, *tables(starts, head_dim), group, own_kv, gates)
    assert all(x.is_contiguous() for x in flat(found))
    expected = split_and_rotate(y, starts, *LAYOUTS[layout])
    assert_close(flat(found), [x.float() for x in flat(expected)], **TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_backward_is_the_gradient_and_takes_any_strides(layout):
    group, head_dim, own_kv, _ = LAYOUTS[layout]
    y, starts = example(layout)
    y.requires_grad_()
    outputs = flat(split_and_rotate(y, starts, *LAYOUTS[layout]))
    grads = [torch.randn(x.shape, dtype=torch.float32) for x in outputs]
    (expected,) = torch.autograd.grad(outputs, y, [x.double() for x in grads])

    batch_major = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in grads]  # as attention returns them
    query_grad, *rest = batch_major
    key_grad, value_grad = rest[:2] if own_kv else (None, None)
    gate_grads = tuple(rest[2 * own_kv :])
    gates = tuple(x.detach().float() for x in outputs[1 + 2 * own_kv :])
    found = rotary_split_backward(query_grad, key_grad, value_grad, gate_grads, gates, *tables(starts, head_dim), group)
    assert_close(found, expected, **TOLERANCE)


def test_a_single_token_is_not_turned():
    y, starts = example("sparse layer", S=1, B=1)
    query, key, value, _ = rotary_split_forward(y, *tables(starts, 32), 4, True, 2)
    assert_close(query.view(-1), y[..., :128].reshape(-1), rtol=0, atol=0)
    assert_close(torch.cat([key, value], dim=-1), y[..., 128:192], rtol=0, atol=0)


def test_tables_of_any_strides_are_read():
    y, starts = example("sparse layer")
    plain = tables(starts, 32)
    batch_major = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in plain]
    expected, found = (flat(rotary_split_forward(y, *x, 4, True, 2)) for x in (plain, batch_major))
    assert_close(found, expected, rtol=0, atol=0)


def test_wrong_arguments_are_named():
    y, starts = example("sparse layer")
    cos, sin = tables(starts, 32)
    with pytest.raises(KernelError, match="y has 200 rows for a KV head.*gates=1 make 196"):
        rotary_split_forward(y, cos, sin, 4, True, 1)
    with pytest.raises(KernelError, match="sin is torch.float64"):
        rotary_split_forward(y, cos, sin.double(), 4, True, 2)
    with pytest.raises(KernelError, match="value_grad must both be given"):
        rotary_split_backward(y[..., :128].reshape(37, 2, 8, 32), y[..., :32], None, (), (), cos, sin, 4)
