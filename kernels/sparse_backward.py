"""Gradients of a sparse layer's attention, in three kernels without atomics: each sum has one owner and one order.

The gradient of the queries goes by query tiles like the forward pass, over the same union of selected blocks and the
same window, both branches into one sum. That kernel first computes what the others need: for each row the product of
output and output gradient (delta), which is also the gradient of its gate; the log-sum-exp minus the gate's logarithm,
so that exp(logit - it) is gate x probability; and the gradient of the sinks.

The gradient of the selected K and V goes by key block: a work item of the inverted index loads one block and gathers
the queries that chose it, in ascending order, four matrix products for each. Work items of a block leave FP32 partial
sums that a last kernel adds up in order. The gradient of the window's K' and V' is the window kernel's own.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.arguments import key_tiles, loadable
from kernels.selection import Index
from kernels.sparse_forward import (
    WINDOW_TILE,
    SparseOutput,
    gate_strides,
    layout,
    window_tiles,
)
from kernels.tiles import BINARY, key_gradient_step, load_keys, load_rows, query_gradient_step, visible_keys
from kernels.window import window_key_gradients

ITEM_ROWS = 64  # gathered queries x heads in one step of a work item


class SparseGradients(NamedTuple):
    """None where the layer has no window, sink or gate."""

    q: Tensor  # [B, S, H, D]
    k: Tensor  # [B, T, K, D] FP32, of the selected blocks
    v: Tensor  # [B, T, K, D'] FP32
    window_k: Tensor | None  # [B, T, K, D] in the dtype asked for
    window_v: Tensor | None  # [B, T, K, D']
    sinks: tuple[Tensor | None, Tensor | None]  # [H] FP32; of the block-sparse branch, then of the window
    gates: tuple[Tensor | None, Tensor | None]  # [B, S, H] FP32; likewise


def sparse_backward(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    index: Index,
    window_kv: tuple[Tensor, Tensor] | None,
    document_start: Tensor,
    sinks: tuple[Tensor | None, Tensor | None],
    gates: tuple[Tensor | None, Tensor | None],
    forward: SparseOutput,
    grads: tuple[Tensor, Tensor],
    *,
    block: int,
    window: int,
    query_start: int = 0,
    window_dtype: torch.dtype | None = None,
) -> SparseGradients:
    """Gradients of all inputs of `sparse_forward`, whose result is `forward`.

    grads [B, S, H, D'] of the two gated branch outputs, before the gate is applied: one and the same tensor unless the
    caller applies gates of its own. The window's K and V get gradients in `window_dtype`, or their own.
    """
    B, S, H, _ = q.shape
    has_window = window_kv is not None
    k, v, window_k, window_v = map(loadable, (*kv, *(window_kv or kv)))
    K, group = k.shape[2], H // k.shape[2]
    tiles = index.union.shape[2]
    rows = forward.sparse_lse.new_empty  # FP32

    dq = q.new_empty(q.shape)
    shifted_lse, sparse_delta = rows(B, S, H), rows(B, S, H)
    window_delta = rows(B, S, H) if has_window else None
    dsinks = [None if sink is None else rows(B, tiles, H) for sink in sinks]
    grads = tuple(grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
    _query_kernel[(tiles, K, B)](
        q,
        key_tiles(k, block),
        key_tiles(v, block),
        key_tiles(window_k, WINDOW_TILE),
        key_tiles(window_v, WINDOW_TILE),
        document_start,
        *index[:3],
        *sinks,
        *gates,
        *grads,
        *forward[1:],
        dq,
        shifted_lse,
        sparse_delta,
        window_delta,
        *dsinks,
        S,
        query_start,
        q.shape[3] ** -0.5,
        *q.stride()[:3],
        *gate_strides(gates),
        *grads[0].stride()[:3],
        *grads[1].stride()[:3],
        ONE_GRAD=grads[0] is grads[1],
        **layout(q, v, group, index, block, window, has_window),
        num_warps=4,
        num_stages=2,
    )
    dk, dv = _selected_key_gradients(
        q, k, v, index, document_start, shifted_lse, sparse_delta, grads[0], block, query_start
    )
    window_dk = window_dv = None
    if has_window:
        window_dk, window_dv = window_key_gradients(
            q, window_k, window_v, document_start, forward.window_lse.transpose(1, 2), window_delta.transpose(1, 2),
            grads[1], gates[1], window=window, query_start=query_start, out_dtype=window_dtype,
        )  # fmt: skip
    dgates = [None if gate is None else delta for gate, delta in zip(gates, (sparse_delta, window_delta), strict=True)]
    dsinks = [None if dsink is None else dsink.sum((0, 1)) for dsink in dsinks]
    return SparseGradients(dq, dk, dv, window_dk, window_dv, tuple(dsinks), tuple(dgates))


def _selected_key_gradients(
    q, k, v, index: Index, document_start, lse, delta, grad, block: int, query_start: int
) -> tuple[Tensor, Tensor]:
    (B, S, H, D), (_, T, K, Dv) = q.shape, v.shape
    group, items, key_blocks = H // K, index.work.shape[0], triton.cdiv(T, block)
    dk_parts, dv_parts = lse.new_empty(items, block, D), lse.new_empty(items, block, Dv)
    sizes = {"D": D, "DV": Dv, "D_PADDED": triton.next_power_of_2(D), "DV_PADDED": triton.next_power_of_2(Dv)}
    _key_kernel[(items,)](
        q,
        key_tiles(k, block),
        key_tiles(v, block),
        grad,
        lse,
        delta,
        document_start,
        index.tokens,
        index.work,
        dk_parts,
        dv_parts,
        S,
        K,
        key_blocks,
        index.tokens.shape[1],
        query_start,
        D**-0.5,
        *q.stride()[:3],
        *grad.stride()[:3],
        G=group,
        TOKENS=max(ITEM_ROWS // group, 1),
        BLOCK=block,
        **sizes,
        num_warps=4,
        num_stages=3,
    )
    dk, dv = lse.new_empty(k.shape), lse.new_empty(v.shape)
    _add_parts_kernel[(B * K * key_blocks,)](
        dk_parts, dv_parts, index.first_item, dk, dv, T, K, key_blocks, BLOCK=block, **sizes, num_warps=4
    )
    return dk, dv


@triton.jit
def _prepare_rows(
    grad, Out, at, stored, LSE, lse_at, Gate, gate_at, Sink, DSink, sink_at, head, inside,
    ROWS: tl.constexpr, TILE: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """What one branch of a tile needs: delta, and the log-sum-exp (base 2) minus the gate's logarithm.

    Stores the tile's part of the sink's gradient: minus the sum over its tokens of sink probability x gate x delta.
    """
    output = tl.load(Out + at, mask=stored, other=0).to(tl.float32)
    delta = tl.sum(grad.to(tl.float32) * output, 1)
    shifted = tl.load(LSE + lse_at, mask=inside, other=float("inf")) * BINARY
    if Gate is not None:
        shifted -= tl.math.log2(tl.load(Gate + gate_at, mask=inside, other=0).to(tl.float32))
    if Sink is not None:
        each = tl.math.exp2(tl.load(Sink + head).to(tl.float32) * BINARY - shifted) * delta
        tl.store(DSink + sink_at + tl.arange(0, G), -tl.sum(each.reshape(TILE, G), 0))
    return delta, shifted


@triton.jit
def _union_query_loop(
    dq, q, grad, Keys, Values, Union, Tokens, first, stop, lse, delta, token, position, start, b, kv_head, scale,
    D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    for u in tl.range(first, stop):
        block = tl.load(Union + u)
        bits = tl.load(Tokens + u)
        k = load_keys(Keys, b, block * BLOCK, kv_head, BLOCK, D_PADDED)
        v = load_keys(Values, b, block * BLOCK, kv_head, BLOCK, DV_PADDED)
        visible = None if WHOLE else visible_keys(block * BLOCK, start, position, BLOCK)
        pivot = tl.where(((bits >> token) & 1) != 0, lse, float("inf"))
        dq = query_gradient_step(dq, q, grad, k, v, pivot, delta, visible, scale)
    return dq


@triton.jit
def _query_kernel(
    Q, Keys, Values, WindowKeys, WindowValues, DocumentStart, Union, Tokens, Size, SparseSink, WindowSink,
    SparseGate, WindowGate, SparseGrad, WindowGrad, SparseOut, WindowOut, SparseLSE, WindowLSE,
    DQ, ShiftedLSE, SparseDelta, WindowDelta, DSparseSink, DWindowSink, S, query_start, scale,
    q_b, q_s, q_h, sg_b, sg_s, sg_h, wg_b, wg_s, wg_h, do_b, do_s, do_h, wdo_b, wdo_s, wdo_h,
    ONE_GRAD: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
    TILE: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, WINDOW_TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, and per row what the key kernels need."""
    tile, kv_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = b.to(tl.int64)  # for offsets
    KV_HEADS = tl.num_programs(1)
    H = KV_HEADS * G
    ROWS: tl.constexpr = TILE * G
    row = tl.arange(0, ROWS)
    token, head = row // G, kv_head * G + row % G
    query = tile * TILE + token
    inside = query < S
    position = query_start + query
    start = tl.load(DocumentStart + sequence * S + query, mask=inside, other=2**30)
    q = load_rows(Q + sequence * q_b, query, head, inside, q_s, q_h, D, D_PADDED)
    grad = load_rows(SparseGrad + sequence * do_b, query, head, inside, do_s, do_h, DV, DV_PADDED)
    d = tl.arange(0, DV_PADDED)
    at = ((sequence * S + query[:, None]) * H + head[:, None]) * DV + d[None, :]
    stored = inside[:, None] & (d < DV)[None, :]
    row_at = (sequence * S + query) * H + head
    sink_at = (sequence * tl.num_programs(0) + tile) * H + kv_head * G
    delta, shifted = _prepare_rows(
        grad, SparseOut, at, stored, SparseLSE, row_at,
        SparseGate, sequence * sg_b + query.to(tl.int64) * sg_s + head * sg_h,
        SparseSink, DSparseSink, sink_at, head, inside, ROWS, TILE, G,
    )  # fmt: skip
    tl.store(SparseDelta + row_at, delta, mask=inside)
    tl.store(ShiftedLSE + row_at, shifted, mask=inside)
    if HAS_WINDOW:
        window_grad = grad
        if not ONE_GRAD:
            window_grad = load_rows(WindowGrad + sequence * wdo_b, query, head, inside, wdo_s, wdo_h, DV, DV_PADDED)
        window_delta, window_shifted = _prepare_rows(
            window_grad, WindowOut, at, stored, WindowLSE, row_at,
            WindowGate, sequence * wg_b + query.to(tl.int64) * wg_s + head * wg_h,
            WindowSink, DWindowSink, sink_at, head, inside, ROWS, TILE, G,
        )  # fmt: skip
        tl.store(WindowDelta + row_at, window_delta, mask=inside)

    dq = tl.zeros([ROWS, D_PADDED], tl.float32)
    scale_2 = scale * BINARY
    lists = (sequence * KV_HEADS + kv_head) * tl.num_programs(0) + tile
    n_whole, n_all = tl.load(Size + lists * 2), tl.load(Size + lists * 2 + 1)
    Union += lists * CAPACITY
    Tokens += lists * CAPACITY
    dq = _union_query_loop(
        dq, q, grad, Keys, Values, Union, Tokens, 0, n_whole, shifted, delta, token, position, start,
        b, kv_head, scale_2, D_PADDED, DV_PADDED, BLOCK, True,
    )  # fmt: skip
    dq = _union_query_loop(
        dq, q, grad, Keys, Values, Union, Tokens, n_whole, n_all, shifted, delta, token, position, start,
        b, kv_head, scale_2, D_PADDED, DV_PADDED, BLOCK, False,
    )  # fmt: skip
    if HAS_WINDOW:
        first_near = tl.maximum(start, position - WINDOW + 1)
        first, stop = window_tiles(S, query_start + tile * TILE, query_start, TILE, WINDOW, WINDOW_TILE)
        for j in tl.range(first, stop):
            k = load_keys(WindowKeys, b, j * WINDOW_TILE, kv_head, WINDOW_TILE, D_PADDED)
            v = load_keys(WindowValues, b, j * WINDOW_TILE, kv_head, WINDOW_TILE, DV_PADDED)
            visible = visible_keys(j * WINDOW_TILE, first_near, position, WINDOW_TILE)
            dq = query_gradient_step(dq, q, window_grad, k, v, window_shifted, window_delta, visible, scale_2)

    column = tl.arange(0, D_PADDED)
    to = ((sequence * S + query[:, None]) * H + head[:, None]) * D + column[None, :]
    tl.store(DQ + to, (dq * scale).to(DQ.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])


@triton.jit
def _item_loop(
    dk, dv, k, v, Q, Grad, LSE, Delta, DocumentStart, Tokens, first, stop, key, head, H, query_start, scale,
    q_s, q_h, do_s, do_h,
    G: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr,
    DV_PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, TOKENS * G)
    head += row % G
    for i in tl.range(first, stop, TOKENS):
        entry = i + row // G
        inside = entry < stop
        token = tl.load(Tokens + entry, mask=inside, other=0)
        q = load_rows(Q, token, head, inside, q_s, q_h, D, D_PADDED)
        grad = load_rows(Grad, token, head, inside, do_s, do_h, DV, DV_PADDED)
        visible = None
        if MASKED:
            start = tl.load(DocumentStart + token, mask=inside, other=2**30)
            visible = (key[:, None] <= query_start + token[None, :]) & (key[:, None] >= start[None, :])
        # Behind the last entry q and grad are zero, so that any finite log-sum-exp and delta will do.
        at = token.to(tl.int64) * H + head
        dk, dv = key_gradient_step(dk, dv, k, v, q, grad, LSE + at, Delta + at, visible, scale)
    return dk, dv


@triton.jit
def _key_kernel(
    Q, Keys, Values, Grad, LSE, Delta, DocumentStart, Tokens, Work, DKParts, DVParts,
    S, KV_HEADS, key_blocks, tokens_row, query_start, scale, q_b, q_s, q_h, do_b, do_s, do_h,
    G: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
):  # fmt: skip
    """One work item: the gradient that a range of a block's queries sends to its keys and values."""
    item = tl.program_id(0).to(tl.int64)
    owner = tl.load(Work + item * 3)
    first, stop = tl.load(Work + item * 3 + 1), tl.load(Work + item * 3 + 2)
    if first == stop:
        return
    lists, block = owner // key_blocks, owner % key_blocks
    kv_head, b = lists % KV_HEADS, (lists // KV_HEADS).to(tl.int64)
    H = KV_HEADS * G
    k = load_keys(Keys, b.to(tl.int32), block * BLOCK, kv_head, BLOCK, D_PADDED)
    v = load_keys(Values, b.to(tl.int32), block * BLOCK, kv_head, BLOCK, DV_PADDED)
    key = block * BLOCK + tl.arange(0, BLOCK)
    Tokens += lists.to(tl.int64) * tokens_row
    Q += b * q_b
    Grad += b * do_b
    LSE += b * S * H
    Delta += b * S * H
    DocumentStart += b * S

    # Queries inside the block see it in part. They come first; and where a document begins inside it, all are masked.
    # Masks take registers: half the rows at a time leaves enough.
    FEW_TOKENS: tl.constexpr = max(TOKENS // 2, 1)
    is_cut = tl.load(DocumentStart + tl.load(Tokens + stop - 1)) > block * BLOCK
    has_diagonal = query_start + tl.load(Tokens + first) < (block + 1) * BLOCK
    masked = tl.where(has_diagonal, tl.minimum(first + BLOCK, stop), first)
    masked = tl.where(is_cut, stop, masked)
    dk = tl.zeros([BLOCK, D_PADDED], tl.float32)
    dv = tl.zeros([BLOCK, DV_PADDED], tl.float32)
    dk, dv = _item_loop(
        dk, dv, k, v, Q, Grad, LSE, Delta, DocumentStart, Tokens, first, masked, key, kv_head * G, H, query_start,
        scale * BINARY, q_s, q_h, do_s, do_h, G, FEW_TOKENS, D, DV, D_PADDED, DV_PADDED, True,
    )  # fmt: skip
    dk, dv = _item_loop(
        dk, dv, k, v, Q, Grad, LSE, Delta, DocumentStart, Tokens, masked, stop, key, kv_head * G, H, query_start,
        scale * BINARY, q_s, q_h, do_s, do_h, G, TOKENS, D, DV, D_PADDED, DV_PADDED, False,
    )  # fmt: skip

    line = item * BLOCK + tl.arange(0, BLOCK)
    column, column_v = tl.arange(0, D_PADDED), tl.arange(0, DV_PADDED)
    tl.store(DKParts + line[:, None] * D + column[None, :], dk * scale, mask=(column < D)[None, :])
    tl.store(DVParts + line[:, None] * DV + column_v[None, :], dv, mask=(column_v < DV)[None, :])


@triton.jit
def _add_parts(Parts, first, stop, Out, to, inside, BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    line, column = tl.arange(0, BLOCK), tl.arange(0, D_PADDED)
    used = (column < D)[None, :] & (line < BLOCK)[:, None]
    total = tl.zeros([BLOCK, D_PADDED], tl.float32)
    Parts += first.to(tl.int64) * BLOCK * D
    for i in tl.range(0, stop - first):
        total += tl.load(Parts + (i * BLOCK + line)[:, None] * D + column[None, :], mask=used, other=0)
    tl.store(Out + to[:, None] * D + column[None, :], total, mask=inside[:, None] & used)


@triton.jit
def _add_parts_kernel(
    DKParts, DVParts, FirstItem, DK, DV_, T, KV_HEADS, key_blocks, BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
):  # fmt: skip
    """Add up the work items of one key block, in order; a block that nobody chose gets zeros."""
    owner = tl.program_id(0)
    lists, block = owner // key_blocks, owner % key_blocks
    kv_head, b = lists % KV_HEADS, (lists // KV_HEADS).to(tl.int64)
    first, stop = tl.load(FirstItem + owner), tl.load(FirstItem + owner + 1)
    key = block * BLOCK + tl.arange(0, BLOCK)
    to = (b * T + key) * KV_HEADS + kv_head
    _add_parts(DKParts, first, stop, DK, to, key < T, BLOCK, D, D_PADDED)
    _add_parts(DVParts, first, stop, DV_, to, key < T, BLOCK, DV, DV_PADDED)
