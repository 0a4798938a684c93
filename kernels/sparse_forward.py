"""A sparse layer's attention: selected key blocks and sliding window, each with sink and gate (eq. 4 to 9).

In two steps. First by key block: a program holds one block's keys and values and gathers queries of one chunk that
chose it, tokens with the G heads of the KV head as the rows of one matrix. Each choice leaves an output and a
log-sum-exp of its own, at the token and its place in the token's list. A block is so read once for all queries of the
piece, however different the selections of neighbouring tokens are.

Then by query: the log-sum-exps of a token's choices become their weights, of which the sink takes its share. A program
of the last kernel owns a few neighbouring tokens, adds up the outputs of their choices by weight, walks the few key
tiles of the window with the layer's own K', V' and a softmax of its own, and writes one gated output. Both branches'
outputs and log-sum-exps are kept for the backward pass.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import sparse_hopper
from kernels.arguments import (
    LOG2_E,
    branch_sinks,
    check_branches,
    check_gate,
    check_qkv,
    check_queries,
    check_starts,
    check_tensor,
    key_tiles,
    loadable,
)
from kernels.capability import BLOCKS, LARGEST_BLOCK_OF_WIDE
from kernels.errors import KernelError
from kernels.selection import Index, index_shapes, masked_until, piece_entries, piece_of
from kernels.tiles import (
    NATURAL,
    finish_softmax,
    load_keys,
    load_rows,
    softmax_step,
    start_softmax,
    visible_keys,
)

WINDOW_TILE = 64  # keys
ROWS = 64  # queries times heads in a step; those of one matrix instruction
WEIGHED = 1024  # choices times heads in a program of `_weights_kernel`
PART_BYTES = 6 * 2**30  # what the KV heads at hand may leave for the kernel behind


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
    blocks: Tensor,
    index: Index,
    window_kv: tuple[Tensor, Tensor] | None,
    document_start: Tensor,
    sinks: tuple[Tensor | None, Tensor | None],
    gates: tuple[Tensor | None, Tensor | None],
    *,
    block: int,
    window: int,
    query_start: int = 0,
    window_start: int = 0,
) -> SparseOutput:
    """o = gate * SA(q, K, V) + gate' * SWA(q, K', V').

    q [B, S, H, D]; kv and window_kv: K [B, T, K, D] and V [B, T, K, D'] of the branch, window_kv None for a layer
    without window; blocks [B, K, S, n] and their index; document_start [B, S]. Of the block-sparse branch, then of the
    window: sinks [H] and gates [B, S, H] in 0 to 1, None where there is none. The window's K and V begin at position
    `window_start`, or before the sequence if that is below 0. Raises KernelError.
    """
    check_sparse(q, kv, blocks, index, window_kv, document_start, gates, block, window, query_start, window_start)
    B, S, H, _ = q.shape
    sinks = branch_sinks(*sinks, q)
    has_window = window_kv is not None
    q, k, v, window_k, window_v = map(loadable, (q, *kv, *(window_kv or kv)))
    blocks, document_start = blocks.contiguous(), document_start.contiguous()
    near_start = counted_from(window_start, document_start)
    K, Dv, n = k.shape[2], v.shape[3], blocks.shape[3]
    output, sparse = q.new_empty(B, S, H, Dv), q.new_empty(B, S, H, Dv)
    sparse_lse = q.new_empty(B, S, H, dtype=torch.float32)
    swa = q.new_empty((B, S, H, Dv) if has_window else 0)
    window_lse = q.new_empty((B, S, H) if has_window else 0, dtype=torch.float32)
    scale, sizes = q.shape[3] ** -0.5 * LOG2_E, head_sizes(q, v)
    heads = heads_at_a_time(B * K, S * n * (H // K) * Dv * q.element_size())
    parts, part_lse = q.new_empty(heads, S, n, H // K, Dv), sparse_lse.new_empty(heads, S, n, H // K)
    for first in range(0, B * K, heads):
        count = min(heads, B * K - first)
        _choice_outputs(
            q, k, v, document_start, index, parts, part_lse, first, count, query_start, scale, block, blocks.shape[3]
        )
        places = triton.next_power_of_2(n)
        tokens = max(WEIGHED // (places * (H // K)), 1)
        _weights_kernel[(triton.cdiv(S, tokens), count)](
            *(blocks, part_lse, sinks[0], sparse_lse, first, S), K, H // K, tokens, n, places, num_warps=4
        )
        _output_kernel[(triton.cdiv(S, tile_tokens(H // K)), count)](
            q,
            key_tiles(window_k, WINDOW_TILE),
            key_tiles(window_v, WINDOW_TILE),
            near_start,
            sinks[1],
            *gates,
            parts,
            part_lse,
            output,
            sparse,
            swa,
            window_lse,
            first,
            S,
            query_start - window_start,
            scale,
            *q.stride()[:3],
            *gate_strides(gates),
            **tile_sizes(q, k, blocks, window, has_window),
            **sizes,
            num_warps=4,
            num_stages=2,
        )
    return SparseOutput(output, sparse, swa, sparse_lse, window_lse)


def _choice_outputs(
    q, k, v, document_start, index: Index, parts, part_lse, first: int, count: int, query_start: int, scale: float,
    block: int, selected: int,
) -> None:  # fmt: skip
    """Fills parts and part_lse for `count` of the KV heads (of all sequences) from `first` on."""
    (S, T), (K, group) = (q.shape[1], k.shape[1]), (k.shape[2], q.shape[2] // k.shape[2])
    grid, sizes = pieces_grid(index, count), (index.cells, triton.cdiv(T, block))
    if sparse_hopper.supported(block, q, k, v):
        sparse_hopper.hopper_choice_outputs_kernel[grid](
            *(q, k, v, document_start, *index, *sizes, parts, part_lse, first, S, T, query_start, scale),
            *(*q.stride()[:2], *k.stride()[:3], *v.stride()[:3]),
            q_h=q.stride(2),
            K=K,
            G=group,
            SELECTED=selected,
            PIECE=piece_entries(group),
            num_warps=4,
            maxnreg=168,  # three programs share a multiprocessor
        )
        return
    _choice_outputs_kernel[grid](
        *(q, key_tiles(k, block), key_tiles(v, block), document_start, *index, *sizes, parts, part_lse),
        *(first, S, query_start, scale, *q.stride()[:3]),
        **choice_sizes(q, k, selected, block),
        **head_sizes(q, v),
        num_warps=4,
        num_stages=2,
    )


def counted_from(position: int, document_start: Tensor) -> Tensor:
    """Where documents start among keys that begin at `position`."""
    return (document_start - position).clamp(min=0) if position else document_start


def check_sparse(
    q, kv, blocks, index: Index, window_kv, document_start, gates, block: int, window: int, query_start: int,
    window_start: int,
) -> None:  # fmt: skip
    """The arguments of `sparse_forward` fit together. Raises KernelError."""
    check_qkv(q, *kv, document_start)
    check_queries(q, kv[0], query_start)
    check_starts(document_start, query_start)
    if window_kv is not None:
        check_qkv(q, *window_kv, document_start, names="q window_k window_v")
        check_queries(q, window_kv[0], query_start - window_start)
        check_branches(kv, window_kv, "v", "window_v")
    for name, gate in zip(("sparse gate", "window gate"), gates, strict=True):
        check_gate(gate, q, name)
    if window < 1:
        raise KernelError(f"window is {window}; a query sees itself at least, so use 1 or more")
    if block not in BLOCKS:
        raise KernelError(f"block is {block}; the kernels take {', '.join(map(str, BLOCKS))}")
    (B, S, H, D), K = q.shape, kv[0].shape[2]
    if block > LARGEST_BLOCK_OF_WIDE and max(D, kv[1].shape[3]) > 128:
        widths = f"head dimensions {D} and {kv[1].shape[3]}"
        raise KernelError(f"block is {block} with {widths}; above 128 use {LARGEST_BLOCK_OF_WIDE} or less")
    check_tensor("blocks", blocks, (B, K, S, max(blocks.shape[-1], 1)), torch.int32, q.device)
    shapes = index_shapes(blocks, block, kv[0].shape[1], H // K)
    for name, x in index._asdict().items():
        check_tensor(f"index.{name}", x, tuple(x.shape), torch.int32, q.device)
    if [tuple(x.shape) for x in index] != shapes:
        found = ", ".join(str(list(x.shape)) for x in index)
        raise KernelError(
            f"index has shapes {found}, not {shapes}: it is of another selection, block or number of keys"
        )


def heads_at_a_time(heads: int, bytes_each: int) -> int:
    """How many of the KV heads (of all sequences) leave at most PART_BYTES together, in even rounds; one at least."""
    fitting = max(PART_BYTES // bytes_each, 1)
    return triton.cdiv(heads, triton.cdiv(heads, fitting))


def pieces_grid(index: Index, heads: int) -> tuple[int, int]:
    """Programs by piece and KV head: those of one chunk run at the same time."""
    return index.pieces.shape[1], heads


def tile_tokens(group: int) -> int:
    """Neighbouring queries in a tile."""
    return max(ROWS // group, 1)


def head_sizes(q: Tensor, v: Tensor) -> dict:
    D, Dv = q.shape[3], v.shape[3]
    return {"D": D, "DV": Dv, "D_PADDED": triton.next_power_of_2(D), "DV_PADDED": triton.next_power_of_2(Dv)}


def choice_sizes(q: Tensor, k: Tensor, selected: int, block: int) -> dict:
    """The compile-time arguments of kernels that go by key block."""
    K, group = k.shape[2], q.shape[2] // k.shape[2]
    sizes = {"K": K, "G": group, "TOKENS": tile_tokens(group), "SELECTED": selected, "BLOCK": block}
    return {**sizes, "PIECE": piece_entries(group)}


def tile_sizes(q: Tensor, k: Tensor, blocks: Tensor, window: int, has_window: bool) -> dict:
    """The compile-time arguments of kernels that go by query."""
    K, group = k.shape[2], q.shape[2] // k.shape[2]
    sizes = {"K": K, "G": group, "TILE": tile_tokens(group), "SELECTED": blocks.shape[3]}
    return {**sizes, "WINDOW": window, "WINDOW_TILE": WINDOW_TILE, "HAS_WINDOW": has_window}


def gate_strides(gates: tuple[Tensor | None, Tensor | None]) -> list[int]:
    return [stride for gate in gates for stride in ((0, 0, 0) if gate is None else gate.stride())]


@triton.jit
def load_gate(Gate, token, head, inside, stride_s, stride_h):
    """[rows] FP32 of one sequence; zero outside."""
    return tl.load(Gate + token.to(tl.int64) * stride_s + head * stride_h, mask=inside, other=0).to(tl.float32)


@triton.jit
def part_rows(entry, row, G: tl.constexpr):
    """Where a choice keeps the numbers of its heads."""
    return entry.to(tl.int64) * G + row % G


@triton.jit
def _choice_outputs_loop(
    k, v, Q, DocumentStart, Entries, Parts, PartLSE, first, stop, key, head, query_start, scale, q_s, q_h,
    G: tl.constexpr, TOKENS: tl.constexpr, SELECTED: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, TOKENS * G)
    column = tl.arange(0, DV_PADDED)
    entry = tl.load(Entries + first + row // G, mask=first + row // G < stop, other=0)
    for i in tl.range(first, stop, TOKENS):
        inside = i + row // G < stop
        token = entry // SELECTED
        q = load_rows(Q, token, head + row % G, inside, q_s, q_h, D, D_PADDED)
        scores = tl.dot(q, k.T)
        if MASKED:
            start = tl.load(DocumentStart + token, mask=inside, other=0)
            scores = tl.where(visible_keys(key, start, query_start + token, BLOCK), scores, float("-inf"))
        top = tl.max(scores, 1) * scale
        if MASKED:
            top = tl.maximum(top, -1e30)
        p = tl.math.exp2(scores * scale - top[:, None])
        total = tl.sum(p, 1)
        output = tl.dot(p.to(v.dtype), v) / (tl.maximum(total, 1e-30) if MASKED else total)[:, None]
        at = part_rows(entry, row, G)
        tl.store(PartLSE + at, top + tl.math.log2(total), mask=inside)
        to = Parts + at[:, None] * DV + column[None, :]
        tl.store(to, output.to(Parts.dtype.element_ty), mask=inside[:, None] & (column < DV)[None, :])
        entry = tl.load(Entries + i + TOKENS + row // G, mask=i + TOKENS + row // G < stop, other=0)


@triton.jit(do_not_specialize=["first_head"])
def _choice_outputs_kernel(
    Q, Keys, Values, DocumentStart, Entries, Bounds, FirstPiece, Pieces, cells, key_blocks, Parts, PartLSE,
    first_head, S, query_start, scale, q_b, q_s, q_h,
    K: tl.constexpr, G: tl.constexpr, TOKENS: tl.constexpr, SELECTED: tl.constexpr, BLOCK: tl.constexpr,
    PIECE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
):  # fmt: skip
    """A piece of the queries of one chunk that chose one block: the attention of each to this block alone."""
    part, head = tl.program_id(1).to(tl.int64), first_head + tl.program_id(1)
    block, first, stop = piece_of(Bounds, FirstPiece, Pieces, head, cells, key_blocks, PIECE)
    if first == stop:
        return
    b, kv_head = head // K, head % K
    k = load_keys(Keys, b, block * BLOCK, kv_head, BLOCK, D_PADDED)
    v = load_keys(Values, b, block * BLOCK, kv_head, BLOCK, DV_PADDED)
    Q += b.to(tl.int64) * q_b
    DocumentStart += b.to(tl.int64) * S
    Entries += head.to(tl.int64) * S * SELECTED
    Parts += part * S * SELECTED * G * DV
    PartLSE += part * S * SELECTED * G
    masked = masked_until(DocumentStart, Entries, first, stop, block, query_start, SELECTED, BLOCK)
    _choice_outputs_loop(
        k, v, Q, DocumentStart, Entries, Parts, PartLSE, first, masked, block * BLOCK, kv_head * G, query_start, scale,
        q_s, q_h, G, TOKENS, SELECTED, BLOCK, D, DV, D_PADDED, DV_PADDED, True,
    )  # fmt: skip
    _choice_outputs_loop(
        k, v, Q, DocumentStart, Entries, Parts, PartLSE, masked, stop, block * BLOCK, kv_head * G, query_start, scale,
        q_s, q_h, G, TOKENS, SELECTED, BLOCK, D, DV, D_PADDED, DV_PADDED, False,
    )  # fmt: skip


@triton.jit
def window_tiles(S, first_position, query_start, TILE: tl.constexpr, WINDOW: tl.constexpr, WINDOW_TILE: tl.constexpr):
    """First and one past the last key tile that the window of any query of this tile touches."""
    earliest = tl.maximum(first_position - WINDOW + 1, 0)
    last = tl.minimum(first_position + TILE, query_start + S) - 1
    return earliest // WINDOW_TILE, last // WINDOW_TILE + 1


@triton.jit(do_not_specialize=["first_head"])
def _weights_kernel(
    Blocks, PartLSE, Sink, LSE, first_head, S,
    K: tl.constexpr, G: tl.constexpr, TOKENS: tl.constexpr, SELECTED: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """The log-sum-exps of the choices of some tokens become weights, 0 where unused, and one for the whole branch."""
    part, kv_row = tl.program_id(1).to(tl.int64), first_head + tl.program_id(1)
    token, place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, PLACES)
    head = kv_row % K * G + tl.arange(0, G)
    inside = token < S
    listed = inside[:, None] & (place < SELECTED)[None, :]
    choice = token[:, None] * SELECTED + place[None, :]
    block = tl.load(Blocks + kv_row.to(tl.int64) * S * SELECTED + choice, mask=listed, other=-1)
    used = (block >= 0)[:, :, None]
    at = PartLSE + (part * S * SELECTED + choice)[:, :, None] * G + tl.arange(0, G)[None, None, :]
    lse = tl.load(at, mask=used, other=float("-inf"))  # [TOKENS, PLACES, G]
    first_top, first_total = start_softmax(Sink, head, G)
    top = tl.maximum(first_top[None, :], tl.max(lse, 1))
    weight = tl.math.exp2(lse - top[:, None, :])
    total = first_total[None, :] * tl.math.exp2(first_top[None, :] - top) + tl.sum(weight, 1)
    seen = total > 0
    tl.store(at, weight / tl.where(seen, total, 1.0)[:, None, :], mask=listed[:, :, None])
    row = ((kv_row // K).to(tl.int64) * S + token)[:, None] * (K * G) + head[None, :]
    lse = tl.where(seen, (top + tl.math.log2(total)) * NATURAL, float("inf"))
    tl.store(LSE + row, lse, mask=inside[:, None])


@triton.jit
def _add_choices(Parts, Weights, row, inside, token, stored,
    G: tl.constexpr, SELECTED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The output [rows, DV_PADDED] of the block-sparse branch from those of its choices."""
    output = tl.zeros([ROWS, DV_PADDED], tl.float32)
    column = tl.arange(0, DV_PADDED)
    STAGES: tl.constexpr = 4 if G >= 16 else 3  # with one more, the addresses of many tokens do not fit the registers
    for place in tl.range(0, SELECTED, num_stages=STAGES):
        at = part_rows(token * SELECTED + place, row, G)
        weight = tl.load(Weights + at, mask=inside, other=0)
        part = tl.load(Parts + at[:, None] * DV + column[None, :], mask=(weight > 0)[:, None] & stored, other=0)
        output += weight[:, None] * part.to(tl.float32)
    return output


@triton.jit(do_not_specialize=["first_head"])
def _output_kernel(
    Q, WindowKeys, WindowValues, DocumentStart, WindowSink, SparseGate, WindowGate, Parts, Weights,
    Out, SparseOut, WindowOut, WindowLSE, first_head, S, query_start, scale,
    q_b, q_s, q_h, sg_b, sg_s, sg_h, wg_b, wg_s, wg_h,
    K: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr, SELECTED: tl.constexpr,
    WINDOW: tl.constexpr, WINDOW_TILE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
):  # fmt: skip
    """A tile of neighbouring queries: its choices by weight, its window, gates, and the one output."""
    tile, part, kv_row = tl.program_id(0), tl.program_id(1).to(tl.int64), first_head + tl.program_id(1)
    b, kv_head = kv_row // K, kv_row % K
    sequence = b.to(tl.int64)  # for offsets
    ROWS: tl.constexpr = TILE * G
    row = tl.arange(0, ROWS)
    query, head = tile * TILE + row // G, kv_head * G + row % G
    inside = query < S
    d = tl.arange(0, DV_PADDED)
    stored = inside[:, None] & (d < DV)[None, :]
    at_row = (sequence * S + query) * (K * G) + head
    at = at_row[:, None] * DV + d[None, :]  # [B, S, H, D'], contiguous

    near = tl.zeros([ROWS, DV_PADDED], tl.float32)
    if HAS_WINDOW:
        position = query_start + query
        start = tl.load(DocumentStart + sequence * S + query, mask=inside, other=2**30)  # rows outside see nothing
        first_near = tl.maximum(start, position - WINDOW + 1)
        q = load_rows(Q + sequence * q_b, query, head, inside, q_s, q_h, D, D_PADDED)
        top, total = start_softmax(WindowSink, head, ROWS)
        first, stop = window_tiles(S, query_start + tile * TILE, query_start, TILE, WINDOW, WINDOW_TILE)
        for j in tl.range(first, stop):
            k = load_keys(WindowKeys, b, j * WINDOW_TILE, kv_head, WINDOW_TILE, D_PADDED)
            v = load_keys(WindowValues, b, j * WINDOW_TILE, kv_head, WINDOW_TILE, DV_PADDED)
            visible = visible_keys(j * WINDOW_TILE, first_near, position, WINDOW_TILE)
            scores = tl.where(visible, tl.dot(q, k.T), float("-inf"))
            top, total, near = softmax_step(scores, v, top, total, near, scale)
        near, lse = finish_softmax(top, total, near)
        tl.store(WindowLSE + at_row, lse, mask=inside)
        tl.store(WindowOut + at, near.to(Out.dtype.element_ty), mask=stored)
        if WindowGate is not None:
            near *= load_gate(WindowGate + sequence * wg_b, query, head, inside, wg_s, wg_h)[:, None]

    sparse = _add_choices(
        Parts + part * S * SELECTED * G * DV, Weights + part * S * SELECTED * G, row, inside, query, stored,
        G, SELECTED, DV, DV_PADDED, ROWS,
    )  # fmt: skip
    tl.store(SparseOut + at, sparse.to(Out.dtype.element_ty), mask=stored)
    if SparseGate is not None:
        sparse *= load_gate(SparseGate + sequence * sg_b, query, head, inside, sg_s, sg_h)[:, None]
    tl.store(Out + at, (sparse + near).to(Out.dtype.element_ty), mask=stored)
