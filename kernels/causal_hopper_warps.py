"""What each kind of warp of the Hopper version of full attention's backward pass does: producer, consumers, adder.

What the barriers say: `full` and `empty` of a buffer. Buffers are used in turn, so the parity of (use // number of
buffers) tells which completion to wait for, and a fresh barrier counts as one that has completed its last phase, so the
first wait for `empty` (parity 1) passes.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.causal_schedule import place, walk
from kernels.packed_rows import packed_offset

ROWS = gl.constexpr(64)  # of a tile: queries times heads
KEYS = gl.constexpr(128)  # of a tile
D = gl.constexpr(128)
BUFFERS = gl.constexpr(2)

WAIT_FOR_TURN = gl.constexpr("""{
.reg .pred early;
.reg .b32 count;
again:
ld.acquire.gpu.global.b32 count, [$1];
setp.lt.s32 early, count, $2;
@early bra again;
fence.proxy.async.global;
bar.warp.sync 0xffffffff;
mov.b32 $0, count;
}""")  # the fence: what was counted, the copy engine's additions of others, come before those that follow here
NEXT_TURN = """{
.reg .pred one;
.reg .b32 lane;
cp.async.bulk.wait_group NEWEST;
bar.warp.sync 0xffffffff;
mov.u32 lane, %laneid;
setp.eq.u32 one, lane, 0;
@one red.release.gpu.global.add.s32 [$1], 1;
mov.b32 $0, $2;
}"""  # when all additions of this warp but the NEWEST are complete
NEXT_TURN_BUT_ONE = gl.constexpr(NEXT_TURN.replace("NEWEST", "1"))
NEXT_TURN_AT_THE_END = gl.constexpr(NEXT_TURN.replace("NEWEST", "0"))


@builtin
def add_shared_to_global(descriptor, coordinates, source, _semantic=None):
    """The copy engine's addition: Triton 3.6 has it, its Gluon has no name for it."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, source.handle
    )


@gluon.jit
def _at_turn(CODE: gl.constexpr, pointer, value):
    return gl.inline_asm_elementwise(
        CODE, "=r,l,r", [pointer.to(gl.int64), value], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _place(work):
    """KV head, sequence and tile of keys of this program."""
    _, _, B, _, K, tiles, together, _ = work
    return place(gl.program_id(0), B, K, tiles, gl.load(together))


@gluon.jit
def _packed(work, G: gl.constexpr):
    """Where the rows of this program's head begin: in 32 bits, as the copy engine counts."""
    _, _, _, S, K, _, _, _ = work
    kv_head, batch, _ = _place(work)
    return packed_offset(batch, kv_head, S, K, G).to(gl.int32)


@gluon.jit
def _walk(work, G: gl.constexpr):
    _, ends, _, S, _, tiles, _, query_start = work
    _, batch, tile = _place(work)
    return walk(ends + (batch * tiles + tile) * 2, tile, S, query_start, KEYS, ROWS // G)


@gluon.jit
def producer(q, lse, grad_output, delta, k, v, rings, keys, work, G: gl.constexpr):
    queries, lse_tiles, grads, delta_tiles = rings
    kv_head, batch, tile = _place(work)
    begin, _, _, end = _walk(work, G)
    packed = _packed(work, G)
    k_tile, v_tile, full = keys
    mbarrier.expect(full.index(0), k.block_type.nbytes + v.block_type.nbytes)
    tma.async_copy_global_to_shared(k, [batch, tile * KEYS, kv_head, 0], full.index(0), k_tile)
    tma.async_copy_global_to_shared(v, [batch, tile * KEYS, kv_head, 0], full.index(0), v_tile)
    for n in range(0, end - begin):
        m = end - 1 - n
        at = [batch, m * (ROWS // G), kv_head * G, 0]
        _load(q, at, lse, packed + m * ROWS, n, queries, lse_tiles)
        _load(grad_output, at, delta, packed + m * ROWS, n, grads, delta_tiles)


@gluon.jit
def _load(source, coordinates, numbers, row, n, ring, number_tiles):
    tiles, full, empty = ring
    at = n % BUFFERS
    mbarrier.wait(empty.index(at), (n // BUFFERS & 1) ^ 1)
    mbarrier.expect(full.index(at), source.block_type.nbytes + numbers.block_type.nbytes)
    tma.async_copy_global_to_shared(source, coordinates, full.index(at), tiles.index(at))
    tma.async_copy_global_to_shared(numbers, [row], full.index(at), number_tiles.index(at))


@gluon.jit
def adder(dq, sums, turn, work, G: gl.constexpr):
    first, _, _, S, K, _, _, _ = work
    TOKENS: gl.constexpr = ROWS // G
    kv_head, batch, tile = _place(work)
    begin, _, _, end = _walk(work, G)
    tiles, full, empty = sums
    turn += (batch * K + kv_head) * ((S + TOKENS - 1) // TOKENS)
    first += _packed(work, G)
    for n in range(0, end - begin):
        m = end - 1 - n
        before = tile - gl.load(first + m * ROWS) // KEYS  # tiles with earlier keys that these rows see
        _at_turn(WAIT_FOR_TURN, turn + m, before)  # before the sum is there: the answer takes a while
        mbarrier.wait(full.index(n % BUFFERS), n // BUFFERS & 1)
        at = [batch, m * TOKENS, kv_head * G, 0]
        if before == 0:
            tma.async_copy_shared_to_global(dq, at, tiles.index(n % BUFFERS))
        else:
            add_shared_to_global(dq, at, tiles.index(n % BUFFERS))
        if n > 0:
            _at_turn(NEXT_TURN_BUT_ONE, turn + m + 1, m)
            mbarrier.arrive(empty.index((n - 1) % BUFFERS))
    if end > begin:
        _at_turn(NEXT_TURN_AT_THE_END, turn + begin, end)


@gluon.jit
def consumer(dk, dv, dk_add, dv_add, rings, keys, ds_tile, sums, T, scale, binary_scale, work, G: gl.constexpr):
    first, _, _, _, K, _, _, query_start = work
    kv_head, batch, tile = _place(work)
    begin, whole, whole_end, end = _walk(work, G)
    k_tile, v_tile, full = keys
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
    dk_sum, dv_sum = gl.zeros([KEYS, D], gl.float32, SUMS), gl.zeros([KEYS, D], gl.float32, SUMS)
    tiles = (rings, k_tile, v_tile, ds_tile, sums)
    rows = (first + _packed(work, G), binary_scale, query_start, tile, end)
    mbarrier.wait(full.index(0), 0)
    for n in range(0, end - whole_end):
        dk_sum, dv_sum = _step(dk_sum, dv_sum, n, tiles, rows, G, True)
    for n in range(end - whole_end, end - whole):
        dk_sum, dv_sum = _step(dk_sum, dv_sum, n, tiles, rows, G, False)
    for n in range(end - whole, end - begin):
        dk_sum, dv_sum = _step(dk_sum, dv_sum, n, tiles, rows, G, True)
    gl.thread_barrier()  # keys and values have been read: their buffers take the gradients
    elsewhere = (batch, kv_head, tile, T, K)
    _leave(dk, dk_sum * scale, dk_add, k_tile, elsewhere)
    _leave(dv, dv_sum, dv_add, v_tile, elsewhere)
    tma.store_wait(0)


@gluon.jit
def _leave(target, gradient, more, tile_buffer, elsewhere):
    batch, kv_head, tile, T, K = elsewhere
    SUMS: gl.constexpr = gradient.type.layout
    if more is not None:
        key = tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, SUMS))
        column = gl.arange(0, D, layout=gl.SliceLayout(0, SUMS))
        row = ((batch.to(gl.int64) * T + key) * K + kv_head) * D
        gradient += gl.load(more + row[:, None] + column[None, :], mask=(key < T)[:, None], other=0.0)
    tile_buffer.reshape([KEYS, D]).store(gradient.to(tile_buffer.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(target, [batch, tile * KEYS, kv_head, 0], tile_buffer)


@gluon.jit
def _step(dk_sum, dv_sum, n, tiles, rows, G: gl.constexpr, MASKED: gl.constexpr):
    """The n-th tile of rows. Scores are transposed, so that P and dS are left operands of dV and dK in registers.

    Matrix products and what runs beside them: the product for dP beside the exponentials, that of dV beside dS, that of
    dK beside the way of dQ into its buffer.
    """
    rings, k_tile, v_tile, ds_tile, sums = tiles
    queries, lse_tiles, grads, delta_tiles = rings
    q_tiles, q_full, q_empty = queries
    grad_tiles, grad_full, grad_empty = grads
    dq_tiles, dq_full, dq_empty = sums
    first, binary_scale, query_start, tile, end = rows
    SUMS: gl.constexpr = dk_sum.type.layout
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, ROWS, 16])
    PER_ROW: gl.constexpr = gl.SliceLayout(0, SCORES)
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])
    at, phase = n % BUFFERS, n // BUFFERS & 1
    q, grad = q_tiles.index(at).reshape([ROWS, D]), grad_tiles.index(at).reshape([ROWS, D])
    k, v = k_tile.reshape([KEYS, D]), v_tile.reshape([KEYS, D])
    nothing = gl.zeros([KEYS, ROWS], gl.float32, SCORES)

    mbarrier.wait(q_full.index(at), phase)
    scores = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
    lse = lse_tiles.index(at).load(PER_ROW)
    mbarrier.wait(grad_full.index(at), phase)
    dp = warpgroup_mma(v, grad.permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores, dp = warpgroup_mma_wait(1, deps=(scores, dp))
    p = gl.exp2(scores * binary_scale - lse[None, :])
    if MASKED:
        row = (end - 1 - n) * ROWS + gl.arange(0, ROWS, layout=PER_ROW)
        key = tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, SCORES))
        visible = key[:, None] <= (query_start + row // G)[None, :]
        p = gl.where(visible & (key[:, None] >= gl.load(first + row)[None, :]), p, 0.0)
    delta = delta_tiles.index(at).load(PER_ROW)
    dv_sum = warpgroup_mma(gl.convert_layout(p.to(q_tiles.dtype), LEFT), grad, dv_sum, is_async=True)
    dp, dv_sum = warpgroup_mma_wait(1, deps=(dp, dv_sum))
    ds = (p * (dp - delta[None, :])).to(q_tiles.dtype)
    ds_tile.store(ds)
    fence_async_shared()
    gl.thread_barrier()
    empty = gl.zeros([ROWS, D], gl.float32, DQ)
    dq_sum = warpgroup_mma(ds_tile.permute((1, 0)), k, empty, use_acc=False, is_async=True)
    dk_sum = warpgroup_mma(gl.convert_layout(ds, LEFT), q, dk_sum, is_async=True)
    dq_sum, dk_sum, dv_sum = warpgroup_mma_wait(1, deps=(dq_sum, dk_sum, dv_sum))
    mbarrier.wait(dq_empty.index(at), phase ^ 1)
    dq_tiles.index(at).reshape([ROWS, D]).store(dq_sum)
    fence_async_shared()
    dk_sum, dv_sum = warpgroup_mma_wait(0, deps=(dk_sum, dv_sum))
    gl.thread_barrier()
    mbarrier.arrive(dq_full.index(at))
    mbarrier.arrive(q_empty.index(at))
    mbarrier.arrive(grad_empty.index(at))
    return dk_sum, dv_sum
