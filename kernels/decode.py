"""Attention of one new query token per sequence over a KV cache: the full layer with its selection, the sparse layer.

Both are bound by reading K and V once, so the G query heads of a group share every tile: they are the rows of the
matrix products (padded to 16), 64 keys at a time come through the copy engine, and enough tiles are in flight to keep
the memory busy.

The full layer cuts each sequence into parts (split-KV). A part leaves its normalised output, its log-sum-exp and the
largest logit of each key block; a second kernel weighs the outputs by the log-sum-exps, subtracts the final one from
the block maxima, takes the largest of the group (paper eq. 3) and selects blocks. No array grows beyond keys / block.

The sparse layer is one launch: a program owns a sequence and a KV head, walks the selected blocks of the full layer's
cache, then the ring buffer of the layer's own last keys, and writes the gated sum.

Cache slots that hold no token yet may contain anything, NaN included. Checks and launches are here, as operators that
`torch.compile` does not look into; the kernels are in `decode_full_kernels.py` and `decode_sparse_kernel.py`.
"""

import functools
import math

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from kernels.arguments import (
    INTERPRETED,
    LOG2_E,
    branch_sinks,
    check_blocks,
    check_branches,
    check_qkv,
    check_tensor,
    key_tiles,
    loadable,
    sink_of_heads,
)
from kernels.capability import BLOCKS
from kernels.decode_full_kernels import combine_kernel, split_kernel
from kernels.decode_sparse_kernel import sparse_kernel
from kernels.errors import KernelError, debugging
from kernels.shared import PAGE, KVCache

TILE = 64  # keys a program reads at a time
RANKED = 8192  # block scores that the selection holds at a time
IN_FLIGHT = 100_000  # bytes of K and V under way per program; two programs fit the shared memory of an SM


ABSENT = None, None, None  # keys, values and page table of a branch without a cache


def decode_full(
    q: Tensor, cache: KVCache, lengths: Tensor, *, block: int, selected: int, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the whole cache, and the key blocks it selects for the sparse layers that follow.

    q [B, H, D]; lengths [B] int32: tokens in the cache, the new one included; sink [H] or None. Returns the output
    [B, H, Dv] and blocks [B, K, selected] int32 by falling score, ties to the lower block, -1 where there are fewer.
    Raises KernelError; what `lengths` and a page table hold is checked with HYSPARSE_DEBUG=1 only.
    """
    return _full(q, *cache, lengths, sink, block, selected)


def launch_full(
    q: Tensor, k: Tensor, v: Tensor, page_table: Tensor | None, lengths: Tensor, sink: Tensor | None,
    block: int, selected: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `decode_full` does, on plain tensors; launches on meta tensors, too."""
    cache = KVCache(k, v, page_table)
    K = _check(q, cache, lengths, block, "cache")
    if selected < 0:
        raise KernelError(f"selected={selected}; use 0 to select nothing, or a number of blocks")
    _check_places(cache, lengths)
    q = q if q.stride(-1) == 1 else q.contiguous()
    B, H, D = q.shape
    sink, lengths = sink_of_heads(sink, q), lengths.contiguous()
    Dv, group = cache.v.shape[3], H // K
    capacity = _capacity(cache)
    piece = min(block, TILE)
    pieces = cdiv(capacity, TILE) * (TILE // piece)
    splits = _splits(B * K, cdiv(capacity, TILE), q.device)

    partial = q.new_empty(B, K, splits, group, Dv, dtype=torch.float32)
    partial_lse = q.new_empty(B, K, group, splits, dtype=torch.float32)
    maxima = q.new_empty(B, K, pieces if selected else 0, group, dtype=torch.float32)
    output = q.new_empty(B, H, Dv)
    blocks = torch.empty(B, K, selected, dtype=torch.int32, device=q.device)

    split_kernel[(K, splits, B)](
        q, *_loads(cache, TILE), lengths, partial, partial_lse, maxima,
        LOG2_E / math.sqrt(D), splits, pieces, q.stride(0), q.stride(1),
        **_widths(group, D, Dv), PAGED=cache.page_table is not None, TILE=TILE, PIECE=piece, SCORED=selected > 0,
        num_warps=4, num_stages=1 + _in_flight(cache) * (1 if cache.page_table is None else 2),  # pages come first
    )  # fmt: skip
    columns = block // piece * next_power_of_2(group)  # maxima that make up the score of a block
    ranked = min(RANKED, max(1, 32768 // columns), next_power_of_2(cdiv(pieces, block // piece)))
    combine_kernel[(group + (selected > 0), K, B)](
        partial, partial_lse, maxima, sink, lengths, output, blocks, splits, pieces,
        GROUP=group, GROUP_PADDED=next_power_of_2(group), DV=Dv, DV_PADDED=next_power_of_2(Dv),
        SPLITS_PADDED=next_power_of_2(splits),
        PIECE=piece, PIECES=block // piece, COLUMNS=columns, RANKED=ranked,
        SELECTED=selected, SELECTED_PADDED=next_power_of_2(max(1, selected)),
        num_warps=16 if ranked * columns > 4096 else 4,
    )  # fmt: skip
    return output, blocks


_full = torch.library.custom_op("hysparse::decode_full", launch_full, mutates_args=())


@_full.register_fake
def _(q, k, v, page_table, lengths, sink, block, selected):
    B, H, _ = q.shape
    return q.new_empty(B, H, v.shape[3]), q.new_empty(B, k.shape[2], selected, dtype=torch.int32)


def decode_sparse(
    q: Tensor,
    cache: KVCache | None,
    blocks: Tensor | None,
    window_cache: KVCache | None,
    lengths: Tensor,
    *,
    block: int,
    window: int,
    sparse_sink: Tensor | None = None,
    window_sink: Tensor | None = None,
    sparse_gate: Tensor | None = None,
    window_gate: Tensor | None = None,
) -> Tensor:
    """Gated sum of attention over the selected blocks of `cache` and over the last `window` tokens (paper eq. 5 to 9).

    q [B, H, D]; blocks [B, K, n] int32 from `decode_full`, -1 only at the end of a list; lengths as there. The window's
    cache is a ring buffer, k [B, window, K, D]: position p in slot p % window. Sinks [H]; gates [B, H] or [B, H, Dv], 1
    where None. A branch whose cache is None is absent. Returns [B, H, Dv]. Raises KernelError; what `blocks`, `lengths`
    and a page table hold is checked with HYSPARSE_DEBUG=1 only.
    """
    caches = *(cache or ABSENT), blocks, *(window_cache or ABSENT)
    return _sparse(q, *caches, lengths, sparse_sink, window_sink, sparse_gate, window_gate, block, window)


def launch_sparse(
    q: Tensor, k: Tensor | None, v: Tensor | None, page_table: Tensor | None, blocks: Tensor | None,
    window_k: Tensor | None, window_v: Tensor | None, window_table: Tensor | None, lengths: Tensor,
    sparse_sink: Tensor | None, window_sink: Tensor | None, sparse_gate: Tensor | None, window_gate: Tensor | None,
    block: int, window: int,
) -> Tensor:  # fmt: skip
    """What `decode_sparse` does, on plain tensors; launches on meta tensors, too."""
    cache = None if k is None else KVCache(k, v, page_table)
    window_cache = None if window_k is None else KVCache(window_k, window_v, window_table)
    K = _check_sparse(q, cache, blocks, window_cache, lengths, block, window)
    if cache is not None:
        check_blocks(blocks, cdiv(_capacity(cache), block))
    _check_places(cache, lengths)
    either = cache or window_cache
    q = q if q.stride(-1) == 1 else q.contiguous()
    B, H, D = q.shape
    sinks = branch_sinks(sparse_sink, window_sink, q)
    Dv, group = either.v.shape[3], H // K
    selected = 0 if cache is None else blocks.shape[2]
    tile, ring_tile = min(block, TILE), min(TILE, max(16, next_power_of_2(window)))
    output = q.new_empty(B, H, Dv)
    sparse_kernel[(K, B)](
        q, *_loads(cache, tile), blocks.contiguous() if selected else None, *_loads(window_cache, ring_tile)[:2],
        lengths.contiguous(), *sinks, *_gate(sparse_gate, output, "sparse_gate"),
        *_gate(window_gate, output, "window_gate"), output, LOG2_E / math.sqrt(D), q.stride(0), q.stride(1),
        **_widths(group, D, Dv), PAGED=cache is not None and cache.page_table is not None,
        TILE=tile, PIECES=block // tile, BLOCK=block,
        SELECTED=selected, SELECTED_PADDED=next_power_of_2(max(1, selected)),
        WINDOW=0 if window_cache is None else window, RING_TILE=ring_tile,
        num_warps=4, num_stages=1 + _in_flight(either),
    )  # fmt: skip
    return output


_sparse = torch.library.custom_op("hysparse::decode_sparse", launch_sparse, mutates_args=())


@_sparse.register_fake
def _(q, k, v, page_table, blocks, window_k, window_v, *_):
    B, H, _ = q.shape
    return q.new_empty(B, H, (window_v if v is None else v).shape[3])


def _check(q: Tensor, cache: KVCache, lengths: Tensor, block: int, name: str) -> int:
    """The number of KV heads; raises KernelError where shapes, dtypes or the block size do not fit."""
    k, v, page_table = cache
    if q.ndim != 3 or 0 in q.shape:
        raise KernelError(f"q has shape {list(q.shape)}; decoding takes one query of each sequence, [B, H, D]")
    B = q.shape[0]
    if page_table is not None:
        _check_pages(cache, B, name)
        k, v = (x[:1].expand(B, -1, -1, -1) for x in (k, v))  # pages belong to no sequence; the rest is checked alike
    check_qkv(q[:, None], k, v, names=f"q {name}.k {name}.v")
    check_tensor("lengths", lengths, (B,), torch.int32, q.device)
    if block not in BLOCKS:
        raise KernelError(f"block={block}; the kernels have key blocks of {', '.join(map(str, BLOCKS))} tokens")
    return k.shape[2]


def _check_pages(cache: KVCache, B: int, name: str) -> None:
    """Pages and their table belong together. Raises KernelError."""
    k, v, table = cache
    fits = k.ndim == v.ndim == 4 and k.shape[:2] == v.shape[:2] and k.shape[1] == PAGE and len(k)
    if not fits or table.dtype != torch.int32 or table.ndim != 2 or len(table) != B or not table.numel():
        raise KernelError(
            f"{name}.k has shape {list(k.shape)}, {name}.v {list(v.shape)}, the page_table is {table.dtype} "
            f"{list(table.shape)}; use k [pages, {PAGE}, K, D], as many pages of v, and an int32 page_table "
            f"[{B}, pages of a sequence]"
        )
    if table.device != k.device:
        raise KernelError(f"{name}.page_table is on {table.device}, {name}.k on {k.device}; use the same")


def _check_places(cache: KVCache | None, lengths: Tensor) -> None:
    """With HYSPARSE_DEBUG=1: every sequence has a token, its tokens fit, and its pages exist. Raises KernelError.

    None for a layer with a ring buffer only, which has a place for every token.
    """
    if not debugging() or lengths.is_meta:
        return
    capacity, table = (math.inf, None) if cache is None else (_capacity(cache), cache.page_table)
    for b, length in enumerate(lengths.tolist()):
        if not 1 <= length <= capacity:
            raise KernelError(f"lengths[{b}] is {length}; a sequence has 1 token at least, and {capacity} at most")
        for i, page in enumerate([] if table is None else table[b, : cdiv(length, PAGE)].tolist()):
            if not 0 <= page < len(cache.k):
                raise KernelError(
                    f"cache.page_table[{b}, {i}] is {page}; it must be one of the {len(cache.k)} pages from 0"
                )


def _check_sparse(
    q: Tensor,
    cache: KVCache | None,
    blocks: Tensor | None,
    window_cache: KVCache | None,
    lengths: Tensor,
    block: int,
    window: int,
) -> int:
    """The number of KV heads of the branches that are there."""
    if cache is None and window_cache is None:
        raise KernelError("cache and window_cache are both None; a sparse layer needs at least one of them")
    if cache is not None:
        K = _check(q, cache, lengths, block, "cache")
        if blocks is None:
            raise KernelError("blocks is None; with a cache it must be what decode_full selected")
        check_tensor("blocks", blocks, (len(q), K, blocks.shape[-1]), torch.int32, q.device)
    if window_cache is not None:
        K = _check(q, window_cache, lengths, block, "window_cache")
        if window_cache.page_table is not None or window_cache.k.shape[1] != window:
            shape = list(window_cache.k.shape)
            raise KernelError(f"window_cache.k has shape {shape}; use a ring buffer of window={window} slots, no pages")
    if cache is not None and window_cache is not None:
        check_branches(cache[:2], window_cache[:2], "cache.v", "window_cache.v")
    return K


def _capacity(cache: KVCache) -> int:
    """Tokens that a sequence can have."""
    return cache.k.shape[1] if cache.page_table is None else cache.page_table.shape[1] * PAGE


def _gate(gate: Tensor | None, output: Tensor, name: str) -> tuple[Tensor | None, int, int, int]:
    """A gate and its strides over sequences, heads and channels; a head-wise one has stride 0 over the channels."""
    if gate is None:
        return None, 0, 0, 0
    if gate.shape not in (output.shape, output.shape[:2]) or gate.device != output.device:
        raise KernelError(
            f"{name} has shape {list(gate.shape)} on {gate.device}; "
            f"it must be {list(output.shape[:2])} or {list(output.shape)} on {output.device}"
        )
    return (gate, *gate.stride(), 0)[:4]


def _loads(cache: KVCache | None, tokens: int) -> tuple:
    """What a kernel reads a cache with: keys, values, page table, and the table's stride over sequences."""
    if cache is None:
        return None, None, None, 0
    table = None if cache.page_table is None else cache.page_table.contiguous()
    k, v = (key_tiles(loadable(x), tokens) for x in (cache.k, cache.v))
    return k, v, table, 0 if table is None else table.stride(0)


def _widths(group: int, D: int, Dv: int) -> dict:
    """The compile-time sizes that the kernels which read K and V share."""
    rows = max(16, next_power_of_2(group))  # the tensor cores take no fewer
    padded = {"D_PADDED": next_power_of_2(D), "DV_PADDED": next_power_of_2(Dv)}
    return {"GROUP": group, "ROWS": rows, "D": D, "DV": Dv, **padded}


def _in_flight(cache: KVCache) -> int:
    """Tiles of K and V that a program loads ahead; in Triton's terms one stage fewer than the pipeline has."""
    tile = TILE * (next_power_of_2(cache.k.shape[3]) + next_power_of_2(cache.v.shape[3])) * cache.k.element_size()
    return min(4, max(2, IN_FLIGHT // tile))


@functools.cache
def _processors(device: torch.device) -> int:
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _splits(pairs: int, tiles: int, device: torch.device) -> int:
    """Parts of a sequence, so that `pairs` (sequence, KV head) fill every SM twice, or a few times that without a rest.

    From the capacity of the cache: the lengths lie on the device, and every part gets an equal share of its sequence.
    """
    slots = 2 * _processors(device)
    waves = max(range(1, 5), key=lambda waves: (waves * slots // pairs) * pairs / (waves * slots))
    return max(1, min(waves * slots // pairs, cdiv(tiles, 2)))
