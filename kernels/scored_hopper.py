"""The scored forward of `scored.py` for Hopper, with warps that specialise (Gluon), for the shapes of the paper.

A CTA is persistent and has one per multiprocessor. Its tiles are neighbouring queries with the G heads of one KV head,
packed into 128 rows. Four kinds of warps share the work and meet only at barriers in shared memory:
- a producer, one warp, keeps the copy engine busy: queries of the tile, then its keys and values, last keys first;
- two consumers, a warp group each, own 64 rows. The product with the keys of a tile starts before the softmax of the
  tile before it is through with the values (FlashAttention-3, arXiv 2407.08608, section 3.2), and while one consumer
  computes exponentials the other one's matrix products run. Each row's largest logit in each key block goes to a strip
  of scratch memory that only this CTA sees, straight from the registers;
- a selector, a warp group, turns the strip of a finished tile into block indices while the next tile is computed. Two
  strips take turns.

`scored_hopper_warps.py` has the code of these warps.
"""

import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from kernels.arguments import INTERPRETED, LOG2_E
from kernels.hopper import barriers, head_tiles
from kernels.scored_hopper_warps import BLOCK, BUFFERS, HALF, KEYS, ROWS, D, consumer, producer, selector
from kernels.scored_schedule import pairs_at_once
from kernels.scored_selection import HOPPER_SPAN

MOST_SELECTED = 16  # their spans fill the lanes of a warp, two lanes a span
PRODUCER_REGISTERS = gl.constexpr(24)


def supported(q: Tensor, v: Tensor, kv_heads: int, block: int, selected: int) -> bool:
    """Whether this version takes the case on this device; `scored.py` takes all others, with sinks and with scores."""
    return (
        not INTERPRETED
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and q.shape[3] == v.shape[3] == D.value
        and q.shape[2] // kv_heads <= HALF.value
        and (block == BLOCK.value or not selected)
        and selected <= MOST_SELECTED
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor, *, selected: int, query_start: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, log-sum-exp and best blocks (None for selected = 0) as `scored.scored_forward` returns them.

    That has checked the arguments and made them loadable; `supported` accepts them.
    """
    (B, S, H, _), (_, T, K, _) = q.shape, k.shape
    group = H // K
    output, lse = q.new_empty(q.shape), q.new_empty(B, H, S, dtype=torch.float32)
    blocks = q.new_empty(B, K, S, selected, dtype=torch.int32) if selected else None
    tokens = ROWS.value // group
    pairs, query_tiles = B * K, triton.cdiv(S, tokens)
    programs = min(pairs * query_tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
    strip_size = ROWS.value * (1 + 2 * triton.cdiv(T, KEYS.value))  # of a tile: log-sum-exp, then blocks
    spans = max(64, triton.next_power_of_2(triton.cdiv(T, BLOCK.value * HOPPER_SPAN.value)))
    score_size = tokens * spans * (HOPPER_SPAN.value + 1)
    scratch = q.new_empty(programs * (2 * strip_size + score_size) if selected else 0, dtype=torch.float32)
    _hopper_forward_kernel[(programs,)](
        head_tiles(q, tokens // 2, group),
        head_tiles(k, KEYS.value, 1),
        head_tiles(v, KEYS.value, 1),
        head_tiles(output, tokens // 2, group),
        lse,
        blocks,
        scratch,
        strip_size,
        score_size,
        document_start,
        pairs,
        query_tiles,
        pairs_at_once(pairs, 2 * T * D.value * k.element_size()),
        S,
        query_start,
        LOG2_E / math.sqrt(D.value),
        K=K,
        SELECTED=selected,
        LANE_SPANS=spans // 32,
        AT_A_TIME=min(tokens, 16 if spans <= 64 else 8),
        CONSUMER_REGISTERS=208 if selected else 240,
        num_warps=4,
        maxnreg=128 if selected else 168,  # times 16 or 12 warps: what a multiprocessor has
    )
    return output, lse, blocks


@gluon.jit(do_not_specialize=["pairs", "query_tiles", "at_once", "S", "query_start"])
def _hopper_forward_kernel(
    q,
    k,
    v,
    output,
    lse,
    blocks,
    scratch,
    strip_size,
    score_size,
    document_start,
    pairs,
    query_tiles,
    at_once,
    S,
    query_start,
    scale,
    K: gl.constexpr,
    SELECTED: gl.constexpr,
    LANE_SPANS: gl.constexpr,
    AT_A_TIME: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    q_tiles = gl.allocate_shared_memory(q.dtype, [4] + q.block_type.shape, q.layout)  # two, of two halves
    k_tiles = gl.allocate_shared_memory(k.dtype, [BUFFERS] + k.block_type.shape, k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [BUFFERS] + v.block_type.shape, v.layout)
    queries = (q_tiles, barriers(4, 1), barriers(4, 1))  # full, empty
    keys = (k_tiles, barriers(BUFFERS, 1), barriers(BUFFERS, 2))
    values = (v_tiles, barriers(BUFFERS, 1), barriers(BUFFERS, 2))
    rings = (queries, keys, values)
    strip = scratch + gl.program_id(0).to(gl.int64) * (2 * strip_size + score_size)
    strips = (strip, strip_size, barriers(2, 2), barriers(2, 1))
    work = (document_start, pairs, query_tiles, at_once, K, S, query_start)
    fence_async_shared()
    if SELECTED > 0:
        gl.warp_specialize(
            [
                (selector, (blocks, strips, work, scale, 2 * q.block_shape[1], SELECTED, LANE_SPANS, AT_A_TIME)),
                (consumer, (output, lse, rings, strips, work, scale, 0, True)),
                (consumer, (output, lse, rings, strips, work, scale, 1, True)),
                (producer, (q, k, v, rings, work)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (producer, (q, k, v, rings, work)),
                (consumer, (output, lse, rings, strips, work, scale, 0, False)),
                (consumer, (output, lse, rings, strips, work, scale, 1, False)),
            ],
            [4, 4],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
        )
