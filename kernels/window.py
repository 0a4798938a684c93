"""Sliding-window attention with a sink (paper eq. 5), forward and backward.

Query i sees the last `window` tokens of its document, itself included, so a tile of queries touches few keys and the
operator is bound by memory. Three kernels:

- forward: a program owns a tile of queries with the G heads of one KV head, packed into the rows of one matrix, and
  runs an online softmax over the keys that the tile sees. The sink starts it: maximum = sink, sum = 1, output = 0.
- dQ: the same tiles; on the way it computes delta = rowsum(dO * O), which the third kernel needs, and dsink.
- dK and dV: a program owns a tile of keys of one KV head and walks the packed queries that can see it. It works on
  transposed scores, so that P and dS stay in registers as the left operands of their products. The sparse layer's
  backward pass uses this kernel too, with the gate of the branch.

Nothing is added up by atomics: two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.arguments import (
    LOG2_E,
    check_qkv,
    check_queries,
    check_results,
    check_starts,
    group_tiles,
    key_tiles,
    loadable,
    sink_of_heads,
)
from kernels.errors import KernelError
from kernels.packed_rows import packed_offset, packed_rows, tile_sizes
from kernels.tiles import (
    BINARY,
    finish_softmax,
    first_visible,
    key_gradient_step,
    load_group,
    load_keys,
    load_rows,
    query_gradient_step,
    softmax_step,
    start_softmax,
    store_group,
    store_keys,
    visible_keys,
)

ROWS = 64  # packed rows (tokens x heads of a group) in a tile, at least
KEYS = 64  # keys in a tile
REGISTERS = 168  # of the forward kernel: three of its programs then share a multiprocessor


def window_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    document_start: Tensor,
    *,
    window: int,
    query_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Output [B, S, H, D'] and natural log-sum-exp [B, H, S] in FP32, the sink included.

    q [B, S, H, D], k [B, T, K, D], v [B, T, K, D'], sink [H] or None, document_start [B, S] int32,
    nondecreasing, at most the query's own position. Query i stands at position query_start + i of the keys. Raises
    KernelError.
    """
    check_window(q, k, v, document_start, window, query_start)
    q, k, v = map(loadable, (q, k, v))
    B, S, H, _ = q.shape
    sink = sink_of_heads(sink, q)
    output = q.new_empty(B, S, H, v.shape[3])
    lse = q.new_empty(B, H, S, dtype=torch.float32)
    sizes, box = window_tile(q, k, v)
    _forward_kernel[(query_programs(q, k, sizes),)](
        *(group_tiles(q, *box), key_tiles(k, KEYS), key_tiles(v, KEYS), group_tiles(output, *box)),
        *(lse, sink, document_start.contiguous()),
        *(S, H, k.shape[2], window, query_start, q.shape[3] ** -0.5 * LOG2_E),
        **sizes,
        KEYS=KEYS,
        num_warps=warps(sizes),
        num_stages=2,
        maxnreg=REGISTERS if warps(sizes) == 4 else None,
    )
    return output, lse


def window_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    document_start: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    *,
    window: int,
    query_start: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and dsink (None without a sink), shaped like what `window_forward` took.

    output [B, S, H, D'] and lse [B, H, S] are what it returned; grad_output [B, S, H, D']. Raises KernelError.
    """
    check_window(q, k, v, document_start, window, query_start)
    check_results(q, v, output, lse, grad_output)
    q, k, v, output, grad_output = map(loadable, (q, k, v, output, grad_output))
    document_start = document_start.contiguous()
    B, S, H, _ = q.shape
    sink = sink_of_heads(sink, q)
    sizes, box = window_tile(q, k, v)
    programs = query_programs(q, k, sizes)
    dq = q.new_empty(q.shape)
    delta = q.new_empty(B, S, H, dtype=torch.float32).transpose(1, 2)  # [B, H, S]; the heads of a token are adjacent
    dsink_parts = None if sink is None else q.new_empty(programs // k.shape[2], H, dtype=torch.float32)
    _query_gradient_kernel[(programs,)](
        *(q, key_tiles(k, KEYS), key_tiles(v, KEYS), output, grad_output, group_tiles(dq, *box)),
        *(lse.contiguous(), delta, sink, dsink_parts, document_start),
        *(*q.stride()[:3], *output.stride()[:3], *grad_output.stride()[:3]),
        *(S, H, k.shape[2], window, query_start, q.shape[3] ** -0.5),
        **sizes,
        HEAD=q.shape[3],
        HEAD_V=v.shape[3],
        KEYS=KEYS,
        num_warps=warps(sizes),
        num_stages=2,
    )
    dk, dv = window_key_gradients(
        q, k, v, document_start, lse, delta, grad_output, None, window=window, query_start=query_start
    )
    dsink = None if sink is None else dsink_parts.sum(0).to(sink.dtype)
    return dq, dk, dv, dsink


def window_key_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_start: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_output: Tensor,
    gate: Tensor | None,
    *,
    window: int,
    query_start: int = 0,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """dk [B, T, K, D] and dv [B, T, K, D'] of the window alone, in `out_dtype` (k's where None).

    lse and delta [B, H, S] FP32 with any strides: the natural log-sum-exp, sink included, and
    rowsum(grad_output * branch output). `gate` [B, S, H] or None is what the branch's output was multiplied by
    afterwards; delta leaves it out.
    """
    check_window(q, k, v, document_start, window, query_start)
    q, k, v, grad_output = map(loadable, (q, k, v, grad_output))
    B, S, H, D = q.shape
    T, K = k.shape[1:3]
    dk, dv = (x.new_empty(x.shape, dtype=out_dtype or k.dtype) for x in (k, v))
    rows = packed_rows(lse, delta, gate, document_start, K, query_start, window)
    sizes, box = window_tile(q, k, v)
    _key_gradient_kernel[(triton.cdiv(T, KEYS) * K * B,)](
        *(group_tiles(q, *box), group_tiles(grad_output, *box)),
        *(key_tiles(x, KEYS) for x in (k, v, dk, dv)),
        *rows,
        *(S, T, K, window, query_start, D**-0.5),
        **sizes,
        KEYS=KEYS,
        num_warps=warps(sizes),
        num_stages=2,
    )
    return dk, dv


def check_window(q: Tensor, k: Tensor, v: Tensor, document_start: Tensor, window: int, query_start: int) -> None:
    """The arguments of `window_forward` fit together. Raises KernelError."""
    check_qkv(q, k, v, document_start)
    if window < 1:
        raise KernelError(f"window is {window}; a query sees itself at least, so use 1 or more")
    check_queries(q, k, query_start)
    check_starts(document_start, query_start)


def window_tile(q: Tensor, k: Tensor, v: Tensor) -> tuple[dict, tuple[int, int]]:
    """Compile-time sizes of a tile of queries, and its tokens and heads."""
    sizes = tile_sizes(q, k, v, ROWS)
    return sizes, (sizes["TOKENS"], sizes["G"])


def warps(sizes: dict) -> int:
    return 4 if max(sizes["D"], sizes["DV"]) <= 128 and sizes["G"] <= ROWS else 8


def query_programs(q: Tensor, k: Tensor, sizes: dict) -> int:
    return q.shape[0] * triton.cdiv(q.shape[1], sizes["TOKENS"]) * k.shape[2]


@triton.jit
def tile_of_program(tile_count, K):
    """Batch, tile, KV head; neighbouring programs share the tokens, whose heads are adjacent in memory."""
    program = tl.program_id(0)
    return program // K // tile_count, program // K % tile_count, program % K


@triton.jit(do_not_specialize=["S", "window", "query_start"])
def _forward_kernel(
    q_tiles, k_tiles, v_tiles, output_tiles, Lse, Sink, DocumentStart,
    S, H, K, window, query_start, scale,  # log2(e) / sqrt(D)
    G: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TOKENS * G
    batch, tile, kv_head = tile_of_program(tl.cdiv(S, TOKENS), K)
    row = tl.arange(0, ROWS)
    token, head = tile * TOKENS + row // G, kv_head * G + row % G
    position = query_start + token
    first = first_visible(DocumentStart, batch, token, S, position, window)
    q = load_group(q_tiles, batch, tile * TOKENS, kv_head * G, ROWS, D)

    top, total = start_softmax(Sink, head, ROWS)
    output = tl.zeros([ROWS, DV], tl.float32)
    for start in tl.range(tl.min(first), query_start + tl.minimum(tile * TOKENS + TOKENS, S), KEYS):
        k = load_keys(k_tiles, batch, start, kv_head, KEYS, D)
        v = load_keys(v_tiles, batch, start, kv_head, KEYS, DV)
        logits = tl.where(visible_keys(start, first, position, KEYS), tl.dot(q, k.T), float("-inf"))
        top, total, output = softmax_step(logits, v, top, total, output, scale)

    output, lse = finish_softmax(top, total, output)
    tl.store(Lse + (batch * H + head).to(tl.int64) * S + token, lse, mask=token < S)
    store_group(output_tiles, batch, tile * TOKENS, kv_head * G, output, TOKENS, G, DV)


@triton.jit(do_not_specialize=["S", "window", "query_start"])
def _query_gradient_kernel(
    Q, k_tiles, v_tiles, Output, GradOutput, dq_tiles, Lse, Delta,  # [B, S, H] in memory
    Sink, SinkParts,  # [B x tiles, H]
    DocumentStart, q_stride_b, q_stride_s, q_stride_h, output_stride_b, output_stride_s, output_stride_h,
    grad_stride_b, grad_stride_s, grad_stride_h, S, H, K, window, query_start, scale,  # 1 / sqrt(D)
    G: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TOKENS * G
    tile_count = tl.cdiv(S, TOKENS)
    batch, tile, kv_head = tile_of_program(tile_count, K)
    row = tl.arange(0, ROWS)
    token, head = tile * TOKENS + row // G, kv_head * G + row % G
    position, inside = query_start + token, token < S
    first = first_visible(DocumentStart, batch, token, S, position, window)

    far = batch.to(tl.int64)
    q = load_rows(Q + far * q_stride_b, token, head, inside, q_stride_s, q_stride_h, HEAD, D)
    output = load_rows(
        Output + far * output_stride_b, token, head, inside, output_stride_s, output_stride_h, HEAD_V, DV
    )
    grad_output = load_rows(
        GradOutput + far * grad_stride_b, token, head, inside, grad_stride_s, grad_stride_h, HEAD_V, DV
    )
    delta = tl.sum(output.to(tl.float32) * grad_output.to(tl.float32), 1)
    tl.store(Delta + (far * S + token) * H + head, delta, mask=inside)
    lse = tl.load(Lse + (batch * H + head).to(tl.int64) * S + token, mask=inside, other=float("inf"))
    if Sink is not None:
        dsink = -tl.math.exp2((tl.load(Sink + head).to(tl.float32) - lse) * BINARY) * delta
        heads = kv_head * G + tl.arange(0, G)
        tl.store(SinkParts + (batch * tile_count + tile).to(tl.int64) * H + heads, tl.sum(dsink.reshape(TOKENS, G), 0))
    lse *= BINARY

    dq = tl.zeros([ROWS, D], tl.float32)
    for start in tl.range(tl.min(first), query_start + tl.minimum(tile * TOKENS + TOKENS, S), KEYS):
        k = load_keys(k_tiles, batch, start, kv_head, KEYS, D)
        v = load_keys(v_tiles, batch, start, kv_head, KEYS, DV)
        visible = visible_keys(start, first, position, KEYS)
        dq = query_gradient_step(dq, q, grad_output, k, v, lse, delta, visible, scale * BINARY)
    store_group(dq_tiles, batch, tile * TOKENS, kv_head * G, dq * scale, TOKENS, G, D)


@triton.jit(do_not_specialize=["S", "T", "window", "query_start"])
def _key_gradient_kernel(
    q_tiles, grad_output_tiles, k_tiles, v_tiles, dk_tiles, dv_tiles, Lse, Delta, First, S, T, K, window, query_start,
    scale,  # 1 / sqrt(D)
    G: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TOKENS * G
    batch, tile, kv_head = tile_of_program(tl.cdiv(T, KEYS), K)
    row = tl.arange(0, ROWS)
    key = tile * KEYS + tl.arange(0, KEYS)
    packed = packed_offset(batch, kv_head, S, K, G)

    k = load_keys(k_tiles, batch, tile * KEYS, kv_head, KEYS, D)
    v = load_keys(v_tiles, batch, tile * KEYS, kv_head, KEYS, DV)
    dk, dv = tl.zeros([KEYS, D], tl.float32), tl.zeros([KEYS, DV], tl.float32)
    stop = tl.minimum(S, tile * KEYS + KEYS - 1 + window - query_start)
    for start in tl.range(tl.maximum(tile * KEYS - query_start, 0), stop, TOKENS):
        q = load_group(q_tiles, batch, start, kv_head * G, ROWS, D)
        grad_output = load_group(grad_output_tiles, batch, start, kv_head * G, ROWS, DV)
        rows = packed + start * G + row
        first, position = tl.load(First + rows), query_start + start + row // G
        visible = (key[:, None] >= first[None, :]) & (key[:, None] <= position[None, :])
        dk, dv = key_gradient_step(dk, dv, k, v, q, grad_output, Lse + rows, Delta + rows, visible, scale * BINARY)
    store_keys(dk_tiles, batch, tile * KEYS, kv_head, dk * scale, KEYS, D)
    store_keys(dv_tiles, batch, tile * KEYS, kv_head, dv, KEYS, DV)
