"""Kernels around the experts' matrix products: tokens to rows and back, and SwiGLU with the routing weight inside.

All of them move memory and little else. A token's row is read once and written A times (`spread_rows`), or A rows are
read and summed in FP32 in a fixed order (`sum_rows`); each is the other's gradient. The rows of a token lie at
position[t, 0 ... A - 1], so that neither needs a sort or atomics; where that is -1 the row was dropped. The routing
weights of a token, or their gradients, travel with its rows: a kernel for them would take longer to start than to run.

The gradient of SwiGLU computes the activation again from its input. The routing weight's gradient is a sum over the
width of the row, which one program holds whole.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.errors import KernelError
from kernels.overlap import overlapping, wait_for_previous

WIDEST = 2048  # numbers of a row in one program
SWIGLU_TILE = 2048  # rows x width of a program
WARPS = 4


def spread_rows(
    x: Tensor, weights: Tensor | None, position: Tensor, kept: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """x [T, hidden], weights [T, A], position [T, A] int64, each row once.

    Returns the rows [N, hidden] and the weight of each [N]: N is T A, or `kept` where some drop.
    """
    _check("x", x, position, position.shape[0])
    x = x.contiguous()
    T, H = x.shape
    N = position.numel() if kept is None else kept
    rows, row_weights = x.new_empty(N, H), None
    if weights is not None:
        if weights.shape != position.shape:
            raise KernelError(f"weights are {list(weights.shape)}; they must be {list(position.shape)} as position is")
        weights, row_weights = weights.contiguous(), weights.new_empty(N)
    if rows.numel():
        width = min(WIDEST, triton.next_power_of_2(H))
        _spread[(T, triton.cdiv(H, width))](
            *(x, weights, position, rows, row_weights, H, position.shape[1], width),
            **overlapping(),
            num_warps=WARPS,
        )
    return rows, row_weights


def sum_rows(rows: Tensor, row_weights: Tensor | None, position: Tensor) -> tuple[Tensor, Tensor | None]:
    """rows [T A or fewer, hidden] -> [T, hidden], the sum over each token's A rows or those that are left.

    Also row_weights [T A or fewer] -> [T, A], 0 for a row that was dropped.
    """
    _check("rows", rows, position, min(len(rows), position.numel()))
    rows = rows.contiguous()
    T, A = position.shape
    H = rows.shape[1]
    x, weights = rows.new_empty(T, H), None
    if row_weights is not None:
        if row_weights.shape != rows.shape[:1]:
            raise KernelError(
                f"row_weights are {list(row_weights.shape)}; they must be [{len(rows)}], one for each row"
            )
        row_weights, weights = row_weights.contiguous(), row_weights.new_empty(T, A)
    if x.numel():
        width = min(WIDEST, triton.next_power_of_2(H))
        _sum[(T, triton.cdiv(H, width))](
            *(rows, row_weights, position, x, weights, H, A, width),
            **overlapping(),
            num_warps=WARPS,
        )
    return x, weights


def swiglu_forward(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [N, gate | up], weight [N] FP32 -> weight * silu(gate) * up [N, ffn]."""
    N, F = _check_swiglu(hidden, weight)
    hidden, output = hidden.contiguous(), hidden.new_empty(N, F)
    if output.numel():
        rows, width = _swiglu_tile(F)
        _swiglu[(triton.cdiv(N, rows),)](
            *(hidden, weight, output, N, F, rows, width),
            **overlapping(),
            num_warps=WARPS,
        )
    return output


def swiglu_backward(hidden: Tensor, weight: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `hidden` and `weight`."""
    N, F = _check_swiglu(hidden, weight)
    hidden, output_grad = hidden.contiguous(), output_grad.contiguous()
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)
    if output_grad.numel():
        rows, width = _swiglu_tile(F)
        _swiglu_backward[(triton.cdiv(N, rows),)](
            *(hidden, weight, output_grad, hidden_grad, weight_grad, N, F, rows, width),
            **overlapping(),
            num_warps=WARPS,
        )
    return hidden_grad, weight_grad


def _check(name: str, x: Tensor, position: Tensor, rows: int) -> None:
    if position.ndim != 2 or position.dtype != torch.int64 or not position.is_contiguous():
        raise KernelError(f"position is {position.dtype} {list(position.shape)}; it must be int64 [T, A], contiguous")
    if x.ndim != 2 or x.shape[0] != rows:
        raise KernelError(f"{name} is {list(x.shape)}; with position {list(position.shape)} it must be [{rows}, ...]")


def _check_swiglu(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    if hidden.ndim != 2 or hidden.shape[1] % 2:
        raise KernelError(f"hidden is {list(hidden.shape)}; it must be [N, gate and up]")
    if weight.shape != hidden.shape[:1] or weight.dtype != torch.float32 or not weight.is_contiguous():
        raise KernelError(f"weight is {weight.dtype} {list(weight.shape)}; it must be float32 [{hidden.shape[0]}]")
    return hidden.shape[0], hidden.shape[1] // 2


def _swiglu_tile(ffn: int) -> tuple[int, int]:
    width = min(SWIGLU_TILE, triton.next_power_of_2(ffn))
    return SWIGLU_TILE // width, width


@triton.jit
def _spread(
    x, weights, position, rows, row_weights,
    H: tl.constexpr, A: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    value = tl.load(x + token * H + column, mask=column < H)
    if weights is not None:  # waited for at the end only
        choice, place, moves = _choices(position, token, A)
        weight = tl.load(weights + token * A + choice, mask=moves)
    for a in tl.static_range(A):
        row = tl.load(position + token * A + a)
        tl.store(rows + row * H + column, value, mask=(column < H) & (row >= 0))
    if weights is not None:
        tl.store(row_weights + place, weight, mask=moves & (place >= 0))


@triton.jit
def _sum(
    rows, row_weights, position, x, weights,
    H: tl.constexpr, A: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    if weights is not None:  # waited for at the end only
        choice, place, moves = _choices(position, token, A)
        weight = tl.load(row_weights + place, mask=moves & (place >= 0), other=0.0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for a in tl.static_range(A):
        row = tl.load(position + token * A + a)
        total += tl.load(rows + row * H + column, mask=(column < H) & (row >= 0), other=0.0).to(tl.float32)
    tl.store(x + token * H + column, total.to(x.dtype.element_ty), mask=column < H)
    if weights is not None:
        tl.store(weights + token * A + choice, weight, mask=moves)


@triton.jit
def _choices(position, token, A: tl.constexpr):
    """The choices of a token, the row of each, and which of them exist, in the one program that moves their weights."""
    choice = tl.arange(0, triton.next_power_of_2(A))
    moves = (choice < A) & (tl.program_id(1) == 0)
    return choice, tl.load(position + token * A + choice, mask=moves, other=-1), moves


@triton.jit
def _swiglu(
    hidden, weight, output,
    N, F: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < N
    factor = tl.load(weight + row, mask=exists, other=0.0)[:, None]
    row = row[:, None]
    for start in tl.static_range(0, F, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        mask = exists[:, None] & (column < F)
        gate = tl.load(hidden + row * (2 * F) + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(hidden + row * (2 * F) + F + column, mask=mask, other=0.0).to(tl.float32)
        value = gate * tl.sigmoid(gate) * up * factor
        tl.store(output + row * F + column, value.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward(
    hidden, weight, output_grad, hidden_grad, weight_grad,
    N, F: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < N
    factor = tl.load(weight + row, mask=exists, other=0.0)[:, None]
    total = tl.zeros([ROWS], tl.float32)
    here = row[:, None]
    for start in tl.static_range(0, F, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        mask = exists[:, None] & (column < F)
        gate = tl.load(hidden + here * (2 * F) + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(hidden + here * (2 * F) + F + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(output_grad + here * F + column, mask=mask, other=0.0).to(tl.float32)
        open_ = tl.sigmoid(gate)
        silu = gate * open_
        total += tl.sum(grad * silu * up, 1)
        grad *= factor
        gate_grad = grad * up * (open_ + silu * (1 - open_))
        tl.store(hidden_grad + here * (2 * F) + column, gate_grad.to(hidden_grad.dtype.element_ty), mask=mask)
        up_grad = (grad * silu).to(hidden_grad.dtype.element_ty)
        tl.store(hidden_grad + here * (2 * F) + F + column, up_grad, mask=mask)
    tl.store(weight_grad + row, total, mask=exists)
