"""How the sparse layers of a hybrid block walk the selection that its full layer made: built once, read by all of them.

They go by key block: a block stays in place and the queries that chose it pass by. For that the choices (token, place
in its list) are sorted once, by chunk of queries, then by block, then by token. The chunks are for the L2 cache:
programs that run at the same time gather from one chunk of queries, small enough to stay there, instead of from
everywhere. All of it is built on the device without atomics and without waiting for it, and the sort is stable, so that
the same selection always gives the same sums in the same order.
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
PROGRAM_SIZE = 256  # choices or bounds that a program handles


class Index(NamedTuple):
    """A selection [B, K, S, n] in the order of its key blocks. C chunks of queries, J key blocks; int32."""

    entries: Tensor  # [B * K, S * n] token * n + place, by chunk, then block, then token; unused ones first
    bounds: Tensor  # [B * K, C, J + 1] where the entries of each block of a chunk begin in a row, and where they end


def chunk_tokens(S: int, selected: int, group: int) -> int:
    """Queries in a chunk, a power of two, where each selects so many keys for a group of so many heads."""
    chunks = min(max(selected * group // CELL_ROWS, 1), MOST_CHUNKS)
    return max(triton.next_power_of_2(triton.cdiv(S, chunks)), SMALLEST_CHUNK)


def build_index(blocks: Tensor, block: int, keys: int, group: int) -> Index:
    """The index of `blocks` [B, K, S, n] int32, -1 where unused, among `keys` keys in blocks of `block`.

    `group` is the number of query heads of a KV head.
    """
    if blocks.dtype != torch.int32 or blocks.ndim != 4:
        raise KernelError(f"blocks is {blocks.dtype} {list(blocks.shape)}; it must be int32 [B, K, S, selected]")
    key_blocks = triton.cdiv(keys, block)
    check_blocks(blocks, key_blocks)
    entries, bounds = (blocks.new_empty(shape) for shape in index_shapes(blocks, block, keys, group))
    B, K, S, n = blocks.shape
    chunks, size = bounds.shape[1], blocks.numel()
    cells = chunks * key_blocks
    cell = torch.empty(B * K, S * n, dtype=torch.int16 if cells < 2**15 else torch.int32, device=blocks.device)
    grid = (triton.cdiv(size, PROGRAM_SIZE),)
    tokens = chunk_tokens(S, n * block, group)
    _cells_kernel[grid](blocks.contiguous(), cell, size, S, n, key_blocks, tokens, SIZE=PROGRAM_SIZE)
    cell, order = cell.sort(dim=1, stable=True)
    _narrow_kernel[grid](order, entries, size, SIZE=PROGRAM_SIZE)
    _bounds_kernel[(triton.cdiv(key_blocks + 1, PROGRAM_SIZE), chunks, B * K)](
        cell, bounds, S * n, key_blocks, SIZE=PROGRAM_SIZE
    )
    return Index(entries, bounds)


def index_shapes(blocks: Tensor, block: int, keys: int, group: int) -> list[tuple[int, ...]]:
    """Shapes of what `build_index` returns; they depend on no value."""
    B, K, S, n = blocks.shape
    chunks = triton.cdiv(S, chunk_tokens(S, n * block, group))
    return [(B * K, S * n), (B * K, chunks, triton.cdiv(keys, block) + 1)]


@triton.jit
def entries_of(Bounds, head, block, chunk):
    """The range of a block's entries in one chunk, in the row of a (sequence, KV head)."""
    blocks, chunks = tl.num_programs(0), tl.num_programs(1)
    at = Bounds + (head.to(tl.int64) * chunks + chunk) * (blocks + 1) + block
    return tl.load(at), tl.load(at + 1)


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
def _bounds_kernel(Cell, Bounds, entries, key_blocks, SIZE: tl.constexpr):
    """By bisection: how many of a row's sorted cells come before each block of a chunk."""
    chunk, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    block = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    wanted = chunk * key_blocks + block
    low, high = tl.zeros_like(wanted), tl.zeros_like(wanted) + entries
    for _ in range(32):  # halvings; more than any int32 needs
        middle = low + (high - low) // 2
        cell = tl.load(Cell + row * entries + middle, mask=middle < high, other=0).to(tl.int32)
        smaller = (middle < high) & (cell < wanted)
        low = tl.where(smaller, middle + 1, low)
        high = tl.where(smaller, high, middle)
    at = (row * tl.num_programs(1) + chunk) * (key_blocks + 1) + block
    tl.store(Bounds + at, low, mask=block <= key_blocks)
