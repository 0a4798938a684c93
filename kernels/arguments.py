"""What the Triton operators share before a launch: argument checks, and tensors in the form that the hardware loads.

Shapes as in `reference.py`: B sequences, S queries, T keys, H query heads, K KV heads, G = H / K, D head dimension.
Nothing here computes.
"""

import os

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.capability import LARGEST_HEAD
from kernels.errors import KernelError, debugging

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's CPU interpreter: tests without a GPU
DTYPES = (torch.bfloat16, torch.float16, *((torch.float32,) if INTERPRETED else ()))
LOG2_E = 1.4426950408889634


def check_qkv(q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None = None, names: str = "q k v") -> None:
    """Shapes and dtypes of q [B, S, H, D], k and v [B, T, K, D] and document_start [B, S] int32 fit together.

    `names` are those of the caller's arguments, for the message. Raises KernelError.
    """
    name_q, name_k, name_v = names.split()
    for name, x in ((name_q, q), (name_k, k), (name_v, v)):
        if x.ndim != 4:
            raise KernelError(f"{name} has shape {list(x.shape)}; the kernels take four dimensions [B, S, heads, D]")
        if 0 in x.shape:
            raise KernelError(f"{name} has shape {list(x.shape)}; it must hold something")
        if x.dtype not in DTYPES:
            raise KernelError(f"{name} is {x.dtype}; the Triton kernels take bfloat16 or float16")
        if x.dtype != q.dtype or x.device != q.device:
            raise KernelError(f"{name} is {x.dtype} on {x.device}, {name_q} is {q.dtype} on {q.device}; use the same")
    B, S, H, D = q.shape
    K = k.shape[2]
    if k.shape[:3] != v.shape[:3] or k.shape[0] != B:
        raise KernelError(f"{name_k} {list(k.shape)} and {name_v} {list(v.shape)} must be [{B}, T, K, D] like {name_q}")
    if k.shape[3] != D:
        raise KernelError(f"{name_q} has head dimension {D}, {name_k} {k.shape[3]}; they must be equal")
    if any(size % 8 or not 16 <= size <= LARGEST_HEAD for size in (D, v.shape[3])):
        raise KernelError(
            f"{name_q} and {name_v} have head dimensions {D} and {v.shape[3]}; "
            f"the kernels take multiples of 8 from 16 to {LARGEST_HEAD}"
        )
    if H % K:
        raise KernelError(f"{name_q} has {H} heads, no multiple of the {K} of {name_k}")
    if document_start is not None:
        check_tensor("document_start", document_start, (B, S), torch.int32, q.device)


def check_tensor(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """x has this shape and dtype and is on this device. Raises KernelError."""
    if tuple(x.shape) != shape or x.dtype != dtype or x.device != device:
        kind = str(dtype).removeprefix("torch.")
        raise KernelError(
            f"{name} is {x.dtype} {list(x.shape)} on {x.device}; it must be {kind} {list(shape)} on {device}"
        )


def check_results(q: Tensor, v: Tensor, output: Tensor, lse: Tensor, grad_output: Tensor) -> None:
    """What a backward pass takes of its forward pass: output and its gradient [B, S, H, D'], lse [B, H, S] FP32.

    Raises KernelError.
    """
    B, S, H, _ = q.shape
    for name, x in (("output", output), ("grad_output", grad_output)):
        check_tensor(name, x, (B, S, H, v.shape[3]), q.dtype, q.device)
    check_tensor("lse", lse, (B, H, S), torch.float32, q.device)


def check_queries(q: Tensor, k: Tensor, query_start: int) -> None:
    """The queries lie within the keys, and the heads of a group fill tiles. Raises KernelError."""
    S, T, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    if query_start < 0 or query_start + S > T:
        raise KernelError(f"query_start {query_start} and {S} queries q reach past the {T} keys of k")
    if not power_of_two(group):
        raise KernelError(f"q has {group} heads for each of k; the kernels take a power of two")


def check_blocks(blocks: Tensor, key_blocks: int) -> None:
    """With HYSPARSE_DEBUG=1: a list in `blocks` [..., n] holds key blocks below `key_blocks`, each once, then -1.

    Raises KernelError.
    """
    if not debugging() or blocks.is_meta:
        return
    if len(wrong := ((blocks < -1) | (blocks >= key_blocks)).nonzero()):
        place = tuple(wrong[0].tolist())
        raise KernelError(
            f"blocks{list(place)} is {int(blocks[place])}; it must be -1 or one of the {key_blocks} key blocks from 0"
        )
    ordered = blocks.sort(-1).values
    twice = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(-1)
    gaps = ((blocks[..., :-1] < 0) & (blocks[..., 1:] >= 0)).any(-1)
    if len(wrong := (twice | gaps).nonzero()):
        place = tuple(wrong[0].tolist())
        raise KernelError(
            f"blocks{list(place)} is {blocks[place].tolist()}; a list names each block once, and -1 only at its end"
        )


def check_branches(kv: tuple[Tensor, Tensor], window_kv: tuple[Tensor, Tensor], name: str, window_name: str) -> None:
    """Both branches of a sparse layer have as many KV heads, and values as wide. Raises KernelError."""
    (heads, width), (window_heads, window_width) = kv[1].shape[2:], window_kv[1].shape[2:]
    if heads != window_heads:
        raise KernelError(f"{name} has {heads} KV heads, {window_name} {window_heads}; they must be equal")
    if width != window_width:
        raise KernelError(f"{name} has head dimension {width}, {window_name} {window_width}; they must be equal")


def check_starts(document_start: Tensor, query_start: int) -> None:
    """With HYSPARSE_DEBUG=1: no document starts below 0, before that of an earlier query, or behind its own query.

    document_start [B, S] counts keys; its queries are those from position `query_start` on. Otherwise programs of the
    backward pass would wait for others that never come. Raises KernelError.
    """
    if not debugging() or document_start.is_meta:
        return
    position = torch.arange(query_start, query_start + document_start.shape[1], device=document_start.device)
    earlier = torch.nn.functional.pad(document_start[:, :-1], (1, 0))
    wrong = ((document_start < earlier) | (document_start > position)).nonzero()
    if len(wrong):
        b, i = wrong[0].tolist()
        raise KernelError(
            f"document_start[{b}, {i}] is {int(document_start[b, i])}; it must be between {int(earlier[b, i])}, where "
            f"the document of the query before starts, and {query_start + i}, the query's own position"
        )


def sink_of_heads(sink: Tensor | None, q: Tensor, name: str = "sink") -> Tensor | None:
    """A sink [H] for q [..., H, D] as kernels read it, with unit stride; None stays None. Raises KernelError."""
    if sink is None:
        return None
    heads = q.shape[-2]
    if tuple(sink.shape) != (heads,) or sink.device != q.device:
        raise KernelError(
            f"{name} has shape {list(sink.shape)} on {sink.device}; "
            f"it must be [{heads}] on {q.device}, one for each head of q"
        )
    return sink.contiguous()


def branch_sinks(sparse: Tensor | None, window: Tensor | None, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The sinks of a sparse layer's two branches, each as `sink_of_heads`. Raises KernelError."""
    return sink_of_heads(sparse, q, "sparse sink"), sink_of_heads(window, q, "window sink")


def check_gate(gate: Tensor | None, q: Tensor, name: str) -> None:
    """A gate has the shape [B, S, H] of q's heads; with HYSPARSE_DEBUG=1: its values lie in 0 to 1.

    The backward pass takes the logarithm of it. Raises KernelError.
    """
    if gate is None:
        return
    if gate.shape != q.shape[:3] or gate.device != q.device:
        raise KernelError(
            f"{name} has shape {list(gate.shape)} on {gate.device}; "
            f"it must be {list(q.shape[:3])} on {q.device} like the heads of q"
        )
    if debugging() and not gate.is_meta and not ((gate >= 0) & (gate <= 1)).all():
        raise KernelError(f"{name} has values from {gate.min():g} to {gate.max():g}; it must be in 0 to 1")


def power_of_two(x: int) -> bool:
    return x > 0 and x & (x - 1) == 0


def loadable(x: Tensor) -> Tensor:
    """x itself where the copy engine can read it: unit last stride, the others and the start multiples of 16 bytes."""
    size = x.element_size()
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s * size % 16 == 0 and s > 0 for s in x.stride()[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)  # also what is contiguous but starts at an odd place


def key_tiles(x: Tensor, keys: int) -> TensorDescriptor:
    """Descriptor of x [B, T, heads, D] that loads tiles of `keys` tokens of one head.

    In a kernel: `x.load([b, head, first_token, 0]).reshape(keys, D)`. Heads stand before tokens so that all dimensions
    of length 1 lead: only then does the tile stay in shared memory instead of passing through registers. What lies past
    T, or past D where D is no power of two, reads as zero.
    """
    x = x.transpose(1, 2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, keys, triton.next_power_of_2(x.shape[3])])


def group_tiles(x: Tensor, tokens: int, heads: int) -> TensorDescriptor:
    """Descriptor of x [B, S, H, D] that moves tiles of `tokens` tokens with `heads` neighbouring heads.

    In a kernel: `x.load([b, first_token, first_head, 0]).reshape(tokens * heads, D)`. What lies past S, or past D where
    D is no power of two, reads as zero and is not written.
    """
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, tokens, heads, triton.next_power_of_2(x.shape[3])])
