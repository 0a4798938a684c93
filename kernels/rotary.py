"""From the output of the fused input projection to what attention reads: split, rotate, gate, in one pass over memory.

The projection's rows are grouped by KV head (`hysparse/attention.py`): y is [S, B, K, R] with, for a token and KV head,

    R = [query G x D | key D | value D | headwise gates, G each]        (key and value only where the layer owns them)

The forward writes the rotated query and key, the value and the sigmoid of each gate as tensors of their own; the
backward turns their gradients into dy. PyTorch takes a pass for each part, and keeps y alive behind every view of it:
here y can be freed, nothing is kept for the backward but the gates, and each number is read and written once.

Rotation pairs the halves (i, i + D/2) by the angle position x base^(-2i/D); backwards it is the same with the opposite
angle. Cosine and sine are read from the tables that a forward pass shares among its layers, so that this kernel and the
PyTorch path turn by the same numbers, wherever a token stands in its document or in a rank's chunk. That is cheap: the
programs of a token's KV heads follow each other and find its table row in the cache, and half a row is enough, since
its halves are equal. It comes to 2 % of the bytes, where computing the angles would take accurate range reductions up
to 131,072 for every KV head.

A program takes `TOKENS` tokens of one KV head, holds their cosines and sines in registers and walks over the heads.
Element-wise gates and a norm of query and key are not covered: such layers use the PyTorch path.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.arguments import DTYPES
from kernels.errors import KernelError

MAX_HEAD_DIM = 256
TILE = 1024  # tokens x D/2 of a program: 8 numbers a thread, loads and stores of 16 bytes
WARPS = 4


def rotary_split(
    y: Tensor, cos: Tensor, sin: Tensor, group: int, own_kv: bool, gates: int
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:
    """The input projection's output, split, rotated and with open gates, as a registered operator with a gradient.

    y [S, B, K, R], BF16 or FP16; cos and sin [S, B, 1, D] FP32 with equal halves; `gates` headwise gates of `group`
    rows each. Returns query [S, B, H, D], key and value [S, B, K, D] (None without `own_kv`) and the sigmoids
    [S, B, H]. Raises KernelError.
    """
    query, *rest = _rotary(y, cos, sin, group, own_kv, gates)
    key, value = (rest.pop(0), rest.pop(0)) if own_kv else (None, None)
    return query, key, value, rest


def rotary_split_forward(
    y: Tensor, cos: Tensor, sin: Tensor, group: int, own_kv: bool, gates: int
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, ...]]:
    """y [S, B, K, R]; cos, sin [S, B, 1, D] FP32 with equal halves; `gates` headwise gates of `group` rows each.

    Returns the rotated query [S, B, H, D] and key [S, B, K, D], the value [S, B, K, D] (None for both without `own_kv`)
    and the sigmoid of each gate [S, B, H]; all contiguous, in the dtype of y.
    """
    D = cos.shape[-1]
    rows = _rows(group, D, own_kv, gates)
    _check("y", y, cos, sin, D)
    if y.shape[3] != rows:
        asked = f"group={group}, head dimension {D}, own_kv={own_kv} and gates={gates}"
        raise KernelError(f"y has {y.shape[3]} rows for a KV head; {asked} make {rows}")
    S, B, K, _ = y.shape
    y = y.contiguous()
    query = y.new_empty(S, B, K * group, D)
    key, value = (y.new_empty(S, B, K, D) if own_kv else None for _ in range(2))
    opened = tuple(y.new_empty(S, B, K * group) for _ in range(gates))
    if y.numel():
        _forward[_grid(S * B, K, D)](
            y,
            *(cos, *cos.stride()[:2], sin, *sin.stride()[:2]),
            *(query, key, value, opened),
            *(S * B, B, K),
            **_constants(group, D, rows),
        )
    return query, key, value, opened


def rotary_split_backward(
    query_grad: Tensor,
    key_grad: Tensor | None,
    value_grad: Tensor | None,
    gate_grads: tuple[Tensor, ...],
    gates: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    group: int,
) -> Tensor:
    """Gradients of what the forward returned, in any strides, and its `gates`. Returns dy [S, B, K, R].

    dy has the dtype of `query_grad`; the others may have their own (FP32 sums of a shared key and value, for example).
    """
    S, B, H, D = query_grad.shape
    _check("query_grad", query_grad, cos, sin, D)
    own_kv = key_grad is not None
    if H % group:
        raise KernelError(f"query_grad has {H} heads, no multiple of group={group}")
    K = H // group
    for name, x in (("key_grad", key_grad), ("value_grad", value_grad)):
        if (x is not None) != own_kv:
            raise KernelError("key_grad and value_grad must both be given, or neither")
        if x is not None and tuple(x.shape) != (S, B, K, D):
            raise KernelError(f"{name} is {list(x.shape)}; it must be {[S, B, K, D]}")
    if len(gate_grads) != len(gates) or any(tuple(x.shape) != (S, B, H) for x in (*gate_grads, *gates)):
        shapes = [list(x.shape) for x in (*gate_grads, *gates)]
        raise KernelError(
            f"gate_grads and gates are {shapes}; each must be {[S, B, H]}, as many of one as of the other"
        )
    rows = _rows(group, D, own_kv, len(gates))
    query_grad, key_grad, value_grad = (
        x if x is None or x.stride()[2:] == (D, 1) else x.contiguous() for x in (query_grad, key_grad, value_grad)
    )
    y_grad = query_grad.new_empty(S, B, K, rows)
    if y_grad.numel():
        _backward[_grid(S * B, K, D)](
            y_grad,
            *(cos, *cos.stride()[:2], sin, *sin.stride()[:2]),
            *(query_grad, *query_grad.stride()[:2]),
            *(key_grad, *(key_grad.stride()[:2] if own_kv else (0, 0))),
            *(value_grad, *(value_grad.stride()[:2] if own_kv else (0, 0))),
            *(tuple(x.contiguous() for x in gate_grads), tuple(x.contiguous() for x in gates)),
            *(S * B, B, K),
            **_constants(group, D, rows),
        )
    return y_grad


@torch.library.custom_op("hysparse::rotary_split", mutates_args=())
def _rotary(y: Tensor, cos: Tensor, sin: Tensor, group: int, own_kv: bool, gates: int) -> list[Tensor]:
    query, key, value, opened = rotary_split_forward(y, cos, sin, group, own_kv, gates)
    return [x for x in (query, key, value, *opened) if x is not None]


@_rotary.register_fake
def _(y, cos, sin, group, own_kv, gates):
    S, B, K, _ = y.shape
    D = cos.shape[-1]
    heads = [K * group, *[K] * 2 * own_kv]
    return [*(y.new_empty(S, B, h, D) for h in heads), *(y.new_empty(S, B, K * group) for _ in range(gates))]


@torch.library.custom_op("hysparse::rotary_split_backward", mutates_args=())
def _rotary_backward(
    grads: list[Tensor], gates: list[Tensor], cos: Tensor, sin: Tensor, group: int, own_kv: bool
) -> Tensor:
    key_grad, value_grad = grads[1:3] if own_kv else (None, None)
    gate_grads = tuple(grads[1 + 2 * own_kv :])
    return rotary_split_backward(grads[0], key_grad, value_grad, gate_grads, tuple(gates), cos, sin, group)


@_rotary_backward.register_fake
def _(grads, gates, cos, sin, group, own_kv):
    S, B, H, D = grads[0].shape
    return grads[0].new_empty(S, B, H // group, group * D + 2 * D * own_kv + len(gates) * group)


def _rotary_context(ctx, inputs, output):
    _, cos, sin, ctx.group, ctx.own_kv, gates = inputs
    ctx.save_for_backward(cos, sin, *output[len(output) - gates :])


def _rotary_gradients(ctx, grads):
    cos, sin, *gates = ctx.saved_tensors
    return _rotary_backward(grads, gates, cos, sin, ctx.group, ctx.own_kv), None, None, None, None, None


_rotary.register_autograd(_rotary_gradients, setup_context=_rotary_context)


def _rows(group: int, head_dim: int, own_kv: bool, gates: int) -> int:
    return group * head_dim + 2 * head_dim * own_kv + gates * group


def _check(name: str, x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> None:
    if x.ndim != 4 or x.dtype not in DTYPES:
        raise KernelError(f"{name} is {x.dtype} {list(x.shape)}; it must be bfloat16 or float16 [S, B, heads, rows]")
    shape = [*x.shape[:2], 1, head_dim]
    for table_name, table in (("cos", cos), ("sin", sin)):
        if list(table.shape) != shape or table.dtype != torch.float32 or table.stride(-1) != 1:
            raise KernelError(f"{table_name} is {table.dtype} {list(table.shape)}; it must be float32 {shape}")
    if head_dim % 2 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise KernelError(f"cos has head dimension {head_dim}; it must be even and at most {MAX_HEAD_DIM}")


def _tokens(head_dim: int) -> int:
    """Tokens that a program takes."""
    return TILE // triton.next_power_of_2(head_dim // 2)


def _grid(tokens: int, kv_heads: int, head_dim: int) -> tuple[int]:
    return (triton.cdiv(tokens, _tokens(head_dim)) * kv_heads,)


def _constants(group: int, head_dim: int, rows: int) -> dict:
    """R is one of them, so that the compiler sees when every row starts on 16 bytes."""
    return {"G": group, "D": head_dim, "R": rows, "TOKENS": _tokens(head_dim), "num_warps": WARPS}


@triton.jit
def _place(tokens, B, K, TOKENS: tl.constexpr):
    """This program's tokens, counted along [S, B] and as (s, b), those that exist, and its KV head. KV heads of a token
    come next to each other."""
    token = (tl.program_id(0) // K).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    return token, token // B, token % B, token < tokens, tl.program_id(0) % K


@triton.jit
def _table(table, stride_s, stride_b, s, b, exists, D: tl.constexpr):
    """Rows of a cosine or sine table, first half: [TOKENS, D/2]."""
    column = tl.arange(0, triton.next_power_of_2(D // 2))[None, :]
    row = table + s[:, None] * stride_s + b[:, None] * stride_b
    return tl.load(row + column, mask=exists[:, None] & (column < D // 2), other=0.0)


@triton.jit
def _turn(source, target, cos, sin, exists, D: tl.constexpr):
    """Rotate one head: source and target point at its first number, one for each token [TOKENS, 1]."""
    half: tl.constexpr = D // 2
    column = tl.arange(0, triton.next_power_of_2(half))[None, :]
    mask = exists[:, None] & (column < half)
    first = tl.load(source + column, mask=mask).to(tl.float32)
    second = tl.load(source + half + column, mask=mask).to(tl.float32)
    tl.store(target + column, (first * cos - second * sin).to(target.dtype.element_ty), mask=mask)
    tl.store(target + half + column, (second * cos + first * sin).to(target.dtype.element_ty), mask=mask)


@triton.jit
def _copy(source, target, exists, D: tl.constexpr):
    column = tl.arange(0, triton.next_power_of_2(D))[None, :]
    mask = exists[:, None] & (column < D)
    tl.store(target + column, tl.load(source + column, mask=mask).to(target.dtype.element_ty), mask=mask)


@triton.jit
def _forward(
    y, cos, cos_s, cos_b, sin, sin_s, sin_b,
    query, key, value, gates,
    tokens, B, K,
    G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token, s, b, exists, kv_head = _place(tokens, B, K, TOKENS)
    cosine = _table(cos, cos_s, cos_b, s, b, exists, D)
    sine = _table(sin, sin_s, sin_b, s, b, exists, D)
    row = (token * K + kv_head)[:, None]  # of a [S, B, K, ...] tensor
    source = y + row * R
    if key is not None:
        _turn(source + G * D, key + row * D, cosine, sine, exists, D)
        _copy(source + (G + 1) * D, value + row * D, exists, D)
    head = tl.arange(0, triton.next_power_of_2(G))[None, :]
    mask = exists[:, None] & (head < G)
    for i in tl.static_range(len(gates)):
        gate = tl.load(source + R - (len(gates) - i) * G + head, mask=mask, other=0.0).to(tl.float32)
        tl.store(gates[i] + row * G + head, tl.sigmoid(gate).to(y.dtype.element_ty), mask=mask)
    for head in range(G):
        _turn(source + head * D, query + (row * G + head) * D, cosine, sine, exists, D)


@triton.jit
def _backward(
    y_grad, cos, cos_s, cos_b, sin, sin_s, sin_b,
    query_grad, query_s, query_b,
    key_grad, key_s, key_b,
    value_grad, value_s, value_b,
    gate_grads, gates,
    tokens, B, K,
    G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token, s, b, exists, kv_head = _place(tokens, B, K, TOKENS)
    cosine = _table(cos, cos_s, cos_b, s, b, exists, D)
    sine = -_table(sin, sin_s, sin_b, s, b, exists, D)
    row = (token * K + kv_head)[:, None]
    s, b = s[:, None], b[:, None]
    target = y_grad + row * R
    head = tl.arange(0, triton.next_power_of_2(G))[None, :]
    mask = exists[:, None] & (head < G)
    for i in tl.static_range(len(gates)):
        gate = tl.load(gates[i] + row * G + head, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(gate_grads[i] + row * G + head, mask=mask, other=0.0).to(tl.float32) * gate * (1 - gate)
        tl.store(target + R - (len(gates) - i) * G + head, grad.to(y_grad.dtype.element_ty), mask=mask)
    if key_grad is not None:
        _turn(key_grad + s * key_s + b * key_b + kv_head * D, target + G * D, cosine, sine, exists, D)
        _copy(value_grad + s * value_s + b * value_b + kv_head * D, target + (G + 1) * D, exists, D)
    source = query_grad + s * query_s + b * query_b + kv_head * G * D  # last: in this order nothing spills
    for head in range(G):
        _turn(source + head * D, target + head * D, cosine, sine, exists, D)
