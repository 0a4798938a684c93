"""The backward pass of causal attention, the full layers': packed documents, chunks of queries, sinks.

Two runs give the same bits. Probabilities are recomputed from the log-sum-exp. Queries are packed with the G heads of
one KV head into the rows of a matrix; only tiles that the diagonal or the edge of a document cuts are masked.

On Hopper, where head dimensions are 128, the kernel of `causal_hopper.py` does it with five products. Everywhere else
two kernels need seven: dK and dV with a tile of keys in place, walking the queries from the diagonal to the end of the
document, dQ with a tile of queries in place, walking the keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import causal_hopper
from kernels.arguments import (
    check_qkv,
    check_queries,
    check_results,
    check_starts,
    check_tensor,
    group_tiles,
    key_tiles,
    loadable,
    sink_of_heads,
)
from kernels.packed_rows import Rows, packed_offset, packed_rows, tile_sizes
from kernels.tiles import (
    BINARY,
    key_gradient_step,
    load_group,
    load_keys,
    load_rows,
    query_gradient_step,
    store_group,
    store_keys,
    visible_keys,
)

DELTA_ROWS = 32


def causal_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    document_start: Tensor,
    *,
    query_start: int = 0,
    sink: Tensor | None = None,
    dk_add: Tensor | None = None,
    dv_add: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and dsink (None without a sink) of softmax attention over the earlier tokens of the same document.

    q [B, S, H, D], k [B, T, K, D], v [B, T, K, D'], output and grad_output [B, S, H, D'], lse [B, H, S] FP32, natural
    logarithm, sink included; sink [H]. document_start [B, S] int32, nondecreasing, counted in keys, at most the query's
    own position. dk_add and dv_add, FP32 and shaped like k and v, are gradients from elsewhere that are added before
    rounding. Raises KernelError.
    """
    check_qkv(q, k, v, document_start)
    check_queries(q, k, query_start)
    check_starts(document_start, query_start)
    check_results(q, v, output, lse, grad_output)
    for name, x, like in (("dk_add", dk_add, k), ("dv_add", dv_add, v)):
        if x is not None:
            check_tensor(name, x, tuple(like.shape), torch.float32, q.device)
    sink = sink_of_heads(sink, q)
    q, k, v, output, grad_output = map(loadable, (q, k, v, output, grad_output))
    delta = rowsum(grad_output, output)
    rows = packed_rows(lse, delta, None, document_start, k.shape[2], query_start, k.shape[1])
    if causal_hopper.supported(q, v, k.shape[2]):
        ends = query_ends(document_start, k.shape[1], causal_hopper.KEYS.value)
        dq, dk, dv = causal_hopper.backward(
            q, k, v, rows, grad_output, ends, document_start, query_start, dk_add, dv_add
        )
    else:
        dq = query_gradient(q, k, v, rows, grad_output, query_start)
        dk, dv = key_gradients(q, k, v, rows, grad_output, document_start, query_start, dk_add, dv_add)
    dsink = None if sink is None else -((sink[:, None] - lse).exp() * delta).sum((0, 2)).to(sink.dtype)
    return dq, dk, dv, dsink


def rowsum(grad_output: Tensor, output: Tensor) -> Tensor:
    """delta [B, H, S] FP32, the product of both summed over D; in memory the heads of a token are adjacent."""
    B, S, H, D = output.shape
    delta = output.new_empty(B, S, H, dtype=torch.float32)
    _delta_kernel[(triton.cdiv(S * H, DELTA_ROWS), B)](
        *(grad_output, output, delta, S, H),
        *(*grad_output.stride()[:3], *output.stride()[:3]),
        ROWS=DELTA_ROWS,
        D=D,
        PADDED=triton.next_power_of_2(D),
    )
    return delta.transpose(1, 2)


def query_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    grad_output: Tensor,
    query_start: int,
) -> Tensor:
    """dq [B, S, H, D]."""
    B, S, H, D = q.shape
    K = k.shape[2]
    dq = q.new_empty(q.shape)
    sizes, keys, options = query_tile(q, k, v)
    box = sizes["TOKENS"], sizes["G"]
    _query_gradient_kernel[(triton.cdiv(S, sizes["TOKENS"]) * B * K,)](
        *(group_tiles(q, *box), group_tiles(grad_output, *box), key_tiles(k, keys), key_tiles(v, keys)),
        group_tiles(dq, *box),
        *(rows.lse, rows.delta, rows.first),
        *(B, S, K, query_start, D**-0.5),
        **sizes,
        KEYS=keys,
        **options,
    )
    return dq


def key_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    grad_output: Tensor,
    document_start: Tensor,
    query_start: int,
    dk_add: Tensor | None,
    dv_add: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dk [B, T, K, D] and dv [B, T, K, D']."""
    B, S, _, D = q.shape
    T, K = k.shape[1:3]
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    sizes, keys, options = key_tile(q, k, v)
    box = sizes["TOKENS"], sizes["G"]
    tiles = triton.cdiv(T, keys)
    _key_gradient_kernel[(tiles * B * K,)](
        *(group_tiles(q, *box), group_tiles(grad_output, *box)),
        *(key_tiles(x, keys) for x in (k, v, dk, dv)),
        *(None if x is None else key_tiles(loadable(x), keys) for x in (dk_add, dv_add)),
        *(rows.lse, rows.delta, rows.first, query_ends(document_start, T, keys)),
        *(B, S, K, tiles, query_start, D**-0.5),
        **sizes,
        KEYS=keys,
        **options,
    )
    return dk, dv


def query_ends(document_start: Tensor, T: int, keys: int) -> Tensor:
    """[B, tiles of keys, 2] int32: where the queries end that see the tile's first key, and its last one.

    Documents are contiguous, so those are the first queries whose document starts later.
    """
    first = torch.arange(0, T, keys, device=document_start.device, dtype=torch.int32)
    last = (first + keys - 1).clamp(max=T - 1)
    bounds = torch.stack([first, last], dim=1).flatten().expand(document_start.shape[0], -1).contiguous()
    return torch.searchsorted(document_start.contiguous(), bounds, right=True, out_int32=True)


def query_tile(q: Tensor, k: Tensor, v: Tensor) -> tuple[dict, int, dict]:
    """Rows and keys of a tile of the dQ kernel, and how it is compiled; the choices are measured."""
    if max(q.shape[3], v.shape[3]) > 128:
        return tile_sizes(q, k, v, 64), 32, {"num_warps": 8, "num_stages": 2}
    sizes = tile_sizes(q, k, v, 64)
    return sizes, 64, {"num_warps": 4 if sizes["G"] <= 64 else 8, "num_stages": 3}


def key_tile(q: Tensor, k: Tensor, v: Tensor) -> tuple[dict, int, dict]:
    """The same of the kernel of dK and dV."""
    if max(q.shape[3], v.shape[3]) > 128:
        return tile_sizes(q, k, v, 32), 64, {"num_warps": 8, "num_stages": 2}
    sizes = tile_sizes(q, k, v, 64)
    if sizes["G"] > 64:
        return sizes, 64, {"num_warps": 8, "num_stages": 2}
    return sizes, 128, {"num_warps": 8, "num_stages": 3}


@triton.jit
def _delta_kernel(
    GradOutput, Output, Delta, S, H, grad_stride_b, grad_stride_s, grad_stride_h, output_stride_b, output_stride_s,
    output_stride_h, ROWS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    token, head = row // H, row % H
    inside = token < S
    GradOutput += batch * grad_stride_b
    Output += batch * output_stride_b
    grad_output = load_rows(GradOutput, token, head, inside, grad_stride_s, grad_stride_h, D, PADDED)
    output = load_rows(Output, token, head, inside, output_stride_s, output_stride_h, D, PADDED)
    delta = tl.sum(grad_output.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(Delta + batch * S * H + row, delta, mask=inside)


@triton.jit(do_not_specialize=["S", "query_start"])
def _query_gradient_kernel(
    q_tiles, grad_output_tiles, k_tiles, v_tiles, dq_tiles, Lse, Delta, First,
    B, S, K, query_start, scale,  # 1 / sqrt(D)
    G: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TOKENS * G
    program = tl.program_id(0)
    kv_head, batch = program % K, program // K % B
    tile = tl.cdiv(S, TOKENS) - 1 - program // K // B  # the longest walks first
    row = tl.arange(0, ROWS)
    position = query_start + tile * TOKENS + row // G
    packed = packed_offset(batch, kv_head, S, K, G) + tile * ROWS
    lse, delta = tl.load(Lse + packed + row), tl.load(Delta + packed + row)
    q = load_group(q_tiles, batch, tile * TOKENS, kv_head * G, ROWS, D)
    grad_output = load_group(grad_output_tiles, batch, tile * TOKENS, kv_head * G, ROWS, DV)

    stop = query_start + tl.minimum(tile * TOKENS + TOKENS, S)
    first, begin = tl.load(First + packed + row), tl.load(First + packed)
    last = tl.load(First + packed + (stop - 1 - query_start - tile * TOKENS) * G)
    # where a document begins inside the tile of queries, no tile of keys is visible to all of them
    bulk = tl.where(last == begin, (query_start + tile * TOKENS + 1 - begin) // KEYS, 0)

    dq = tl.zeros([ROWS, D], tl.float32)
    for i in tl.range(0, bulk):
        k = load_keys(k_tiles, batch, begin + i * KEYS, kv_head, KEYS, D)
        v = load_keys(v_tiles, batch, begin + i * KEYS, kv_head, KEYS, DV)
        dq = query_gradient_step(dq, q, grad_output, k, v, lse, delta, None, scale * BINARY)
    for start in tl.range(begin + bulk * KEYS, stop, KEYS):
        k = load_keys(k_tiles, batch, start, kv_head, KEYS, D)
        v = load_keys(v_tiles, batch, start, kv_head, KEYS, DV)
        visible = visible_keys(start, first, position, KEYS)
        dq = query_gradient_step(dq, q, grad_output, k, v, lse, delta, visible, scale * BINARY)
    store_group(dq_tiles, batch, tile * TOKENS, kv_head * G, dq * scale, TOKENS, G, D)


@triton.jit(do_not_specialize=["S", "query_start"])
def _key_gradient_kernel(
    q_tiles, grad_output_tiles, k_tiles, v_tiles, dk_tiles, dv_tiles, dk_add_tiles, dv_add_tiles, Lse, Delta, First,
    QueryEnds, B, S, K, tile_count, query_start, scale,  # 1 / sqrt(D)
    G: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TOKENS * G
    program = tl.program_id(0)
    kv_head, batch, tile = program % K, program // K % B, program // K // B  # of one document, the longest walks first
    row = tl.arange(0, ROWS)
    key = tile * KEYS + tl.arange(0, KEYS)
    packed = packed_offset(batch, kv_head, S, K, G)

    begin = tl.maximum(tile * KEYS - query_start, 0)
    QueryEnds += (batch * tile_count + tile) * 2
    all_see, some_see = tl.load(QueryEnds), tl.load(QueryEnds + 1)
    tiles = tl.maximum(tl.cdiv(some_see - begin, TOKENS), 0)
    diagonal = tl.maximum(tl.cdiv(tile * KEYS + KEYS - 1 - query_start - begin, TOKENS), 0)
    diagonal = tl.minimum(diagonal, tiles)
    bulk_stop = tl.where(all_see == S, tiles, tl.maximum((all_see - begin) // TOKENS, diagonal))

    k = load_keys(k_tiles, batch, tile * KEYS, kv_head, KEYS, D)
    v = load_keys(v_tiles, batch, tile * KEYS, kv_head, KEYS, DV)
    dk, dv = tl.zeros([KEYS, D], tl.float32), tl.zeros([KEYS, DV], tl.float32)
    for i in tl.range(0, bulk_stop - diagonal):
        start = begin + (diagonal + i) * TOKENS
        q = load_group(q_tiles, batch, start, kv_head * G, ROWS, D)
        grad_output = load_group(grad_output_tiles, batch, start, kv_head * G, ROWS, DV)
        rows = packed + start * G + row
        dk, dv = key_gradient_step(dk, dv, k, v, q, grad_output, Lse + rows, Delta + rows, None, scale * BINARY)
    for i in tl.range(0, diagonal + tiles - bulk_stop):
        start = begin + tl.where(i < diagonal, i, i - diagonal + bulk_stop) * TOKENS
        q = load_group(q_tiles, batch, start, kv_head * G, ROWS, D)
        grad_output = load_group(grad_output_tiles, batch, start, kv_head * G, ROWS, DV)
        rows = packed + start * G + row
        visible = key[:, None] <= (query_start + start + row // G)[None, :]
        visible &= key[:, None] >= tl.load(First + rows)[None, :]
        dk, dv = key_gradient_step(dk, dv, k, v, q, grad_output, Lse + rows, Delta + rows, visible, scale * BINARY)
    dk *= scale
    if dk_add_tiles is not None:
        dk += load_keys(dk_add_tiles, batch, tile * KEYS, kv_head, KEYS, D)
    if dv_add_tiles is not None:
        dv += load_keys(dv_add_tiles, batch, tile * KEYS, kv_head, KEYS, DV)
    store_keys(dk_tiles, batch, tile * KEYS, kv_head, dk, KEYS, D)
    store_keys(dv_tiles, batch, tile * KEYS, kv_head, dv, KEYS, DV)
