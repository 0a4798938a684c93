"""What each kind of warp of the grouped products for Hopper does: a producer, and two consumers of 64 rows each.

A step of a tile multiplies [128, 64] by [64, 256] in 16-bit floats. Steps go through a ring of `DEPTH` buffers in
shared memory: `full` and `empty` are the barriers of each buffer, and the parity of (step // DEPTH) tells which
completion to wait for; a fresh barrier counts as one that has completed its last phase. `ring` is (left halves, right
tiles, full, empty).
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

ROWS = gl.constexpr(128)  # of a tile of the result
HALF = gl.constexpr(64)  # of a consumer
COLUMNS = gl.constexpr(256)  # of a tile of the result
DEPTH_OF_STEP = gl.constexpr(64)  # summed over in a step


@gluon.jit
def _tile(tile, groups, COLUMN_TILES: gl.constexpr):
    """Expert, first row, end of the expert's rows and first column of a tile; past the last one, of any tile."""
    experts, firsts, ends, total = groups
    at = gl.minimum(tile, total - 1) // COLUMN_TILES
    return gl.load(experts + at), gl.load(firsts + at), gl.load(ends + at), tile % COLUMN_TILES * COLUMNS


@gluon.jit
def rows_producer(rows, weight, ring, groups, STEPS: gl.constexpr, COLUMN_TILES: gl.constexpr, TURNED: gl.constexpr):
    """Loads of `rows_consumer`. weight is [experts x columns, steps], TURNED [experts x steps, columns]."""
    left, right, full, empty = ring
    DEPTH: gl.constexpr = right.shape[0]
    _, _, _, total = groups
    n = 0  # steps so far
    expert, first, end, column = _tile(gl.program_id(0), groups, COLUMN_TILES)
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        next_expert, next_first, next_end, next_column = _tile(tile + gl.num_programs(0), groups, COLUMN_TILES)
        both = first + HALF < end
        for step in range(STEPS):
            at = n % DEPTH
            k = step * DEPTH_OF_STEP
            mbarrier.wait(empty.index(at), (n // DEPTH & 1) ^ 1)
            mbarrier.expect(full.index(at), 2 * rows.block_type.nbytes + weight.block_type.nbytes, pred=both)
            mbarrier.expect(full.index(at), rows.block_type.nbytes + weight.block_type.nbytes, pred=first + HALF >= end)
            tma.async_copy_global_to_shared(rows, [first, k], full.index(at), left.index(2 * at))
            tma.async_copy_global_to_shared(rows, [first + HALF, k], full.index(at), left.index(2 * at + 1), pred=both)
            if TURNED:
                where = [expert * STEPS * DEPTH_OF_STEP + k, column]
            else:
                where = [expert * COLUMN_TILES * COLUMNS + column, k]
            tma.async_copy_global_to_shared(weight, where, full.index(at), right.index(at))
            n += 1
        expert, first, end, column = next_expert, next_first, next_end, next_column


@gluon.jit
def rows_consumer(
    output, ring, staging, groups, WHICH: gl.constexpr, STEPS: gl.constexpr, COLUMN_TILES: gl.constexpr,
    TURNED: gl.constexpr,
):  # fmt: skip
    """Rows of an expert times its matrix: 64 rows of every tile, none where the expert has no more."""
    left, right, full, empty = ring
    DEPTH: gl.constexpr = right.shape[0]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    _, _, _, total = groups
    n = 0
    _, first, end, column = _tile(gl.program_id(0), groups, COLUMN_TILES)
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        _, next_first, next_end, next_column = _tile(tile + gl.num_programs(0), groups, COLUMN_TILES)
        first += WHICH * HALF
        if first < end:
            acc = gl.zeros([HALF, COLUMNS], gl.float32, SUMS)
            for step in range(STEPS):
                at = n % DEPTH
                mbarrier.wait(full.index(at), n // DEPTH & 1)
                tile_right = right.index(at) if TURNED else right.index(at).permute((1, 0))
                acc = warpgroup_mma(left.index(2 * at + WHICH), tile_right, acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))
                # The product before this one has been computed.
                mbarrier.arrive(empty.index((n + DEPTH - 1) % DEPTH), pred=step > 0)
                n += 1
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((n + DEPTH - 1) % DEPTH))
            _store(output, acc, staging, first, end, column, False)
        else:
            for _ in range(STEPS):
                mbarrier.wait(full.index(n % DEPTH), n // DEPTH & 1)
                mbarrier.arrive(empty.index(n % DEPTH))
                n += 1
        first, end, column = next_first, next_end, next_column
    tma.store_wait(0)


@gluon.jit
def _store(output, acc, staging, first, end, column, WHOLE: gl.constexpr):
    """The rows first ... min(first + 64, end) - 1 of a result, through shared memory. WHOLE: all 64, whatever `end`."""
    tiles, pointer, WIDTH = output
    value = acc.to(tiles.dtype)
    PIECES: gl.constexpr = COLUMNS // staging.shape[1]
    PIECE: gl.constexpr = staging.shape[1]
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // PIECE, PIECE // 8], [4, 1], [1, 0])
    for piece in gl.static_range(PIECES):
        tma.store_wait(0)  # what lay there before has been read
        gl.thread_barrier()
        staging.store(_piece(value, PIECES, piece))
        fence_async_shared()
        gl.thread_barrier()
        if WHOLE or first + HALF <= end:
            tma.async_copy_shared_to_global(tiles, [first, column + piece * PIECE], staging)
        else:
            row = first + gl.arange(0, HALF, layout=gl.SliceLayout(1, PLAIN))
            at = column + piece * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(0, PLAIN))
            at = row.to(gl.int64)[:, None] * WIDTH + at[None, :]
            gl.store(pointer + at, staging.load(PLAIN), mask=(row < end)[:, None])


@gluon.jit
def _piece(value, PIECES: gl.constexpr, piece: gl.constexpr):
    """Columns of a tile: the piece-th of PIECES (1 or 2)."""
    if PIECES == 1:
        part = value
    else:
        lower, upper = value.reshape([HALF, 2, COLUMNS // 2]).permute([0, 2, 1]).split()
        part = lower if piece == 0 else upper
    return part


@gluon.jit
def _weight_tile(tile, offsets, ROW_TILES: gl.constexpr, COLUMN_TILES: gl.constexpr, total):
    """Expert, its first row and the end of its rows, and the tile's first row and column of the expert's matrix."""
    PER_EXPERT: gl.constexpr = ROW_TILES * COLUMN_TILES
    expert = gl.minimum(tile, total - 1) // PER_EXPERT
    first = gl.where(expert > 0, gl.load(offsets + gl.maximum(expert - 1, 0)), 0)
    inside = tile % PER_EXPERT
    return expert, first, gl.load(offsets + expert), inside // COLUMN_TILES * ROWS, inside % COLUMN_TILES * COLUMNS


@gluon.jit
def weights_producer(grad, rows, ring, offsets, total, ROW_TILES: gl.constexpr, COLUMN_TILES: gl.constexpr):
    """Loads of `weights_consumer`: rows of an expert, and those after its last one that fill up a step."""
    left, right, full, empty = ring
    DEPTH: gl.constexpr = right.shape[0]
    n = 0
    _, first, end, row, column = _weight_tile(gl.program_id(0), offsets, ROW_TILES, COLUMN_TILES, total)
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        later = tile + gl.num_programs(0)
        _, next_first, next_end, next_row, next_column = _weight_tile(later, offsets, ROW_TILES, COLUMN_TILES, total)
        for step in range((end - first + DEPTH_OF_STEP - 1) // DEPTH_OF_STEP):
            at = n % DEPTH
            k = first + step * DEPTH_OF_STEP
            mbarrier.wait(empty.index(at), (n // DEPTH & 1) ^ 1)
            mbarrier.expect(full.index(at), 2 * grad.block_type.nbytes + rows.block_type.nbytes)
            # The condition always holds. Triton 3.6 takes a variable of a loop for a constant if nothing but the bounds
            # of another loop inside depends on it, so that without this every tile would have the first one's steps.
            tma.async_copy_global_to_shared(grad, [k, row], full.index(at), left.index(2 * at), pred=k < end)
            tma.async_copy_global_to_shared(grad, [k, row + HALF], full.index(at), left.index(2 * at + 1))
            tma.async_copy_global_to_shared(rows, [k, column], full.index(at), right.index(at))
            n += 1
        first, end, row, column = next_first, next_end, next_row, next_column


@gluon.jit
def weights_consumer(
    output, ring, staging, offsets, total,
    WHICH: gl.constexpr, HEIGHT: gl.constexpr, ROW_TILES: gl.constexpr, COLUMN_TILES: gl.constexpr,
):  # fmt: skip
    """Gradient of an expert's matrix: 64 of its rows of every tile, a sum over the rows that the expert had."""
    left, right, full, empty = ring
    DEPTH: gl.constexpr = right.shape[0]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    n = 0
    expert, first, end, row, column = _weight_tile(gl.program_id(0), offsets, ROW_TILES, COLUMN_TILES, total)
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        later = tile + gl.num_programs(0)
        next_ = _weight_tile(later, offsets, ROW_TILES, COLUMN_TILES, total)
        acc = gl.zeros([HALF, COLUMNS], gl.float32, SUMS)
        whole = (end - first) // DEPTH_OF_STEP
        for step in range(whole):
            at = n % DEPTH
            mbarrier.wait(full.index(at), n // DEPTH & 1)
            acc = warpgroup_mma(left.index(2 * at + WHICH).permute((1, 0)), right.index(at), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((n + DEPTH - 1) % DEPTH), pred=step > 0)
            n += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((n + DEPTH - 1) % DEPTH), pred=whole > 0)
        rest = (end - first) % DEPTH_OF_STEP
        if rest > 0:  # the last buffer has rows of the next expert as well: they become zero
            at = n % DEPTH
            mbarrier.wait(full.index(at), n // DEPTH & 1)
            mine = left.index(2 * at + WHICH)
            k = gl.arange(0, DEPTH_OF_STEP, layout=gl.SliceLayout(1, PLAIN))
            value = mine.load(PLAIN)
            mine.store(gl.where((k < rest)[:, None], value, gl.zeros_like(value)))
            fence_async_shared()
            gl.thread_barrier()
            acc = warpgroup_mma(mine.permute((1, 0)), right.index(at), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(at))
            n += 1
        _store(output, acc, staging, expert * HEIGHT + row + WHICH * HALF, 0, column, True)
        expert, first, end, row, column = next_
    tma.store_wait(0)
