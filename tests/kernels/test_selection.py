"""The index of a selection, read back: it must say what the block lists say, block by block."""

import pytest
import torch

from kernels import KernelError
from kernels.selection import build_index, index_shapes
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


@pytest.mark.parametrize("query_start", [0, 16])
@pytest.mark.parametrize("chunk", [8, 16, 64])
def test_a_block_has_in_each_chunk_the_tokens_that_chose_it_in_order(chunk, query_start, monkeypatch):
    monkeypatch.setattr("kernels.selection.chunk_tokens", lambda S, selected, group: chunk)
    document_start, blocks = example(query_start)
    index = build_index(blocks, BLOCK, 45, 2)
    S, n = blocks.shape[2:]
    J = -(-45 // BLOCK)
    seen = 0
    for row, c, block in torch.cartesian_prod(*map(torch.arange, (4, -(-S // chunk), J))).tolist():
        first, stop = index.bounds[row, c * J + block :][:2].tolist()
        b, head = divmod(row, 2)
        chosen = blocks[b, head].flatten()
        expected = [t * n + i for t in range(c * chunk, min(S, c * chunk + chunk)) for i in range(n)]
        assert index.entries[row, first:stop].tolist() == [e for e in expected if chosen[e] == block]
        seen += stop - first
    assert seen == (blocks >= 0).sum()


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_pieces_are_the_cells_in_order_each_cut_where_it_is_full(size, monkeypatch):
    monkeypatch.setattr("kernels.selection.piece_entries", lambda group: size)
    _, blocks = example()
    index = build_index(blocks, BLOCK, 45, 2)
    for bounds, first_piece, pieces in zip(index.bounds, index.first_piece, index.pieces, strict=True):
        number = (bounds.diff() + size - 1) // size
        assert first_piece.tolist() == [0, *number.cumsum(0).tolist()]
        expected = torch.repeat_interleave(torch.arange(len(number)), number).tolist()
        assert pieces.tolist() == expected + [-1] * (len(pieces) - len(expected))


@pytest.mark.parametrize("selected", [1, 3, 16])
def test_shapes_are_known_before_any_value(selected):
    document_start = starts([[45]])
    blocks = random_blocks(document_start, kv_heads=2, selected=selected)
    index = build_index(blocks, BLOCK, 45, 2)
    assert [tuple(x.shape) for x in index] == index_shapes(blocks, BLOCK, 45, 2)


def test_blocks_of_another_type_are_refused():
    document_start, blocks = example()
    with pytest.raises(KernelError, match=r"blocks is torch.int64 \[2, 2, 45, 3\]; it must be int32"):
        build_index(blocks.long(), BLOCK, 45, 2)
