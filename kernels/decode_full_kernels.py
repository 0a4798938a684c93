"""The kernels of `decode.decode_full`: a part of a sequence each, then all parts put together and blocks selected."""

import triton
import triton.language as tl

from kernels.tiles import BINARY, finish_softmax, hide_unused, load_keys, load_rows, softmax_step, start_softmax


@triton.jit
def split_kernel(
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
    mine = tl.zeros_like(row) + sequence  # q has one token of each sequence
    queries = load_rows(q, mine, kv_head * GROUP + row, row < GROUP, q_sequence, q_head, D, D_PADDED)
    maxima += pair * pieces * GROUP
    top, total = start_softmax(None, row, ROWS)
    output = tl.zeros([ROWS, DV_PADDED], tl.float32)
    stop = tiles * (split + 1) // splits
    whole = tl.minimum(stop, length // TILE)
    for tile in range(tiles * split // splits, whole):
        place, token = _locate(page_table, pages, sequence, tile * TILE, PAGED)
        k = load_keys(keys, place, token, kv_head, TILE, D_PADDED)
        v = load_keys(values, place, token, kv_head, TILE, DV_PADDED)
        logits = tl.dot(queries, k.T)
        if SCORED:
            _store_maxima(maxima, logits, scale, tile, row, GROUP, ROWS, TILE, PIECE)
        top, total, output = softmax_step(logits, v, top, total, output, scale)
    if whole < stop:
        place, token = _locate(page_table, pages, sequence, whole * TILE, PAGED)
        k = load_keys(keys, place, token, kv_head, TILE, D_PADDED)
        v = load_keys(values, place, token, kv_head, TILE, DV_PADDED)
        logits, v = hide_unused(tl.dot(queries, k.T), v, length - whole * TILE, TILE)
        if SCORED:
            _store_maxima(maxima, logits, scale, whole, row, GROUP, ROWS, TILE, PIECE)
        top, total, output = softmax_step(logits, v, top, total, output, scale)
    lse = top + tl.math.log2(total)  # -inf for a part without keys
    output, _ = finish_softmax(top, total, output)
    tl.store(partial_lse + (pair * GROUP + row) * splits + split, lse, mask=row < GROUP)
    cell = ((pair * splits + split) * GROUP + row[:, None]) * DV + channel[None, :]
    mask = (row[:, None] < GROUP) & (channel[None, :] < DV)
    tl.store(partial + cell, output, mask=mask)


@triton.jit
def _locate(page_table, pages, sequence, position, PAGED: tl.constexpr):
    """First two coordinates in the cache of the token at `position`, a multiple of the page."""
    if PAGED:
        place, token = tl.load(page_table + sequence.to(tl.int64) * pages + position // 64), 0
    else:
        place, token = sequence, position
    return place, token


@triton.jit
def _store_maxima(
    maxima, logits, scale, tile, row, GROUP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PIECE: tl.constexpr
):
    """The largest logit of each row in each piece of a tile, which is a key block or a part of one."""
    PARTS: tl.constexpr = TILE // PIECE
    if PARTS == 1:
        tl.store(maxima + tile * GROUP + row, tl.max(logits, 1) * scale, mask=row < GROUP)
    else:
        highest = tl.max(tl.reshape(logits, [ROWS, PARTS, PIECE]), 2) * scale
        piece = tile * PARTS + tl.arange(0, PARTS)[None, :]
        tl.store(maxima + piece * GROUP + row[:, None], highest, mask=row[:, None] < GROUP)


@triton.jit
def combine_kernel(
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
        sink_logit = tl.load(sink + kv_head * GROUP + head, mask=head < GROUP, other=0).to(tl.float32) * BINARY
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
