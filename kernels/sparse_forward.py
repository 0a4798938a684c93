"""A sparse layer's attention in one kernel: selected key blocks and a window, each with sink and gate (eq. 4 to 9).

A program owns a tile of neighbouring queries with the G heads of one KV head, packed into the rows of one matrix. It
walks the union of the tile's selected blocks (`selection.py`): a block is loaded once for all tokens that chose it, and
the rows of the others take infinity as the pivot of their softmax, so that they add exactly zero without a mask on the
elements. Blocks that a token sees in part (its own, or one with a document's edge) come last and are masked. Then come
the few key tiles of the window with the layer's own K', V' and a softmax of their own. One gated output is written;
both branches' outputs and log-sum-exps are kept for the backward pass.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.arguments import LOG2_E, key_tiles, loadable
from kernels.selection import Index, tile_tokens
from kernels.tiles import finish_softmax, load_keys, load_rows, softmax_step, start_softmax, visible_keys

WINDOW_TILE = 64  # keys


class SparseOutput(NamedTuple):
    """D' is the head dimension of the values. The window's tensors are empty where the layer has no window."""

    output: Tensor  # [B, S, H, D'] both branches, gated
    sparse: Tensor  # [B, S, H, D'] before its gate
    window: Tensor  # [B, S, H, D'] before its gate
    sparse_lse: Tensor  # [B, S, H] FP32, natural logarithm, the sink included
    window_lse: Tensor  # [B, S, H] FP32, likewise


def sparse_forward(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    index: Index,
    window_kv: tuple[Tensor, Tensor] | None,
    document_start: Tensor,
    sinks: tuple[Tensor | None, Tensor | None],
    gates: tuple[Tensor | None, Tensor | None],
    *,
    block: int,
    window: int,
    query_start: int = 0,
) -> SparseOutput:
    """o = gate * SA(q, K, V) + gate' * SWA(q, K', V').

    q [B, S, H, D]; kv and window_kv: K [B, T, K, D] and V [B, T, K, D'] of the branch, window_kv None for a layer
    without window; index of the selection; document_start [B, S]. Of the block-sparse branch, then of the window:
    sinks [H] and gates [B, S, H], None where there is none.
    """
    B, S, H, _ = q.shape
    has_window = window_kv is not None
    k, v, window_k, window_v = map(loadable, (*kv, *(window_kv or kv)))
    K, Dv, group = k.shape[2], v.shape[3], H // k.shape[2]
    output, sparse = q.new_empty(B, S, H, Dv), q.new_empty(B, S, H, Dv)
    sparse_lse = q.new_empty(B, S, H, dtype=torch.float32)
    swa = q.new_empty((B, S, H, Dv) if has_window else 0)
    window_lse = q.new_empty((B, S, H) if has_window else 0, dtype=torch.float32)
    tile = tile_tokens(group)
    _forward_kernel[(triton.cdiv(S, tile), K, B)](
        q,
        key_tiles(k, block),
        key_tiles(v, block),
        key_tiles(window_k, WINDOW_TILE),
        key_tiles(window_v, WINDOW_TILE),
        document_start,
        *index[:3],
        *sinks,
        *gates,
        output,
        sparse,
        swa,
        sparse_lse,
        window_lse,
        S,
        query_start,
        q.shape[3] ** -0.5 * LOG2_E,
        *q.stride()[:3],
        *gate_strides(gates),
        **layout(q, v, group, index, block, window, has_window),
        num_warps=4,
        num_stages=3,
    )
    return SparseOutput(output, sparse, swa, sparse_lse, window_lse)


def gate_strides(gates: tuple[Tensor | None, Tensor | None]) -> list[int]:
    return [stride for gate in gates for stride in ((0, 0, 0) if gate is None else gate.stride())]


def layout(q: Tensor, v: Tensor, group: int, index: Index, block: int, window: int, has_window: bool) -> dict:
    """The compile-time arguments that the forward kernel and that of the query gradient share."""
    return {
        "G": group,
        "D": q.shape[3],
        "DV": v.shape[3],
        "D_PADDED": triton.next_power_of_2(q.shape[3]),
        "DV_PADDED": triton.next_power_of_2(v.shape[3]),
        "TILE": tile_tokens(group),
        "CAPACITY": index.union.shape[3],
        "BLOCK": block,
        "WINDOW": window,
        "WINDOW_TILE": WINDOW_TILE,
        "HAS_WINDOW": has_window,
    }


@triton.jit
def load_gate(Gate, token, head, inside, stride_s, stride_h):
    """[rows] FP32 of one sequence; zero outside."""
    return tl.load(Gate + token.to(tl.int64) * stride_s + head * stride_h, mask=inside, other=0).to(tl.float32)


@triton.jit
def _union_loop(
    q, Keys, Values, Union, Tokens, first, stop, top, total, output, token, position, start, b, kv_head, scale,
    D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    for u in tl.range(first, stop):
        block = tl.load(Union + u)
        bits = tl.load(Tokens + u)
        k = load_keys(Keys, b, block * BLOCK, kv_head, BLOCK, D_PADDED)
        v = load_keys(Values, b, block * BLOCK, kv_head, BLOCK, DV_PADDED)
        scores = tl.dot(q, k.T)
        if not WHOLE:
            scores = tl.where(visible_keys(block * BLOCK, start, position, BLOCK), scores, float("-inf"))
        chosen = ((bits >> token) & 1) != 0
        top, total, output = softmax_step(scores, v, top, total, output, chosen, scale)
    return top, total, output


@triton.jit
def window_tiles(S, first_position, query_start, TILE: tl.constexpr, WINDOW: tl.constexpr, WINDOW_TILE: tl.constexpr):
    """First and one past the last key tile that the window of any query of this tile touches."""
    earliest = tl.maximum(first_position - WINDOW + 1, 0)
    last = tl.minimum(first_position + TILE, query_start + S) - 1
    return earliest // WINDOW_TILE, last // WINDOW_TILE + 1


@triton.jit
def _forward_kernel(
    Q, Keys, Values, WindowKeys, WindowValues, DocumentStart, Union, Tokens, Size, SparseSink, WindowSink,
    SparseGate, WindowGate, Out, SparseOut, WindowOut, SparseLSE, WindowLSE, S, query_start, scale,
    q_b, q_s, q_h, sg_b, sg_s, sg_h, wg_b, wg_s, wg_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
    TILE: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, WINDOW_TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
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
    start = tl.load(DocumentStart + sequence * S + query, mask=inside, other=2**30)  # rows outside see nothing
    q = load_rows(Q + sequence * q_b, query, head, inside, q_s, q_h, D, D_PADDED)
    d = tl.arange(0, DV_PADDED)
    at = ((sequence * S + query[:, None]) * H + head[:, None]) * DV + d[None, :]  # [B, S, H, D'], contiguous
    stored = inside[:, None] & (d < DV)[None, :]

    lists = (sequence * KV_HEADS + kv_head) * tl.num_programs(0) + tile
    n_whole, n_all = tl.load(Size + lists * 2), tl.load(Size + lists * 2 + 1)
    Union += lists * CAPACITY
    Tokens += lists * CAPACITY
    top, total = start_softmax(SparseSink, head, ROWS)
    sparse = tl.zeros([ROWS, DV_PADDED], tl.float32)
    top, total, sparse = _union_loop(
        q, Keys, Values, Union, Tokens, 0, n_whole, top, total, sparse, token, position, start, b,
        kv_head, scale, D_PADDED, DV_PADDED, BLOCK, True,
    )  # fmt: skip
    top, total, sparse = _union_loop(
        q, Keys, Values, Union, Tokens, n_whole, n_all, top, total, sparse, token, position, start, b,
        kv_head, scale, D_PADDED, DV_PADDED, BLOCK, False,
    )  # fmt: skip
    sparse, lse = finish_softmax(top, total, sparse)
    tl.store(SparseLSE + (sequence * S + query) * H + head, lse, mask=inside)
    rounded = sparse.to(Out.dtype.element_ty)  # what the backward pass will read; holds half the registers
    tl.store(SparseOut + at, rounded, mask=stored)

    if HAS_WINDOW:
        top, total = start_softmax(WindowSink, head, ROWS)
        near = tl.zeros([ROWS, DV_PADDED], tl.float32)
        first_near = tl.maximum(start, position - WINDOW + 1)
        first, stop = window_tiles(S, query_start + tile * TILE, query_start, TILE, WINDOW, WINDOW_TILE)
        for j in tl.range(first, stop):
            k = load_keys(WindowKeys, b, j * WINDOW_TILE, kv_head, WINDOW_TILE, D_PADDED)
            v = load_keys(WindowValues, b, j * WINDOW_TILE, kv_head, WINDOW_TILE, DV_PADDED)
            visible = visible_keys(j * WINDOW_TILE, first_near, position, WINDOW_TILE)
            scores = tl.where(visible, tl.dot(q, k.T), float("-inf"))
            top, total, near = softmax_step(scores, v, top, total, near, inside, scale)
        near, lse = finish_softmax(top, total, near)
        tl.store(WindowLSE + (sequence * S + query) * H + head, lse, mask=inside)
        tl.store(WindowOut + at, near.to(Out.dtype.element_ty), mask=stored)
        if WindowGate is not None:
            near *= load_gate(WindowGate + sequence * wg_b, query, head, inside, wg_s, wg_h)[:, None]

    output = rounded.to(tl.float32)
    if SparseGate is not None:
        output *= load_gate(SparseGate + sequence * sg_b, query, head, inside, sg_s, sg_h)[:, None]
    if HAS_WINDOW:
        output += near
    tl.store(Out + at, output.to(Out.dtype.element_ty), mask=stored)
