"""How the sparse layers of a hybrid block walk the selection that its full layer made: built once, read by all of them.

A forward pass goes by tiles of neighbouring queries, whose selections overlap: each tile gets the sorted union of its
tokens' key blocks, with one bit a token. The gradients of K and V go by key block: each block gets the tokens that
chose it, in ascending order, cut into work items of bounded length so that a block that everybody chose keeps no
multiprocessor busy alone. All of it is built on the device without atomics and without waiting for it, so that the same
selection always gives the same sums in the same order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.arguments import check_blocks
from kernels.errors import KernelError

MULTIPROCESSORS = 132  # of an H100 or H200; only the length of a work item depends on it
ITEMS_EACH = 16  # work items a multiprocessor gets, so that the last ones end together
CHUNK = 256  # entries, blocks or items that a program handles
UNUSED = tl.constexpr(2**30)  # sorts behind all blocks


class Index(NamedTuple):
    """Two views of the selection [B, K, S, n] of one hybrid block; all int32. J = key blocks, W = work items."""

    union: Tensor  # [B, K, tiles, capacity] the tile's distinct blocks, those that all its tokens see whole first
    union_tokens: Tensor  # [B, K, tiles, capacity] bit i is set where token i of the tile chose the block
    union_size: Tensor  # [B, K, tiles, 2] blocks seen whole; all blocks
    tokens: Tensor  # [B * K, S * n] the tokens that chose a block, by block, then ascending
    work: Tensor  # [W, 3] (b * K + kv head) * J + block, and its range in a row of `tokens`; empty where unused
    first_item: Tensor  # [B * K * J + 1] the first work item of each block


def tile_tokens(group: int) -> int:
    """Queries in a tile: with their heads they fill 64 rows of a matrix instruction; a bit each must fit 32 bits."""
    return min(max(64 // group, 1), 32)


def build_index(blocks: Tensor, document_start: Tensor, group: int, block: int, keys: int, query_start: int) -> Index:
    """The index of `blocks` [B, K, S, n] int32, -1 where unused, among `keys` keys in blocks of `block`.

    document_start [B, S] int32; `group` query heads per KV head. Query i stands at position query_start + i.
    """
    if blocks.dtype != torch.int32 or blocks.ndim != 4:
        raise KernelError(f"blocks is {blocks.dtype} {list(blocks.shape)}; it must be int32 [B, K, S, selected]")
    check_blocks(blocks, -(-keys // block))
    B, K, S, n = blocks.shape
    blocks = blocks.contiguous()
    union = _unions(blocks, document_start, tile_tokens(group), block, query_start)
    return Index(*union, *_inverse(blocks, -(-keys // block), _item_length(B * K * S * n)))


def index_shapes(blocks: Tensor, group: int, block: int, keys: int) -> list[tuple[int, ...]]:
    """Shapes of what `build_index` returns; they depend on no value."""
    B, K, S, n = blocks.shape
    tile = tile_tokens(group)
    lists = (B, K, triton.cdiv(S, tile))
    capacity, owners, entries = tile * triton.next_power_of_2(n), B * K * -(-keys // block), B * K * S * n
    items = owners + entries // _item_length(entries)
    return [(*lists, capacity), (*lists, capacity), (*lists, 2), (B * K, S * n), (items, 3), (owners + 1,)]


def _item_length(entries: int) -> int:
    length = entries // (MULTIPROCESSORS * ITEMS_EACH)
    return min(max(triton.next_power_of_2(length), 128), 1024)


def _unions(blocks: Tensor, document_start: Tensor, tile: int, block: int, query_start: int) -> list[Tensor]:
    B, K, S, n = blocks.shape
    tiles, padded = triton.cdiv(S, tile), triton.next_power_of_2(n)
    capacity = tile * padded
    union, tokens = (blocks.new_empty(B, K, tiles, capacity) for _ in range(2))
    size = blocks.new_empty(B, K, tiles, 2)
    _union_kernel[(tiles, K, B)](
        blocks,
        document_start,
        union,
        tokens,
        size,
        S,
        query_start,
        TILE=tile,
        SELECTED=n,
        PADDED=padded,
        BLOCK=block,
        num_warps=1 if capacity <= 128 else 4,
    )
    return [union, tokens, size]


@triton.jit
def _or_within_run(block_a, bits_a, block_b, bits_b):
    """Scan over sorted blocks: collects the bits of equal blocks."""
    return block_b, tl.where(block_a == block_b, bits_a, 0) | bits_b


@triton.jit
def _union_kernel(
    Blocks,
    DocumentStart,
    Union,
    Tokens,
    Size,
    S,
    query_start,
    TILE: tl.constexpr,
    SELECTED: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of queries: sort (block, token) pairs, keep the last of each run of equal blocks with the run's bits."""
    tile, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    CAPACITY: tl.constexpr = TILE * PADDED
    i = tl.arange(0, CAPACITY)
    token, slot = i // PADDED, i % PADDED
    row = b * tl.num_programs(1) + head
    query = tile * TILE + token
    inside = (query < S) & (slot < SELECTED)
    chosen = tl.load(Blocks + (row.to(tl.int64) * S + query) * SELECTED + slot, mask=inside, other=-1)

    pair = tl.sort(tl.where(chosen >= 0, chosen * TILE + token, UNUSED))
    block = pair // TILE
    used = pair < UNUSED
    _, bits = tl.associative_scan((block, tl.where(used, 1 << (pair % TILE), 0)), 0, _or_within_run)
    following = tl.gather(block, tl.minimum(i + 1, CAPACITY - 1), 0)
    last = used & ((block != following) | (i == CAPACITY - 1))

    first_query = query_start + tile * TILE
    latest_start = tl.load(DocumentStart + b.to(tl.int64) * S + tl.minimum(tile * TILE + TILE - 1, S - 1))
    whole = last & ((block + 1) * BLOCK - 1 <= first_query) & (block * BLOCK >= latest_start)
    partly = last & (whole == 0)
    n_whole = tl.sum(whole.to(tl.int32), 0)
    place = tl.where(whole, tl.cumsum(whole.to(tl.int32), 0), n_whole + tl.cumsum(partly.to(tl.int32), 0)) - 1

    out = (row.to(tl.int64) * tl.num_programs(0) + tile) * CAPACITY
    tl.store(Union + out + place, block, mask=last)
    tl.store(Tokens + out + place, bits, mask=last)
    size = Size + (row.to(tl.int64) * tl.num_programs(0) + tile) * 2
    tl.store(size, n_whole)
    tl.store(size + 1, tl.sum(last.to(tl.int32), 0))


def _inverse(blocks: Tensor, key_blocks: int, item_length: int) -> list[Tensor]:
    """Tokens by key block, and the work items."""
    B, K, S, n = blocks.shape
    rows, entries = B * K, S * n
    owners = rows * key_blocks
    narrow = torch.int16 if key_blocks < 2**15 else torch.int32  # half the passes of the radix sort
    key, order = blocks.view(rows, entries).to(narrow).sort(dim=1, stable=True)  # unused places come first
    tokens, bounds = blocks.new_empty(rows, entries), blocks.new_empty(rows, key_blocks + 1)
    first_item = blocks.new_empty(owners + 1)
    work = blocks.new_empty(owners + rows * entries // item_length, 3)
    _tokens_kernel[(triton.cdiv(rows * entries, CHUNK),)](order, tokens, rows * entries, n, CHUNK=CHUNK)
    _bounds_kernel[(triton.cdiv(key_blocks + 1, CHUNK), rows)](key, bounds, entries, key_blocks, CHUNK=CHUNK)
    _first_item_kernel[(1,)](bounds, first_item, owners, key_blocks, item_length, CHUNK=CHUNK)
    _work_kernel[(triton.cdiv(work.shape[0], CHUNK),)](
        bounds, first_item, work, owners, key_blocks, work.shape[0], item_length, CHUNK=CHUNK
    )
    return [tokens, work, first_item]


@triton.jit
def _tokens_kernel(Order, Tokens, size, n, CHUNK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    tl.store(Tokens + i, (tl.load(Order + i, mask=i < size) // n).to(tl.int32), mask=i < size)


@triton.jit
def _lower_bound(Sorted, size, wanted):
    """How many of `size` ascending numbers are smaller than each of `wanted`."""
    low = tl.zeros_like(wanted)
    high = tl.zeros_like(wanted) + size
    for _ in range(32):  # halvings; more than any int32 needs
        middle = (low + high) // 2
        smaller = (middle < high) & (tl.load(Sorted + middle, mask=middle < high, other=0).to(tl.int32) < wanted)
        low = tl.where(smaller, middle + 1, low)
        high = tl.where(smaller, high, middle)
    return low


@triton.jit
def _bounds_kernel(Key, Bounds, entries, key_blocks, CHUNK: tl.constexpr):
    """Where the entries of each block begin in a row; one more for the end of the last."""
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    bound = _lower_bound(Key + row * entries, entries, block)
    tl.store(Bounds + row * (key_blocks + 1) + block, bound, mask=block <= key_blocks)


@triton.jit
def _entries_of(Bounds, owner, key_blocks, inside):
    at = Bounds + owner + owner // key_blocks  # a row has one bound more than blocks
    return tl.load(at, mask=inside, other=0), tl.load(at + 1, mask=inside, other=0)


@triton.jit
def _first_item_kernel(Bounds, FirstItem, owners, key_blocks, item_length, CHUNK: tl.constexpr):
    """Running sum of the work items of all blocks, by one program."""
    total = 0
    tl.store(FirstItem, total)
    for chunk in range(0, owners, CHUNK):
        owner = chunk + tl.arange(0, CHUNK)
        first, stop = _entries_of(Bounds, owner, key_blocks, owner < owners)
        items = (stop - first + item_length - 1) // item_length
        tl.store(FirstItem + owner + 1, total + tl.cumsum(items, 0), mask=owner < owners)
        total += tl.sum(items, 0)


@triton.jit
def _work_kernel(Bounds, FirstItem, Work, owners, key_blocks, size, item_length, CHUNK: tl.constexpr):
    """The owner and the range of each work item."""
    item = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    owner = _lower_bound(FirstItem + 1, owners, item + 1)  # the first whose items end behind this one
    used = owner < owners
    first, stop = _entries_of(Bounds, owner, key_blocks, used)
    first += (item - tl.load(FirstItem + owner, mask=used, other=0)) * item_length
    stop = tl.where(used, tl.minimum(first + item_length, stop), first)
    tl.store(Work + item * 3, owner, mask=item < size)
    tl.store(Work + item * 3 + 1, first, mask=item < size)
    tl.store(Work + item * 3 + 2, stop, mask=item < size)
