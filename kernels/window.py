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

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.arguments import LOG2_E, check_qkv, key_tiles, loadable, power_of_two
from kernels.errors import KernelError

LOWEST = tl.constexpr(-1e30)  # a running maximum before any key; finite, so that differences are never NaN
NATURAL = tl.constexpr(1 / LOG2_E)  # the kernels' logarithms have base 2, those in memory base e
BINARY = tl.constexpr(LOG2_E)
ROWS = 64  # packed rows (tokens x heads of a group) in a tile, at least
KEYS = 64  # keys in a tile
PADDING = 128  # tokens behind the last; no tile of queries reaches further
PACKED = 1024  # rows that a program of the packing kernel moves
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

    q [B, S, H, D], k [B, T, K, D], v [B, T, K, D'], sink [H] or None, document_start [B, S] int32. Query i stands at
    position query_start + i of the keys.
    """
    check_window(q, k, v, document_start, window, query_start)
    q, k, v = map(loadable, (q, k, v))
    B, S, H, _ = q.shape
    output = q.new_empty(B, S, H, v.shape[3])
    lse = q.new_empty(B, H, S, dtype=torch.float32)
    sizes = tile_sizes(q, k, v)
    _forward_kernel[(query_programs(q, k, sizes),)](
        *(group_tiles(q, sizes), key_tiles(k, KEYS), key_tiles(v, KEYS), group_tiles(output, sizes)),
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
    """dq, dk, dv and dsink (None without a sink) from what `window_forward` took and returned."""
    check_window(q, k, v, document_start, window, query_start)
    q, k, v, output, grad_output = map(loadable, (q, k, v, output, grad_output))
    document_start = document_start.contiguous()
    B, S, H, _ = q.shape
    sizes = tile_sizes(q, k, v)
    programs = query_programs(q, k, sizes)
    dq = q.new_empty(q.shape)
    delta = q.new_empty(B, S, H, dtype=torch.float32).transpose(1, 2)  # [B, H, S]; the heads of a token are adjacent
    dsink_parts = None if sink is None else q.new_empty(programs // k.shape[2], H, dtype=torch.float32)
    _query_gradient_kernel[(programs,)](
        *(q, key_tiles(k, KEYS), key_tiles(v, KEYS), output, grad_output, group_tiles(dq, sizes)),
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
    sizes = tile_sizes(q, k, v)
    _key_gradient_kernel[(triton.cdiv(T, KEYS) * K * B,)](
        *(group_tiles(q, sizes), group_tiles(grad_output, sizes)),
        *(key_tiles(x, KEYS) for x in (k, v, dk, dv)),
        *rows,
        *(S, T, K, window, query_start, D**-0.5),
        **sizes,
        KEYS=KEYS,
        num_warps=warps(sizes),
        num_stages=2,
    )
    return dk, dv


class Rows(NamedTuple):
    """Numbers of the packed rows, [B, K, S + PADDING, G], as the KV-stationary kernels stream them."""

    lse: Tensor  # FP32, base 2; infinite past S, which makes the probabilities of those rows zero
    delta: Tensor  # FP32
    gate: Tensor | None  # FP32
    first: Tensor | None  # int32, the first key that the query sees


def packed_rows(
    lse: Tensor,
    delta: Tensor,
    gate: Tensor | None,
    document_start: Tensor | None,
    K: int,
    query_start: int,
    window: int,
) -> Rows:
    """lse and delta [B, H, S], gate [B, S, H] and document_start [B, S], in the order of the rows and padded."""
    B, H, S = lse.shape
    shape = B, K, S + PADDING, H // K
    rows = Rows(
        lse.new_empty(shape),
        lse.new_empty(shape),
        None if gate is None else lse.new_empty(shape),
        None if document_start is None else lse.new_empty(shape, dtype=torch.int32),
    )
    _pack_kernel[(triton.cdiv((S + PADDING) * (H // K), PACKED), B * K)](
        *(lse, delta, gate, None if document_start is None else document_start.contiguous()),
        *rows,
        *(*lse.stride(), *delta.stride(), *((0, 0, 0) if gate is None else gate.stride())),
        *(S, K, window, query_start),
        G=H // K,
        PADDING=PADDING,
        PACKED=PACKED,
    )
    return rows


def check_window(q: Tensor, k: Tensor, v: Tensor, document_start: Tensor, window: int, query_start: int) -> None:
    check_qkv(q, k, v, document_start)
    if window < 1:
        raise KernelError(f"window is {window}; a query sees itself at least, so use 1 or more")
    check_queries(q, k, query_start)


def check_queries(q: Tensor, k: Tensor, query_start: int) -> None:
    """The queries lie within the keys, and the heads of a group fill tiles. Raises KernelError."""
    S, T, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    if query_start < 0 or query_start + S > T:
        raise KernelError(f"query_start {query_start} and {S} queries q reach past the {T} keys of k")
    if not power_of_two(group):
        raise KernelError(f"q has {group} heads for each of k; the kernels take a power of two")


def tile_sizes(q: Tensor, k: Tensor, v: Tensor, rows: int = ROWS) -> dict:
    """Compile-time sizes of a tile of `rows` packed rows; head dimensions are padded to a power of two."""
    group = q.shape[2] // k.shape[2]
    return {
        "G": group,
        "TOKENS": max(rows // group, 1),
        "D": triton.next_power_of_2(q.shape[3]),
        "DV": triton.next_power_of_2(v.shape[3]),
    }


def warps(sizes: dict) -> int:
    return 4 if max(sizes["D"], sizes["DV"]) <= 128 and sizes["G"] <= ROWS else 8


def query_programs(q: Tensor, k: Tensor, sizes: dict) -> int:
    return q.shape[0] * triton.cdiv(q.shape[1], sizes["TOKENS"]) * k.shape[2]


def group_tiles(x: Tensor, sizes: dict) -> TensorDescriptor:
    """Descriptor of x [B, S, H, D] that moves a few tokens with the heads of one KV head; outside S it reads zero."""
    box = [1, sizes["TOKENS"], sizes["G"], triton.next_power_of_2(x.shape[3])]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box)


@triton.jit
def load_group(tiles, batch, token, head, ROWS: tl.constexpr, D: tl.constexpr):
    """[tokens x heads of the group, D]."""
    return tl.reshape(tiles.load([batch, token, head, 0]), [ROWS, D])


@triton.jit
def load_rows(X, stride_b, stride_s, stride_h, batch, token, head, inside, HEAD: tl.constexpr, D: tl.constexpr):
    """[rows, D] with zeros past HEAD. Unlike descriptors, several of these wait for memory at the same time."""
    column = tl.arange(0, D)
    mask = inside[:, None] if HEAD == D else inside[:, None] & (column < HEAD)[None, :]
    rows = X + (batch.to(tl.int64) * stride_b + token.to(tl.int64) * stride_s + head * stride_h)
    return tl.load(rows[:, None] + column[None, :], mask=mask, other=0)


@triton.jit
def load_keys(tiles, batch, key, head, KEYS: tl.constexpr, D: tl.constexpr):
    return tl.reshape(tiles.load([batch, head, key, 0]), [KEYS, D])


@triton.jit
def store_group(tiles, batch, token, head, x, TOKENS: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    tiles.store([batch, token, head, 0], tl.reshape(x, [1, TOKENS, G, D]).to(tiles.dtype))


@triton.jit
def store_keys(tiles, batch, key, head, x, KEYS: tl.constexpr, D: tl.constexpr):
    tiles.store([batch, head, key, 0], tl.reshape(x, [1, 1, KEYS, D]).to(tiles.dtype))


@triton.jit
def tile_of_program(tile_count, K):
    """Batch, tile, KV head; neighbouring programs share the tokens, whose heads are adjacent in memory."""
    program = tl.program_id(0)
    return program // K // tile_count, program // K % tile_count, program % K


@triton.jit
def packed_offset(batch, kv_head, S, K, G: tl.constexpr, PADDING: tl.constexpr = PADDING):
    """Where the rows of one KV head begin in the tensors of `packed_rows`."""
    return (batch * K + kv_head).to(tl.int64) * (S + PADDING) * G


@triton.jit
def visible_from(DocumentStart, batch, token, S, position, window):
    """The first key that each query sees."""
    start = tl.load(DocumentStart + batch.to(tl.int64) * S + token, mask=token < S, other=0)
    return tl.maximum(start, position - window + 1)


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
    first = visible_from(DocumentStart, batch, token, S, position, window)
    q = load_group(q_tiles, batch, tile * TOKENS, kv_head * G, ROWS, D)

    if Sink is None:
        top, total = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    else:
        top, total = tl.load(Sink + head).to(tl.float32) * BINARY, tl.full([ROWS], 1.0, tl.float32)
    output = tl.zeros([ROWS, DV], tl.float32)
    for start in tl.range(tl.min(first), query_start + tl.minimum(tile * TOKENS + TOKENS, S), KEYS):
        k = load_keys(k_tiles, batch, start, kv_head, KEYS, D)
        v = load_keys(v_tiles, batch, start, kv_head, KEYS, DV)
        key = start + tl.arange(0, KEYS)
        visible = (key[None, :] >= first[:, None]) & (key[None, :] <= position[:, None])
        logits = tl.where(visible, tl.dot(q, k.T) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        p = tl.math.exp2(logits - new_top[:, None])
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        output = tl.dot(p.to(v.dtype), v, output * shrink[:, None])
        top = new_top

    lse = (top + tl.math.log2(total)) * NATURAL
    tl.store(Lse + (batch * H + head).to(tl.int64) * S + token, lse, mask=token < S)
    store_group(output_tiles, batch, tile * TOKENS, kv_head * G, output / total[:, None], TOKENS, G, DV)


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
    first = visible_from(DocumentStart, batch, token, S, position, window)

    q = load_rows(Q, q_stride_b, q_stride_s, q_stride_h, batch, token, head, inside, HEAD, D)
    output = load_rows(
        Output, output_stride_b, output_stride_s, output_stride_h, batch, token, head, inside, HEAD_V, DV
    )
    grad_output = load_rows(
        GradOutput, grad_stride_b, grad_stride_s, grad_stride_h, batch, token, head, inside, HEAD_V, DV
    )
    delta = tl.sum(output.to(tl.float32) * grad_output.to(tl.float32), 1)
    tl.store(Delta + (batch.to(tl.int64) * S + token) * H + head, delta, mask=inside)
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
        key = start + tl.arange(0, KEYS)
        visible = (key[None, :] >= first[:, None]) & (key[None, :] <= position[:, None])
        p = tl.math.exp2(tl.dot(q, k.T) * (scale * BINARY) - lse[:, None])
        ds = tl.where(visible, p, 0.0) * (tl.dot(grad_output, v.T) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    store_group(dq_tiles, batch, tile * TOKENS, kv_head * G, dq * scale, TOKENS, G, D)


@triton.jit(do_not_specialize=["S", "window", "query_start"])
def _pack_kernel(
    Lse, Delta, Gate, DocumentStart, PackedLse, PackedDelta, PackedGate, PackedFirst, lse_stride_b, lse_stride_h,
    lse_stride_s, delta_stride_b, delta_stride_h, delta_stride_s, gate_stride_b, gate_stride_s, gate_stride_h, S, K,
    window, query_start, G: tl.constexpr, PADDING: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * PACKED + tl.arange(0, PACKED)
    batch, kv_head = tl.program_id(1).to(tl.int64) // K, tl.program_id(1).to(tl.int64) % K
    token, head = row // G, kv_head * G + row % G
    inside, room = token < S, token < S + PADDING
    target = (batch * K + kv_head) * (S + PADDING) * G + row
    lse = tl.load(
        Lse + batch * lse_stride_b + head * lse_stride_h + token * lse_stride_s, mask=inside, other=float("inf")
    )
    tl.store(PackedLse + target, lse * BINARY, mask=room)
    delta = tl.load(
        Delta + batch * delta_stride_b + head * delta_stride_h + token * delta_stride_s, mask=inside, other=0.0
    )
    tl.store(PackedDelta + target, delta, mask=room)
    if Gate is not None:
        gate = tl.load(
            Gate + batch * gate_stride_b + head * gate_stride_h + token * gate_stride_s, mask=inside, other=0.0
        )
        tl.store(PackedGate + target, gate.to(tl.float32), mask=room)
    if DocumentStart is not None:
        first = visible_from(DocumentStart, batch, token, S, query_start + token, window)
        tl.store(PackedFirst + target, first.to(tl.int32), mask=room)


@triton.jit(do_not_specialize=["S", "T", "window", "query_start"])
def _key_gradient_kernel(
    q_tiles, grad_output_tiles, k_tiles, v_tiles, dk_tiles, dv_tiles, Lse, Delta, Gate, First, S, T, K, window,
    query_start, scale,  # 1 / sqrt(D)
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
        # the numbers of the rows are loaded where they are used, which saves registers
        logits = tl.dot(k, q.T) * (scale * BINARY)
        p = tl.math.exp2(logits - tl.load(Lse + packed + start * G + row)[None, :])  # [keys, rows]
        first, position = tl.load(First + packed + start * G + row), query_start + start + row // G
        p = tl.where((key[:, None] >= first[None, :]) & (key[:, None] <= position[None, :]), p, 0.0)
        if Gate is not None:
            p *= tl.load(Gate + packed + start * G + row)[None, :]
        dv = tl.dot(p.to(q.dtype), grad_output, dv)
        ds = p * (tl.dot(v, grad_output.T) - tl.load(Delta + packed + start * G + row)[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    store_keys(dk_tiles, batch, tile * KEYS, kv_head, dk * scale, KEYS, D)
    store_keys(dv_tiles, batch, tile * KEYS, kv_head, dv, KEYS, DV)
