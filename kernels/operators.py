"""The Triton operators as PyTorch sees them: registered custom operators with shapes for meta tensors, and gradients.

The functions of `reference.py`; those of decoding, of the projection and of a mixture of experts are registered where
their kernels are. `torch.compile`, activation recomputation (as a selective policy too: what an operator
returned, indices above all, can be kept by its name) and dry runs on meta tensors go through the registration.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import moe  # noqa: F401
from kernels.causal_backward import causal_backward
from kernels.decode import decode_full, decode_sparse  # noqa: F401
from kernels.errors import KernelError
from kernels.reference import best_blocks
from kernels.rotary import rotary_split  # noqa: F401
from kernels.scored import scored_forward
from kernels.selection import Index, build_index, index_shapes
from kernels.shared import Branch, SharedKV, check_layer
from kernels.sparse_backward import sparse_backward
from kernels.sparse_forward import SparseOutput, counted_from, sparse_forward
from kernels.window import window_backward, window_forward


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor, query_start: int = 0, sink: Tensor | None = None
) -> Tensor:
    """Softmax attention over the earlier tokens of the same document (paper eq. 2).

    q [B, S, H, D], k [B, T, K, D], v [B, T, K, D'], BF16 or FP16; document_start [B, S] int32; sink [H] or None. Query
    i stands at position query_start + i of the keys. Returns [B, S, H, D']. Raises KernelError.
    """
    return _full(q, k, v, sink, document_start, 64, 0, query_start)[0]


def oracle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_start: Tensor,
    block: int,
    selected: int,
    selection: tuple[Tensor, ...] | None = None,
    merge: Callable[[Tensor], Tensor] | None = None,
    query_start: int = 0,
    sink: Tensor | None = None,
) -> tuple[Tensor, SharedKV]:
    """Causal attention that also selects `selected` key blocks of `block` tokens (eq. 2 and 3), and what it hands on.

    Arguments and output as in `causal_attention`; the blocks in `SharedKV` are [B, K, S, selected] int32. With the
    `selection` of an earlier run on the same inputs nothing is selected again. `merge` is that of the reference's
    `scored_attention`; with it all scores [B, K, S, T / block] exist for a moment. Raises KernelError.
    """
    if selected < 1:
        raise KernelError(f"selected={selected}; select one block at least, or use causal_attention")
    merges = selection is None and merge is not None
    output, _, blocks, k_gradient, v_gradient, scores = _full(
        q, k, v, sink, document_start, block, 0 if merges or selection is not None else selected, query_start, merges
    )
    if merges:
        blocks = best_blocks(merge(scores), selected)
    if selection is None:
        selection = (blocks, *_index(blocks, block, k.shape[1], q.shape[2] // k.shape[2]))
    return output, SharedKV(k.detach(), v.detach(), k_gradient, v_gradient, *selection)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor, window: int, sink: Tensor | None, query_start: int = 0
) -> Tensor:
    """Attention over the last `window` tokens of the document, the current one included (paper eq. 5).

    Arguments and result as in `causal_attention`. Raises KernelError.
    """
    return _window(q, k, v, sink, document_start, window, query_start)[0]


def hybrid_attention(
    q: Tensor,
    sparse: Branch | None,
    window: Branch | None,
    shared: SharedKV,
    document_start: Tensor,
    block: int,
    window_size: int,
    query_start: int = 0,
    window_start: int = 0,
) -> Tensor:
    """The attention of a sparse layer: both branches, gated and summed (paper eq. 5 to 9).

    q [B, S, H, D]; of a branch k [B, T, K, D], v [B, T, K, D'], sink [H] and gate [B, S, H, 1 or D'], None where a
    layer lacks it. The window's K and V begin at position `window_start`. Below 0, their first rows stand before the
    sequence and are seen by nobody. Returns [B, S, H, D']. Raises KernelError.
    """
    check_layer(sparse, window, shared)
    for name, branch in (("sparse", sparse), ("window", window)):
        if branch is not None and branch.gate is not None:
            _check_gate(f"{name}.gate", branch.gate, q, (*q.shape[:3], branch.v.shape[-1]))
    if sparse is not None and shared.entries is None:
        raise KernelError("shared has blocks but no index; take it from oracle_attention of the same version")
    if sparse is None:
        starts = counted_from(window_start, document_start)
        output = window_attention(q, window.k, window.v, starts, window_size, window.sink, query_start - window_start)
        return _gated(output, window.gate).to(q.dtype)
    branches = [sparse, window or Branch(None, None)]
    gates = [branch.gate for branch in branches]
    elementwise = any(gate is not None and gate.shape[-1] > 1 for gate in gates)
    output, *outputs, _, _ = _sparse(
        q,
        *(tensor for branch in branches for tensor in (branch.k, branch.v, branch.k_gradient, branch.v_gradient)),
        *(branch.sink for branch in branches),
        *(None if elementwise or gate is None else gate.squeeze(-1) for gate in gates),
        document_start,
        list(shared.selection),
        block,
        window_size,
        query_start,
        window_start,
    )
    if elementwise:  # as large as the outputs themselves: nothing is saved by doing this in the kernel
        output = _gated(outputs[0], sparse.gate)
        if window is not None:
            output = output + _gated(outputs[1], window.gate)
    return output.to(q.dtype)


def _check_gate(name: str, gate: Tensor, q: Tensor, output: tuple[int, ...]) -> None:
    """One number a head, or one a channel of an output [B, S, H, D']."""
    if tuple(gate.shape) not in (output, (*output[:3], 1)) or gate.device != q.device:
        raise KernelError(
            f"{name} has shape {list(gate.shape)} on {gate.device}; "
            f"it must be {[*output[:3], 1]} or {list(output)} on {q.device}"
        )


def _gated(output: Tensor, gate: Tensor | None) -> Tensor:
    return output if gate is None else gate * output


def _no_storage(x: Tensor) -> Tensor:
    """An FP32 tensor of x's shape that occupies nothing: only its gradient is ever used."""
    return torch.zeros((), dtype=torch.float32, device=x.device).expand(x.shape)


@torch.library.custom_op("hysparse::full_attention", mutates_args=())
def _full(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, document_start: Tensor, block: int, selected: int,
    query_start: int, scored: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, log-sum-exp, blocks, the storage-free tensors of `SharedKV`, and the scores of all blocks if `scored`."""
    output, lse, blocks, scores = scored_forward(
        q, k, v, document_start, block=block, selected=selected, sink=sink, query_start=query_start,
        dense_scores=scored,
    )  # fmt: skip
    blocks = q.new_empty(0, dtype=torch.int32) if blocks is None else blocks
    scores = q.new_empty(0, dtype=torch.float32) if scores is None else scores
    return output, lse, blocks, _no_storage(k), _no_storage(v), scores


@_full.register_fake
def _(q, k, v, sink, document_start, block, selected, query_start, scored=False):
    B, S, H, _ = q.shape
    T, K = k.shape[1:3]
    blocks = q.new_empty((B, k.shape[2], S, selected) if selected else 0, dtype=torch.int32)
    output, lse = q.new_empty(B, S, H, v.shape[3]), q.new_empty(B, H, S, dtype=torch.float32)
    scores = q.new_empty((B, K, S, -(-T // block)) if scored else 0, dtype=torch.float32)
    return output, lse, blocks, _no_storage(k), _no_storage(v), scores


@torch.library.custom_op("hysparse::full_attention_backward", mutates_args=())
def _full_backward(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, output: Tensor, lse: Tensor, grad_output: Tensor,
    document_start: Tensor, query_start: int, dk_add: Tensor | None, dv_add: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    *gradients, dsink = causal_backward(
        q, k, v, output, lse, grad_output, document_start,
        query_start=query_start, sink=sink, dk_add=dk_add, dv_add=dv_add,
    )  # fmt: skip
    return *gradients, q.new_empty(0) if dsink is None else dsink


@_full_backward.register_fake
def _(q, k, v, sink, output, lse, grad_output, document_start, query_start, dk_add, dv_add):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), _like(sink, q)


def _full_context(ctx, inputs, output):
    q, k, v, sink, document_start, _, _, ctx.query_start, _ = inputs
    ctx.save_for_backward(q, k, v, sink, output[0], output[1], document_start)
    ctx.set_materialize_grads(False)


def _full_gradients(ctx, grad_output, _lse, _blocks, dk_add, dv_add, _scores):
    q, k, v, sink, output, lse, document_start = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    dq, dk, dv, dsink = _full_backward(
        q, k, v, sink, output, lse, grad_output, document_start, ctx.query_start, dk_add, dv_add
    )
    return dq, dk, dv, _or_none(dsink), None, None, None, None, None


_full.register_autograd(_full_gradients, setup_context=_full_context)


@torch.library.custom_op("hysparse::index", mutates_args=())
def _index(blocks: Tensor, block: int, keys: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.selection.build_index`."""
    return tuple(build_index(blocks, block, keys, group))


@_index.register_fake
def _(blocks, block, keys, group):
    return tuple(blocks.new_empty(shape) for shape in index_shapes(blocks, block, keys, group))


@torch.library.custom_op("hysparse::window_attention", mutates_args=())
def _window(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, document_start: Tensor, window: int, query_start: int
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    return window_forward(q, k, v, sink, document_start, window=window, query_start=query_start)


@_window.register_fake
def _(q, k, v, sink, document_start, window, query_start):
    B, S, H, _ = q.shape
    return q.new_empty(B, S, H, v.shape[3]), q.new_empty(B, H, S, dtype=torch.float32)


@torch.library.custom_op("hysparse::window_attention_backward", mutates_args=())
def _window_backward(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, document_start: Tensor, output: Tensor, lse: Tensor,
    grad_output: Tensor, window: int, query_start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, dsink = window_backward(
        q, k, v, sink, document_start, output, lse, grad_output, window=window, query_start=query_start
    )
    return dq, dk, dv, q.new_empty(0) if dsink is None else dsink


@_window_backward.register_fake
def _(q, k, v, sink, document_start, output, lse, grad_output, window, query_start):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), _like(sink, q)


def _window_context(ctx, inputs, output):
    q, k, v, sink, document_start, ctx.window, ctx.query_start = inputs
    ctx.save_for_backward(q, k, v, sink, document_start, *output)


def _window_gradients(ctx, grad_output, _lse):
    q, k, v, sink, document_start, output, lse = ctx.saved_tensors
    dq, dk, dv, dsink = _window_backward(
        q, k, v, sink, document_start, output, lse, grad_output, ctx.window, ctx.query_start
    )
    return dq, dk, dv, _or_none(dsink), None, None, None


_window.register_autograd(_window_gradients, setup_context=_window_context)


@torch.library.custom_op("hysparse::sparse_attention", mutates_args=())
def _sparse(
    q: Tensor, k: Tensor, v: Tensor, k_gradient: Tensor | None, v_gradient: Tensor | None,
    window_k: Tensor | None, window_v: Tensor | None,
    window_k_gradient: Tensor | None, window_v_gradient: Tensor | None,
    sparse_sink: Tensor | None, window_sink: Tensor | None, sparse_gate: Tensor | None, window_gate: Tensor | None,
    document_start: Tensor, selection: list[Tensor], block: int, window: int, query_start: int, window_start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`kernels.sparse_forward.sparse_forward`; k_gradient and so on only receive gradients."""
    return tuple(
        sparse_forward(
            q, (k, v), selection[0], Index(*selection[1:]), None if window_k is None else (window_k, window_v),
            document_start, (sparse_sink, window_sink), (sparse_gate, window_gate),
            block=block, window=window, query_start=query_start, window_start=window_start,
        )
    )  # fmt: skip


@_sparse.register_fake
def _(q, k, v, _k, _v, window_k, window_v, *_):
    B, S, H, _ = q.shape
    output, rows = (B, S, H, v.shape[3]), q.new_empty(B, S, H, dtype=torch.float32)
    has_window = window_k is not None
    return (
        q.new_empty(output),
        q.new_empty(output),
        q.new_empty(output if has_window else 0),
        rows,
        rows.clone() if has_window else rows.new_empty(0),
    )


@torch.library.custom_op("hysparse::sparse_attention_backward", mutates_args=())
def _sparse_backward(
    q: Tensor, k: Tensor, v: Tensor, window_k: Tensor | None, window_v: Tensor | None,
    sparse_sink: Tensor | None, window_sink: Tensor | None, sparse_gate: Tensor | None, window_gate: Tensor | None,
    document_start: Tensor, selection: list[Tensor], forward: list[Tensor], grads: list[Tensor],
    block: int, window: int, query_start: int, window_start: int, window_in_fp32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, window dk, dv, two sinks, two gates; empty where there is none. grads: one, or one a branch."""
    result = sparse_backward(
        q, (k, v), selection[0], Index(*selection[1:]), None if window_k is None else (window_k, window_v),
        document_start, (sparse_sink, window_sink), (sparse_gate, window_gate),
        SparseOutput(*forward), (grads[0], grads[-1]),
        block=block, window=window, query_start=query_start, window_start=window_start,
        window_dtype=torch.float32 if window_in_fp32 else None,
    )  # fmt: skip
    return tuple(q.new_empty(0) if x is None else x for x in (*result[:5], *result.sinks, *result.gates))


@_sparse_backward.register_fake
def _(q, k, v, wk, wv, ss, ws, sg, wg, *rest):
    fp32, window_in_fp32 = torch.float32, rest[-1]
    return (
        q.new_empty(q.shape),
        *(_like(x, q, fp32) for x in (k, v)),
        *(_like(x, q, fp32 if window_in_fp32 else None) for x in (wk, wv)),
        *(_like(x, q, fp32) for x in (ss, ws, sg, wg)),
    )


def _sparse_context(ctx, inputs, output):
    (q, k, v, k_gradient, _, window_k, window_v, window_k_gradient, _, *rest, selection, ctx.block, ctx.window,
     ctx.query_start, ctx.window_start) = inputs  # fmt: skip
    ctx.shares = k_gradient is not None, window_k_gradient is not None
    ctx.selection, ctx.dtypes = len(selection), [None if x is None else x.dtype for x in rest[:4]]
    ctx.save_for_backward(q, k, v, window_k, window_v, *rest, *selection, *output)
    ctx.set_materialize_grads(False)


def _sparse_gradients(ctx, grad_output, grad_sparse, grad_window, *_):
    saved = ctx.saved_tensors
    tensors, selection, forward = saved[:10], list(saved[10 : 10 + ctx.selection]), list(saved[10 + ctx.selection :])
    if grad_output is None:  # gates per channel: the sum of both branches was formed outside
        pairs = zip(forward[1:3], (grad_sparse, grad_window), strict=True)
        grads = [torch.zeros_like(output) if grad is None else grad for output, grad in pairs if output.numel()]
    else:
        grads = [grad_output]
    dq, dk, dv, dwk, dwv, *rest = _sparse_backward(
        *tensors, selection, forward, grads, ctx.block, ctx.window, ctx.query_start, ctx.window_start, ctx.shares[1]
    )
    rest = [None if dtype is None else x.to(dtype) for x, dtype in zip(rest, ctx.dtypes, strict=True)]
    keys = []
    for shared, dtype, gradients in zip(ctx.shares, (tensors[1].dtype,) * 2, ((dk, dv), (dwk, dwv)), strict=True):
        gradients = [_or_none(x) for x in gradients]
        nothing = [None, None]
        keys += [*nothing, *gradients] if shared else [*(x if x is None else x.to(dtype) for x in gradients), *nothing]
    return dq, *keys, *rest, None, [None] * ctx.selection, None, None, None, None


_sparse.register_autograd(_sparse_gradients, setup_context=_sparse_context)


def _like(x: Tensor | None, q: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What the backward operators return for an input that may be absent."""
    return q.new_empty(0) if x is None else x.new_empty(x.shape, dtype=dtype or x.dtype)


def _or_none(x: Tensor) -> Tensor | None:
    return x if x.numel() else None
