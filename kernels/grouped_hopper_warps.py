"""What each kind of warp of the grouped products for Hopper does: a producer, and consumers that own 64 rows of a tile.

A step of a tile multiplies [64 x consumers, 64] by [64, 256] in 16-bit floats. Steps go through a ring of `DEPTH`
buffers in shared memory: `full` and `empty` are the barriers of each buffer, and the parity of (step // DEPTH) tells
which completion to wait for; a fresh barrier counts as one that has completed its last phase. `ring` is (left parts of
64 rows, right tiles, full, empty).
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

from kernels.overlap import wait_for_previous

PART = gl.constexpr(64)  # rows of a consumer
COLUMNS = gl.constexpr(256)  # of a tile of the result
STEP = gl.constexpr(64)  # numbers that are summed over in one


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
    PARTS: gl.constexpr = left.shape[0] // DEPTH
    _, _, _, total = groups
    n = 0  # steps so far
    expert, first, end, column = _tile(gl.program_id(0), groups, COLUMN_TILES)
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        next_expert, next_first, next_end, next_column = _tile(tile + gl.num_programs(0), groups, COLUMN_TILES)
        for step in range(STEPS):
            at = n % DEPTH
            k = step * STEP
            mbarrier.wait(empty.index(at), (n // DEPTH & 1) ^ 1)
            for part in gl.static_range(PARTS):  # those that have rows come first; the last one of them announces all
                start = first + part * PART
                last = (start < end) & ((start + PART >= end) | (part + 1 == PARTS))
                mbarrier.expect(
                    full.index(at), (part + 1) * rows.block_type.nbytes + weight.block_type.nbytes, pred=last
                )
            for part in gl.static_range(PARTS):
                start = first + part * PART
                tma.async_copy_global_to_shared(
                    rows, [start, k], full.index(at), left.index(PARTS * at + part), pred=start < end
                )
            if TURNED:
                where = [expert * STEPS * STEP + k, column]
            else:
                where = [expert * COLUMN_TILES * COLUMNS + column, k]
            tma.async_copy_global_to_shared(weight, where, full.index(at), right.index(at))
            n += 1
        expert, first, end, column = next_expert, next_first, next_end, next_column


@gluon.jit
def rows_consumer(
    output, ring, staging, groups, WHICH: gl.constexpr, STEPS: gl.constexpr, COLUMN_TILES: gl.constexpr,
    TURNED: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Rows of an expert times its matrix: 64 rows of every tile, none where the expert has no more."""
    wait_for_previous(OVERLAP)
    left, right, full, empty = ring
    DEPTH: gl.constexpr = right.shape[0]
    PARTS: gl.constexpr = left.shape[0] // DEPTH
    # In two halves: the assembler takes no instruction with more registers than a thread has on average.
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS // 2, 16])
    _, _, _, total = groups
    n = 0
    _, first, end, column = _tile(gl.program_id(0), groups, COLUMN_TILES)
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        _, next_first, next_end, next_column = _tile(tile + gl.num_programs(0), groups, COLUMN_TILES)
        first += WHICH * PART
        if first < end:
            acc = gl.zeros([PART, COLUMNS], gl.float32, SUMS)
            for step in range(STEPS):
                at = n % DEPTH
                mbarrier.wait(full.index(at), n // DEPTH & 1)
                tile_right = right.index(at) if TURNED else right.index(at).permute((1, 0))
                acc = warpgroup_mma(left.index(PARTS * at + WHICH), tile_right, acc, is_async=True)
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
def _store(output, acc, staging, first, end, column, WHOLE: gl.constexpr, BULK: gl.constexpr = True):
    """The rows first ... min(first + 64, end) - 1 of a result, through shared memory. WHOLE: all 64, whatever `end`.

    BULK: by the copy engine, where all 64 are stored.
    """
    tiles, pointer, WIDTH = output
    value = acc.to(tiles.dtype)
    PIECE: gl.constexpr = staging.shape[1]  # half of the columns
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // PIECE, PIECE // 8], [4, 1], [1, 0])
    lower, upper = value.reshape([PART, 2, PIECE]).permute([0, 2, 1]).split()
    for piece in gl.static_range(2):
        tma.store_wait(0)  # what lay there before has been read
        gl.thread_barrier()
        staging.store(lower if piece == 0 else upper)
        fence_async_shared()
        gl.thread_barrier()
        if BULK and (WHOLE or first + PART <= end):
            tma.async_copy_shared_to_global(tiles, [first, column + piece * PIECE], staging)
        else:
            row = first + gl.arange(0, PART, layout=gl.SliceLayout(1, PLAIN))
            at = column + piece * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(0, PLAIN))
            at = row.to(gl.int64)[:, None] * WIDTH + at[None, :]
            gl.store(pointer + at, staging.load(PLAIN), mask=((row < end) | WHOLE)[:, None])


@gluon.jit
def _weight_tile(tile, offsets, total, PARTS: gl.constexpr, ROW_TILES: gl.constexpr, COLUMN_TILES: gl.constexpr):
    """Expert, its first row and the end of its rows, and the tile's first row and column of the expert's matrix."""
    PER_EXPERT: gl.constexpr = ROW_TILES * COLUMN_TILES
    expert = gl.minimum(tile, total - 1) // PER_EXPERT
    first = gl.where(expert > 0, gl.load(offsets + gl.maximum(expert - 1, 0)), 0)
    row, column = tile % PER_EXPERT // COLUMN_TILES, tile % COLUMN_TILES
    return expert, first, gl.load(offsets + expert), row * PARTS * PART, column * COLUMNS


@gluon.jit
def weights_producer(grad, rows, ring, offsets, total, ROW_TILES: gl.constexpr, COLUMN_TILES: gl.constexpr):
    """Loads of `weights_consumer`: rows of an expert, and those after its last one that fill up a step."""
    left, right, full, empty = ring
    DEPTH: gl.constexpr = right.shape[0]
    PARTS: gl.constexpr = left.shape[0] // DEPTH
    n = 0
    _, first, end, row, column = _weight_tile(gl.program_id(0), offsets, total, PARTS, ROW_TILES, COLUMN_TILES)
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        next_tile = tile + gl.num_programs(0)
        next_ = _weight_tile(next_tile, offsets, total, PARTS, ROW_TILES, COLUMN_TILES)
        for step in range((end - first + STEP - 1) // STEP):
            at = n % DEPTH
            k = first + step * STEP
            mbarrier.wait(empty.index(at), (n // DEPTH & 1) ^ 1)
            mbarrier.expect(full.index(at), PARTS * grad.block_type.nbytes + rows.block_type.nbytes)
            for part in gl.static_range(PARTS):
                # The condition always holds. Triton 3.6 takes a variable of a loop for a constant if nothing but the
                # bounds of another loop inside depends on it: without this every tile would have the first one's steps.
                tma.async_copy_global_to_shared(
                    grad, [k, row + part * PART], full.index(at), left.index(PARTS * at + part), pred=k < end
                )
            tma.async_copy_global_to_shared(rows, [k, column], full.index(at), right.index(at))
            n += 1
        _, first, end, row, column = next_


@gluon.jit
def weights_consumer(
    output, ring, staging, offsets, total,
    WHICH: gl.constexpr, ROW_TILES: gl.constexpr, COLUMN_TILES: gl.constexpr, BULK: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Gradient of an expert's matrix: 64 of its rows of every tile, a sum over the rows that the expert had."""
    wait_for_previous(OVERLAP)
    left, right, full, empty = ring
    DEPTH: gl.constexpr = right.shape[0]
    PARTS: gl.constexpr = left.shape[0] // DEPTH
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    n = 0
    expert, first, end, row, column = _weight_tile(gl.program_id(0), offsets, total, PARTS, ROW_TILES, COLUMN_TILES)
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        next_tile = tile + gl.num_programs(0)
        next_ = _weight_tile(next_tile, offsets, total, PARTS, ROW_TILES, COLUMN_TILES)
        acc = gl.zeros([PART, COLUMNS], gl.float32, SUMS)
        whole = (end - first) // STEP
        for step in range(whole):
            at = n % DEPTH
            mbarrier.wait(full.index(at), n // DEPTH & 1)
            acc = warpgroup_mma(left.index(PARTS * at + WHICH).permute((1, 0)), right.index(at), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((n + DEPTH - 1) % DEPTH), pred=step > 0)
            n += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((n + DEPTH - 1) % DEPTH), pred=whole > 0)
        rest = (end - first) % STEP
        if rest > 0:  # the last buffer has rows of the next expert as well: they become zero
            at = n % DEPTH
            mbarrier.wait(full.index(at), n // DEPTH & 1)
            mine = left.index(PARTS * at + WHICH)
            k = gl.arange(0, STEP, layout=gl.SliceLayout(1, PLAIN))
            value = mine.load(PLAIN)
            mine.store(gl.where((k < rest)[:, None], value, gl.zeros_like(value)))
            fence_async_shared()
            gl.thread_barrier()
            acc = warpgroup_mma(mine.permute((1, 0)), right.index(at), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(at))
            n += 1
        row += (expert * ROW_TILES * PARTS + WHICH) * PART
        _store(output, acc, staging, row, 0, column, True, BULK)
        expert, first, end, row, column = next_
    tma.store_wait(0)
