"""`scored_forward` of `scored.py` for Hopper, with warps that specialise (Gluon): the same result, faster.

A CTA is persistent and has one per multiprocessor. Its tiles are neighbouring queries with the G heads of one KV head,
packed into 128 rows. Four kinds of warps share the work and meet only at barriers in shared memory:
- a producer, one warp, keeps the copy engine busy: queries of the tile, then its keys and values, last keys first;
- two consumers, a warp group each, own 64 rows. The product with the keys of a tile starts before the softmax of the
  tile before it is through with the values (FlashAttention-3, arXiv 2407.08608, section 3.2), and while one consumer
  computes exponentials the other one's matrix products run. Each row's largest logit in each key block goes to a strip
  of scratch memory that only this CTA sees, straight from the registers;
- a selector, a warp group, turns the strip of a finished tile into block indices while the next tile is computed. Two
  strips take turns.

The selection is exact, ties go to the lower block. A score is the largest over the heads of (maximum - log-sum-exp).
The selector finds the scores of all blocks and the best score of each span of 8 neighbouring blocks, then the best
`selected` spans (blocks outside of them cannot be among the best: each of these spans holds a block that precedes
them), then the best `selected` of their blocks, one maximum after the other, with a query's scores in one warp.

What the barriers say: `full` and `empty` of a ring's buffer, or of a strip. Buffers are used in turn, so the parity of
(use // number of buffers) tells which completion to wait for, and a fresh barrier counts as one that has completed its
last phase, so the first wait for `empty` (parity 1) passes.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.arguments import LOG2_E, check_qkv, loadable, power_of_two
from kernels.errors import KernelError

ROWS = gl.constexpr(128)  # of a tile: queries times heads
HALF = gl.constexpr(64)  # of a consumer
BLOCK = gl.constexpr(64)  # keys
SPAN = gl.constexpr(8)  # neighbouring blocks that the selection first takes as one
MOST_SELECTED = 16  # their spans fill the lanes of a warp, two lanes a span
NO_SCORE = gl.constexpr(-(2**31))  # as an ordered integer; below that of -inf
HIDDEN = gl.constexpr(-2139095041)  # the ordered integer of -inf: nothing visible
NO_BLOCK = gl.constexpr(2**31 - 1)
LN_2 = gl.constexpr(0.6931471805599453)
PRODUCER_REGISTERS = gl.constexpr(24)


class Tiling(NamedTuple):
    """What may be tuned."""

    keys: int = 128  # of a tile
    key_tiles: int = 2  # buffers in the ring
    value_tiles: int = 2
    ping_pong: bool = False  # the consumers take turns at starting matrix products


TILING = Tiling()


def supported(q: Tensor, v: Tensor, kv_heads: int, block: int, selected: int) -> bool:
    """Whether this version takes the case; `scored.py` takes all others."""
    group = q.shape[2] // kv_heads
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] == v.shape[3] == 128
        and power_of_two(group)
        and group <= HALF.value
        and block == BLOCK.value
        and selected <= MOST_SELECTED
    )


def scored_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_start: Tensor,
    *,
    block: int = 64,
    selected: int = 16,
    query_start: int = 0,
    tiling: Tiling = TILING,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output [B, S, H, D], log-sum-exp [B, H, S] and best blocks [B, K, S, selected] (None for selected = 0).

    Arguments and results as in `scored.scored_forward`, for what `supported` accepts.
    """
    check_qkv(q, k, v, document_start)
    (B, S, H, D), (_, T, K, Dv) = q.shape, v.shape
    group = H // K
    if block != BLOCK.value or selected > MOST_SELECTED or not power_of_two(group) or group > HALF.value or D != Dv:
        raise KernelError(f"block={block}, selected={selected}, {group} heads a group, D={D}, {Dv}: use kernels.scored")
    if not 0 <= query_start <= T - S:
        raise KernelError(f"query_start={query_start} with {S} queries needs {query_start + S} keys; k has {T}")
    q, k, v, document_start = loadable(q), loadable(k), loadable(v), document_start.contiguous()
    output, lse = q.new_empty(B, S, H, Dv), q.new_empty(B, H, S, dtype=torch.float32)
    blocks = q.new_empty(B, K, S, selected, dtype=torch.int32) if selected else None
    tokens = ROWS.value // group
    tiles = triton.cdiv(S, tokens) * B * K
    programs = min(tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
    strip_size = ROWS.value * (1 + 2 * triton.cdiv(T, 2 * BLOCK.value))  # of a tile: log-sum-exp, then blocks
    spans = max(64, triton.next_power_of_2(triton.cdiv(T, BLOCK.value * SPAN.value)))
    score_size = tokens * spans * (SPAN.value + 1)
    scratch = q.new_empty(programs * (2 * strip_size + score_size) if selected else 0, dtype=torch.float32)
    _forward_kernel[(programs,)](
        _tiles(q, tokens // 2, group),
        _tiles(k, tiling.keys, 1),
        _tiles(v, tiling.keys, 1),
        _tiles(output, tokens // 2, group),
        lse,
        blocks,
        scratch,
        strip_size,
        score_size,
        document_start,
        tiles,
        triton.cdiv(S, tokens),
        K,
        S,
        query_start,
        LOG2_E / math.sqrt(D),
        KEY_TILES=tiling.key_tiles,
        VALUE_TILES=tiling.value_tiles,
        PING_PONG=tiling.ping_pong,
        SELECTED=selected,
        LANE_SPANS=spans // 32,
        AT_A_TIME=min(tokens, 16 if spans <= 64 else 8),
        CONSUMER_REGISTERS=208 if selected else 240,
        num_warps=4,
        maxnreg=128 if selected else 168,  # times 16 or 12 warps: what a multiprocessor has
    )
    return output, lse, blocks


def _tiles(x: Tensor, tokens: int, heads: int) -> TensorDescriptor:
    """Loads and stores tiles of x [B, T, heads, D]; what lies outside of x reads as zero and is not stored."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, tokens, heads, x.shape[3]], layout)


@gluon.jit(do_not_specialize=["tiles", "query_tiles", "K", "S", "query_start"])  # one compilation for all lengths
def _forward_kernel(
    q,
    k,
    v,
    output,
    lse,
    blocks,
    scratch,
    strip_size,
    score_size,
    document_start,
    tiles,
    query_tiles,
    K,
    S,
    query_start,
    scale,
    KEY_TILES: gl.constexpr,
    VALUE_TILES: gl.constexpr,
    PING_PONG: gl.constexpr,
    SELECTED: gl.constexpr,
    LANE_SPANS: gl.constexpr,
    AT_A_TIME: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    q_tiles = gl.allocate_shared_memory(q.dtype, [4] + q.block_type.shape, q.layout)  # two, of two halves
    k_tiles = gl.allocate_shared_memory(k.dtype, [KEY_TILES] + k.block_type.shape, k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [VALUE_TILES] + v.block_type.shape, v.layout)
    queries = (q_tiles, _barriers(4, 1), _barriers(4, 1))  # full, empty
    keys = (k_tiles, _barriers(KEY_TILES, 1), _barriers(KEY_TILES, 2))
    values = (v_tiles, _barriers(VALUE_TILES, 1), _barriers(VALUE_TILES, 2))
    rings = (queries, keys, values)
    strip = scratch + gl.program_id(0).to(gl.int64) * (2 * strip_size + score_size)
    strips = (strip, strip_size, _barriers(2, 2), _barriers(2, 1))
    turns = _barriers(2, 1)
    work = (document_start, tiles, query_tiles, K, S, query_start)
    fence_async_shared()
    if SELECTED > 0:
        gl.warp_specialize(
            [
                (_selector, (blocks, k_tiles, q_tiles, strips, work, scale, SELECTED, LANE_SPANS, AT_A_TIME)),
                (_consumer, (output, lse, rings, strips, turns, work, scale, 0, True, PING_PONG)),
                (_consumer, (output, lse, rings, strips, turns, work, scale, 1, True, PING_PONG)),
                (_producer, (q, k, v, rings, work)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_producer, (q, k, v, rings, work)),
                (_consumer, (output, lse, rings, strips, turns, work, scale, 0, False, PING_PONG)),
                (_consumer, (output, lse, rings, strips, turns, work, scale, 1, False, PING_PONG)),
            ],
            [4, 4],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
        )


@gluon.jit
def _barriers(N: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def _place(turn, work, TOKENS: gl.constexpr):
    """Sequence, KV head and first query of a program's turn.

    One head after the other for the cache's sake, last queries first; every other round of tiles is dealt backwards,
    so that work evens out.
    """
    _, tiles, query_tiles, K, _, _ = work
    programs = gl.num_programs(0)
    start = turn // programs * programs
    backwards = (turn // programs % 2 == 1) & (start + programs <= tiles)
    tile = gl.where(backwards, 2 * start + programs - 1 - turn, turn)
    pair = tile // query_tiles
    return pair // K, pair % K, (query_tiles - 1 - tile % query_tiles) * TOKENS


@gluon.jit
def _documents(turn, work, TOKENS: gl.constexpr):
    """Where the documents of a tile's first and last query start."""
    document_start, tiles, _, _, S, _ = work
    b, _, first = _place(gl.minimum(turn, tiles - 1), work, TOKENS)
    row = document_start + b.to(gl.int64) * S
    return gl.load(row + first), gl.load(row + gl.minimum(first + TOKENS, S) - 1)


@gluon.jit
def _key_range(first, lowest, work, TOKENS: gl.constexpr, KEYS: gl.constexpr):
    """The key tiles low to high - 1 of the queries from `first` on."""
    _, _, _, _, S, query_start = work
    return lowest // KEYS, (query_start + gl.minimum(first + TOKENS, S) - 1) // KEYS + 1


@gluon.jit
def _producer(q, k, v, rings, work):
    queries, keys, values = rings
    q_tiles, q_full, q_empty = queries
    KEYS: gl.constexpr = keys[0].shape[2]
    HALF_TOKENS: gl.constexpr = q_tiles.shape[2]
    G: gl.constexpr = q_tiles.shape[3]
    tile = 0  # of this program
    n = 0  # key tiles so far
    for turn in range(gl.program_id(0), work[1], gl.num_programs(0)):
        b, head, first = _place(turn, work, 2 * HALF_TOKENS)
        lowest, _ = _documents(turn, work, 2 * HALF_TOKENS)
        low, high = _key_range(first, lowest, work, 2 * HALF_TOKENS, KEYS)
        for half in gl.static_range(2):
            at = tile % 2 * 2 + half
            mbarrier.wait(q_empty.index(at), (tile // 2 & 1) ^ 1)
            mbarrier.expect(q_full.index(at), q.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q, [b, first + half * HALF_TOKENS, head * G, 0], q_full.index(at), q_tiles.index(at)
            )
        tile += 1
        # Keys are wanted a tile before values.
        _load(k, b, (high - 1) * KEYS, head, n, keys)
        for back in range(1, high - low):
            _load(k, b, (high - 1 - back) * KEYS, head, n + back, keys)
            _load(v, b, (high - back) * KEYS, head, n + back - 1, values)
        n += high - low
        _load(v, b, low * KEYS, head, n - 1, values)


@gluon.jit
def _load(source, b, key, head, n, ring):
    """The n-th tile of a ring: from `key` on."""
    tiles, full, empty = ring
    BUFFERS: gl.constexpr = tiles.shape[0]
    at = n % BUFFERS
    mbarrier.wait(empty.index(at), (n // BUFFERS & 1) ^ 1)
    mbarrier.expect(full.index(at), source.block_type.nbytes)
    tma.async_copy_global_to_shared(source, [b, key, head, 0], full.index(at), tiles.index(at))


@gluon.jit
def _consumer(
    output, lse, rings, strips, turns, work, scale, WHICH: gl.constexpr, SCORED: gl.constexpr, PING_PONG: gl.constexpr
):
    queries, keys, values = rings
    q_tiles, q_full, q_empty = queries
    k_tiles, k_full, k_empty = keys
    v_tiles, v_full, v_empty = values
    strip_start, strip_size, strip_full, strip_empty = strips
    document_start, tiles, _, K, S, query_start = work
    KEY_TILES: gl.constexpr = k_tiles.shape[0]
    VALUE_TILES: gl.constexpr = v_tiles.shape[0]
    KEYS: gl.constexpr = k_tiles.shape[2]
    HALF_TOKENS: gl.constexpr = q_tiles.shape[2]
    TOKENS: gl.constexpr = 2 * HALF_TOKENS
    G: gl.constexpr = q_tiles.shape[3]
    D: gl.constexpr = q_tiles.shape[4]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PER_ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)

    row = gl.arange(0, HALF, layout=PER_ROW)
    tile = 0  # of this program
    n = 0  # key tiles so far
    lowest, highest = _documents(gl.program_id(0), work, TOKENS)
    for turn in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, head, first = _place(turn, work, TOKENS)
        low, high = _key_range(first, lowest, work, TOKENS, KEYS)
        # Last keys first. Whole tiles, with nothing to mask: below some row's future, above some row's document start.
        whole_high = gl.minimum((query_start + first + 1) // KEYS, high - 1)
        whole_low = gl.minimum((highest + KEYS - 1) // KEYS, whole_high)
        lowest, highest = _documents(turn + gl.num_programs(0), work, TOKENS)  # early, for the next tile

        token = first + WHICH * HALF_TOKENS + row // G
        start = gl.load(document_start + b.to(gl.int64) * S + token, mask=token < S, other=0)
        strip = strip_start + tile % 2 * strip_size
        rows = (query_start + token, start, strip + WHICH * HALF + row, scale)
        if SCORED:
            mbarrier.wait(strip_empty.index(tile % 2), (tile // 2 & 1) ^ 1)
        at = tile % 2 * 2 + WHICH
        query = q_tiles.index(at).reshape([HALF, D])
        m = gl.full([HALF], -float("inf"), gl.float32, PER_ROW)
        denominator = gl.zeros([HALF], gl.float32, PER_ROW)
        acc = gl.zeros([HALF, D], gl.float32, SUMS)

        # The first tile, before which there are no values to multiply.
        mbarrier.wait(q_full.index(at), tile // 2 & 1)
        mbarrier.wait(k_full.index(n % KEY_TILES), n // KEY_TILES & 1)
        logits = _start_logits(query, k_tiles, n, LOGITS)
        logits = warpgroup_mma_wait(0, deps=(logits,))
        mbarrier.arrive(k_empty.index(n % KEY_TILES))
        weights, shrink, m, denominator = _softmax(logits, m, denominator, high - 1, rows, True, SCORED)
        weights = _pack(weights, k_tiles.dtype)
        n += 1
        mbarrier.wait(k_full.index(n % KEY_TILES), n // KEY_TILES & 1, pred=high - 1 > low)
        state = (n, acc, weights, m, denominator)
        # Turns taken so far: one a key tile, save each tile's first. The other parity is that of who may begin.
        past = n - tile - 1 + (1 - WHICH)
        go = (turns.index(WHICH), turns.index(1 - WHICH))
        matrices = (query, keys, values)
        state = _walk(high - 2, whole_high, low, state, past, matrices, go, rows, True, SCORED, PING_PONG)
        past = state[0] - tile - 1 + (1 - WHICH)
        state = _walk(whole_high - 1, whole_low, low, state, past, matrices, go, rows, False, SCORED, PING_PONG)
        past = state[0] - tile - 1 + (1 - WHICH)
        state = _walk(whole_low - 1, low, low, state, past, matrices, go, rows, True, SCORED, PING_PONG)
        n, acc, weights, m, denominator = state
        before = (n - 1) % VALUE_TILES
        mbarrier.wait(v_full.index(before), (n - 1) // VALUE_TILES & 1)
        acc = _start_sums(weights, v_tiles, n - 1, acc, SUMS)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(before))

        log_sum = m * scale + gl.log2(denominator)
        if SCORED:
            gl.store(strip + WHICH * HALF + row, log_sum)
            gl.thread_barrier()
            mbarrier.arrive(strip_full.index(tile % 2))
        gl.store(lse + (b * K * G + head * G + row % G).to(gl.int64) * S + token, log_sum * LN_2, mask=token < S)
        share = gl.convert_layout(1 / denominator, gl.SliceLayout(1, SUMS), assert_trivial=True)
        gl.thread_barrier()  # the queries have been read: their buffer takes the output
        query.store((acc * share[:, None]).to(q_tiles.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(output, [b, first + WHICH * HALF_TOKENS, head * G, 0], q_tiles.index(at))
        tma.store_wait(0)
        gl.thread_barrier()
        mbarrier.arrive(q_empty.index(at))
        tile += 1


@gluon.jit
def _walk(
    j, stop, low, state, past, matrices, go, rows, MASKED: gl.constexpr, SCORED: gl.constexpr, PING_PONG: gl.constexpr
):
    """Key tiles j, j - 1, ..., stop of a tile that goes down to `low`, whose keys have arrived; `past`: see the caller.

    Every iteration starts the product of the queries with its keys, and that of the weights of the iteration before
    with its values; its softmax runs while the latter is under way.
    """
    query, keys, values = matrices
    k_tiles, k_full, k_empty = keys
    v_tiles, v_full, v_empty = values
    n, acc, weights, m, denominator = state
    KEY_TILES: gl.constexpr = k_tiles.shape[0]
    VALUE_TILES: gl.constexpr = v_tiles.shape[0]
    LOGITS: gl.constexpr = m.type.layout.parent
    SUMS: gl.constexpr = acc.type.layout
    for _ in range(0, j - stop + 1):
        if PING_PONG:
            mbarrier.wait(go[0], past & 1)
        logits = _start_logits(query, k_tiles, n, LOGITS)
        before = (n - 1) % VALUE_TILES
        mbarrier.wait(v_full.index(before), (n - 1) // VALUE_TILES & 1)
        acc = _start_sums(weights, v_tiles, n - 1, acc, SUMS)
        if PING_PONG:
            mbarrier.arrive(go[1])
        logits, acc = warpgroup_mma_wait(1, deps=(logits, acc))
        mbarrier.arrive(k_empty.index(n % KEY_TILES))
        weights_now, shrink, m, denominator = _softmax(logits, m, denominator, j, rows, MASKED, SCORED)
        n += 1
        # Here, not where the keys are used: the assembler moves no exponential behind the loop of this wait. Left to
        # itself it puts them behind the next one, where no matrix product runs beside them.
        mbarrier.wait(k_full.index(n % KEY_TILES), n // KEY_TILES & 1, pred=j > low)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        weights = _keep(weights)
        mbarrier.arrive(v_empty.index(before))
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS), assert_trivial=True)[:, None]
        weights = _pack(weights_now, k_tiles.dtype)
        j -= 1
        past += 1
    return n, acc, weights, m, denominator


@gluon.jit
def _start_logits(query, k_tiles, n, LOGITS: gl.constexpr):
    KEYS: gl.constexpr = k_tiles.shape[2]
    key = k_tiles.index(n % k_tiles.shape[0]).reshape([KEYS, k_tiles.shape[4]])
    nothing = gl.zeros([HALF, KEYS], gl.float32, LOGITS)
    return warpgroup_mma(query, key.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _start_sums(weights, v_tiles, n, acc, SUMS: gl.constexpr):
    value = v_tiles.index(n % v_tiles.shape[0]).reshape([v_tiles.shape[2], v_tiles.shape[4]])
    weights = _unpack(weights, v_tiles.dtype, gl.DotOperandLayout(0, SUMS, 2))
    return warpgroup_mma(weights, value, acc, is_async=True)


@gluon.jit
def _softmax(logits, m, denominator, j, rows, MASKED: gl.constexpr, SCORED: gl.constexpr):
    """Key tile j: its weights, what is left of a weight before it, and the new running maximum (not scaled) and sum."""
    position, start, strip, scale = rows
    KEYS: gl.constexpr = logits.shape[1]
    LOGITS: gl.constexpr = logits.type.layout
    if MASKED:
        key = (j * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, LOGITS)))[None, :]
        logits = gl.where((key <= position[:, None]) & (key >= start[:, None]), logits, -float("inf"))
    if SCORED:
        if KEYS == BLOCK:
            top = gl.max(logits, 1)
            gl.store(strip + (1 + j) * ROWS, top)
        else:
            gl.static_assert(KEYS == 2 * BLOCK)
            lower, upper = logits.reshape([HALF, 2, BLOCK]).permute([0, 2, 1]).split()
            lower = gl.convert_layout(gl.max(lower, 1), m.type.layout, assert_trivial=True)
            upper = gl.convert_layout(gl.max(upper, 1), m.type.layout, assert_trivial=True)
            gl.store(strip + (1 + 2 * j) * ROWS, lower)
            gl.store(strip + (2 + 2 * j) * ROWS, upper)
            top = gl.maximum(lower, upper)
    else:
        top = gl.max(logits, 1)
    top = gl.maximum(m, top)
    pivot = top * scale
    if MASKED:
        pivot = gl.where(top == -float("inf"), 0.0, pivot)
    weights = gl.exp2(logits * scale - pivot[:, None])
    shrink = gl.exp2(m * scale - pivot)
    return weights, shrink, top, denominator * shrink + gl.sum(weights, 1)


@gluon.jit
def _pack(x, dtype: gl.constexpr):
    """x [rows, columns] as 16-bit floats, neighbours in an integer: as such a loop variable costs no instruction."""
    even, odd = x.reshape([x.shape[0], x.shape[1] // 2, 2]).split()
    if dtype == gl.bfloat16:
        CONVERT: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    else:
        CONVERT: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(CONVERT, "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _unpack(packed, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    even = packed.to(gl.int16).to(dtype, bitcast=True)
    odd = (packed >> 16).to(gl.int16).to(dtype, bitcast=True)
    x = gl.join(even, odd).reshape([packed.shape[0], packed.shape[1] * 2])
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def _keep(x):
    """A use of x without an instruction: until here its registers, which a matrix product still reads, are taken."""
    return gl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=1)


@gluon.jit
def _selector(
    blocks,
    k_tiles,
    q_tiles,
    strips,
    work,
    scale,
    SELECTED: gl.constexpr,
    LANE_SPANS: gl.constexpr,
    AT_A_TIME: gl.constexpr,
):
    strip_start, strip_size, strip_full, strip_empty = strips
    _, tiles, _, K, S, _ = work
    KEYS: gl.constexpr = k_tiles.shape[2]
    TOKENS: gl.constexpr = 2 * q_tiles.shape[2]
    SPANS: gl.constexpr = 32 * LANE_SPANS
    span_scores = (strip_start + 2 * strip_size).to(gl.pointer_type(gl.int32), bitcast=True)
    scores = span_scores + TOKENS * SPANS
    tile = 0
    for turn in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, head, first = _place(turn, work, TOKENS)
        lowest, _ = _documents(turn, work, TOKENS)
        low, high = _key_range(first, lowest, work, TOKENS, KEYS)
        first_block = low * (KEYS // BLOCK)
        count = (high - low) * (KEYS // BLOCK)
        mbarrier.wait(strip_full.index(tile % 2), tile // 2 & 1)
        strip = strip_start + tile % 2 * strip_size
        seen = _score_blocks(strip, first_block, count, scores, span_scores, scale, TOKENS, SPANS)
        gl.thread_barrier()
        mbarrier.arrive(strip_empty.index(tile % 2))
        tile += 1
        out = blocks + (b * K + head).to(gl.int64) * S * SELECTED
        for at in range(0, TOKENS, AT_A_TIME):
            _select(scores, span_scores, seen, at, first_block, out, first, S, AT_A_TIME, SELECTED, SPANS)
        gl.thread_barrier()


@gluon.jit
def _score_blocks(strip, first_block, count, scores, span_scores, scale, TOKENS: gl.constexpr, SPANS: gl.constexpr):
    """Scores [TOKENS, blocks from first_block on] and best of spans [TOKENS, spans], as integers that order like them.

    Returns how many spans there are.
    """
    G: gl.constexpr = ROWS // TOKENS
    CHUNK: gl.constexpr = 4 * SPAN  # blocks, a span a warp
    READ: gl.constexpr = gl.BlockedLayout([SPAN, 4], [1, 32], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, READ))[None, :]
    name = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, READ))[:, None]
    log_sum = gl.load(strip + row)
    chunks = (count + CHUNK - 1) // CHUNK
    for chunk in range(0, chunks):
        seen = chunk * CHUNK + name < count
        cell = (1 + first_block + chunk * CHUNK + name) * ROWS + row
        maxima = gl.load(strip + cell, mask=seen, other=-float("inf"))
        score = gl.max((maxima * scale - log_sum).reshape([CHUNK, TOKENS, G]), 2)
        key = (score + 0.0).to(gl.int32, bitcast=True)  # no -0.0
        key = key ^ ((key >> 31) & 0x7FFFFFFF)
        PAIRS: gl.constexpr = key.type.layout
        token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, PAIRS))[None, :]
        column = chunk * CHUNK + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, PAIRS))[:, None]
        gl.store(scores + token * (SPANS * SPAN) + column, key)
        best = gl.max(key.reshape([4, SPAN, TOKENS]), 1)
        OF_SPANS: gl.constexpr = best.type.layout
        token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, OF_SPANS))[None, :]
        column = chunk * 4 + gl.arange(0, 4, layout=gl.SliceLayout(1, OF_SPANS))[:, None]
        gl.store(span_scores + token * SPANS + column, best)
    return chunks * 4


@gluon.jit
def _select(
    scores,
    span_scores,
    seen,
    at,
    first_block,
    out,
    first,
    S,
    QUERIES: gl.constexpr,
    SELECTED: gl.constexpr,
    SPANS: gl.constexpr,
):
    """The blocks of the tile's queries at, at + 1, ...: tiles [QUERIES, 32 lanes, registers], a query in one warp."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 1, SPANS // 32], [1, 32, 1], [4, 1, 1], [2, 1, 0])
    FINE: gl.constexpr = gl.BlockedLayout([1, 1, SPAN // 2], [1, 32, 1], [4, 1, 1], [2, 1, 0])
    QUERY_LANES: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    query, lane, place = _grid(QUERIES, SPANS // 32, WIDE)
    name = lane * (SPANS // 32) + place
    score = gl.load(span_scores + (at + query) * SPANS + name, mask=name < seen, other=NO_SCORE)
    spans = _best(score, name, SELECTED, 2)  # two lanes a span

    query, lane, place = _grid(QUERIES, SPAN // 2, FINE)
    spans = gl.expand_dims(gl.convert_layout(spans, gl.SliceLayout(2, FINE), assert_trivial=True), 2)
    name = spans * SPAN + lane % 2 * (SPAN // 2) + place
    score = gl.load(scores + (at + query) * (SPANS * SPAN) + name, mask=spans >= 0, other=NO_SCORE)
    chosen = _best(score, name, SELECTED, 1)

    chosen = gl.convert_layout(gl.where(chosen >= 0, chosen + first_block, -1), QUERY_LANES, assert_trivial=True)
    query = first + at + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, QUERY_LANES))[:, None]
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, QUERY_LANES))[None, :]
    gl.store(out + query * SELECTED + lane, chosen, mask=(query < S) & (lane < SELECTED))


@gluon.jit
def _grid(QUERIES: gl.constexpr, PLACES: gl.constexpr, LAYOUT: gl.constexpr):
    """Indices of a tile [QUERIES, 32, PLACES] along its three dimensions."""
    PAIRS: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    query = gl.arange(0, QUERIES, layout=gl.SliceLayout(1, PAIRS))[:, None]
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, PAIRS))[None, :]
    place = gl.arange(0, PLACES, layout=gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT)))[None, :]
    return gl.expand_dims(query, 2), gl.expand_dims(lane, 2), gl.expand_dims(place, 0)


@gluon.jit
def _best(score, name, SELECTED: gl.constexpr, LANES: gl.constexpr):
    """The names of the best scores [QUERIES, 32, places], best first, each in LANES of 32 lanes, -1 where none is left.

    Equal scores go to the lower name.
    """
    PAIRS: gl.constexpr = gl.SliceLayout(2, score.type.layout)
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, PAIRS))[None, :]
    result = gl.full([score.shape[0], 32], -1, gl.int32, PAIRS)
    for rank in gl.static_range(SELECTED):
        best = _over_lanes(gl.max(score, 2), "max")
        at = _over_lanes(gl.min(gl.where(score == gl.expand_dims(best, 2), name, NO_BLOCK), 2), "min")
        result = gl.where((lane // LANES == rank) & (best > HIDDEN), at, result)
        score = gl.where(name == gl.expand_dims(at, 2), NO_SCORE, score)
    return result


@gluon.jit
def _over_lanes(x, which: gl.constexpr):
    """The largest or smallest of the 32 lanes, in all of them; x [queries, 32] int32."""
    if which == "max":
        REDUCE: gl.constexpr = "redux.sync.max.s32 $0, $1, 0xffffffff;"
    else:
        REDUCE: gl.constexpr = "redux.sync.min.s32 $0, $1, 0xffffffff;"
    return gl.inline_asm_elementwise(REDUCE, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)
