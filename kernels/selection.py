"""How the sparse layers of a hybrid block walk the selection that its full layer made: built once, read by all of them.

They go by key block: a block stays in place and the queries that chose it pass by. For that the choices (token, place
in its list) are sorted once, by chunk of queries, then by block, then by token. The chunks are for the L2 cache:
programs that run at the same time gather from one chunk of queries, small enough to stay there, instead of from
everywhere. The choices of one block in one chunk are a cell, and a piece of a cell is the work of one program: where
all tokens want the same blocks, their cells are cut into many, so that the work is still divided evenly.

All of it is built on the device without atomics and without waiting for it, and the sort is stable, so that the same
selection always gives the same sums in the same order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.arguments import check_blocks
from kernels.errors import KernelError

MOST_CHUNKS = 16  # of 32,768 queries one has 17 MB of an 80B KV head's q and dO, which the L2 cache mostly keeps
CELL_ROWS = 512  # queries times heads of one chunk that choose one block, on average, at least; fewer do not pay
SMALLEST_CHUNK = 64  # queries
PIECE_ROWS = 4096  # queries times heads of a piece, at most
PROGRAM_SIZE = 256  # choices, cells or pieces that a program handles


class Index(NamedTuple):
    """A selection [B, K, S, n] in the order of its key blocks. C chunks of queries, J key blocks; int32.

    Cell c J + j has the choices of block j by the queries of chunk c.
    """

    entries: Tensor  # [B * K, S * n] token * n + place, by cell, then token; unused ones first
    bounds: Tensor  # [B * K, C J + 1] where the entries of each cell begin in a row, and where the last one ends
    first_piece: Tensor  # [B * K, C J + 1] how many pieces come before each cell, and how many there are
    pieces: Tensor  # [B * K, most pieces] the cell of each, in order; -1 behind the last

    @property
    def cells(self) -> int:
        """C J."""
        return self.bounds.shape[1] - 1


def piece_entries(group: int) -> int:
    """Choices of a piece, at most, each of so many heads."""
    return PIECE_ROWS // group


def chunk_tokens(S: int, selected: int, group: int) -> int:
    """Queries in a chunk, a power of two, where each selects so many keys for a group of so many heads."""
    chunks = min(max(selected * group // CELL_ROWS, 1), MOST_CHUNKS)
    return max(triton.next_power_of_2(triton.cdiv(S, chunks)), SMALLEST_CHUNK)


def build_index(blocks: Tensor, block: int, keys: int, group: int) -> Index:
    """The index of `blocks` [B, K, S, n] int32, -1 where unused, among `keys` keys in blocks of `block`.

    `group` is the number of query heads of a KV head. Raises KernelError.
    """
    if blocks.dtype != torch.int32 or blocks.ndim != 4:
        raise KernelError(f"blocks is {blocks.dtype} {list(blocks.shape)}; it must be int32 [B, K, S, selected]")
    key_blocks = triton.cdiv(keys, block)
    check_blocks(blocks, key_blocks)
    entries, bounds, first_piece, pieces = (blocks.new_empty(x) for x in index_shapes(blocks, block, keys, group))
    B, K, S, n = blocks.shape
    rows, cells, size = B * K, bounds.shape[1] - 1, blocks.numel()
    cell = torch.empty(rows, S * n, dtype=torch.int16 if cells < 2**15 else torch.int32, device=blocks.device)
    grid = (triton.cdiv(size, PROGRAM_SIZE),)
    tokens = chunk_tokens(S, n * block, group)
    _cells_kernel[grid](blocks.contiguous(), cell, size, S, n, key_blocks, tokens, SIZE=PROGRAM_SIZE)
    cell, order = cell.sort(dim=1, stable=True)
    _narrow_kernel[grid](order, entries, size, SIZE=PROGRAM_SIZE)
    _bounds_kernel[(triton.cdiv(cells + 1, PROGRAM_SIZE), rows)](
        cell, bounds, first_piece, S * n, cells, PIECE=piece_entries(group), SIZE=PROGRAM_SIZE
    )
    first_piece = first_piece.cumsum(1, dtype=torch.int32)
    most = pieces.shape[1]
    _pieces_kernel[(triton.cdiv(most, PROGRAM_SIZE), rows)](first_piece, pieces, cells, most, SIZE=PROGRAM_SIZE)
    return Index(entries, bounds, first_piece, pieces)


def index_shapes(blocks: Tensor, block: int, keys: int, group: int) -> list[tuple[int, ...]]:
    """Shapes of what `build_index` returns; they depend on no value."""
    B, K, S, n = blocks.shape
    cells = triton.cdiv(S, chunk_tokens(S, n * block, group)) * triton.cdiv(keys, block)
    most = min(cells, S * n) + S * n // piece_entries(group)  # every cell has one piece that is not full, at most
    return [(B * K, S * n), (B * K, cells + 1), (B * K, cells + 1), (B * K, most)]


@triton.jit
def piece_of(Bounds, FirstPiece, Pieces, row, cells, key_blocks, SIZE: tl.constexpr):
    """This program's piece of a (sequence, KV head): its key block, and its entries' range in the row, maybe none."""
    piece, row = tl.program_id(0), row.to(tl.int64)
    listed = tl.load(Pieces + row * tl.num_programs(0) + piece)
    cell = tl.maximum(listed, 0)
    at = row * (cells + 1) + cell
    first = tl.load(Bounds + at) + (piece - tl.load(FirstPiece + at)) * SIZE
    stop = tl.minimum(tl.load(Bounds + at + 1), first + SIZE)
    return cell % key_blocks, first, tl.where(listed < 0, first, stop)


@triton.jit
def masked_until(DocumentStart, Entries, first, stop, block, query_start, SELECTED: tl.constexpr, BLOCK: tl.constexpr):
    """Up to where entries need element masks.

    Queries inside the block see it in part; tokens ascend, so they come first, at most BLOCK of them. And where a
    document begins inside the block, all are masked.
    """
    is_cut = tl.load(DocumentStart + tl.load(Entries + stop - 1) // SELECTED) > block * BLOCK
    has_diagonal = query_start + tl.load(Entries + first) // SELECTED < (block + 1) * BLOCK
    masked = tl.where(has_diagonal, tl.minimum(first + BLOCK, stop), first)
    return tl.where(is_cut, stop, masked)


@triton.jit
def _cells_kernel(Blocks, Cell, size, S, n, key_blocks, chunk, SIZE: tl.constexpr):
    """The chunk and block of each choice as one number, -1 where unused."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    block = tl.load(Blocks + i, mask=i < size, other=-1)
    token = ((i // n) % S).to(tl.int32)
    tl.store(Cell + i, tl.where(block < 0, -1, token // chunk * key_blocks + block), mask=i < size)


@triton.jit
def _narrow_kernel(Order, Entries, size, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(Entries + i, tl.load(Order + i, mask=i < size).to(tl.int32), mask=i < size)


@triton.jit
def _smaller(Sorted, wanted, number):
    """How many of `number` sorted values are smaller than each wanted one, by bisection."""
    low, high = tl.zeros_like(wanted), tl.zeros_like(wanted) + number
    for _ in range(32):  # halvings; more than any int32 needs
        middle = low + (high - low) // 2
        value = tl.load(Sorted + middle, mask=middle < high, other=0).to(tl.int32)
        smaller = (middle < high) & (value < wanted)
        low = tl.where(smaller, middle + 1, low)
        high = tl.where(smaller, high, middle)
    return low


@triton.jit
def _bounds_kernel(Cell, Bounds, Counts, entries, cells, PIECE: tl.constexpr, SIZE: tl.constexpr):
    """Where each cell begins, and, one place further, of how many pieces it is."""
    row, cell = tl.program_id(1).to(tl.int64), tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    Cell += row * entries
    bound = _smaller(Cell, cell, entries)
    before = _smaller(Cell, tl.maximum(cell - 1, 0), entries)
    at = row * (cells + 1) + cell
    tl.store(Bounds + at, bound, mask=cell <= cells)
    tl.store(Counts + at, (bound - before + PIECE - 1) // PIECE, mask=cell <= cells)


@triton.jit
def _pieces_kernel(FirstPiece, Pieces, cells, most, SIZE: tl.constexpr):
    """The cell of each piece: the last one that no more than the pieces up to here come before."""
    row, piece = tl.program_id(1).to(tl.int64), tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    FirstPiece += row * (cells + 1)
    cell = _smaller(FirstPiece, piece + 1, cells + 1) - 1
    tl.store(Pieces + row * most + piece, tl.where(cell < cells, cell, -1), mask=piece < most)
