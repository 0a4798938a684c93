"""The index of a selection, read back: it must say what the block lists say, tile by tile and block by block."""

import pytest
import torch

from kernels import KernelError
from kernels.selection import build_index, index_shapes, tile_tokens
from tests.kernels.cases import starts

BLOCK = 8


def random_blocks(document_start, kv_heads: int, selected: int, query_start: int = 0):
    """For each query and KV head some of the blocks that it sees, in random order, -1 behind them."""
    B, S = document_start.shape
    blocks = torch.full((B, kv_heads, S, selected), -1, dtype=torch.int32)
    for b, head, s in torch.cartesian_prod(torch.arange(B), torch.arange(kv_heads), torch.arange(S)).tolist():
        first, last = int(document_start[b, s]) // BLOCK, (query_start + s) // BLOCK
        some = (torch.randperm(last - first + 1) + first)[: int(torch.randint(1, selected + 1, ()))]
        blocks[b, head, s, : len(some)] = some
    return blocks


def example(query_start: int = 0):
    torch.manual_seed(0)
    document_start = starts([[20, 1, 24], [33, 12]])
    if query_start:
        document_start = document_start[:, query_start:].contiguous()
    return document_start, random_blocks(document_start, kv_heads=2, selected=3, query_start=query_start)


@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("query_start", [0, 16])
def test_a_tiles_union_holds_what_its_queries_chose(group, query_start):
    document_start, blocks = example(query_start)
    index = build_index(blocks, document_start, group, BLOCK, 45, query_start)
    tile, S = tile_tokens(group), blocks.shape[2]
    for b, head, i in torch.cartesian_prod(*map(torch.arange, index.union.shape[:3])).tolist():
        whole, size = index.union_size[b, head, i].tolist()
        union, bits = index.union[b, head, i, :size].tolist(), index.union_tokens[b, head, i, :size].tolist()
        assert len(set(union)) == size
        for token in range(tile):
            s = i * tile + token
            chosen = {block for block, word in zip(union, bits, strict=True) if word >> token & 1}
            assert chosen == (set(blocks[b, head, s].tolist()) - {-1} if s < S else set())
        first, latest = query_start + i * tile, int(document_start[b, min(i * tile + tile, S) - 1])
        seen_whole = [block for block in sorted(union) if latest <= block * BLOCK and (block + 1) * BLOCK - 1 <= first]
        assert union[:whole] == seen_whole and union[whole:] == sorted(union[whole:])


def test_the_work_items_of_a_block_hold_the_tokens_that_chose_it_in_order(monkeypatch):
    monkeypatch.setattr("kernels.selection._item_length", lambda entries: 4)  # so that blocks have several items
    document_start, blocks = example()
    index = build_index(blocks, document_start, 4, BLOCK, 45, 0)
    key_blocks = -(-45 // BLOCK)
    for owner in range(4 * key_blocks):
        row, block = divmod(owner, key_blocks)
        b, head = divmod(row, 2)
        items = index.work[index.first_item[owner] : index.first_item[owner + 1]].tolist()
        assert all(item[0] == owner and 0 < item[2] - item[1] <= 4 for item in items)
        tokens = [token for _, first, stop in items for token in index.tokens[row, first:stop].tolist()]
        assert tokens == [s for s in range(45) if block in blocks[b, head, s].tolist()]
    unused = index.work[index.first_item[-1] :]
    assert len(unused) and (unused[:, 1] == unused[:, 2]).all()


@pytest.mark.parametrize("selected", [1, 3, 16])
def test_shapes_are_known_before_any_value(selected):
    document_start = starts([[45]])
    blocks = random_blocks(document_start, kv_heads=2, selected=selected)
    index = build_index(blocks, document_start, 4, BLOCK, 45, 0)
    assert [tuple(x.shape) for x in index] == index_shapes(blocks, 4, BLOCK, 45)


def test_blocks_of_another_type_are_refused():
    document_start, blocks = example()
    with pytest.raises(KernelError, match=r"blocks is torch.int64 \[2, 2, 45, 3\]; it must be int32"):
        build_index(blocks.long(), document_start, 4, BLOCK, 45, 0)
