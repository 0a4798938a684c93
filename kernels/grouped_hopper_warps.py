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
def _weight_unit(unit, offsets, total, ROWS: gl.constexpr, ROW_UNITS: gl.constexpr, COLUMN_TILES: gl.constexpr):
    """Expert, its first row and the end of its rows, and the unit's first row and column of the expert's matrix."""
    PER_EXPERT: gl.constexpr = ROW_UNITS * COLUMN_TILES
    expert = gl.minimum(unit, total - 1) // PER_EXPERT
    first = gl.where(expert > 0, gl.load(offsets + gl.maximum(expert - 1, 0)), 0)
    row, column = unit % PER_EXPERT // COLUMN_TILES, unit % COLUMN_TILES
    return expert, first, gl.load(offsets + expert), row * ROWS, column * COLUMNS


@gluon.jit
def _kept(steps, TILES: gl.constexpr, DEPTH: gl.constexpr):
    """1 where the right buffers of a unit hold an expert's rows for all of its tiles, otherwise 0."""
    return gl.where((TILES > 1) & (steps <= DEPTH // 2), 1, 0)


@gluon.jit
def weights_producer(grad, rows, ring, work, ROW_UNITS: gl.constexpr, COLUMN_TILES: gl.constexpr, TILES: gl.constexpr):
    """Loads of `weights_consumer`: rows of an expert, and those after its last one that fill up a step."""
    left, right, full, empty = ring
    offsets, total = work
    DEPTH: gl.constexpr = right.shape[0]
    PARTS: gl.constexpr = left.shape[0] // DEPTH
    ROWS: gl.constexpr = TILES * PARTS * PART
    n, half, kept_before = 0, 0, 1
    _, first, end, row, column = _weight_unit(gl.program_id(0), offsets, total, ROWS, ROW_UNITS, COLUMN_TILES)
    for unit in range(gl.program_id(0), total, gl.num_programs(0)):
        next_unit = unit + gl.num_programs(0)
        next_ = _weight_unit(next_unit, offsets, total, ROWS, ROW_UNITS, COLUMN_TILES)
        steps = (end - first + STEP - 1) // STEP
        kept = _kept(steps, TILES, DEPTH)
        if TILES > 1:
            # The right buffers are used in another way than before: all must be empty.
            changed = (steps > 0) & (n > 0) & (kept * kept_before == 0)
            if changed:
                mbarrier.wait(empty.index((n - 1) % DEPTH), (n - 1) // DEPTH & 1)
            kept_before = gl.where(steps > 0, kept, kept_before)
        for i in range(steps * TILES):
            at = n % DEPTH
            tile, step = i // steps, i % steps
            k = first + step * STEP
            fresh = (tile == 0) | (kept == 0)
            mbarrier.wait(empty.index(at), (n // DEPTH & 1) ^ 1)
            mbarrier.expect(full.index(at), PARTS * grad.block_type.nbytes + rows.block_type.nbytes, pred=fresh)
            mbarrier.expect(full.index(at), PARTS * grad.block_type.nbytes, pred=fresh == 0)
            for part in gl.static_range(PARTS):
                # The condition always holds. Triton 3.6 takes a variable of a loop for a constant if nothing but the
                # bounds of another loop inside depends on it: without this every tile would have the first one's steps.
                where = [k, row + (tile * PARTS + part) * PART]
                tma.async_copy_global_to_shared(
                    grad, where, full.index(at), left.index(PARTS * at + part), pred=k < end
                )
            slot = gl.where(kept == 1, half * (DEPTH // 2) + step, at)
            tma.async_copy_global_to_shared(rows, [k, column], full.index(at), right.index(slot), pred=fresh)
            n += 1
        half = gl.where(steps > 0, 1 - half, half)
        _, first, end, row, column = next_


@gluon.jit
def weights_consumer(
    output, ring, staging, work, WHICH: gl.constexpr, ROW_UNITS: gl.constexpr, COLUMN_TILES: gl.constexpr,
    TILES: gl.constexpr, BULK: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Gradient of an expert's matrix: 64 of its rows of every tile, a sum over the rows that the expert had.

    A unit of work is TILES tiles below each other, which need the same right buffers. If the expert's rows fit half
    of the buffers they stay for all of the unit, in the half that the unit before does not use. That unit has `DEPTH`
    steps or more, in which everyone has left the half behind: to wait for the left buffers is enough.
    """
    wait_for_previous(OVERLAP)
    left, right, full, empty = ring
    offsets, total = work
    DEPTH: gl.constexpr = right.shape[0]
    PARTS: gl.constexpr = left.shape[0] // DEPTH
    ROWS: gl.constexpr = TILES * PARTS * PART
    gl.static_assert(TILES == 1 or TILES >= DEPTH)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    n, half = 0, 0
    expert, first, end, row, column = _weight_unit(gl.program_id(0), offsets, total, ROWS, ROW_UNITS, COLUMN_TILES)
    for unit in range(gl.program_id(0), total, gl.num_programs(0)):
        next_unit = unit + gl.num_programs(0)
        next_ = _weight_unit(next_unit, offsets, total, ROWS, ROW_UNITS, COLUMN_TILES)
        whole, rest = (end - first) // STEP, (end - first) % STEP
        kept = _kept((end - first + STEP - 1) // STEP, TILES, DEPTH)
        row += expert * ROW_UNITS * ROWS + WHICH * PART
        for _ in range(TILES):
            acc = gl.zeros([PART, COLUMNS], gl.float32, SUMS)
            for step in range(whole):
                at = n % DEPTH
                slot = gl.where(kept == 1, half * (DEPTH // 2) + step, at)
                mbarrier.wait(full.index(at), n // DEPTH & 1)
                mine = left.index(PARTS * at + WHICH)
                acc = warpgroup_mma(mine.permute((1, 0)), right.index(slot), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))
                mbarrier.arrive(empty.index((n + DEPTH - 1) % DEPTH), pred=step > 0)
                n += 1
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((n + DEPTH - 1) % DEPTH), pred=whole > 0)
            if rest > 0:  # the last buffer has rows of the next expert as well: they become zero
                at = n % DEPTH
                slot = gl.where(kept == 1, half * (DEPTH // 2) + whole, at)
                mbarrier.wait(full.index(at), n // DEPTH & 1)
                mine = left.index(PARTS * at + WHICH)
                k = gl.arange(0, STEP, layout=gl.SliceLayout(1, PLAIN))
                value = mine.load(PLAIN)
                mine.store(gl.where((k < rest)[:, None], value, gl.zeros_like(value)))
                fence_async_shared()
                gl.thread_barrier()
                acc = warpgroup_mma(mine.permute((1, 0)), right.index(slot), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(empty.index(at))
                n += 1
            _store(output, acc, staging.index(WHICH), row, 0, column, True, BULK)
            row += PARTS * PART
        half = gl.where(end > first, 1 - half, half)
        expert, first, end, row, column = next_
    tma.store_wait(0)
