"""Decoding as operators that `torch.compile` takes as they are: `kernels.decode` behind `torch.library`.

The functions of `kernels/decode.py`, with the same arguments and results. They have no gradients.
"""

import torch
from torch import Tensor

from kernels import decode
from kernels.decode import KVCache

ABSENT = None, None, None  # keys, values and page table of a branch without a cache


def decode_full(
    q: Tensor, cache: KVCache, lengths: Tensor, *, block: int, selected: int, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Dv] and selected blocks [B, K, selected] of the full layer; see `kernels.decode.decode_full`."""
    return _full(q, *cache, lengths, sink, block, selected)


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
    """Output [B, H, Dv] of the sparse layer; see `kernels.decode.decode_sparse`."""
    sinks_and_gates = sparse_sink, window_sink, sparse_gate, window_gate
    caches = *(cache or ABSENT), blocks, *(window_cache or ABSENT)
    return _sparse(q, *caches, lengths, *sinks_and_gates, block, window)


@torch.library.custom_op("hysparse::decode_full", mutates_args=())
def _full(
    q: Tensor, k: Tensor, v: Tensor, page_table: Tensor | None, lengths: Tensor, sink: Tensor | None,
    block: int, selected: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return decode.decode_full(q, KVCache(k, v, page_table), lengths, block=block, selected=selected, sink=sink)


@_full.register_fake
def _(q, k, v, page_table, lengths, sink, block, selected):
    B, H, _ = q.shape
    return q.new_empty(B, H, v.shape[3]), q.new_empty(B, k.shape[2], selected, dtype=torch.int32)


@torch.library.custom_op("hysparse::decode_sparse", mutates_args=())
def _sparse(
    q: Tensor, k: Tensor | None, v: Tensor | None, page_table: Tensor | None, blocks: Tensor | None,
    window_k: Tensor | None, window_v: Tensor | None, window_table: Tensor | None, lengths: Tensor,
    sparse_sink: Tensor | None, window_sink: Tensor | None, sparse_gate: Tensor | None, window_gate: Tensor | None,
    block: int, window: int,
) -> Tensor:  # fmt: skip
    cache = None if k is None else KVCache(k, v, page_table)
    window_cache = None if window_k is None else KVCache(window_k, window_v, window_table)
    return decode.decode_sparse(
        q, cache, blocks, window_cache, lengths, block=block, window=window, sparse_sink=sparse_sink,
        window_sink=window_sink, sparse_gate=sparse_gate, window_gate=window_gate,
    )  # fmt: skip


@_sparse.register_fake
def _(q, k, v, page_table, blocks, window_k, window_v, *_):
    B, H, _ = q.shape
    return q.new_empty(B, H, (window_v if v is None else v).shape[3])
