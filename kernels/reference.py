"""The operators in plain PyTorch, straight from the equations: what every faster version is tested against.

Shapes: B sequences, S tokens, H query heads, K KV heads, G = H / K query heads per KV head, D head dimension.
Documents packed into one sequence are contiguous, so one integer a token says what it may see:
`document_start[b, t] <= key <= t`, with `document_start` [B, S] counted from the sequence's first token.

Everything is FP32 inside and returns the dtype of the query. Queries are taken in chunks that the backward pass
recomputes, so that memory grows with S x QUERY_CHUNK, not with S x S.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

QUERY_CHUNK = 512


def causal_attention(q: Tensor, k: Tensor, v: Tensor, document_start: Tensor) -> Tensor:
    """Softmax attention over the earlier tokens of the same document (paper eq. 2).

    q [B, S, H, D], k and v [B, S, K, D]; document_start [B, S] integers. Returns [B, S, H, D].
    """

    def chunk(start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        visible = _visible(document_start, start, q.shape[1], 0, k.shape[1])
        return _attend(q, k, v, visible[:, None])[0]

    return _by_query_chunk(chunk, q, k, v)


def scored_attention(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor, block: int, selected: int
) -> tuple[Tensor, Tensor]:
    """Causal attention that also selects key blocks for the sparse layers that follow (paper eq. 2 and 3).

    Arguments as in `causal_attention`; `block` tokens in a key block, `selected` blocks to choose. Returns the output
    [B, S, H, D] and, without gradient, the chosen blocks [B, K, S, selected] int32 by falling score, -1 where fewer
    blocks hold a visible token. Equal scores go to the lower block.
    """
    blocks = []

    def chunk(start: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        visible = _visible(document_start, start, q.shape[1], 0, k.shape[1])
        output, log_probability = _attend(q, k, v, visible[:, None])
        return output, _top_blocks(log_probability.detach(), block, selected)

    output = _by_query_chunk(chunk, q, k, v, extra=blocks)
    return output, torch.cat(blocks, dim=2)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, document_start: Tensor, block: int, sink: Tensor | None
) -> Tensor:
    """Attention over the visible tokens of each query's selected key blocks (paper eq. 6 and 7).

    q [B, S, H, D], k and v [B, S, K, D]; blocks [B, K, S, selected], -1 where unused; sink [H] or None: a logit that
    joins the softmax denominator and has no value (gpt-oss). Returns [B, S, H, D].
    """
    key_blocks = -(-k.shape[1] // block)

    def chunk(start: int, q: Tensor, k: Tensor, v: Tensor, *sink: Tensor) -> Tensor:
        chosen = blocks[:, :, start : start + q.shape[1]].long()  # [B, K, Q, selected]
        in_block = torch.zeros(*chosen.shape[:3], key_blocks + 1, dtype=torch.bool, device=q.device)
        in_block.scatter_(-1, torch.where(chosen < 0, key_blocks, chosen), True)  # unused ones fall into a spare column
        in_block = in_block[..., :key_blocks].repeat_interleave(block, dim=-1)[..., : k.shape[1]]  # [B, K, Q, T]
        visible = _visible(document_start, start, q.shape[1], 0, k.shape[1])
        return _attend(q, k, v, in_block & visible[:, None], *sink)[0]

    return _by_query_chunk(chunk, q, k, v, *([] if sink is None else [sink]))


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor, window: int, sink: Tensor | None
) -> Tensor:
    """Attention over the last `window` tokens of the document, the current one included (paper eq. 5).

    Arguments and result as in `sparse_attention`.
    """

    def chunk(start: int, q: Tensor, k: Tensor, v: Tensor, *sink: Tensor) -> Tensor:
        first, stop = max(0, start - window + 1), start + q.shape[1]
        query = torch.arange(start, stop, device=q.device)[:, None]
        near = torch.arange(first, stop, device=q.device) > query - window  # [Q, T]
        visible = _visible(document_start, start, q.shape[1], first, stop) & near
        return _attend(q, k[:, first:stop], v[:, first:stop], visible[:, None], *sink)[0]

    return _by_query_chunk(chunk, q, k, v, *([] if sink is None else [sink]))


def _visible(document_start: Tensor, start: int, queries: int, first: int, stop: int) -> Tensor:
    """[B, Q, T]: whether query `start + i` may see key `first + j`: not later, and of the same document."""
    query = torch.arange(start, start + queries, device=document_start.device)[:, None]
    key = torch.arange(first, stop, device=document_start.device)
    return (key <= query) & (key >= document_start[:, start : start + queries, None])


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q [B, Q, H, D] against k, v [B, T, K, D] where visible [B, K or 1, Q, T].

    Returns the output [B, Q, H, D] and the log probabilities [B, K, G, Q, T], -inf where invisible.
    """
    B, Q, H, D = q.shape
    K = k.shape[2]
    logits = torch.einsum("bqkgd,btkd->bkgqt", q.float().view(B, Q, K, H // K, D), k.float()) / math.sqrt(D)
    logits = logits.masked_fill(~visible[:, :, None], -torch.inf)
    normaliser = logits.logsumexp(-1, keepdim=True)  # [B, K, G, Q, 1]
    if sink is not None:
        normaliser = torch.logaddexp(normaliser, sink.float().view(K, H // K, 1, 1))
    log_probability = logits - normaliser
    output = torch.einsum("bkgqt,btkd->bqkgd", log_probability.exp(), v.float())
    return output.reshape(B, Q, H, D).to(q.dtype), log_probability


def _top_blocks(log_probability: Tensor, block: int, selected: int) -> Tensor:
    """The `selected` blocks of largest probability, [B, K, G, Q, T] -> [B, K, Q, selected] int32.

    The logarithm ranks like the probability of eq. 3 and does not underflow where a head is very sure.
    """
    keys = log_probability.shape[-1]
    key_blocks = -(-keys // block)
    padded = torch.nn.functional.pad(log_probability, (0, key_blocks * block - keys), value=-torch.inf)
    score = padded.unflatten(-1, (key_blocks, block)).amax(-1).amax(2)  # over the block, then over the group
    score, index = score.sort(dim=-1, descending=True, stable=True)  # stable: ties go to the lower block
    index = index.masked_fill(score == -torch.inf, -1)[..., :selected].int()
    return torch.nn.functional.pad(index, (0, selected - index.shape[-1]), value=-1)


def _by_query_chunk(chunk: Callable, q: Tensor, *inputs: Tensor, extra: list[Tensor] | None = None) -> Tensor:
    """Concatenate `chunk(start, q[:, start : stop], *inputs)` over the queries; second results go to `extra`."""
    S = q.shape[1]
    outputs = []
    for start in range(0, S, QUERY_CHUNK):
        arguments = (start, q[:, start : start + QUERY_CHUNK], *inputs)
        if S > QUERY_CHUNK and torch.is_grad_enabled():
            result = checkpoint(chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            result = chunk(*arguments)
        if extra is not None:
            result, second = result
            extra.append(second)
        outputs.append(result)
    return torch.cat(outputs, dim=1)
