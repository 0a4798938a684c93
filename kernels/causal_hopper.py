"""The backward pass of `causal_backward.py` for Hopper in one kernel, with warps that specialise (Gluon).

A program owns a tile of keys of one KV head and walks the tiles of rows (queries times heads) that see it, with five
products a step, the fewest there are. dK and dV stay in its registers; what a step adds to dQ, in FP32, is added up in
global memory by the copy engine, one program after the other: `turn` counts for each tile of rows the programs that
have been there, and a program adds when it has counted those with earlier keys. So two runs give the same bits.
Programs start in the order of their keys (`causal_schedule.py`), so none waits for one that cannot run yet. They walk
from the last rows to the diagonal: those that start together are at the same rows together, which the L2 cache then
holds, and need not wait until others have come from an earlier diagonal.

Three kinds of warps share the work and meet at barriers in shared memory: a producer (one warp) loads rows, two buffers
of each; eight consumer warps compute; an adder (one warp) waits for its turn and starts the additions, from two buffers
as well.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.arguments import INTERPRETED, LOG2_E
from kernels.causal_hopper_warps import BUFFERS, KEYS, ROWS, D, adder, consumer, producer
from kernels.causal_schedule import heads_together
from kernels.hopper import barriers, head_tiles
from kernels.packed_rows import Rows

CONSUMER_WARPS = 8
REGISTERS = 168  # times 12 warps: what a multiprocessor has, 24 for each of the other warps and 240 for the consumers


def supported(q: Tensor, v: Tensor, kv_heads: int) -> bool:
    """Whether this version takes the case on this device."""
    return (
        not INTERPRETED
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and q.shape[3] == v.shape[3] == D.value
        and ROWS.value % (q.shape[2] // kv_heads) == 0
    )


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    grad_output: Tensor,
    ends: Tensor,
    document_start: Tensor,
    query_start: int,
    dk_add: Tensor | None,
    dv_add: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv as `causal_backward` returns them, which has checked the arguments and made them loadable.

    `rows` with their first keys; `ends` [B, tiles of keys, 2] as its `query_ends` returns them for KEYS.
    """
    (B, S, H, _), (_, T, K, _) = q.shape, k.shape
    group, tiles, scale = H // K, triton.cdiv(T, KEYS.value), D.value**-0.5
    tokens = ROWS.value // group
    dq_sum = q.new_empty(q.shape, dtype=torch.float32)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    turn = torch.zeros(B * K * triton.cdiv(S, tokens), dtype=torch.int32, device=q.device)
    _hopper_backward_kernel[(tiles * B * K,)](
        *(head_tiles(x, tokens, group) for x in (q, grad_output, dq_sum)),
        *(_numbers(x) for x in (rows.lse, rows.delta)),
        *(head_tiles(x, KEYS.value, 1) for x in (k, v, dk, dv)),
        *(None if x is None else x.contiguous() for x in (dk_add, dv_add)),
        *(rows.first, turn, ends),
        *(B, S, T, tiles, heads_together(document_start, B * K, tiles), query_start, scale, scale * LOG2_E),
        K=K,
        G=group,
        num_warps=CONSUMER_WARPS,
        maxnreg=REGISTERS,
    )
    dq = torch.mul(dq_sum, scale, out=q.new_empty(q.shape))
    return dq, dk, dv


def _numbers(x: Tensor) -> TensorDescriptor:
    """Moves a number of each row of a tile."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(x, [x.numel()], [1], [ROWS.value], layout)


@gluon.jit(do_not_specialize=["B", "S", "T", "tiles", "query_start"])
def _hopper_backward_kernel(
    q,
    grad_output,
    dq,
    lse,
    delta,
    k,
    v,
    dk,
    dv,
    dk_add,
    dv_add,
    first,
    turn,
    ends,
    B,
    S,
    T,
    tiles,
    together,
    query_start,
    scale,
    binary_scale,
    K: gl.constexpr,
    G: gl.constexpr,
):
    queries = _ring(q)
    grads = _ring(grad_output)
    sums = _ring(dq)
    # They come with the queries and the output gradients, behind the barriers of those.
    lse_tiles = gl.allocate_shared_memory(gl.float32, [BUFFERS, ROWS], lse.layout)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [BUFFERS, ROWS], delta.layout)
    k_tile = gl.allocate_shared_memory(k.dtype, k.block_type.shape, k.layout)
    v_tile = gl.allocate_shared_memory(v.dtype, v.block_type.shape, v.layout)
    DS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ds_tile = gl.allocate_shared_memory(q.dtype, [KEYS, ROWS], DS)
    keys = (k_tile, v_tile, barriers(1, 1))
    rings = (queries, lse_tiles, grads, delta_tiles)
    work = (first, ends, B, S, K, tiles, together, query_start)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consumer, (dk, dv, dk_add, dv_add, rings, keys, ds_tile, sums, T, scale, binary_scale, work, G)),
            (producer, (q, lse, grad_output, delta, k, v, rings, keys, work, G)),
            (adder, (dq, sums, turn, work, G)),
        ],
        [1, 1],
        [24, 24],
    )


@gluon.jit
def _ring(descriptor):
    """Buffers, and of each a barrier that says it is full and one that says it is empty."""
    tiles = gl.allocate_shared_memory(descriptor.dtype, [BUFFERS] + descriptor.block_type.shape, descriptor.layout)
    return tiles, barriers(BUFFERS, 1), barriers(BUFFERS, 1)
