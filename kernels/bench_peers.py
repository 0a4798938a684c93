"""The public kernels that the benchmark runs beside ours. Each returns what to time; what is not installed raises."""

import importlib
from collections.abc import Callable
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.bench_inputs import BLOCK, DIMENSION

Calls = tuple[Callable[[], object], Callable[[], object]]  # forward, backward


def with_gradients(forward: Callable[..., Tensor], *inputs: Tensor) -> Calls:
    """The forward pass that a training step runs, and the backward pass through autograd."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = forward(*inputs)
    grad_output = torch.randn_like(output)
    return lambda: forward(*inputs), lambda: torch.autograd.grad(output, inputs, grad_output, retain_graph=True)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Calls:
    """Causal attention, PyTorch's SDPA on cuDNN."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return with_gradients(forward, q, k, v)


def flash_attention_4(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None, window: int | None = None, deterministic: bool = False
) -> Calls:
    """Causal attention, flash-attn-4; deterministic: with a backward pass whose bits repeat."""
    flash_attn_func = importlib.import_module("flash_attn.cute").flash_attn_func
    reach = (window - 1, 0) if window else (None, None)

    def forward(q: Tensor, k: Tensor, v: Tensor, *sink: Tensor) -> Tensor:
        options = {"learnable_sink": sink[0]} if sink else {}
        return flash_attn_func(q, k, v, causal=True, window_size=reach, deterministic=deterministic, **options)[0]

    return with_gradients(forward, q, k, v, *([] if sink is None else [sink]))


def flash_attention_4_documents(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Calls:
    """Causal within documents of these lengths, flash-attn-4."""
    flash_attn_varlen_func = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    bounds = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(*(x.squeeze(0) for x in (q, k, v)), **bounds, causal=True)[0]

    return with_gradients(forward, q, k, v)


def flex_documents(q: Tensor, k: Tensor, v: Tensor, document_start: Tensor) -> Calls:
    """FlexAttention, causal within documents."""

    def visible(b, h, query, key):
        return (query >= key) & (key >= document_start[b, query])

    return with_gradients(_flex(q.shape[1], visible), q, k, v)


def flex_window(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, window: int) -> Calls:
    """FlexAttention over a sliding window, without the sink."""
    return with_gradients(_flex(q.shape[1], _near(window)), q, k, v)


def flex_window_with_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, window: int) -> Calls:
    """FlexAttention over a sliding window, then the sink by way of the log-sum-exp, compiled together."""
    flex, mask = _flex_and_mask(q.shape[1], _near(window))

    @torch.compile(dynamic=False)
    def forward(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        request = flex.AuxRequest(lse=True)
        output, extra = flex.flex_attention(q, k, v, block_mask=mask, enable_gqa=True, return_aux=request)
        return output * torch.sigmoid(extra.lse - sink[:, None])[..., None].to(output.dtype)

    return with_gradients(forward, q, k, v, sink)


def _near(window: int) -> Callable:
    return lambda b, h, query, key: (query >= key) & (query - key < window)


def _flex(length: int, visible: Callable) -> Callable[..., Tensor]:
    """FlexAttention of q, k, v [B, S, heads, D], compiled."""
    flex, mask = _flex_and_mask(length, visible)
    attention = torch.compile(flex.flex_attention, dynamic=False)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attention(q, k, v, block_mask=mask, enable_gqa=True)

    return forward


def _flex_and_mask(length: int, visible: Callable) -> tuple[ModuleType, object]:
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    torch._dynamo.reset()  # or it tries to make one program for all lengths
    build = torch.compile(flex.create_block_mask)  # never holds [S, S]
    return flex, build(visible, None, None, length, length, device="cuda")


def nsa_selected(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Calls:
    """The selected-attention branch of fla-core's NSA. Its inverted index is built before, as ours is."""
    nsa = importlib.import_module("fla.ops.nsa.parallel")
    indices = blocks.transpose(1, 2).contiguous()  # [B, S, K, n]
    options = {"block_indices": indices, "block_counts": indices.shape[-1], "block_size": BLOCK}
    options |= {"scale": DIMENSION**-0.5}
    output, lse = nsa.parallel_nsa_fwd(q=q, k=k, v=v, **options)
    grad_output = torch.randn_like(output)
    inverse = nsa.prepare_block_csr(
        block_indices=indices,
        block_counts=indices.shape[-1],
        cu_seqlens=None,
        chunk_indices=None,
        num_blocks=-(-k.shape[1] // BLOCK),
        block_size=BLOCK,
    )

    def backward() -> object:
        with mock.patch.object(nsa, "prepare_block_csr", lambda **_: inverse):
            return nsa.parallel_nsa_bwd(q=q, k=k, v=v, o=output, lse=lse, do=grad_output, **options)

    return lambda: nsa.parallel_nsa_fwd(q=q, k=k, v=v, **options), backward
