"""What each kind of warp of the grouped products for Hopper does: a producer, and consumers that own 64 rows of a tile.

A step of a tile multiplies [64 x consumers, 64] by [64, 256] in 16-bit floats. Steps go through a ring of `DEPTH`
buffers in shared memory: `full` and `empty` are the barriers of each buffer, and the parity of (step // DEPTH) tells
which completion to wait for; a fresh barrier counts as one that has completed its last phase. `ring` is (left parts of
64 rows, right tiles, full, empty). A weight gradient has a ring for each side: its tiles come in runs of one column,
which share their right tiles where the expert has few rows.
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
    TURNED: gl.constexpr,
):  # fmt: skip
    """Rows of an expert times its matrix: 64 rows of every tile, none where the expert has no more."""
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
            _store(output, acc, staging, first, end, column, WHICH, PARTS, False)
        else:
            for _ in range(STEPS):
                mbarrier.wait(full.index(n % DEPTH), n // DEPTH & 1)
                mbarrier.arrive(empty.index(n % DEPTH))
                n += 1
        first, end, column = next_first, next_end, next_column
    tma.store_wait(0)


@gluon.jit
def _store(
    output, acc, staging, first, end, column, WHICH: gl.constexpr, PARTS: gl.constexpr, WHOLE: gl.constexpr
):  # fmt: skip
    """The rows first ... min(first + 64, end) - 1 of a result, through shared memory. WHOLE: all 64, whatever `end`.

    In pieces of some columns: a consumer has SLOTS buffers for them, and fills one while the others are being stored.
    """
    tiles, pointer, WIDTH = output
    value = acc.to(tiles.dtype)
    SLOTS: gl.constexpr = staging.shape[0] // PARTS
    PIECE: gl.constexpr = staging.shape[2]
    PIECES: gl.constexpr = COLUMNS // PIECE
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // PIECE, PIECE // 8], [4, 1], [1, 0])
    for piece in gl.static_range(PIECES):
        buffer = staging.index(WHICH * SLOTS + piece % SLOTS)
        tma.store_wait(SLOTS - 1)  # what lay there before has been read
        gl.thread_barrier()
        buffer.store(_piece(value, PIECES, piece))
        fence_async_shared()
        gl.thread_barrier()
        if WHOLE or first + PART <= end:
            tma.async_copy_shared_to_global(tiles, [first, column + piece * PIECE], buffer)
        else:
            row = first + gl.arange(0, PART, layout=gl.SliceLayout(1, PLAIN))
            at = column + piece * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(0, PLAIN))
            at = row.to(gl.int64)[:, None] * WIDTH + at[None, :]
            gl.store(pointer + at, buffer.load(PLAIN), mask=(row < end)[:, None])


@gluon.jit
def _piece(value, PIECES: gl.constexpr, piece: gl.constexpr):
    """Columns of a tile: the piece-th of PIECES, a power of two."""
    if PIECES == 1:
        part = value
    else:
        HALF: gl.constexpr = value.shape[1] // 2
        lower, upper = value.reshape([PART, 2, HALF]).permute([0, 2, 1]).split()
        part = _piece(lower if piece < PIECES // 2 else upper, PIECES // 2, piece % (PIECES // 2))
    return part


@gluon.jit
def _run(run, offsets, total, ROWS: gl.constexpr, RUNS: gl.constexpr, COLUMN_TILES: gl.constexpr):
    """Of a run of tiles: expert, first and end of its rows, and the run's first row and column in the matrix."""
    expert = gl.minimum(run, total - 1) // RUNS
    first = gl.where(expert > 0, gl.load(offsets + gl.maximum(expert - 1, 0)), 0)
    row, column = run % RUNS // COLUMN_TILES, run % COLUMN_TILES
    return expert, first, gl.load(offsets + expert), row * ROWS, column * COLUMNS


@gluon.jit
def _right_step(base, tile, steps, DEPTH: gl.constexpr, TILES: gl.constexpr):
    """Of a tile of a run that begins with the right step `base`: its first one, and that of the run behind.

    If its right tiles fit the ring, all tiles of the run share them.
    """
    shared = steps <= DEPTH
    return gl.where(shared, base, base + tile * steps), gl.where(shared, base + steps, base + TILES * steps), shared


@gluon.jit
def weights_producer(
    grad, rows, left_ring, right_ring, offsets, total,
    TILES: gl.constexpr, RUNS: gl.constexpr, COLUMN_TILES: gl.constexpr,
):  # fmt: skip
    """Loads of `weights_consumer`: rows of an expert, and those after its last one that fill up a step."""
    left, left_full, left_empty = left_ring
    right, right_full, right_empty = right_ring
    DEPTH: gl.constexpr = right.shape[0]
    PARTS: gl.constexpr = left.shape[0] // DEPTH
    ROWS: gl.constexpr = TILES * PARTS * PART
    n, base = 0, 0
    _, first, end, row, column = _run(gl.program_id(0), offsets, total, ROWS, RUNS, COLUMN_TILES)
    for run in range(gl.program_id(0), total, gl.num_programs(0)):
        next_ = _run(run + gl.num_programs(0), offsets, total, ROWS, RUNS, COLUMN_TILES)
        steps = (end - first + STEP - 1) // STEP
        next_base = base
        for tile in range(TILES):
            start, next_base, shared = _right_step(base, tile, steps, DEPTH, TILES)
            for step in range(steps):
                k = first + step * STEP
                at = n % DEPTH
                mbarrier.wait(left_empty.index(at), (n // DEPTH & 1) ^ 1)
                mbarrier.expect(left_full.index(at), PARTS * grad.block_type.nbytes)
                for part in gl.static_range(PARTS):
                    # The condition always holds. Triton 3.6 takes a variable of a loop for a constant if nothing but
                    # the bounds of another loop inside depends on it: without this every tile would have the first
                    # one's steps.
                    where = [k, row + (tile * PARTS + part) * PART]
                    tma.async_copy_global_to_shared(
                        grad, where, left_full.index(at), left.index(PARTS * at + part), pred=k < end
                    )
                n += 1
                if (tile == 0) | (not shared):
                    at = (start + step) % DEPTH
                    mbarrier.wait(right_empty.index(at), ((start + step) // DEPTH & 1) ^ 1)
                    mbarrier.expect(right_full.index(at), rows.block_type.nbytes)
                    tma.async_copy_global_to_shared(rows, [k, column], right_full.index(at), right.index(at))
        base = next_base
        _, first, end, row, column = next_


@gluon.jit
def weights_consumer(
    output, left_ring, right_ring, staging, offsets, total,
    WHICH: gl.constexpr, TILES: gl.constexpr, RUNS: gl.constexpr, COLUMN_TILES: gl.constexpr,
):  # fmt: skip
    """Gradient of an expert's matrix: 64 of its rows of every tile, a sum over the rows that the expert had."""
    left, left_full, left_empty = left_ring
    right, right_full, right_empty = right_ring
    DEPTH: gl.constexpr = right.shape[0]
    PARTS: gl.constexpr = left.shape[0] // DEPTH
    ROWS: gl.constexpr = TILES * PARTS * PART
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    n, base = 0, 0
    expert, first, end, row, column = _run(gl.program_id(0), offsets, total, ROWS, RUNS, COLUMN_TILES)
    for run in range(gl.program_id(0), total, gl.num_programs(0)):
        next_ = _run(run + gl.num_programs(0), offsets, total, ROWS, RUNS, COLUMN_TILES)
        row += expert * (RUNS // COLUMN_TILES * ROWS) + WHICH * PART
        whole, rest = (end - first) // STEP, (end - first) % STEP
        next_base = base
        for tile in range(TILES):
            start, next_base, shared = _right_step(base, tile, whole + (rest > 0).to(gl.int32), DEPTH, TILES)
            last = (tile + 1 == TILES) | (not shared)  # to need the right tiles
            acc = gl.zeros([PART, COLUMNS], gl.float32, SUMS)
            for step in range(whole):
                at, right_at = n % DEPTH, (start + step) % DEPTH
                mbarrier.wait(left_full.index(at), n // DEPTH & 1)
                mbarrier.wait(right_full.index(right_at), (start + step) // DEPTH & 1)
                mine = left.index(PARTS * at + WHICH).permute((1, 0))
                acc = warpgroup_mma(mine, right.index(right_at), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))
                # The product before this one has been computed.
                mbarrier.arrive(left_empty.index((n + DEPTH - 1) % DEPTH), pred=step > 0)
                mbarrier.arrive(right_empty.index((right_at + DEPTH - 1) % DEPTH), pred=(step > 0) & last)
                n += 1
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(left_empty.index((n + DEPTH - 1) % DEPTH), pred=whole > 0)
            mbarrier.arrive(right_empty.index((start + whole + DEPTH - 1) % DEPTH), pred=(whole > 0) & last)
            if rest > 0:  # the last buffer has rows of the next expert as well: they become zero
                at, right_at = n % DEPTH, (start + whole) % DEPTH
                mbarrier.wait(left_full.index(at), n // DEPTH & 1)
                mine = left.index(PARTS * at + WHICH)
                _keep_rows(mine, rest)
                mbarrier.wait(right_full.index(right_at), (start + whole) // DEPTH & 1)
                acc = warpgroup_mma(mine.permute((1, 0)), right.index(right_at), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(left_empty.index(at))
                mbarrier.arrive(right_empty.index(right_at), pred=last)
                n += 1
            _store(output, acc, staging, row + tile * PARTS * PART, 0, column, WHICH, PARTS, True)
        base = next_base
        expert, first, end, row, column = next_
    tma.store_wait(0)


@gluon.jit
def _keep_rows(tile, number):
    """Sets all but the first `number` rows of a tile in shared memory [STEP, columns] to zero."""
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, STEP, layout=gl.SliceLayout(1, PLAIN))
    value = tile.load(PLAIN)
    tile.store(gl.where((row < number)[:, None], value, gl.zeros_like(value)))
    fence_async_shared()
    gl.thread_barrier()
