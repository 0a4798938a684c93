"""Attention of one new query token per sequence over a KV cache: the full layer with its selection, the sparse layer.

Both are bound by reading K and V once, so the G query heads of a group share every tile: they are the rows of the
matrix products (padded to 16), 64 keys at a time come through the copy engine, and enough tiles are in flight to keep
the memory busy.

The full layer cuts each sequence into parts (split-KV). A part leaves its normalised output, its log-sum-exp and the
largest logit of each key block; a second kernel weighs the outputs by the log-sum-exps, subtracts the final one from
the block maxima, takes the largest of the group (paper eq. 3) and selects blocks. No array grows beyond keys / block.

The sparse layer is one launch: a program owns a sequence and a KV head, walks the selected blocks of the full layer's
cache, then the ring buffer of the layer's own last keys, and writes the gated sum.

Logits are kept in units of log2. Cache slots that hold no token yet may contain anything, NaN included.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.arguments import INTERPRETED, LOG2_E, check_qkv, loadable, power_of_two
from kernels.errors import KernelError

PAGE = 64  # tokens in a page of a paged cache
TILE = 64  # keys a program reads at a time
RANKED = 8192  # block scores that the selection holds at a time
IN_FLIGHT = 100_000  # bytes of K and V under way per program; two programs fit the shared memory of an SM


class KVCache(NamedTuple):
    """Keys (after RoPE) and values of one layer: one buffer per sequence, or 64-token pages.

    k [B, T_max, K, D], v [B, T_max, K, Dv]; paged: k [pages, 64, K, D], v [pages, 64, K, Dv], and token t of sequence b
    lies in page `page_table[b, t // 64]`.
    """

    k: Tensor
    v: Tensor
    page_table: Tensor | None = None  # [B, pages of a sequence] int32


def decode_full(
    q: Tensor, cache: KVCache, lengths: Tensor, *, block: int, selected: int, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the whole cache, and the key blocks it selects for the sparse layers that follow.

    q [B, H, D]; lengths [B] int32: tokens in the cache, the new one included; sink [H] or None. Returns the output
    [B, H, Dv] and blocks [B, K, selected] int32 by falling score, ties to the lower block, -1 where there are fewer.
    """
    K = _check(q, cache, lengths, block, "cache")
    q = q if q.stride(-1) == 1 else q.contiguous()
    B, H, D = q.shape
    Dv, group = cache.v.shape[3], H // K
    capacity = cache.k.shape[1] if cache.page_table is None else cache.page_table.shape[1] * PAGE
    piece = min(block, TILE)
    pieces = triton.cdiv(capacity, TILE) * (TILE // piece)
    splits = _splits(B * K, triton.cdiv(capacity, TILE), q.device)

    partial = q.new_empty(B, K, splits, group, Dv, dtype=torch.float32)
    partial_lse = q.new_empty(B, K, group, splits, dtype=torch.float32)
    maxima = q.new_empty(B, K, pieces if selected else 0, group, dtype=torch.float32)
    output = q.new_empty(B, H, Dv)
    blocks = torch.empty(B, K, selected, dtype=torch.int32, device=q.device)

    _split_kernel[(K, splits, B)](
        q, *_loads(cache, TILE), lengths, partial, partial_lse, maxima,
        LOG2_E / math.sqrt(D), splits, pieces, q.stride(0), q.stride(1),
        GROUP=group, ROWS=_rows(group), D=D, D_PADDED=_padded(D), DV=Dv, DV_PADDED=_padded(Dv),
        PAGED=cache.page_table is not None, TILE=TILE, PIECE=piece, SCORED=selected > 0,
        num_warps=4, num_stages=1 + _in_flight(cache) * (1 if cache.page_table is None else 2),  # pages come first
    )  # fmt: skip
    columns = block // piece * _padded(group)  # maxima that make up the score of a block
    ranked = min(RANKED, max(1, 32768 // columns), _padded(triton.cdiv(pieces, block // piece)))
    _combine_kernel[(group + (selected > 0), K, B)](
        partial, partial_lse, maxima, sink, lengths, output, blocks, splits, pieces,
        GROUP=group, GROUP_PADDED=_padded(group), DV=Dv, DV_PADDED=_padded(Dv), SPLITS_PADDED=_padded(splits),
        PIECE=piece, PIECES=block // piece, COLUMNS=columns, RANKED=ranked,
        SELECTED=selected, SELECTED_PADDED=_padded(max(1, selected)), num_warps=16 if ranked * columns > 4096 else 4,
    )  # fmt: skip
    return output, blocks


def decode_sparse(
    q: Tensor,
    cache: KVCache | None,
    blocks: Tensor | None,
    window_cache: KVCache | None,
    lengths: Tensor,
    *,
    block: int,
    window: int,
    sparse_sink: Tensor | None = None,
    window_sink: Tensor | None = None,
    sparse_gate: Tensor | None = None,
    window_gate: Tensor | None = None,
) -> Tensor:
    """Gated sum of attention over the selected blocks of `cache` and over the last `window` tokens (paper eq. 5 to 9).

    q [B, H, D]; blocks [B, K, n] int32 from `decode_full`, -1 only at the end of a list; lengths as there. The window's
    cache is a ring buffer, k [B, window, K, D]: position p in slot p % window. Sinks [H]; gates [B, H] or [B, H, Dv], 1
    where None. A branch whose cache is None is absent. Returns [B, H, Dv].
    """
    K = _check_sparse(q, cache, blocks, window_cache, lengths, block, window)
    either = cache or window_cache
    q = q if q.stride(-1) == 1 else q.contiguous()
    B, H, D = q.shape
    Dv, group = either.v.shape[3], H // K
    selected = 0 if cache is None else blocks.shape[2]
    tile, ring_tile = min(block, TILE), min(TILE, max(16, _padded(window)))
    output = q.new_empty(B, H, Dv)
    _sparse_kernel[(K, B)](
        q, *_loads(cache, tile), blocks.contiguous() if selected else None, *_loads(window_cache, ring_tile)[:2],
        lengths, sparse_sink, window_sink, *_gate(sparse_gate, B, H, Dv, "sparse_gate"),
        *_gate(window_gate, B, H, Dv, "window_gate"), output, LOG2_E / math.sqrt(D), q.stride(0), q.stride(1),
        GROUP=group, ROWS=_rows(group), D=D, D_PADDED=_padded(D), DV=Dv, DV_PADDED=_padded(Dv),
        PAGED=cache is not None and cache.page_table is not None, TILE=tile, PIECES=block // tile, BLOCK=block,
        SELECTED=selected, SELECTED_PADDED=_padded(max(1, selected)), WINDOW=0 if window_cache is None else window,
        RING_TILE=ring_tile, num_warps=4, num_stages=1 + _in_flight(either),
    )  # fmt: skip
    return output


def _check(q: Tensor, cache: KVCache, lengths: Tensor, block: int, name: str) -> int:
    """The number of KV heads; raises KernelError where shapes, dtypes or the block size do not fit."""
    B = q.shape[0]
    k, v, page_table = cache
    if page_table is not None:
        if k.ndim != 4 or k.shape[1] != PAGE or page_table.dtype != torch.int32 or page_table.shape[:-1] != (B,):
            raise KernelError(
                f"{name}.k has shape {list(k.shape)}, its page_table is {page_table.dtype} {list(page_table.shape)}; "
                f"use k [pages, {PAGE}, K, D] and an int32 page_table [{B}, pages of a sequence]"
            )
        k, v = (x[:1].expand(B, -1, -1, -1) for x in (k, v))  # pages belong to no sequence; the rest is checked alike
    check_qkv(q[:, None], k, v, names=f"q {name}.k {name}.v")
    if tuple(lengths.shape) != (B,) or lengths.dtype != torch.int32:
        raise KernelError(f"lengths is {lengths.dtype} {list(lengths.shape)}; it must be int32 [{B}]")
    if block not in (16, 32, 64, 128):
        raise KernelError(f"block={block}; the kernels have key blocks of 16, 32, 64 and 128 tokens")
    return k.shape[2]


def _check_sparse(
    q: Tensor,
    cache: KVCache | None,
    blocks: Tensor | None,
    window_cache: KVCache | None,
    lengths: Tensor,
    block: int,
    window: int,
) -> int:
    """The number of KV heads of the branches that are there."""
    if cache is None and window_cache is None:
        raise KernelError("cache and window_cache are both None; a sparse layer needs at least one of them")
    K = None
    if cache is not None:
        K = _check(q, cache, lengths, block, "cache")
        if blocks is None or blocks.shape[:2] != (q.shape[0], K) or blocks.dtype != torch.int32:
            given = "None" if blocks is None else f"{blocks.dtype} {list(blocks.shape)}"
            raise KernelError(f"blocks is {given}; it must be int32 [{q.shape[0]}, {K}, n]")
    if window_cache is not None:
        window_K = _check(q, window_cache, lengths, block, "window_cache")
        if window_cache.page_table is not None or window_cache.k.shape[1] != window:
            shape = list(window_cache.k.shape)
            raise KernelError(f"window_cache.k has shape {shape}; use a ring buffer of window={window} slots, no pages")
        if K not in (None, window_K):
            raise KernelError(f"cache has {K} KV heads, window_cache {window_K}; they must be equal")
        K = window_K
    return K


def _gate(gate: Tensor | None, B: int, H: int, Dv: int, name: str) -> tuple[Tensor | None, int, int, int]:
    """A gate and its strides over sequences, heads and channels; a head-wise one has stride 0 over the channels."""
    if gate is None:
        return None, 0, 0, 0
    if tuple(gate.shape) not in ((B, H), (B, H, Dv)):
        raise KernelError(f"{name} has shape {list(gate.shape)}; it must be [{B}, {H}] or [{B}, {H}, {Dv}]")
    return (gate, *gate.stride(), 0)[:4]


def _tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """Loads `rows` tokens of one head; a head dimension of 192 is filled up to 256 with zeros that are never read."""
    x = loadable(x)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, _padded(x.shape[3])])


def _loads(cache: KVCache | None, rows: int) -> tuple:
    """What a kernel reads a cache with: keys, values, page table, and the table's stride over sequences."""
    if cache is None:
        return None, None, None, 0
    table = cache.page_table
    return _tiles(cache.k, rows), _tiles(cache.v, rows), table, 0 if table is None else table.stride(0)


def _padded(x: int) -> int:
    return x if power_of_two(x) else 1 << x.bit_length()


def _rows(group: int) -> int:
    return max(16, _padded(group))  # the tensor cores take no fewer


def _in_flight(cache: KVCache) -> int:
    """Tiles of K and V that a program loads ahead; in Triton's terms one stage fewer than the pipeline has."""
    tile = TILE * (_padded(cache.k.shape[3]) + _padded(cache.v.shape[3])) * cache.k.element_size()
    return min(4, max(2, IN_FLIGHT // tile))


@functools.cache
def _processors(device: torch.device) -> int:
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _splits(pairs: int, tiles: int, device: torch.device) -> int:
    """Parts of a sequence, so that `pairs` (sequence, KV head) fill every SM twice, or a few times that without a rest.

    From the capacity of the cache: the lengths lie on the device, and every part gets an equal share of its sequence.
    """
    slots = 2 * _processors(device)
    waves = max(range(1, 5), key=lambda waves: (waves * slots // pairs) * pairs / (waves * slots))
    return max(1, min(waves * slots // pairs, triton.cdiv(tiles, 2)))


@triton.jit
def _split_kernel(
    q, keys, values, page_table, pages, lengths, partial, partial_lse, maxima,
    scale, splits, pieces, q_sequence, q_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr,
    DV_PADDED: tl.constexpr, PAGED: tl.constexpr, TILE: tl.constexpr, PIECE: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    """One part of one sequence for one KV head; neighbours in the grid read neighbouring heads of the same tokens."""
    kv_head, split, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pair = (sequence * tl.num_programs(0) + kv_head).to(tl.int64)
    length = tl.load(lengths + sequence)
    tiles = tl.cdiv(length, TILE)
    row, channel = tl.arange(0, ROWS), tl.arange(0, DV_PADDED)
    queries = _load_queries(q + sequence.to(tl.int64) * q_sequence, q_head, kv_head, GROUP, ROWS, D, D_PADDED)
    maxima += pair * pieces * GROUP
    peak, total = _start(None, row, row < GROUP, ROWS)
    accumulator = tl.zeros([ROWS, DV_PADDED], tl.float32)
    stop = tiles * (split + 1) // splits
    whole = tl.minimum(stop, length // TILE)
    for tile in range(tiles * split // splits, whole):
        place, token = _locate(page_table, pages, sequence, tile * TILE, PAGED)
        k, v = _load(keys, values, place, token, kv_head, TILE, D_PADDED, DV_PADDED)
        logits = tl.dot(queries, k.T) * scale
        if SCORED:
            _store_maxima(maxima, logits, tile, row, GROUP, ROWS, TILE, PIECE)
        peak, total, accumulator = _accumulate(logits, v, peak, total, accumulator)
    if whole < stop:
        place, token = _locate(page_table, pages, sequence, whole * TILE, PAGED)
        k, v = _load(keys, values, place, token, kv_head, TILE, D_PADDED, DV_PADDED)
        logits, v = _hide(tl.dot(queries, k.T) * scale, v, length - whole * TILE, TILE)
        if SCORED:
            _store_maxima(maxima, logits, whole, row, GROUP, ROWS, TILE, PIECE)
        peak, total, accumulator = _accumulate(logits, v, peak, total, accumulator)
    lse = peak + tl.math.log2(total)  # -inf for a part without keys
    tl.store(partial_lse + (pair * GROUP + row) * splits + split, lse, mask=row < GROUP)
    cell = ((pair * splits + split) * GROUP + row[:, None]) * DV + channel[None, :]
    mask = (row[:, None] < GROUP) & (channel[None, :] < DV)
    tl.store(partial + cell, accumulator / tl.where(total > 0, total, 1)[:, None], mask=mask)


@triton.jit
def _store_maxima(
    maxima, logits, tile, row, GROUP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PIECE: tl.constexpr
):
    PARTS: tl.constexpr = TILE // PIECE
    if PARTS == 1:
        tl.store(maxima + tile * GROUP + row, tl.max(logits, 1), mask=row < GROUP)
    else:
        highest = tl.max(tl.reshape(logits, [ROWS, PARTS, PIECE]), 2)
        piece = tile * PARTS + tl.arange(0, PARTS)[None, :]
        tl.store(maxima + piece * GROUP + row[:, None], highest, mask=row[:, None] < GROUP)


@triton.jit
def _combine_kernel(
    partial, partial_lse, maxima, sink, lengths, output, blocks, splits, pieces,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr,
    RANKED: tl.constexpr, SELECTED: tl.constexpr, SELECTED_PADDED: tl.constexpr,
):  # fmt: skip
    """Programs 0 to GROUP - 1 of a (sequence, KV head) put one head's output together, the last one selects blocks."""
    member, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pair = (sequence * tl.num_programs(1) + kv_head).to(tl.int64)
    partial_lse += pair * GROUP * splits
    if member < GROUP:
        output += (pair * GROUP + member) * DV
        partial += (pair * splits * GROUP + member) * DV
        head_lse = _final_lse(partial_lse, sink, kv_head, member + tl.arange(0, 1), splits, GROUP, SPLITS_PADDED)
        _weighted_sum(partial, partial_lse + member * splits, head_lse, output, splits, GROUP * DV, DV, DV_PADDED)
    else:
        column = tl.arange(0, COLUMNS)
        lse = _final_lse(partial_lse, sink, kv_head, column % GROUP_PADDED, splits, GROUP, SPLITS_PADDED)
        present = tl.cdiv(tl.load(lengths + sequence), PIECE)
        maxima += pair * pieces * GROUP
        blocks += pair * SELECTED
        _select(maxima, lse, present, blocks, GROUP, GROUP_PADDED, PIECES, COLUMNS, RANKED, SELECTED, SELECTED_PADDED)


@triton.jit
def _final_lse(partial_lse, sink, kv_head, head, splits, GROUP: tl.constexpr, SPLITS_PADDED: tl.constexpr):
    """Log-sum-exp of each of the `head` [N] of this group over all parts, and the sink."""
    split = tl.arange(0, SPLITS_PADDED)
    mask = (head[:, None] < GROUP) & (split[None, :] < splits)
    lse = tl.load(partial_lse + head[:, None] * splits + split[None, :], mask=mask, other=-float("inf"))
    highest = tl.max(lse, 1)
    if sink is not None:
        sink_logit = _sink_logit(sink + kv_head * GROUP + head, head < GROUP)
        highest = tl.maximum(highest, sink_logit)
    pivot = tl.where(highest == -float("inf"), 0, highest)
    total = tl.sum(tl.math.exp2(lse - pivot[:, None]), 1)
    if sink is not None:
        total += tl.math.exp2(sink_logit - pivot)
    return pivot + tl.math.log2(total)


@triton.jit
def _weighted_sum(
    partial, partial_lse, lse, output, splits, split_stride: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr
):
    """One head's output: the parts' outputs, each with its share of the softmax denominator."""
    PARTS: tl.constexpr = 32
    channel = tl.arange(0, DV_PADDED)
    final = tl.max(tl.where(lse == -float("inf"), 0, lse), 0)
    total = tl.zeros([DV_PADDED], tl.float32)
    for start in range(0, splits, PARTS):
        split = start + tl.arange(0, PARTS)
        weight = tl.math.exp2(tl.load(partial_lse + split, mask=split < splits, other=-float("inf")) - final)
        mask = (split[:, None] < splits) & (channel[None, :] < DV)
        part = tl.load(partial + split[:, None].to(tl.int64) * split_stride + channel[None, :], mask=mask, other=0)
        total += tl.sum(weight[:, None] * part, 0)
    tl.store(output + channel, total.to(output.dtype.element_ty), mask=channel < DV)


@triton.jit
def _select(
    maxima, lse, present, blocks, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, PIECES: tl.constexpr,
    COLUMNS: tl.constexpr, RANKED: tl.constexpr, SELECTED: tl.constexpr, SELECTED_PADDED: tl.constexpr,
):  # fmt: skip
    """The SELECTED blocks of largest score by repeated extraction of the maximum.

    A key holds the order-preserving bits of the score and, below them, the block counted backwards: keys are unique and
    equal scores go to the lower block. RANKED blocks at a time take the places of the smallest keys found so far.
    """
    LOWEST: tl.constexpr = -(2**63)
    HIGHEST: tl.constexpr = 2**63 - 1
    slot = tl.arange(0, SELECTED_PADDED).to(tl.int64)
    best = tl.where(slot < SELECTED, LOWEST + slot, HIGHEST)  # all different, so that one slot is replaced at a time
    column = tl.arange(0, COLUMNS)
    head, part = column % GROUP_PADDED, column // GROUP_PADDED
    for start in range(0, tl.cdiv(present, PIECES), RANKED):
        block = start + tl.arange(0, RANKED)
        piece = block[:, None] * PIECES + part[None, :]
        mask = (piece < present) & (head[None, :] < GROUP)
        highest = tl.load(maxima + piece * GROUP + head[None, :], mask=mask, other=-float("inf"))
        score = tl.max(tl.where(mask, highest - lse[None, :], -float("inf")), 1)
        bits = score.to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - block).to(tl.int64)
        key = tl.where(score == -float("inf"), LOWEST, key)
        worst = tl.min(best, 0)
        top = tl.max(key, 0)
        while top > worst:
            best = tl.where(best == worst, top, best)
            key = tl.where(key == top, LOWEST, key)
            worst = tl.min(best, 0)
            top = tl.max(key, 0)
    best = tl.where(slot < SELECTED, best, LOWEST)
    for i in range(SELECTED):
        top = tl.max(best, 0)
        found = top >= LOWEST + SELECTED
        tl.store(blocks + i, tl.where(found, 0x7FFFFFFF - (top & 0x7FFFFFFF).to(tl.int32), -1))
        best = tl.where(best == top, LOWEST, best)


@triton.jit
def _sparse_kernel(
    q, keys, values, page_table, pages, blocks, ring_keys, ring_values, lengths, sparse_sink, window_sink,
    sparse_gate, sparse_gate_sequence, sparse_gate_head, sparse_gate_channel,
    window_gate, window_gate_sequence, window_gate_head, window_gate_channel,
    output, scale, q_sequence, q_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr,
    DV_PADDED: tl.constexpr, PAGED: tl.constexpr, TILE: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr,
    SELECTED: tl.constexpr, SELECTED_PADDED: tl.constexpr, WINDOW: tl.constexpr, RING_TILE: tl.constexpr,
):  # fmt: skip
    """One sequence, one KV head: both branches one after the other, each with its own softmax."""
    kv_head, sequence = tl.program_id(0), tl.program_id(1)
    far = sequence.to(tl.int64)
    length = tl.load(lengths + sequence)
    row, channel = tl.arange(0, ROWS), tl.arange(0, DV_PADDED)
    head = kv_head * GROUP + row
    mask = (row[:, None] < GROUP) & (channel[None, :] < DV)
    queries = _load_queries(q + far * q_sequence, q_head, kv_head, GROUP, ROWS, D, D_PADDED)
    result = tl.zeros([ROWS, DV_PADDED], tl.float32)
    if SELECTED > 0:
        blocks += (far * tl.num_programs(0) + kv_head) * SELECTED
        place, token, present, rank = _list(
            blocks, page_table, pages, sequence, length, PAGED, BLOCK, TILE, PIECES, SELECTED, SELECTED_PADDED
        )
        peak, total = _start(sparse_sink, head, row < GROUP, ROWS)
        accumulator = tl.zeros([ROWS, DV_PADDED], tl.float32)
        for i in range(tl.max(rank, 0) + 1):
            here = rank == i
            k, v = _load(keys, values, _pick(place, here), _pick(token, here), kv_head, TILE, D_PADDED, DV_PADDED)
            peak, total, accumulator = _accumulate(tl.dot(queries, k.T) * scale, v, peak, total, accumulator)
        here = (present > 0) & (present < TILE)
        ragged = _pick(present, here)
        if ragged > 0:
            k, v = _load(keys, values, _pick(place, here), _pick(token, here), kv_head, TILE, D_PADDED, DV_PADDED)
            logits, v = _hide(tl.dot(queries, k.T) * scale, v, ragged, TILE)
            peak, total, accumulator = _accumulate(logits, v, peak, total, accumulator)
        gate = far * sparse_gate_sequence + head[:, None] * sparse_gate_head + channel[None, :] * sparse_gate_channel
        result += _gated(accumulator, total, sparse_gate, gate, mask)
    if WINDOW > 0:
        filled = tl.minimum(length, WINDOW)
        peak, total = _start(window_sink, head, row < GROUP, ROWS)
        accumulator = tl.zeros([ROWS, DV_PADDED], tl.float32)
        whole = filled // RING_TILE
        for tile in range(whole):  # the softmax does not mind the order of the ring's slots
            k, v = _load(ring_keys, ring_values, sequence, tile * RING_TILE, kv_head, RING_TILE, D_PADDED, DV_PADDED)
            peak, total, accumulator = _accumulate(tl.dot(queries, k.T) * scale, v, peak, total, accumulator)
        if whole * RING_TILE < filled:
            slot = whole * RING_TILE
            k, v = _load(ring_keys, ring_values, sequence, slot, kv_head, RING_TILE, D_PADDED, DV_PADDED)
            logits, v = _hide(tl.dot(queries, k.T) * scale, v, filled - slot, RING_TILE)
            peak, total, accumulator = _accumulate(logits, v, peak, total, accumulator)
        gate = far * window_gate_sequence + head[:, None] * window_gate_head + channel[None, :] * window_gate_channel
        result += _gated(accumulator, total, window_gate, gate, mask)
    cell = (far * tl.num_programs(0) * GROUP + head[:, None]) * DV + channel[None, :]
    tl.store(output + cell, result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _load_queries(q, q_head, kv_head, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    """The group's queries [ROWS, D_PADDED], zero where padded."""
    row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, D_PADDED)[None, :]
    return tl.load(q + (kv_head * GROUP + row) * q_head + channel, mask=(row < GROUP) & (channel < D), other=0)


@triton.jit
def _locate(page_table, pages, sequence, position, PAGED: tl.constexpr):
    """First two coordinates in the cache of the token at `position`, a multiple of the page."""
    if PAGED:
        place, token = tl.load(page_table + sequence.to(tl.int64) * pages + position // 64), 0
    else:
        place, token = sequence, position
    return place, token


@triton.jit
def _list(
    blocks, page_table, pages, sequence, length, PAGED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    PIECES: tl.constexpr, SELECTED: tl.constexpr, SELECTED_PADDED: tl.constexpr,
):  # fmt: skip
    """The tiles of the selected blocks, in registers, so that the loop waits for no index on its way to a key.

    Returns vectors over the tiles: the first two coordinates in the cache, the tokens present, and for a tile full of
    them its rank among those (-1 for others). Only the tile that holds the new token may be partly filled.
    """
    tile = tl.arange(0, SELECTED_PADDED * PIECES)
    block = tl.load(blocks + tile // PIECES, mask=tile < SELECTED * PIECES, other=-1)
    position = block * BLOCK + tile % PIECES * TILE
    present = tl.where(block < 0, 0, tl.minimum(tl.maximum(length - position, 0), TILE))
    if PAGED:
        entry = page_table + sequence.to(tl.int64) * pages + position // 64
        place, token = tl.load(entry, mask=present > 0, other=0), position % 64
    else:
        place, token = tl.zeros_like(position) + sequence, position
    full = (present == TILE).to(tl.int32)
    return place, token, present, tl.where(full > 0, tl.cumsum(full, 0) - 1, -1)


@triton.jit
def _pick(vector, here):
    return tl.sum(tl.where(here, vector, 0), 0)


@triton.jit
def _sink_logit(sink, mask):
    LOG2_E: tl.constexpr = 1.4426950408889634
    return tl.load(sink, mask=mask, other=0).to(tl.float32) * LOG2_E


@triton.jit
def _start(sink, head, mask, ROWS: tl.constexpr):
    """Softmax state before any key: maximum and denominator hold the sink, where there is one."""
    if sink is None:
        peak, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    else:
        peak, total = _sink_logit(sink + head, mask), tl.full([ROWS], 1, tl.float32)
    return peak, total


@triton.jit
def _load(keys, values, place, token, kv_head, TILE: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr):
    k = keys.load([place, token, kv_head, 0]).reshape(TILE, D_PADDED)
    return k, values.load([place, token, kv_head, 0]).reshape(TILE, DV_PADDED)


@triton.jit
def _hide(logits, v, present, TILE: tl.constexpr):
    """Leaves the first `present` keys. A weight of 0 would not hide a NaN among the values of an unused slot."""
    visible = tl.arange(0, TILE) < present
    return tl.where(visible[None, :], logits, -float("inf")), tl.where(visible[:, None], v, 0)


@triton.jit
def _accumulate(logits, v, peak, total, accumulator):
    """Online softmax: maximum, denominator and unnormalised output with another tile of keys."""
    highest = tl.maximum(peak, tl.max(logits, 1))
    pivot = tl.where(highest == -float("inf"), 0, highest)
    shrink = tl.math.exp2(peak - pivot)
    weight = tl.math.exp2(logits - pivot[:, None])
    accumulator = tl.dot(weight.to(v.dtype), v, accumulator * shrink[:, None])
    return highest, total * shrink + tl.sum(weight, 1), accumulator


@triton.jit
def _gated(accumulator, total, gate, cell, mask):
    output = accumulator / tl.where(total > 0, total, 1)[:, None]
    if gate is not None:
        output *= tl.load(gate + cell, mask=mask, other=0).to(tl.float32)
    return output
