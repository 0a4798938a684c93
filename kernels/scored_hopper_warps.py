"""What each kind of warp of the Hopper version of the scored forward does: producer, consumers, selector.

What the barriers say: `full` and `empty` of a ring's buffer, or of a strip. Buffers are used in turn, so the parity of
(use // number of buffers) tells which completion to wait for, and a fresh barrier counts as one that has completed its
last phase, so the first wait for `empty` (parity 1) passes.

`rings` are those of queries, keys and values: (buffers, full, empty). `work` is what tells which tiles are whose.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.scored_schedule import place, turns
from kernels.scored_selection import hopper_score_blocks, hopper_select_blocks
from kernels.tiles import NATURAL

ROWS = gl.constexpr(128)  # of a tile: queries times heads
HALF = gl.constexpr(64)  # of a consumer
KEYS = gl.constexpr(128)  # of a tile
BLOCK = gl.constexpr(64)  # keys
D = gl.constexpr(128)
BUFFERS = gl.constexpr(2)  # of a ring: what fits into shared memory


@gluon.jit
def _turns(work):
    _, pairs, query_tiles, _, _, _, _ = work
    return turns(pairs, query_tiles)


@gluon.jit
def _place(turn, work, TOKENS: gl.constexpr):
    _, pairs, query_tiles, at_once, K, _, _ = work
    return place(turn, pairs, query_tiles, at_once, K, TOKENS)


@gluon.jit
def _documents(turn, work, TOKENS: gl.constexpr):
    """Where the documents of a tile's first and last query start."""
    document_start, _, _, _, _, S, _ = work
    b, _, first = _place(turn, work, TOKENS)
    row = document_start + b.to(gl.int64) * S
    return gl.load(row + first), gl.load(row + gl.minimum(first + TOKENS, S) - 1)


@gluon.jit
def _key_range(first, lowest, work, TOKENS: gl.constexpr):
    """The key tiles low to high - 1 of the queries from `first` on."""
    _, _, _, _, _, S, query_start = work
    return lowest // KEYS, (query_start + gl.minimum(first + TOKENS, S) - 1) // KEYS + 1


@gluon.jit
def producer(q, k, v, rings, work):
    queries, keys, values = rings
    q_tiles, q_full, q_empty = queries
    HALF_TOKENS: gl.constexpr = q_tiles.shape[2]
    G: gl.constexpr = q_tiles.shape[3]
    n = 0  # key tiles so far
    for turn in range(0, _turns(work)):
        b, head, first = _place(turn, work, 2 * HALF_TOKENS)
        lowest, _ = _documents(turn, work, 2 * HALF_TOKENS)
        low, high = _key_range(first, lowest, work, 2 * HALF_TOKENS)
        for half in gl.static_range(2):
            at = turn % 2 * 2 + half
            mbarrier.wait(q_empty.index(at), (turn // 2 & 1) ^ 1)
            mbarrier.expect(q_full.index(at), q.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q, [b, first + half * HALF_TOKENS, head * G, 0], q_full.index(at), q_tiles.index(at)
            )
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
    at = n % BUFFERS
    mbarrier.wait(empty.index(at), (n // BUFFERS & 1) ^ 1)
    mbarrier.expect(full.index(at), source.block_type.nbytes)
    tma.async_copy_global_to_shared(source, [b, key, head, 0], full.index(at), tiles.index(at))


@gluon.jit
def consumer(output, lse, rings, strips, work, scale, WHICH: gl.constexpr, SCORED: gl.constexpr):
    queries, keys, values = rings
    q_tiles, q_full, q_empty = queries
    k_tiles, k_full, k_empty = keys
    v_tiles, v_full, v_empty = values
    strip_start, strip_size, strip_full, strip_empty = strips
    document_start, _, _, _, K, S, query_start = work
    HALF_TOKENS: gl.constexpr = q_tiles.shape[2]
    TOKENS: gl.constexpr = 2 * HALF_TOKENS
    G: gl.constexpr = q_tiles.shape[3]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PER_ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)

    row = gl.arange(0, HALF, layout=PER_ROW)
    n = 0  # key tiles so far
    lowest, highest = _documents(0, work, TOKENS)
    for turn in range(0, _turns(work)):
        b, head, first = _place(turn, work, TOKENS)
        low, high = _key_range(first, lowest, work, TOKENS)
        # Last keys first. Whole tiles, with nothing to mask: below some row's future, above some row's document start.
        whole_high = gl.minimum((query_start + first + 1) // KEYS, high - 1)
        whole_low = gl.minimum((highest + KEYS - 1) // KEYS, whole_high)
        lowest, highest = _documents(turn + 1, work, TOKENS)  # early, for the next tile

        token = first + WHICH * HALF_TOKENS + row // G
        start = gl.load(document_start + b.to(gl.int64) * S + token, mask=token < S, other=0)
        strip = strip_start + turn % 2 * strip_size
        rows = (query_start + token, start, strip + WHICH * HALF + row, scale)
        if SCORED:
            mbarrier.wait(strip_empty.index(turn % 2), (turn // 2 & 1) ^ 1)
        at = turn % 2 * 2 + WHICH
        query = q_tiles.index(at).reshape([HALF, D])
        m = gl.full([HALF], -float("inf"), gl.float32, PER_ROW)
        denominator = gl.zeros([HALF], gl.float32, PER_ROW)
        acc = gl.zeros([HALF, D], gl.float32, SUMS)

        # The first tile, before which there are no values to multiply.
        mbarrier.wait(q_full.index(at), turn // 2 & 1)
        mbarrier.wait(k_full.index(n % BUFFERS), n // BUFFERS & 1)
        logits = _start_logits(query, k_tiles, n, LOGITS)
        logits = warpgroup_mma_wait(0, deps=(logits,))
        mbarrier.arrive(k_empty.index(n % BUFFERS))
        weights, shrink, m, denominator = _softmax(logits, m, denominator, high - 1, rows, True, SCORED)
        weights = _pack(weights, k_tiles.dtype)
        n += 1
        mbarrier.wait(k_full.index(n % BUFFERS), n // BUFFERS & 1, pred=high - 1 > low)
        state = (n, acc, weights, m, denominator)
        matrices = (query, keys, values)
        state = _walk(high - 2, whole_high, low, state, matrices, rows, True, SCORED)
        state = _walk(whole_high - 1, whole_low, low, state, matrices, rows, False, SCORED)
        state = _walk(whole_low - 1, low, low, state, matrices, rows, True, SCORED)
        n, acc, weights, m, denominator = state
        before = (n - 1) % BUFFERS
        mbarrier.wait(v_full.index(before), (n - 1) // BUFFERS & 1)
        acc = _start_sums(weights, v_tiles, n - 1, acc, SUMS)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(before))

        log_sum = m * scale + gl.log2(denominator)
        if SCORED:
            gl.store(strip + WHICH * HALF + row, log_sum)
            gl.thread_barrier()
            mbarrier.arrive(strip_full.index(turn % 2))
        gl.store(lse + (b * K * G + head * G + row % G).to(gl.int64) * S + token, log_sum * NATURAL, mask=token < S)
        share = gl.convert_layout(1 / denominator, gl.SliceLayout(1, SUMS), assert_trivial=True)
        gl.thread_barrier()  # the queries have been read: their buffer takes the output
        query.store((acc * share[:, None]).to(q_tiles.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(output, [b, first + WHICH * HALF_TOKENS, head * G, 0], q_tiles.index(at))
        tma.store_wait(0)
        gl.thread_barrier()
        mbarrier.arrive(q_empty.index(at))


@gluon.jit
def _walk(j, stop, low, state, matrices, rows, MASKED: gl.constexpr, SCORED: gl.constexpr):
    """Key tiles j, j - 1, ..., stop of a tile that goes down to `low`, whose keys have arrived.

    Every iteration starts the product of the queries with its keys, and that of the weights of the iteration before
    with its values; its softmax runs while the latter is under way.
    """
    query, keys, values = matrices
    k_tiles, k_full, k_empty = keys
    v_tiles, v_full, v_empty = values
    n, acc, weights, m, denominator = state
    LOGITS: gl.constexpr = m.type.layout.parent
    SUMS: gl.constexpr = acc.type.layout
    for _ in range(0, j - stop + 1):
        logits = _start_logits(query, k_tiles, n, LOGITS)
        before = (n - 1) % BUFFERS
        mbarrier.wait(v_full.index(before), (n - 1) // BUFFERS & 1)
        acc = _start_sums(weights, v_tiles, n - 1, acc, SUMS)
        logits, acc = warpgroup_mma_wait(1, deps=(logits, acc))
        mbarrier.arrive(k_empty.index(n % BUFFERS))
        weights_now, shrink, m, denominator = _softmax(logits, m, denominator, j, rows, MASKED, SCORED)
        n += 1
        # Here, not where the keys are used: the assembler moves no exponential behind the loop of this wait. Left to
        # itself it puts them behind the next one, where no matrix product runs beside them.
        mbarrier.wait(k_full.index(n % BUFFERS), n // BUFFERS & 1, pred=j > low)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        weights = _keep(weights)
        mbarrier.arrive(v_empty.index(before))
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS), assert_trivial=True)[:, None]
        weights = _pack(weights_now, k_tiles.dtype)
        j -= 1
    return n, acc, weights, m, denominator


@gluon.jit
def _start_logits(query, k_tiles, n, LOGITS: gl.constexpr):
    key = k_tiles.index(n % BUFFERS).reshape([KEYS, D])
    nothing = gl.zeros([HALF, KEYS], gl.float32, LOGITS)
    return warpgroup_mma(query, key.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _start_sums(weights, v_tiles, n, acc, SUMS: gl.constexpr):
    value = v_tiles.index(n % BUFFERS).reshape([KEYS, D])
    weights = _unpack(weights, v_tiles.dtype, gl.DotOperandLayout(0, SUMS, 2))
    return warpgroup_mma(weights, value, acc, is_async=True)


@gluon.jit
def _softmax(logits, m, denominator, j, rows, MASKED: gl.constexpr, SCORED: gl.constexpr):
    """Key tile j: its weights, what is left of a weight before it, and the new running maximum (not scaled) and sum."""
    position, start, strip, scale = rows
    LOGITS: gl.constexpr = logits.type.layout
    if MASKED:
        key = (j * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, LOGITS)))[None, :]
        logits = gl.where((key <= position[:, None]) & (key >= start[:, None]), logits, -float("inf"))
    if SCORED:
        gl.static_assert(KEYS == 2 * BLOCK)
        lower, upper = logits.reshape([HALF, 2, BLOCK]).permute([0, 2, 1]).split()
        lower = gl.convert_layout(gl.max(lower, 1), m.type.layout, assert_trivial=True)
        upper = gl.convert_layout(gl.max(upper, 1), m.type.layout, assert_trivial=True)
        # Long strips of all programs exceed the L2 cache: it gives them up before keys and values.
        gl.store(strip + (1 + 2 * j) * ROWS, lower, eviction_policy="evict_first")
        gl.store(strip + (2 + 2 * j) * ROWS, upper, eviction_policy="evict_first")
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
def selector(
    blocks,
    strips,
    work,
    scale,
    TOKENS: gl.constexpr,
    SELECTED: gl.constexpr,
    LANE_SPANS: gl.constexpr,
    AT_A_TIME: gl.constexpr,
):
    strip_start, strip_size, strip_full, strip_empty = strips
    _, _, _, _, K, S, _ = work
    SPANS: gl.constexpr = 32 * LANE_SPANS
    span_scores = (strip_start + 2 * strip_size).to(gl.pointer_type(gl.int32), bitcast=True)
    scores = span_scores + TOKENS * SPANS
    for turn in range(0, _turns(work)):
        b, head, first = _place(turn, work, TOKENS)
        lowest, _ = _documents(turn, work, TOKENS)
        low, high = _key_range(first, lowest, work, TOKENS)
        first_block = low * (KEYS // BLOCK)
        count = (high - low) * (KEYS // BLOCK)
        mbarrier.wait(strip_full.index(turn % 2), turn // 2 & 1)
        strip = strip_start + turn % 2 * strip_size
        hopper_score_blocks(strip, first_block, count, scores, span_scores, scale, ROWS, TOKENS, SPANS)
        gl.thread_barrier()
        mbarrier.arrive(strip_empty.index(turn % 2))
        out = blocks + (b * K + head).to(gl.int64) * S * SELECTED
        for at in range(0, TOKENS, AT_A_TIME):
            hopper_select_blocks(scores, span_scores, count, at, first_block, out, first, S, AT_A_TIME, SELECTED, SPANS)
        gl.thread_barrier()
