"""Which tile of keys a program of the Hopper backward pass of full attention takes, and which tiles of rows it walks.

A program waits for those with earlier keys of its head, which therefore start before it: blocks of a grid start in the
order of their numbers. CUDA does not promise that; all its GPUs do it, and other kernels with an order rely on it too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

AHEAD = 264  # programs, twice as many as an H100 or H200 runs at the same time


def heads_together(document_start: Tensor, heads: int, tiles: int) -> Tensor:
    """How many of all KV heads, with so many tiles of keys each, take turns in the order of the programs.

    [] int32 on the device, for the host does not know the documents; document_start [B, S].

    In one undivided document one where its programs are enough: those of few heads meet more rows of theirs in the L2
    cache. Where they are not, one head after the other would leave the long walk of the last head's first keys to the
    end. With packed documents all heads, for then long walks are anywhere, and each head has some near its end.
    """
    undivided = min(max(AHEAD // tiles, 1), heads)
    return torch.where((document_start[:, -1] > 0).any(), heads, undivided).int()


@triton.jit
def place(program, B, K, tiles, together):
    """KV head, sequence and tile of keys: those of one head in ascending order, whose walks become shorter."""
    head = program // (tiles * together) * together  # of those of all sequences
    side_by_side = tl.minimum(together, B * K - head)
    within = program - head * tiles
    head += within % side_by_side
    return head % K, head // K, within // side_by_side


@triton.jit
def walk(ends, tile, S, query_start, KEYS: tl.constexpr, TOKENS: tl.constexpr):
    """Tiles of rows: begin, from where on the diagonal is behind, up to where all rows see all keys, and the end.

    A tile of rows has TOKENS queries. `ends` points at the two numbers that `query_ends` has for the tile of KEYS keys.
    """
    begin = tl.maximum(tile * KEYS - query_start, 0) // TOKENS
    all_see, some_see = tl.load(ends), tl.load(ends + 1)
    end = tl.maximum((some_see + TOKENS - 1) // TOKENS, begin)
    whole = tl.maximum((tile * KEYS + KEYS - 1 - query_start + TOKENS - 1) // TOKENS, begin)
    whole = tl.minimum(whole, end)
    return begin, whole, tl.where(all_see == S, end, tl.maximum(all_see // TOKENS, whole)), end
