"""The exact selection of key blocks at the end of a tile, for both versions of the scored forward.

The strip of a tile holds the largest logit of each row in each key block. A score is the largest over the G heads of a
token of (maximum - log-sum-exp). Ties go to the lower block. Three steps:
1. scores of all blocks [queries, blocks], and the best score of each span of SPAN neighbouring blocks;
2. the best `selected` spans. Blocks outside of them cannot be among the best `selected`: each of these spans holds
   a block that precedes it;
3. the best `selected` of their blocks.
Steps 2 and 3 extract one maximum after the other. A query's scores lie within one warp, as integers, which a warp
reduces in one instruction. On Hopper step 2 is left out where it would take all spans, and step 3 extracts no more
maxima than there are blocks: with short documents this is what a tile's time goes to.

`score_blocks` and `select_blocks` are those of `scored.py`, in Triton; `hopper_score_blocks` and `hopper_select_blocks`
those of `scored_hopper.py`, in Gluon, where one warp group does it beside the next tile's products.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.tiles import NATURAL

HOPPER_SPAN = gl.constexpr(8)
LANES_OF_SPAN = gl.constexpr(2)  # of the 32 of a warp, where it looks at the blocks of spans
HIDDEN = tl.constexpr(0x807FFFFF - 2**32)  # minus infinity among ordered integers: nothing visible, or already taken
NO_BLOCK = tl.constexpr(2**31 - 1)


@triton.jit
def ordered(score):
    """FP32 as integers that order alike. Called from Triton and from Gluon."""
    key = (score + 0.0).to(tl.int32, bitcast=True)  # no -0.0
    return key ^ ((key >> 31) & 0x7FFFFFFF)


@triton.jit
def score_blocks(
    strip,
    log_sum,
    first_block,
    stop_block,
    scores,
    rows_out,
    kept,
    key_blocks,
    strip_blocks,
    TOKENS: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Step 1: behind the maxima [blocks, rows] come scores [TOKENS, blocks] and the best of spans [TOKENS, spans]."""
    ROWS: tl.constexpr = log_sum.shape[0]
    G: tl.constexpr = ROWS // TOKENS
    READ: tl.constexpr = CHUNK // SPAN
    block_scores = strip + strip_blocks * ROWS
    span_scores = block_scores + strip_blocks * TOKENS
    row = tl.arange(0, ROWS)[None, None, :]
    token = tl.arange(0, TOKENS)
    span = tl.arange(0, READ)
    for chunk in tl.range(first_block // CHUNK, tl.cdiv(stop_block, CHUNK)):
        name = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :] + chunk * CHUNK
        seen = ((name >= first_block) & (name < stop_block))[:, :, None]
        maxima = tl.load(strip + name[:, :, None] * ROWS + row, mask=seen, other=float("-inf"))  # [READ, SPAN, ROWS]
        score = tl.max((maxima - log_sum[None, None, :]).reshape(READ, SPAN, TOKENS, G), 3)
        tl.store(block_scores + token[None, None, :] * strip_blocks + name[:, :, None], score)
        tl.store(span_scores + token[None, :] * SPANS + (span + chunk * READ)[:, None], tl.max(score, 1))
        if scores is not None:
            into = scores + (rows_out + token)[None, None, :] * key_blocks + name[:, :, None]
            exists = (name < key_blocks)[:, :, None] & (token < kept)[None, None, :]
            tl.store(into, score * NATURAL, mask=exists & seen)


@triton.jit
def select_blocks(
    block_scores,
    first_block,
    stop_block,
    blocks,
    rows_out,
    kept,
    strip_blocks,
    TOKENS: tl.constexpr,
    SELECTED: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Steps 2 and 3. In tiles [TOKENS, registers, WIDTH], the WIDTH scores of a query lie in the lanes of one warp."""
    WIDTH: tl.constexpr = max(4, min(128, 1024 // TOKENS))
    PLACES: tl.constexpr = triton.next_power_of_2(SELECTED)
    token = tl.arange(0, TOKENS)[:, None, None]
    lane = tl.arange(0, WIDTH)[None, None, :]
    place = tl.arange(0, PLACES)[None, :]
    into = blocks + (rows_out + tl.arange(0, TOKENS))[:, None] * SELECTED + place
    inside = (tl.arange(0, TOKENS) < kept)[:, None] & (place < SELECTED)
    slot = tl.arange(0, triton.cdiv(PLACES * SPAN, WIDTH))[None, :, None] * WIDTH + lane
    if SPANS <= PLACES:
        name = slot + tl.zeros([TOKENS, 1, 1], tl.int32)
        seen = (name >= first_block) & (name < stop_block)
    else:
        span = tl.arange(0, triton.cdiv(SPANS, WIDTH))[None, :, None] * WIDTH + lane
        near = (span >= first_block // SPAN) & (span < tl.cdiv(stop_block, SPAN))
        span_scores = block_scores + strip_blocks * TOKENS + token * SPANS
        score = tl.load(span_scores + span, mask=near, other=float("-inf"))
        tl.store(into, _best(score, span, SELECTED, PLACES), mask=inside)  # spans, until the blocks take their place
        tl.debug_barrier()
        mine = (token < kept) & (slot // SPAN < SELECTED)
        span = tl.load(blocks + (rows_out + token) * SELECTED + slot // SPAN, mask=mine, other=-1)
        name = span * SPAN + slot % SPAN
        seen = span >= 0
    name = tl.max_contiguous(tl.multiple_of(name, [1, 1, 4]), [1, 1, 4])  # whole spans, so a lane loads four at once
    score = tl.load(block_scores + token * strip_blocks + name, mask=seen, other=float("-inf"))
    chosen = _best(score, name, SELECTED, PLACES)
    tl.debug_barrier()
    tl.store(into, chosen, mask=inside)


@triton.jit
def _best(score, name, SELECTED: tl.constexpr, PLACES: tl.constexpr):
    """The names [TOKENS, PLACES] of each query's `SELECTED` largest scores, -1 where there is none.

    Equal scores go to the lower name. score, name [TOKENS, registers, lanes].
    """
    place = tl.arange(0, PLACES)[None, :]
    result = tl.full([score.shape[0], PLACES], -1, tl.int32)
    key = ordered(score)
    for rank in range(SELECTED):
        best = tl.max(tl.max(key, 1), 1)
        at = tl.min(tl.min(tl.where(key == best[:, None, None], name, NO_BLOCK), 1), 1)
        result = tl.where((place == rank) & (best != HIDDEN)[:, None], at[:, None], result)
        key = tl.where(name == at[:, None, None], HIDDEN, key)
    return result


@gluon.jit
def hopper_score_blocks(
    strip,
    first_block,
    count,
    scores,
    span_scores,
    scale,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    SPANS: gl.constexpr,
):
    """Step 1: scores [TOKENS, blocks from first_block on] and the best of spans [TOKENS, spans], ordered integers."""
    G: gl.constexpr = ROWS // TOKENS
    CHUNK: gl.constexpr = 4 * HOPPER_SPAN  # blocks, a span a warp
    READ: gl.constexpr = gl.BlockedLayout([HOPPER_SPAN, 4], [1, 32], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, READ))[None, :]
    name = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, READ))[:, None]
    log_sum = gl.load(strip + row)
    chunks = (count + CHUNK - 1) // CHUNK
    for chunk in range(0, chunks):
        seen = chunk * CHUNK + name < count
        cell = (1 + first_block + chunk * CHUNK + name) * ROWS + row
        maxima = gl.load(strip + cell, mask=seen, other=-float("inf"))
        score = gl.max((maxima * scale - log_sum).reshape([CHUNK, TOKENS, G]), 2)
        key = ordered(score)
        PAIRS: gl.constexpr = key.type.layout
        token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, PAIRS))[None, :]
        column = chunk * CHUNK + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, PAIRS))[:, None]
        gl.store(scores + token * (SPANS * HOPPER_SPAN) + column, key)
        best = gl.max(key.reshape([4, HOPPER_SPAN, TOKENS]), 1)
        OF_SPANS: gl.constexpr = best.type.layout
        token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, OF_SPANS))[None, :]
        column = chunk * 4 + gl.arange(0, 4, layout=gl.SliceLayout(1, OF_SPANS))[:, None]
        gl.store(span_scores + token * SPANS + column, best)


@gluon.jit
def hopper_select_blocks(
    scores,
    span_scores,
    count,
    at,
    first_block,
    out,
    first,
    S,
    QUERIES: gl.constexpr,
    SELECTED: gl.constexpr,
    SPANS: gl.constexpr,
):
    """Steps 2 and 3 for queries at, at + 1, ... of the tile: [QUERIES, 32 lanes, registers], each within one warp."""
    FINE: gl.constexpr = gl.BlockedLayout([1, 1, HOPPER_SPAN // LANES_OF_SPAN], [1, 32, 1], [4, 1, 1], [2, 1, 0])
    QUERY_LANES: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    query, lane, place = _grid(QUERIES, HOPPER_SPAN // LANES_OF_SPAN, FINE)
    spans = lane // LANES_OF_SPAN + gl.zeros([QUERIES, 1, 1], gl.int32, FINE)
    seen = (count + HOPPER_SPAN - 1) // HOPPER_SPAN
    if seen > 32 // LANES_OF_SPAN:
        spans = _best_spans(span_scores + at * SPANS, seen, QUERIES, SELECTED, SPANS, FINE)
    name = spans * HOPPER_SPAN + lane % LANES_OF_SPAN * (HOPPER_SPAN // LANES_OF_SPAN) + place
    exists = (spans >= 0) & (spans < seen)
    score = gl.load(scores + (at + query) * (SPANS * HOPPER_SPAN) + name, mask=exists, other=HIDDEN)
    chosen = _best_in_lanes(score, name, gl.minimum(count, SELECTED), 1)

    chosen = gl.convert_layout(gl.where(chosen >= 0, chosen + first_block, -1), QUERY_LANES, assert_trivial=True)
    query = first + at + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, QUERY_LANES))[:, None]
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, QUERY_LANES))[None, :]
    gl.store(out + query * SELECTED + lane, chosen, mask=(query < S) & (lane < SELECTED))


@gluon.jit
def _best_spans(
    span_scores, seen, QUERIES: gl.constexpr, SELECTED: gl.constexpr, SPANS: gl.constexpr, LAYOUT: gl.constexpr
):
    """Step 2: [QUERIES, 32, 1], the same span in neighbouring lanes; -1 where none is left."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 1, SPANS // 32], [1, 32, 1], [4, 1, 1], [2, 1, 0])
    query, lane, place = _grid(QUERIES, SPANS // 32, WIDE)
    name = lane * (SPANS // 32) + place
    score = gl.load(span_scores + query * SPANS + name, mask=name < seen, other=HIDDEN)
    best = _best_in_lanes(score, name, SELECTED, LANES_OF_SPAN)
    return gl.expand_dims(gl.convert_layout(best, gl.SliceLayout(2, LAYOUT), assert_trivial=True), 2)


@gluon.jit
def _grid(QUERIES: gl.constexpr, PLACES: gl.constexpr, LAYOUT: gl.constexpr):
    """Indices of a tile [QUERIES, 32, PLACES] along its three dimensions."""
    PAIRS: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    query = gl.arange(0, QUERIES, layout=gl.SliceLayout(1, PAIRS))[:, None]
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, PAIRS))[None, :]
    place = gl.arange(0, PLACES, layout=gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT)))[None, :]
    return gl.expand_dims(query, 2), gl.expand_dims(lane, 2), gl.expand_dims(place, 0)


@gluon.jit
def _best_in_lanes(score, name, wanted, LANES: gl.constexpr):
    """The names of the best scores [QUERIES, 32, places], best first, each in LANES of 32 lanes, -1 where none is left.

    Equal scores go to the lower name.
    """
    PAIRS: gl.constexpr = gl.SliceLayout(2, score.type.layout)
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, PAIRS))[None, :]
    result = gl.full([score.shape[0], 32], -1, gl.int32, PAIRS)
    for rank in range(0, wanted):
        best = _over_lanes(gl.max(score, 2), "max")
        at = _over_lanes(gl.min(gl.where(score == gl.expand_dims(best, 2), name, NO_BLOCK), 2), "min")
        result = gl.where((lane // LANES == rank) & (best > HIDDEN), at, result)
        score = gl.where(name == gl.expand_dims(at, 2), HIDDEN, score)
    return result


@gluon.jit
def _over_lanes(x, which: gl.constexpr):
    """The largest or smallest of the 32 lanes, in all of them; x [queries, 32] int32."""
    if which == "max":
        REDUCE: gl.constexpr = "redux.sync.max.s32 $0, $1, 0xffffffff;"
    else:
        REDUCE: gl.constexpr = "redux.sync.min.s32 $0, $1, 0xffffffff;"
    return gl.inline_asm_elementwise(REDUCE, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)
