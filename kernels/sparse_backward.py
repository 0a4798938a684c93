"""Gradients of a sparse layer's attention without atomics: each sum has one owner and one order.

1. By query, what everything else needs: of each row the product of output and output gradient (delta), which is also
   the gradient of its gate; the log-sum-exp minus the gate's logarithm, so that exp(logit - it) is gate x probability;
   and the gradient of the sinks.
2. By key block and piece of the queries that chose it, as in the forward pass: a block's keys and values stay in place,
   the queries are gathered in ascending order, five matrix products for each step. dK and dV of the block leave as FP32
   partial sums of the piece; each choice leaves the dQ it causes at the token and its place in the token's list.
3. By query: the sum of its choices' dQ in their order, plus the dQ of the window.
4. By key block: the sum of the pieces' partial sums, in order. K' and V' of the window: the window kernel's own.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import sparse_hopper
from kernels.arguments import LOG2_E, branch_sinks, check_tensor, key_tiles, loadable
from kernels.selection import Index, masked_until, piece_entries, piece_of
from kernels.sparse_forward import (
    WINDOW_TILE,
    SparseOutput,
    check_sparse,
    choice_sizes,
    counted_from,
    gate_strides,
    head_sizes,
    heads_at_a_time,
    part_rows,
    pieces_grid,
    tile_sizes,
    tile_tokens,
    window_tiles,
)
from kernels.tiles import BINARY, load_keys, load_rows, query_gradient_step, visible_keys
from kernels.window import window_key_gradients

ROW_TOKENS = 32  # of one head, in a program of step 1


class SparseGradients(NamedTuple):
    """None where the layer has no window, sink or gate."""

    q: Tensor  # [B, S, H, D]
    k: Tensor  # [B, T, K, D] FP32, of the selected blocks
    v: Tensor  # [B, T, K, D'] FP32
    window_k: Tensor | None  # [B, T, K, D] in the dtype asked for
    window_v: Tensor | None  # [B, T, K, D']
    sinks: tuple[Tensor | None, Tensor | None]  # [H] FP32; of the block-sparse branch, then of the window
    gates: tuple[Tensor | None, Tensor | None]  # [B, S, H] FP32; likewise


class Rows(NamedTuple):
    """What step 1 leaves of a branch, [B, S, H] FP32."""

    delta: Tensor
    shifted_lse: Tensor  # base 2, minus the gate's logarithm
    dsink: Tensor | None  # [H]


def sparse_backward(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    blocks: Tensor,
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
    window_start: int = 0,
    window_dtype: torch.dtype | None = None,
) -> SparseGradients:
    """Gradients of all inputs of `sparse_forward`, whose result is `forward`.

    grads [B, S, H, D'] of the two gated branch outputs, before the gate is applied: one and the same tensor unless the
    caller applies gates of its own. The window's K and V get gradients in `window_dtype`, or their own. Raises
    KernelError.
    """
    check_sparse(q, kv, blocks, index, window_kv, document_start, gates, block, window, query_start, window_start)
    for grad in grads:
        check_tensor("grads", grad, tuple(forward.output.shape), q.dtype, q.device)
    sinks = branch_sinks(*sinks, q)
    q, k, v = map(loadable, (q, *kv))
    blocks, document_start = blocks.contiguous(), document_start.contiguous()
    grads = tuple(map(loadable, grads))
    sparse, near = _rows(forward, grads, sinks, gates, has_window=window_kv is not None)
    dq, dk, dv = _choice_gradients(
        q, k, v, blocks, index, window_kv, document_start, sparse, near, grads, block, window, query_start, window_start
    )
    window_dk = window_dv = None
    if window_kv is not None:
        lse, delta = forward.window_lse.transpose(1, 2), near.delta.transpose(1, 2)
        window_dk, window_dv = window_key_gradients(
            q, *window_kv, counted_from(window_start, document_start), lse, delta, grads[1], gates[1],
            window=window, query_start=query_start - window_start, out_dtype=window_dtype,
        )  # fmt: skip
    branches = (sparse, near)
    dgates = tuple(None if gate is None else rows.delta for gate, rows in zip(gates, branches, strict=True))
    dsinks = tuple(None if rows is None else rows.dsink for rows in branches)
    return SparseGradients(dq, dk, dv, window_dk, window_dv, dsinks, dgates)


def _rows(forward: SparseOutput, grads, sinks, gates, has_window: bool) -> tuple[Rows, Rows | None]:
    """Step 1 for both branches at once, because their output gradients mostly are one tensor."""
    B, S, H, Dv = forward.sparse.shape
    tiles = triton.cdiv(S, ROW_TOKENS)
    outputs = ((forward.sparse, forward.sparse_lse), (forward.window, forward.window_lse))
    branches, found = [], []
    for (output, lse), grad, sink, gate in zip(outputs[: 1 + has_window], grads, sinks, gates, strict=False):
        dsink = None if sink is None else lse.new_empty(B, tiles, H)
        rows = Rows(torch.empty_like(lse), torch.empty_like(lse), dsink)
        strides = (*grad.stride()[:3], *gate_strides((gate, None))[:3])
        branches.append((output, lse, grad, sink, gate, *rows, *strides))
        found.append(rows)
    sizes = {"TOKENS": ROW_TOKENS, "DV": Dv, "DV_PADDED": triton.next_power_of_2(Dv)}
    near = branches[1] if has_window else None
    _rows_kernel[(H, tiles, B)](branches[0], near, S, **sizes, HAS_WINDOW=has_window, num_warps=4)
    found = [rows._replace(dsink=None if rows.dsink is None else rows.dsink.sum((0, 1))) for rows in found]
    return found[0], found[1] if has_window else None


def _choice_gradients(
    q, k, v, blocks, index: Index, window_kv, document_start, sparse: Rows, near: Rows | None, grads,
    block: int, window: int, query_start: int, window_start: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq of both branches, dk and dv of the selected blocks; some KV heads at a time, so that partial sums fit."""
    (B, S, H, D), (_, T, K, Dv) = q.shape, v.shape
    window_k, window_v = map(loadable, window_kv or (k, v))
    near_start = counted_from(window_start, document_start)
    key_blocks, pieces = triton.cdiv(T, block), index.pieces.shape[1]
    sizes, rows = head_sizes(q, v), sparse.delta.new_empty  # FP32
    choices, sums = S * blocks.shape[3] * (H // K) * D * q.element_size(), pieces * block * (D + Dv) * 4
    heads = heads_at_a_time(B * K, choices + sums)
    dq, dk, dv = q.new_empty(q.shape), rows(k.shape), rows(v.shape)
    dq_parts = q.new_empty(heads, S, blocks.shape[3], H // K, D)
    dk_parts, dv_parts = (rows(heads, pieces, block, width) for width in (D, Dv))
    for first in range(0, B * K, heads):
        count = min(heads, B * K - first)
        _choice_parts(
            q, k, v, grads[0], sparse, document_start, index, (dq_parts, dk_parts, dv_parts), first, count,
            query_start, block, blocks.shape[3],
        )  # fmt: skip
        _query_kernel[(triton.cdiv(S, tile_tokens(H // K)), count)](
            q,
            key_tiles(window_k, WINDOW_TILE),
            key_tiles(window_v, WINDOW_TILE),
            near_start,
            blocks,
            grads[1],
            *(near[:2] if near else (None, None)),
            dq_parts,
            dq,
            first,
            S,
            query_start - window_start,
            D**-0.5,
            *q.stride()[:3],
            *grads[1].stride()[:3],
            **tile_sizes(q, k, blocks, window, near is not None),
            **sizes,
            num_warps=4,
            num_stages=2,
        )
        _add_pieces_kernel[(key_blocks, count)](
            dk_parts, dv_parts, index.first_piece, dk, dv, first, T, D**-0.5, index.cells, pieces,
            K=K, BLOCK=block, **sizes, num_warps=4,
        )  # fmt: skip
    return dq, dk, dv


def _choice_parts(
    q, k, v, grad, rows: Rows, document_start, index: Index, parts, first: int, count: int, query_start: int,
    block: int, selected: int,
) -> None:  # fmt: skip
    """Step 2 for `count` of the KV heads (of all sequences) from `first` on: fills parts of dQ, dK and dV."""
    (S, T), (K, group), scale = (q.shape[1], k.shape[1]), (k.shape[2], q.shape[2] // k.shape[2]), q.shape[3] ** -0.5
    grid, row_tensors = pieces_grid(index, count), (rows.shifted_lse, rows.delta, document_start)
    sizes = index.cells, triton.cdiv(T, block)
    if sparse_hopper.supported(block, q, k, v, grad):
        sparse_hopper.hopper_choice_gradients_kernel[grid](
            *(q, k, v, grad, *row_tensors, *index, *sizes, *parts, first, S, T, query_start, scale * LOG2_E),
            *(*q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:2]),
            q_h=q.stride(2),
            do_h=grad.stride(2),
            K=K,
            G=group,
            SELECTED=selected,
            PIECE=piece_entries(group),
            num_warps=4,
        )
        return
    widths = head_sizes(q, v)
    _choice_gradients_kernel[grid](
        *(q, key_tiles(k, block), key_tiles(v, block), grad, *row_tensors, *index, *sizes, *parts),
        *(first, S, query_start, scale, *q.stride()[:3], *grad.stride()[:3]),
        **choice_sizes(q, k, selected, block),
        **widths,
        num_warps=4 if widths["D_PADDED"] <= 128 else 8,  # for the registers
        num_stages=2,
    )


@triton.jit
def _rows_kernel(
    sparse, near, S, TOKENS: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """Step 1 for some tokens of one head."""
    _branch_rows(sparse, S, TOKENS, DV, DV_PADDED)
    if HAS_WINDOW:  # Triton cannot ask whether a tuple that has None in it is None
        _branch_rows(near, S, TOKENS, DV, DV_PADDED)


@triton.jit
def _branch_rows(branch, S, TOKENS: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr):
    """The sink's gradient: minus the sum of sink probability x gate x delta."""
    Out, LSE, Grad, Sink, Gate, Delta, Shifted, DSink, do_b, do_s, do_h, g_b, g_s, g_h = branch
    head, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(0)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    inside = token < S
    column = tl.arange(0, DV_PADDED)
    stored = inside[:, None] & (column < DV)[None, :]
    at = (b * S + token) * H + head
    output = tl.load(Out + at[:, None] * DV + column[None, :], mask=stored, other=0).to(tl.float32)
    grad = Grad + b * do_b + token.to(tl.int64) * do_s + head * do_h
    delta = tl.sum(tl.load(grad[:, None] + column[None, :], mask=stored, other=0).to(tl.float32) * output, 1)
    shifted = tl.load(LSE + at, mask=inside, other=float("inf")) * BINARY
    if Gate is not None:
        gate = tl.load(Gate + b * g_b + token.to(tl.int64) * g_s + head * g_h, mask=inside, other=0)
        shifted -= tl.math.log2(gate.to(tl.float32))
    tl.store(Delta + at, delta, mask=inside)
    tl.store(Shifted + at, shifted, mask=inside)
    if Sink is not None:
        each = tl.math.exp2(tl.load(Sink + head).to(tl.float32) * BINARY - shifted) * delta
        tl.store(DSink + (b * tl.num_programs(1) + tile) * H + head, -tl.sum(each, 0))


@triton.jit
def _choice_gradients_loop(
    dk, dv, k, v, Q, Grad, LSE, Delta, DocumentStart, Entries, DQParts, first, stop, key, head, query_start, scale,
    q_s, q_h, do_s, do_h,
    K: tl.constexpr, G: tl.constexpr, TOKENS: tl.constexpr, SELECTED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, TOKENS * G)
    column = tl.arange(0, D_PADDED)
    head += row % G
    entry = tl.load(Entries + first + row // G, mask=first + row // G < stop, other=0)
    for i in tl.range(first, stop, TOKENS, disable_licm=True):
        inside = i + row // G < stop
        token = entry // SELECTED
        q = load_rows(Q, token, head, inside, q_s, q_h, D, D_PADDED)
        grad = load_rows(Grad, token, head, inside, do_s, do_h, DV, DV_PADDED)
        at = token.to(tl.int64) * (K * G) + head
        # Behind the last entry q and grad are zero: there any finite p and delta will do, and p is at most 1 elsewhere.
        exponent = tl.dot(k, q.T) * scale - tl.load(LSE + at)[None, :]
        p = tl.math.exp2(tl.minimum(exponent, 0.0))  # gate x probability, [keys, rows]
        if MASKED:
            start = tl.load(DocumentStart + token)
            p = tl.where((key[:, None] <= query_start + token[None, :]) & (key[:, None] >= start[None, :]), p, 0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv)
        ds = (p * (tl.dot(v, grad.T) - tl.load(Delta + at)[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk)
        dq = tl.dot(k.T, ds)  # [D, rows]: this way round it takes half the registers that [rows, D] does
        to = DQParts + part_rows(entry, row, G)[None, :] * D + column[:, None]
        tl.store(to, dq.to(DQParts.dtype.element_ty), mask=inside[None, :] & (column < D)[:, None])
        entry = tl.load(Entries + i + TOKENS + row // G, mask=i + TOKENS + row // G < stop, other=0)
    return dk, dv


@triton.jit(do_not_specialize=["first_head"])
def _choice_gradients_kernel(
    Q, Keys, Values, Grad, LSE, Delta, DocumentStart, Entries, Bounds, FirstPiece, Pieces, cells, key_blocks,
    DQParts, DKParts, DVParts, first_head, S, query_start, scale, q_b, q_s, q_h, do_b, do_s, do_h,
    K: tl.constexpr, G: tl.constexpr, TOKENS: tl.constexpr, SELECTED: tl.constexpr, BLOCK: tl.constexpr,
    PIECE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
):  # fmt: skip
    """Step 2: what a piece of the queries that chose one block send to its keys and values, and get from them."""
    part, row = tl.program_id(1).to(tl.int64), first_head + tl.program_id(1)
    block, first, stop = piece_of(Bounds, FirstPiece, Pieces, row, cells, key_blocks, PIECE)
    if first == stop:
        return
    b, kv_head = row // K, row % K
    sequence = b.to(tl.int64)  # for offsets
    k = load_keys(Keys, b, block * BLOCK, kv_head, BLOCK, D_PADDED)
    v = load_keys(Values, b, block * BLOCK, kv_head, BLOCK, DV_PADDED)
    key = block * BLOCK + tl.arange(0, BLOCK)
    Q += sequence * q_b
    Grad += sequence * do_b
    LSE += sequence * S * (K * G)
    Delta += sequence * S * (K * G)
    DocumentStart += sequence * S
    Entries += row.to(tl.int64) * S * SELECTED
    DQParts += part * S * SELECTED * G * D
    masked = masked_until(DocumentStart, Entries, first, stop, block, query_start, SELECTED, BLOCK)
    dk = tl.zeros([BLOCK, D_PADDED], tl.float32)
    dv = tl.zeros([BLOCK, DV_PADDED], tl.float32)
    dk, dv = _choice_gradients_loop(
        dk, dv, k, v, Q, Grad, LSE, Delta, DocumentStart, Entries, DQParts, first, masked, key, kv_head * G,
        query_start, scale * BINARY, q_s, q_h, do_s, do_h, K, G, TOKENS, SELECTED, D, DV, D_PADDED, DV_PADDED, True,
    )  # fmt: skip
    dk, dv = _choice_gradients_loop(
        dk, dv, k, v, Q, Grad, LSE, Delta, DocumentStart, Entries, DQParts, masked, stop, key, kv_head * G,
        query_start, scale * BINARY, q_s, q_h, do_s, do_h, K, G, TOKENS, SELECTED, D, DV, D_PADDED, DV_PADDED, False,
    )  # fmt: skip
    line = (part * tl.num_programs(0) + tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    column, column_v = tl.arange(0, D_PADDED), tl.arange(0, DV_PADDED)
    tl.store(DKParts + line[:, None] * D + column[None, :], dk, mask=(column < D)[None, :])
    tl.store(DVParts + line[:, None] * DV + column_v[None, :], dv, mask=(column_v < DV)[None, :])


@triton.jit(do_not_specialize=["first_head"])
def _query_kernel(
    Q, WindowKeys, WindowValues, DocumentStart, Blocks, Grad, Delta, Shifted, DQParts, DQ, first_head, S, query_start,
    scale, q_b, q_s, q_h, do_b, do_s, do_h,
    K: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr, SELECTED: tl.constexpr,
    WINDOW: tl.constexpr, WINDOW_TILE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
):  # fmt: skip
    """Step 3: the gradient of a tile of neighbouring queries."""
    tile, part, kv_row = tl.program_id(0), tl.program_id(1).to(tl.int64), first_head + tl.program_id(1)
    b, kv_head = kv_row // K, kv_row % K
    sequence = b.to(tl.int64)  # for offsets
    ROWS: tl.constexpr = TILE * G
    row = tl.arange(0, ROWS)
    query, head = tile * TILE + row // G, kv_head * G + row % G
    inside = query < S
    at_row = (sequence * S + query) * (K * G) + head
    column = tl.arange(0, D_PADDED)
    stored = inside[:, None] & (column < D)[None, :]

    dq = tl.zeros([ROWS, D_PADDED], tl.float32)
    if HAS_WINDOW:
        position = query_start + query
        start = tl.load(DocumentStart + sequence * S + query, mask=inside, other=2**30)  # rows outside see nothing
        first_near = tl.maximum(start, position - WINDOW + 1)
        q = load_rows(Q + sequence * q_b, query, head, inside, q_s, q_h, D, D_PADDED)
        grad = load_rows(Grad + sequence * do_b, query, head, inside, do_s, do_h, DV, DV_PADDED)
        delta = tl.load(Delta + at_row, mask=inside, other=0)
        shifted = tl.load(Shifted + at_row, mask=inside, other=float("inf"))
        first, stop = window_tiles(S, query_start + tile * TILE, query_start, TILE, WINDOW, WINDOW_TILE)
        for j in tl.range(first, stop):
            k = load_keys(WindowKeys, b, j * WINDOW_TILE, kv_head, WINDOW_TILE, D_PADDED)
            v = load_keys(WindowValues, b, j * WINDOW_TILE, kv_head, WINDOW_TILE, DV_PADDED)
            visible = visible_keys(j * WINDOW_TILE, first_near, position, WINDOW_TILE)
            dq = query_gradient_step(dq, q, grad, k, v, shifted, delta, visible, scale * BINARY)

    Blocks += kv_row.to(tl.int64) * S * SELECTED
    DQParts += part * S * SELECTED * G * D
    for place in tl.range(0, SELECTED, num_stages=4):
        used = inside & (tl.load(Blocks + query * SELECTED + place, mask=inside, other=-1) >= 0)
        at = part_rows(query * SELECTED + place, row, G)
        mask = used[:, None] & stored
        dq += tl.load(DQParts + at[:, None] * D + column[None, :], mask=mask, other=0).to(tl.float32)
    tl.store(DQ + at_row[:, None] * D + column[None, :], (dq * scale).to(DQ.dtype.element_ty), mask=stored)


@triton.jit
def _add_parts(Parts, Out, FirstPiece, row_to, inside, block, blocks, cells, scale,
    BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    line, column = tl.arange(0, BLOCK), tl.arange(0, D_PADDED)
    used = (column < D)[None, :] & (line < BLOCK)[:, None]
    total = tl.zeros([BLOCK, D_PADDED], tl.float32)
    for cell in tl.range(block, cells, blocks):
        first = tl.load(FirstPiece + cell)
        part = Parts + first.to(tl.int64) * BLOCK * D
        for _ in tl.range(first, tl.load(FirstPiece + cell + 1)):
            total += tl.load(part + line[:, None] * D + column[None, :], mask=used, other=0)
            part += BLOCK * D
    tl.store(Out + row_to[:, None] * D + column[None, :], total * scale, mask=inside[:, None] & used)


@triton.jit(do_not_specialize=["first_head"])
def _add_pieces_kernel(
    DKParts, DVParts, FirstPiece, DK, DV_, first_head, T, scale, cells, pieces, K: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
):  # fmt: skip
    """Step 4: the pieces' sums for one key block, in order; a block that nobody chose gets zeros."""
    block, part, row = tl.program_id(0), tl.program_id(1).to(tl.int64), first_head + tl.program_id(1)
    blocks = tl.num_programs(0)
    FirstPiece += row.to(tl.int64) * (cells + 1)
    key = block * BLOCK + tl.arange(0, BLOCK)
    to = ((row // K).to(tl.int64) * T + key) * K + row % K
    DKParts += part * pieces * BLOCK * D
    DVParts += part * pieces * BLOCK * DV
    _add_parts(DKParts, DK, FirstPiece, to, key < T, block, blocks, cells, scale, BLOCK, D, D_PADDED)
    _add_parts(DVParts, DV_, FirstPiece, to, key < T, block, blocks, cells, 1.0, BLOCK, DV, DV_PADDED)
