"""Query tokens and the heads of a group as the rows of one matrix: how large tiles of them are, and what a row carries.

The kernels that keep keys in place stream over tiles of rows. The numbers of a row (log-sum-exp, delta, gate, first
visible key) are brought into the same order beforehand and padded, so that a tile of them is one aligned load without
a mask.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tiles import BINARY, first_visible

PADDING = 128  # tokens behind the last; no tile of queries reaches further
PACKED = 1024  # rows that a program of the packing kernel moves


class Rows(NamedTuple):
    """Numbers of the packed rows, [B, K, S + PADDING, G]."""

    lse: Tensor  # FP32, base 2, minus the gate's logarithm; infinite past S, which makes probabilities there zero
    delta: Tensor  # FP32
    first: Tensor  # int32, the first key that the query sees


def tile_sizes(q: Tensor, k: Tensor, v: Tensor, rows: int) -> dict:
    """Compile-time sizes of a tile of `rows` packed rows; head dimensions are padded to a power of two."""
    group = q.shape[2] // k.shape[2]
    return {
        "G": group,
        "TOKENS": max(rows // group, 1),
        "D": triton.next_power_of_2(q.shape[3]),
        "DV": triton.next_power_of_2(v.shape[3]),
    }


def packed_rows(
    lse: Tensor,
    delta: Tensor,
    gate: Tensor | None,
    document_start: Tensor,
    K: int,
    query_start: int,
    window: int,
) -> Rows:
    """lse and delta [B, H, S], gate [B, S, H], not negative, and document_start [B, S], in the order of the rows."""
    B, H, S = lse.shape
    shape = B, K, S + PADDING, H // K
    rows = Rows(lse.new_empty(shape), lse.new_empty(shape), lse.new_empty(shape, dtype=torch.int32))
    _pack_kernel[(triton.cdiv((S + PADDING) * (H // K), PACKED), B * K)](
        *(lse, delta, gate, document_start.contiguous()),
        *rows,
        *(*lse.stride(), *delta.stride(), *((0, 0, 0) if gate is None else gate.stride())),
        *(S, K, window, query_start),
        G=H // K,
        PADDING=PADDING,
        PACKED=PACKED,
    )
    return rows


@triton.jit(do_not_specialize=["S", "window", "query_start"])
def _pack_kernel(
    Lse, Delta, Gate, DocumentStart, PackedLse, PackedDelta, PackedFirst, lse_stride_b, lse_stride_h, lse_stride_s,
    delta_stride_b, delta_stride_h, delta_stride_s, gate_stride_b, gate_stride_s, gate_stride_h, S, K, window,
    query_start, G: tl.constexpr, PADDING: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * PACKED + tl.arange(0, PACKED)
    batch, kv_head = tl.program_id(1).to(tl.int64) // K, tl.program_id(1).to(tl.int64) % K
    token, head = row // G, kv_head * G + row % G
    inside, room = token < S, token < S + PADDING
    target = (batch * K + kv_head) * (S + PADDING) * G + row
    lse = Lse + batch * lse_stride_b + head * lse_stride_h + token * lse_stride_s
    lse = tl.load(lse, mask=inside, other=float("inf")) * BINARY
    if Gate is not None:
        gate = Gate + batch * gate_stride_b + head * gate_stride_h + token * gate_stride_s
        lse -= tl.math.log2(tl.load(gate, mask=inside, other=1.0).to(tl.float32))
    tl.store(PackedLse + target, lse, mask=room)
    delta = Delta + batch * delta_stride_b + head * delta_stride_h + token * delta_stride_s
    tl.store(PackedDelta + target, tl.load(delta, mask=inside, other=0.0), mask=room)
    first = first_visible(DocumentStart, batch, token, S, query_start + token, window)
    tl.store(PackedFirst + target, first.to(tl.int32), mask=room)


@triton.jit
def packed_offset(batch, kv_head, S, K, G: tl.constexpr, PADDING: tl.constexpr = PADDING):
    """Where the rows of one KV head begin in the tensors of `packed_rows`."""
    return (batch * K + kv_head).to(tl.int64) * (S + PADDING) * G
