"""The kernel of `decode.decode_sparse`: the selected blocks of one cache, then the ring buffer of another."""

import triton
import triton.language as tl

from kernels.tiles import finish_softmax, hide_unused, load_keys, load_rows, softmax_step, start_softmax


@triton.jit
def sparse_kernel(
    q, keys, values, page_table, pages, blocks, ring_keys, ring_values, lengths, sparse_sink, window_sink,
    sparse_gate, sparse_gate_sequence, sparse_gate_head, sparse_gate_channel,
    window_gate, window_gate_sequence, window_gate_head, window_gate_channel,
    result, scale, q_sequence, q_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr,
    DV_PADDED: tl.constexpr, PAGED: tl.constexpr, TILE: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr,
    SELECTED: tl.constexpr, SELECTED_PADDED: tl.constexpr, WINDOW: tl.constexpr, RING_TILE: tl.constexpr,
):  # fmt: skip
    """One sequence, one KV head: both branches one after the other, each with its own softmax."""
    kv_head, sequence = tl.program_id(0), tl.program_id(1)
    far = sequence.to(tl.int64)
    length = tl.load(lengths + sequence)
    row, channel = tl.arange(0, ROWS), tl.arange(0, DV_PADDED)
    head = kv_head * GROUP + tl.minimum(row, GROUP - 1)  # rows past the group go nowhere
    mask = (row[:, None] < GROUP) & (channel[None, :] < DV)
    mine = tl.zeros_like(row) + sequence  # q has one token of each sequence
    queries = load_rows(q, mine, head, row < GROUP, q_sequence, q_head, D, D_PADDED)
    gated = tl.zeros([ROWS, DV_PADDED], tl.float32)
    if SELECTED > 0:
        blocks += (far * tl.num_programs(0) + kv_head) * SELECTED
        place, token, present, rank = _listed_tiles(
            blocks, page_table, pages, sequence, length, PAGED, BLOCK, TILE, PIECES, SELECTED, SELECTED_PADDED
        )
        top, total = start_softmax(sparse_sink, head, ROWS)
        output = tl.zeros([ROWS, DV_PADDED], tl.float32)
        for i in range(tl.max(rank, 0) + 1):
            k, v = _load_picked(keys, values, place, token, rank == i, kv_head, TILE, D_PADDED, DV_PADDED)
            top, total, output = softmax_step(tl.dot(queries, k.T), v, top, total, output, scale)
        here = (present > 0) & (present < TILE)
        ragged = _pick(present, here)
        if ragged > 0:
            k, v = _load_picked(keys, values, place, token, here, kv_head, TILE, D_PADDED, DV_PADDED)
            logits, v = hide_unused(tl.dot(queries, k.T), v, ragged, TILE)
            top, total, output = softmax_step(logits, v, top, total, output, scale)
        gate = far * sparse_gate_sequence + head[:, None] * sparse_gate_head + channel[None, :] * sparse_gate_channel
        gated += _gated(top, total, output, sparse_gate, gate, mask)
    if WINDOW > 0:
        filled = tl.minimum(length, WINDOW)
        top, total = start_softmax(window_sink, head, ROWS)
        output = tl.zeros([ROWS, DV_PADDED], tl.float32)
        whole = filled // RING_TILE
        for tile in range(whole):  # the softmax does not mind the order of the ring's slots
            k = load_keys(ring_keys, sequence, tile * RING_TILE, kv_head, RING_TILE, D_PADDED)
            v = load_keys(ring_values, sequence, tile * RING_TILE, kv_head, RING_TILE, DV_PADDED)
            top, total, output = softmax_step(tl.dot(queries, k.T), v, top, total, output, scale)
        if whole * RING_TILE < filled:
            slot = whole * RING_TILE
            k = load_keys(ring_keys, sequence, slot, kv_head, RING_TILE, D_PADDED)
            v = load_keys(ring_values, sequence, slot, kv_head, RING_TILE, DV_PADDED)
            logits, v = hide_unused(tl.dot(queries, k.T), v, filled - slot, RING_TILE)
            top, total, output = softmax_step(logits, v, top, total, output, scale)
        gate = far * window_gate_sequence + head[:, None] * window_gate_head + channel[None, :] * window_gate_channel
        gated += _gated(top, total, output, window_gate, gate, mask)
    cell = (far * tl.num_programs(0) * GROUP + head[:, None]) * DV + channel[None, :]
    tl.store(result + cell, gated.to(result.dtype.element_ty), mask=mask)


@triton.jit
def _listed_tiles(
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
def _load_picked(
    keys, values, place, token, here, kv_head, TILE: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr
):
    """Keys and values of the one tile that is `here`."""
    place, token = _pick(place, here), _pick(token, here)
    k = load_keys(keys, place, token, kv_head, TILE, D_PADDED)
    return k, load_keys(values, place, token, kv_head, TILE, DV_PADDED)


@triton.jit
def _pick(vector, here):
    return tl.sum(tl.where(here, vector, 0), 0)


@triton.jit
def _gated(top, total, output, gate, cell, mask):
    """A branch's output, multiplied by its gate where there is one."""
    output, _ = finish_softmax(top, total, output)
    if gate is not None:
        output *= tl.load(gate + cell, mask=mask, other=0).to(tl.float32)
    return output
