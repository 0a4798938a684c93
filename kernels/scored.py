"""Causal attention that selects key blocks while it runs (paper eq. 2 and 3), forward.

A program is a persistent CTA. Its tiles are neighbouring queries with the G heads of one KV head, packed into the rows
of one matrix, longest key range first. While it walks the keys as any attention kernel does, it leaves the largest
logit of each row in each key block in a strip of scratch memory that it alone reads. A score is the largest over the
heads of (maximum - log-sum-exp), and the log-sum-exp is known only behind the last key, so that is when the strip is
read back. Its size follows from the number of CTAs and the number of blocks: nothing of S x T / block ever exists.

`scored_selection.py` selects from the strip, `scored_schedule.py` deals out the tiles. For the shapes of the paper on
Hopper `scored_forward` takes a faster version of the kernel, in `scored_hopper.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import scored_hopper
from kernels.arguments import (
    INTERPRETED,
    LOG2_E,
    check_qkv,
    check_starts,
    group_tiles,
    key_tiles,
    loadable,
    power_of_two,
    sink_of_heads,
)
from kernels.capability import BLOCKS
from kernels.errors import KernelError
from kernels.scored_schedule import pairs_at_once, place, turns
from kernels.scored_selection import score_blocks, select_blocks
from kernels.tiles import BINARY, LOWEST, NATURAL

ROWS = 128  # of a tile: queries times heads
WARPS = 8
KEYS = 64  # of a tile, where a block is not larger
CHUNK = 128  # blocks that come back from the strip at a time
ON_CPU = tl.constexpr(INTERPRETED)


def scored_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_start: Tensor,
    *,
    block: int,
    selected: int,
    sink: Tensor | None = None,
    query_start: int = 0,
    dense_scores: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Attention of query_start + i over keys document_start[:, i] to query_start + i, and each query's best blocks.

    q [B, S, H, D]; k [B, T, K, D], v [B, T, K, D'], T >= query_start + S; document_start [B, S] int32, nondecreasing,
    counted in keys; sink [H], a logit that joins the softmax denominator and has no value.
    Returns the output [B, S, H, D'], the log-sum-exp [B, H, S] (FP32, natural, the sink included), the `selected`
    blocks of largest probability [B, K, S, selected] int32 by falling score, -1 where fewer hold a visible key (None
    for selected = 0), and on request, for analysis, the logarithms of all scores [B, K, S, T/block] FP32. Raises
    KernelError.
    """
    check_qkv(q, k, v, document_start)
    (B, S, H, D), (_, T, K, Dv) = q.shape, v.shape
    group = H // K
    if not power_of_two(group) or group > ROWS:
        raise KernelError(f"q has {H} heads for {K} of k: {group} a group; the kernel takes powers of two up to {ROWS}")
    if block not in BLOCKS:
        raise KernelError(f"block={block}; the kernel takes one of {BLOCKS}")
    if selected < 0:
        raise KernelError(f"selected={selected}; use 0 to select nothing, or a number of blocks")
    if not 0 <= query_start <= T - S:
        raise KernelError(f"query_start={query_start} with {S} queries needs {query_start + S} keys; k has {T}")
    check_starts(document_start, query_start)
    sink = sink_of_heads(sink, q)
    q, k, v, document_start = loadable(q), loadable(k), loadable(v), document_start.contiguous()
    if sink is None and not dense_scores and scored_hopper.supported(q, v, K, block, selected):
        return *scored_hopper.forward(q, k, v, document_start, selected=selected, query_start=query_start), None
    key_blocks, tokens, keys = triton.cdiv(T, block), ROWS // group, max(KEYS, block)
    output, lse = q.new_empty(B, S, H, Dv), q.new_empty(B, H, S, dtype=torch.float32)
    blocks = q.new_empty(B, K, S, selected, dtype=torch.int32) if selected else None
    scores = q.new_full((B, K, S, key_blocks), -torch.inf, dtype=torch.float32) if dense_scores else None
    pairs, query_tiles = B * K, triton.cdiv(S, tokens)
    programs = min(pairs * query_tiles, _multiprocessors(q.device))
    span = _span(key_blocks)
    strip_blocks = triton.cdiv(key_blocks, CHUNK) * CHUNK
    spans = triton.next_power_of_2(strip_blocks // span)
    strip_size = strip_blocks * ROWS + tokens * (strip_blocks + spans)
    strip = q.new_empty(programs * strip_size if selected or dense_scores else 0, dtype=torch.float32)
    _forward_kernel[(programs,)](
        group_tiles(q, tokens, group),
        key_tiles(k, keys),
        key_tiles(v, keys),
        document_start,
        sink,
        output,
        lse,
        blocks,
        scores,
        strip,
        S,
        query_start,
        LOG2_E / D**0.5,
        pairs,
        query_tiles,
        pairs_at_once(pairs, T * (D + Dv) * k.element_size()),
        key_blocks,
        strip_blocks,
        strip_size,
        H=H,
        K=K,
        BLOCK=block,
        VALUE_WIDTH=Dv,
        SELECTED=selected,
        SPAN=span,
        SPANS=spans,
        CHUNK=CHUNK,
        STAGES=_stages(D, Dv, keys, q.element_size()),
        num_warps=WARPS,
    )
    return output, lse, blocks, scores


def _multiprocessors(device: torch.device) -> int:
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _span(key_blocks: int) -> int:
    """Blocks that step 2 takes as one: steps 2 and 3 together look at key_blocks / span + selected * span scores."""
    return 8 if key_blocks <= 1024 else 16 if key_blocks <= 4096 else 32


def _stages(D: int, Dv: int, keys: int, size: int) -> int:
    """Key tiles in flight: as many as fit beside the queries into 224 KiB of shared memory, at most three."""
    D, Dv = triton.next_power_of_2(D), triton.next_power_of_2(Dv)
    return max(1, min(3, (224 * 1024 - ROWS * D * size) // (keys * (D + Dv) * size)))


@triton.jit(do_not_specialize=["S", "query_start", "pairs", "query_tiles", "at_once", "key_blocks"])
def _forward_kernel(
    q,
    k,
    v,
    document_start,
    sink,
    output,
    lse,
    blocks,
    scores,
    strip,
    S,
    query_start,
    scale,
    pairs,
    query_tiles,
    at_once,
    key_blocks,
    strip_blocks,
    strip_size,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    SELECTED: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    G: tl.constexpr = H // K
    TOKENS: tl.constexpr = q.block_shape[1]
    ROWS: tl.constexpr = TOKENS * G
    KEYS: tl.constexpr = k.block_shape[2]
    DV: tl.constexpr = v.block_shape[3]
    PARTS: tl.constexpr = KEYS // BLOCK
    SCORED: tl.constexpr = blocks is not None or scores is not None
    strip += tl.program_id(0).to(tl.int64) * strip_size
    row = tl.arange(0, ROWS)
    # What the selection needs of constants would otherwise wait in registers all along, and spill.
    for turn in tl.range(0, turns(pairs, query_tiles), num_stages=1, disable_licm=True):
        b, head, first = place(turn, pairs, query_tiles, at_once, K, TOKENS)
        last = tl.minimum(first + TOKENS, S) - 1
        token = tl.minimum(first + row // G, last)  # rows past the last query repeat it
        query_head = head * G + row % G
        start = tl.load(document_start + b * S + token)
        position = query_start + token

        # Key tiles: the first `front` have keys before some row's document, those from `whole` on some row's future.
        low = tl.load(document_start + b * S + first) // KEYS
        stop = (query_start + last) // KEYS + 1
        edge = tl.minimum(tl.cdiv(tl.load(document_start + b * S + last), KEYS), stop)
        whole = tl.maximum(edge, (query_start + first + 1) // KEYS)
        front = edge - low
        masked = front + stop - whole

        query = q.load([b, first, head * G, 0]).reshape(ROWS, q.block_shape[3])
        if sink is None:
            m = tl.full([ROWS], LOWEST, tl.float32)
            denominator = tl.zeros([ROWS], tl.float32)
        else:
            m = tl.load(sink + query_head).to(tl.float32) * BINARY
            denominator = tl.full([ROWS], 1.0, tl.float32)
        acc = tl.zeros([ROWS, DV], tl.float32)
        weights = tl.zeros([ROWS, KEYS], tl.float32)
        shrink = tl.full([ROWS], 1.0, tl.float32)
        final = tl.where(masked > 0, _masked_tile(masked - 1, front, low, whole), edge)
        m, denominator, acc, weights, shrink = _walk(
            m, denominator, acc, weights, shrink, query, k, v, b, head, 0, masked, front, low, whole, final,
            position, start, strip, scale, True, SCORED, BLOCK, STAGES,
        )  # fmt: skip
        m, denominator, acc, weights, shrink = _walk(
            m, denominator, acc, weights, shrink, query, k, v, b, head, edge, whole, front, low, whole, final,
            position, start, strip, scale, False, SCORED, BLOCK, STAGES,
        )  # fmt: skip
        final = tl.where(whole > edge, whole - 1, final)
        value = v.load([b, head, final * KEYS, 0]).reshape(KEYS, DV)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None])

        log_sum = m + tl.math.log2(denominator)
        kept = first + row // G < S
        tl.store(lse + (b * H + query_head).to(tl.int64) * S + token, log_sum * NATURAL, mask=kept)
        column = tl.arange(0, DV)
        into = output + ((b * S + token).to(tl.int64) * H + query_head)[:, None] * VALUE_WIDTH + column[None, :]
        inside = kept[:, None] & (column < VALUE_WIDTH)[None, :]
        tl.store(into, (acc * (1 / denominator)[:, None]).to(output.dtype.element_ty), mask=inside)
        if SCORED:
            tl.debug_barrier()  # others read what a thread has left in the strip
            rows_out = (b * K + head).to(tl.int64) * S + first
            kept = last - first + 1
            score_blocks(
                strip, log_sum, low * PARTS, stop * PARTS, scores, rows_out, kept, key_blocks, strip_blocks,
                TOKENS, SPAN, SPANS, CHUNK,
            )  # fmt: skip
        if blocks is not None:
            tl.debug_barrier()
            select_blocks(
                strip + strip_blocks * ROWS, low * PARTS, stop * PARTS, blocks, rows_out, kept, strip_blocks,
                TOKENS, SELECTED, SPAN, SPANS,
            )  # fmt: skip


@triton.jit
def _masked_tile(index, front, low, whole):
    """The key tiles that need a mask: those where documents begin, then those on the diagonal."""
    return tl.where(index < front, low + index, whole + index - front)


@triton.jit
def _walk(
    m,
    denominator,
    acc,
    weights,
    shrink,
    query,
    k,
    v,
    b,
    head,
    first,
    stop,
    front,
    low,
    whole,
    before,
    position,
    start,
    strip,
    scale,
    MASKED: tl.constexpr,
    SCORED: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Softmax attention over the key tiles first to stop - 1, or over the masked tiles of these indices.

    The product with the values of a tile is one iteration late, so that it runs while the softmax of the next tile is
    computed; `before` is the tile that an earlier walk left for this one. Weights wait in FP32: as BF16 they would be
    sent through shared memory. m counts in powers of two, as do the scaled logits.
    """
    ROWS: tl.constexpr = query.shape[0]
    KEYS: tl.constexpr = k.block_shape[2]
    PARTS: tl.constexpr = KEYS // BLOCK
    row = tl.arange(0, ROWS)
    column = tl.arange(0, KEYS)
    for index in tl.range(first, stop, num_stages=STAGES):
        if MASKED:
            tile = _masked_tile(index, front, low, whole)
            previous = _masked_tile(tl.maximum(index - 1, 0), front, low, whole)
        else:
            tile = index
            previous = tl.where(index == first, before, index - 1)
        key = k.load([b, head, tile * KEYS, 0]).reshape(KEYS, k.block_shape[3])
        value = v.load([b, head, previous * KEYS, 0]).reshape(KEYS, v.block_shape[3])
        logits = tl.dot(query, key.T)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None])
        if MASKED:
            number = tile * KEYS + column
            seen = (number[None, :] <= position[:, None]) & (number[None, :] >= start[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        if SCORED:
            maximum = tl.full([ROWS], float("-inf"), tl.float32)
            for part in tl.static_range(PARTS):
                of_part = logits if PARTS == 1 else tl.where((column // BLOCK == part)[None, :], logits, float("-inf"))
                part_maximum = tl.max(of_part, 1) * scale
                _put(strip + (tile * PARTS + part) * ROWS + row, part_maximum)
                maximum = tl.maximum(maximum, part_maximum)
        else:
            maximum = tl.max(logits, 1) * scale
        new = tl.maximum(m, maximum)
        weights = tl.math.exp2(logits * scale - new[:, None])
        shrink = tl.math.exp2(m - new)
        denominator = denominator * shrink + tl.sum(weights, 1)
        m = new
    return m, denominator, acc, weights, shrink


@triton.jit
def _put(pointers, values):
    """A store by the threads that hold the values; `tl.store` moves them to others through shared memory first."""
    if ON_CPU:
        tl.store(pointers, values)
    else:
        tl.inline_asm_elementwise(
            "st.global.f32 [$1], $2; mov.u32 $0, 0;",
            "=r,l,f",
            [pointers.to(tl.int64), values],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
