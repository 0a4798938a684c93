"""Grouped matrix products for Hopper: each expert's rows times its own matrix, and the gradients (Gluon).

A CTA is persistent and has one per multiprocessor; its tiles of the result have 192 rows of one expert and 256 columns,
those of a weight gradient 128 rows. One producer warp feeds the consumers, warp groups that own 64 rows each and wait
for each other only through the ring of buffers between them and the producer: while one stores its part of a tile, the
products of the others run. Tiles of 128 rows of an expert would read a quarter more from the L2 cache, which is busy
enough; weight gradients were slower with 192.

PyTorch's grouped product takes the rows of every expert for a multiple of 256, a quarter more work at 512 rows an
expert; here a consumer without rows has nothing to do. The last 64 rows of an expert are stored under a mask, and the
last rows of a weight gradient's sum are set to zero in shared memory, so that rows need no padding.

`grouped_hopper_warps.py` has the code of the warps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.arguments import INTERPRETED
from kernels.grouped_hopper_warps import (
    COLUMNS,
    PART,
    STEP,
    rows_consumer,
    rows_producer,
    weights_consumer,
    weights_producer,
)
from kernels.overlap import overlapping, wait_for_previous

# What fits the memory and the registers of a multiprocessor: consumers, buffers of the ring, registers of a thread on
# average, and those of a consumer. Of a product of rows, then of a weight gradient.
ROW_PARTS, ROW_DEPTH, ROW_REGISTERS, ROW_CONSUMER_REGISTERS = 3, gl.constexpr(3), 128, gl.constexpr(160)
WEIGHT_PARTS, WEIGHT_DEPTH, WEIGHT_REGISTERS, WEIGHT_CONSUMER_REGISTERS = 2, 4, 168, gl.constexpr(240)
# Up to so many rows of an expert on average a weight gradient is bound by what it writes. It is a tenth faster then
# with fewer loads under way, and if threads store what otherwise the copy engine does, which is busy with loads.
FEW, FEW_DEPTH = 96, 2
PIECE = 128  # columns of a result that a consumer stores at a time
ROWS = tl.constexpr(ROW_PARTS * PART.value)  # of a tile
TABLE_ROWS = 64  # tiles that a program of `_table` writes at a time


def supported(rows: Tensor, weight: Tensor) -> bool:
    """Whether these kernels take rows [N, in] and weight [E, out, in], forward and backward, on this device."""
    return (
        len(rows) > 0
        and rows.dtype == weight.dtype
        and rows.dtype in (torch.bfloat16, torch.float16)
        and weight.is_contiguous()
        and takes(*weight.shape[1:])
    )


def takes(out: int, inside: int) -> bool:
    """Whether these kernels take matrices of that size on the current device."""
    fits = out % COLUMNS.value == inside % COLUMNS.value == 0
    return fits and not INTERPRETED and torch.cuda.get_device_capability() == (9, 0)


class Groups:
    """Which rows each tile of a product has, found on the device from `offsets` [E] int32, the ends of the groups."""

    def __init__(self, offsets: Tensor, rows: int):
        E = len(offsets)
        most = triton.cdiv(rows, ROWS.value) + E
        self.offsets = offsets
        self.table = offsets.new_empty(3, most)  # expert, first row, end of the expert's rows
        self.total = offsets.new_empty(1)
        _table[(E,)](
            *(offsets, self.table, self.total, E, most, triton.next_power_of_2(E), TABLE_ROWS),
            **overlapping(),
            num_warps=1,
        )


def multiply(rows: Tensor, weight: Tensor, groups: Groups, turned: bool) -> Tensor:
    """rows [N, in] times weight [E, out, in] -> [N, out]; `turned`: rows [N, out] times weight -> [N, in]. N > 0."""
    _, *sizes = weight.shape
    columns, depth = reversed(sizes) if turned else sizes
    rows, output = rows.contiguous(), rows.new_empty(len(rows), columns)
    block = [STEP.value, COLUMNS.value] if turned else [COLUMNS.value, STEP.value]
    experts, firsts, ends = groups.table
    _rows_kernel[(_multiprocessors(rows.device),)](
        _tiles(rows, PART.value, STEP.value),
        _tiles(weight.view(-1, weight.shape[2]), *block),
        _tiles(output, PART.value, PIECE),
        *(output, experts, firsts, ends, groups.total),
        STEPS=depth // STEP.value,
        COLUMN_TILES=columns // COLUMNS.value,
        TURNED=turned,
        **overlapping(),
        num_warps=4,
        maxnreg=ROW_REGISTERS,
    )
    return output


def weight_gradient(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """grad [N, out], rows [N, in] -> [E, out, in], of each expert grad^T rows. N > 0."""
    E, out, inside = len(offsets), grad.shape[1], rows.shape[1]
    grad, rows = grad.contiguous(), rows.contiguous()
    output = rows.new_empty(E, out, inside)
    few = len(rows) <= FEW * E
    row_tiles, column_tiles = out // (WEIGHT_PARTS * PART.value), inside // COLUMNS.value
    _weights_kernel[(_multiprocessors(rows.device),)](
        _tiles(grad, STEP.value, PART.value),
        _tiles(rows, STEP.value, COLUMNS.value),
        _tiles(output.view(-1, inside), PART.value, PIECE),
        *(output, offsets, E * row_tiles * column_tiles),
        ROW_TILES=row_tiles,
        COLUMN_TILES=column_tiles,
        DEPTH=FEW_DEPTH if few else WEIGHT_DEPTH,
        BULK=not few,
        **overlapping(),
        num_warps=4,
        maxnreg=WEIGHT_REGISTERS,
    )
    return output


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tiles(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Loads and stores tiles of x [rows, columns]; what lies outside of x reads as zero and is not stored."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)


@triton.jit
def _table(
    offsets, table, total, E, most,
    PADDED: tl.constexpr, AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr, ROWS: tl.constexpr = ROWS,
):  # fmt: skip
    """Every program lists the tiles of one expert behind those of the experts before it."""
    wait_for_previous(OVERLAP)
    expert = tl.program_id(0)
    e = tl.arange(0, PADDED)
    ends = tl.load(offsets + e, mask=e < E, other=0)
    starts = tl.load(offsets + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.cdiv(ends - starts, ROWS)
    before = tl.sum(tl.where(e < expert, tiles, 0))
    mine = tl.sum(tl.where(e == expert, tiles, 0))
    start = tl.sum(tl.where(e == expert, starts, 0))
    end = tl.sum(tl.where(e == expert, ends, 0))
    for tile in range(0, mine, AT_ONCE):
        tile += tl.arange(0, AT_ONCE)
        here, exists = table + before + tile, tile < mine
        tl.store(here, expert, mask=exists)
        tl.store(here + most, start + tile * ROWS, mask=exists)
        tl.store(here + 2 * most, end, mask=exists)
    if expert == E - 1:
        tl.store(total, before + mine)


@gluon.jit
def _rows_kernel(
    rows, weight, output, pointer, experts, firsts, ends, total,
    STEPS: gl.constexpr, COLUMN_TILES: gl.constexpr, TURNED: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    ring, staging = _buffers(rows, weight, output, 3, ROW_DEPTH)
    wait_for_previous(OVERLAP)
    groups = (experts, firsts, ends, gl.load(total) * COLUMN_TILES)
    output = (output, pointer, COLUMN_TILES * COLUMNS)
    gl.warp_specialize(
        [
            (rows_producer, (rows, weight, ring, groups, STEPS, COLUMN_TILES, TURNED)),
            (rows_consumer, (output, ring, staging.index(0), groups, 0, STEPS, COLUMN_TILES, TURNED, OVERLAP)),
            (rows_consumer, (output, ring, staging.index(1), groups, 1, STEPS, COLUMN_TILES, TURNED, OVERLAP)),
            (rows_consumer, (output, ring, staging.index(2), groups, 2, STEPS, COLUMN_TILES, TURNED, OVERLAP)),
        ],
        [4, 4, 4],
        [ROW_CONSUMER_REGISTERS, ROW_CONSUMER_REGISTERS, ROW_CONSUMER_REGISTERS],
    )


@gluon.jit
def _weights_kernel(
    grad, rows, output, pointer, offsets, total,
    ROW_TILES: gl.constexpr, COLUMN_TILES: gl.constexpr, DEPTH: gl.constexpr, BULK: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    ring, staging = _buffers(grad, rows, output, 2, DEPTH)
    wait_for_previous(OVERLAP)
    output = (output, pointer, COLUMN_TILES * COLUMNS)
    gl.warp_specialize(
        [
            (weights_producer, (grad, rows, ring, offsets, total, ROW_TILES, COLUMN_TILES)),
            (
                weights_consumer,
                (output, ring, staging.index(0), offsets, total, 0, ROW_TILES, COLUMN_TILES, BULK, OVERLAP),
            ),
            (
                weights_consumer,
                (output, ring, staging.index(1), offsets, total, 1, ROW_TILES, COLUMN_TILES, BULK, OVERLAP),
            ),
        ],
        [4, 4],
        [WEIGHT_CONSUMER_REGISTERS, WEIGHT_CONSUMER_REGISTERS],
    )


@gluon.jit
def _buffers(left, right, output, PARTS: gl.constexpr, DEPTH: gl.constexpr):
    """The ring between producer and consumers, and what each consumer stores its results through."""
    parts = gl.allocate_shared_memory(left.dtype, [PARTS * DEPTH] + left.block_type.shape, left.layout)
    tiles = gl.allocate_shared_memory(right.dtype, [DEPTH] + right.block_type.shape, right.layout)
    staging = gl.allocate_shared_memory(output.dtype, [PARTS] + output.block_type.shape, output.layout)
    full = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(DEPTH):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=PARTS)
    fence_async_shared()
    return (parts, tiles, full, empty), staging
