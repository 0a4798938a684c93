"""The operators in plain PyTorch, straight from the equations: what every faster version is tested against.

Shapes: B sequences, S tokens, H query heads, K KV heads, G = H / K query heads per KV head, D head dimension.
Documents packed into one sequence are contiguous, so one integer a token says what it may see:
`document_start[b, t] <= key <= t`, with `document_start` [B, S] counted from the sequence's first token.
Under context parallelism the queries are a chunk of the sequence: query i stands at position query_start + i of the T
keys, and `document_start` of the queries [B, S] still counts keys.

Everything is FP32 inside and returns the dtype of the query. Queries are taken in chunks that the backward pass
recomputes, so that memory grows with S x QUERY_CHUNK, not with S x S.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import moe_reference as moe  # noqa: F401 (the operators of a mixture of experts)
from kernels.shared import PAGE, Branch, KVCache, SharedKV, check_layer

QUERY_CHUNK = 512


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor, query_start: int = 0, sink: Tensor | None = None
) -> Tensor:
    """Softmax attention over the earlier tokens of the same document (paper eq. 2).

    q [B, S, H, D], k and v [B, T, K, D]; document_start [B, S] integers; sink [H] or None: a logit that joins the
    softmax denominator and has no value (gpt-oss). Returns [B, S, H, D].
    """

    def chunk(start: int, q: Tensor, k: Tensor, v: Tensor, *sink: Tensor) -> Tensor:
        visible = _visible(document_start, start, q.shape[1], 0, k.shape[1], query_start)
        return _attend(q, k, v, visible[:, None], *sink)[0]

    return _by_query_chunk(chunk, q, k, v, *([] if sink is None else [sink]))


def scored_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_start: Tensor,
    block: int,
    selected: int,
    merge: Callable[[Tensor], Tensor] | None = None,
    query_start: int = 0,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention that also selects key blocks for the sparse layers that follow (paper eq. 2 and 3).

    Arguments as in `causal_attention`; `block` tokens in a key block, `selected` blocks to choose. Returns the output
    [B, S, H, D] and, without gradient, the chosen blocks [B, K, S, selected] int32 by falling score, -1 where fewer
    blocks hold a visible token. Equal scores go to the lower block. Where other ranks hold more query heads of the same
    groups, `merge` takes the largest of all ranks' block scores [B, K, S, T / block].
    """
    scores = []

    def chunk(start: int, q: Tensor, k: Tensor, v: Tensor, *sink: Tensor) -> tuple[Tensor, Tensor]:
        visible = _visible(document_start, start, q.shape[1], 0, k.shape[1], query_start)
        output, logits = _attend(q, k, v, visible[:, None], *sink)
        score = _block_scores(logits.detach(), k.shape[1], block)
        return output, score if merge else best_blocks(score, selected)

    output = _by_query_chunk(chunk, q, k, v, *([] if sink is None else [sink]), extra=scores)
    scores = torch.cat(scores, dim=2)
    return output, best_blocks(merge(scores), selected) if merge else scores


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    document_start: Tensor,
    block: int,
    sink: Tensor | None,
    query_start: int = 0,
) -> Tensor:
    """Attention over the visible tokens of each query's selected key blocks (paper eq. 6 and 7).

    Arguments and result as in `causal_attention`; blocks [B, K, S, selected], -1 where unused. Every query needs a
    visible token in its blocks, as those that `scored_attention` selects have.
    """
    key_blocks = -(-k.shape[1] // block)

    def chunk(start: int, q: Tensor, k: Tensor, v: Tensor, *sink: Tensor) -> Tensor:
        chosen = blocks[:, :, start : start + q.shape[1]].long()  # [B, K, Q, selected]
        in_block = torch.zeros(*chosen.shape[:3], key_blocks + 1, dtype=torch.bool, device=q.device)
        in_block.scatter_(-1, torch.where(chosen < 0, key_blocks, chosen), True)  # unused ones fall into a spare column
        in_block = in_block[..., :key_blocks].repeat_interleave(block, dim=-1)[..., : k.shape[1]]  # [B, K, Q, T]
        visible = _visible(document_start, start, q.shape[1], 0, k.shape[1], query_start)
        return _attend(q, k, v, in_block & visible[:, None], *sink)[0]

    return _by_query_chunk(chunk, q, k, v, *([] if sink is None else [sink]))


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor, window: int, sink: Tensor | None, query_start: int = 0
) -> Tensor:
    """Attention over the last `window` tokens of the document, the current one included (paper eq. 5).

    Arguments and result as in `sparse_attention`.
    """

    def chunk(start: int, q: Tensor, k: Tensor, v: Tensor, *sink: Tensor) -> Tensor:
        position = query_start + start
        first, stop = max(0, position - window + 1), position + q.shape[1]
        query = torch.arange(position, stop, device=q.device)[:, None]
        near = torch.arange(first, stop, device=q.device) > query - window  # [Q, T]
        visible = _visible(document_start, start, q.shape[1], first, stop, query_start) & near
        return _attend(q, k[:, first:stop], v[:, first:stop], visible[:, None], *sink)[0]

    return _by_query_chunk(chunk, q, k, v, *([] if sink is None else [sink]))


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
    """`scored_attention` of a full layer, and what it hands to the sparse layers of its hybrid block.

    With the `selection` of an earlier run on the same inputs nothing is selected again.
    """
    if selection is None:
        output, *selection = scored_attention(q, k, v, document_start, block, selected, merge, query_start, sink)
    else:
        output = causal_attention(q, k, v, document_start, query_start, sink)
    return output, SharedKV(k, v, None, None, *selection)


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
    """The attention of a sparse layer: its branches, gated and summed (paper eq. 9). q [B, S, H, D].

    The window's K and V begin at position `window_start`. Below 0, their first rows stand before the sequence and are
    seen by nobody.
    """
    check_layer(sparse, window, shared)
    output = torch.zeros((), dtype=q.dtype, device=q.device)
    if sparse is not None:
        attended = sparse_attention(
            q, sparse.k, sparse.v, shared.blocks, document_start, block, sparse.sink, query_start
        )
        output = output + (attended if sparse.gate is None else sparse.gate * attended)
    if window is not None:
        starts = (document_start - window_start).clamp(min=0)
        attended = window_attention(q, window.k, window.v, starts, window_size, window.sink, query_start - window_start)
        output = output + (attended if window.gate is None else window.gate * attended)
    return output.to(q.dtype)


def decode_full(
    q: Tensor, cache: KVCache, lengths: Tensor, *, block: int, selected: int, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`scored_attention` of one query that stands behind its sequence, over a cache of keys and values.

    q [B, H, D]; lengths [B]: tokens in the cache, the new one included. Returns the output [B, H, D] and the blocks
    [B, K, selected].
    """
    outputs, blocks = [], []
    for b, length in enumerate(lengths.tolist()):
        k, v = _cached(cache, b, torch.arange(length, device=q.device))
        start = lengths.new_zeros(1, 1)
        output, chosen = scored_attention(
            q[b, None, None], k, v, start, block, selected, query_start=length - 1, sink=sink
        )
        outputs.append(output[:, 0])
        blocks.append(chosen[:, :, 0])
    return torch.cat(outputs), torch.cat(blocks)


def decode_sparse(
    q: Tensor,
    cache: KVCache | None,
    blocks: Tensor | None,
    window_cache: KVCache | None,
    lengths: Tensor,
    *,
    block: int,
    window: int,
    sparse_sink: Tensor | None = None,
    window_sink: Tensor | None = None,
    sparse_gate: Tensor | None = None,
    window_gate: Tensor | None = None,
) -> Tensor:
    """`hybrid_attention` of one query that stands behind its sequence, over caches of keys and values.

    q [B, H, D]; blocks [B, K, n] of `decode_full`; the window's cache [B, window, K, D] has position p in slot
    p % window; gates [B, H] or [B, H, D]. Returns [B, H, D].
    """
    outputs = []
    for b, length in enumerate(lengths.tolist()):
        query, start, output = q[b, None, None], lengths.new_zeros(1, 1), 0
        if cache is not None:
            k, v = _cached(cache, b, torch.arange(length, device=q.device))
            attended = sparse_attention(query, k, v, blocks[b, None, :, None], start, block, sparse_sink, length - 1)
            output = output + _gated(attended[0, 0], None if sparse_gate is None else sparse_gate[b])
        if window_cache is not None:
            near = torch.arange(max(length - window, 0), length, device=q.device)
            k, v = _cached(window_cache, b, near % window)
            attended = window_attention(query, k, v, start, window, window_sink, len(near) - 1)
            output = output + _gated(attended[0, 0], None if window_gate is None else window_gate[b])
        outputs.append(output)
    return torch.stack(outputs).to(q.dtype)


def _cached(cache: KVCache, b: int, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [1, T, K, D] in these slots of sequence b."""
    if cache.page_table is None:
        return cache.k[b][slots][None], cache.v[b][slots][None]
    pages = cache.page_table[b, slots // PAGE].long()
    return cache.k[None, pages, slots % PAGE], cache.v[None, pages, slots % PAGE]


def _gated(output: Tensor, gate: Tensor | None) -> Tensor:
    """output [H, D] times a gate [H] or [H, D]."""
    return output if gate is None else output * (gate if gate.ndim == 2 else gate[:, None])


def rotary_split(
    y: Tensor, cos: Tensor, sin: Tensor, group: int, own_kv: bool, gates: int
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:
    """The output of a layer's fused input projection, split, rotated, and with the gates' sigmoid taken (eq. 4 and 8).

    y [S, B, K, R], of each KV head: query G x D, key D and value D if `own_kv`, each gate G. cos and sin [S, B, 1, D].
    Returns query [S, B, H, D], key and value [S, B, K, D] or None, gates [S, B, H].
    """
    S, B, K, _ = y.shape
    D = cos.shape[-1]
    query, *rest = y.split([group * D, *[D] * 2 * own_kv, *[group] * gates], dim=-1)
    key, value = (rotate(rest[0], cos, sin), rest[1]) if own_kv else (None, None)
    opened = [gate.reshape(S, B, K * group).sigmoid() for gate in rest[2 * own_kv :]]
    return rotate(query.reshape(S, B, K * group, D), cos, sin), key, value, opened


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding over the whole head, halves paired. x [S, B, heads, D]; cos, sin [S, B, 1, D] FP32."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def _visible(document_start: Tensor, start: int, queries: int, first: int, stop: int, query_start: int) -> Tensor:
    """[B, Q, T]: whether query `start + i` may see key `first + j`: not later, and of the same document."""
    query = query_start + torch.arange(start, start + queries, device=document_start.device)[:, None]
    key = torch.arange(first, stop, device=document_start.device)
    return (key <= query) & (key >= document_start[:, start : start + queries, None])


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q [B, Q, H, D] against k, v [B, T, K, D] in FP32 where visible [B, K or 1, Q, T].

    Returns the output [B, Q, H, D] and the logits [B, K, G, Q, T], -inf where invisible. The sink is a key that is
    visible to nobody: its logit is the sink instead of -inf, its value zero, and it comes last.
    """
    B, Q, H, D = q.shape
    K = k.shape[2]
    hidden = torch.full((), -torch.inf, device=q.device)
    if sink is not None:
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))  # T + 1
        visible = F.pad(visible, (0, 1))
        hidden = torch.cat([hidden.expand(K, H // K, 1, k.shape[1] - 1), sink.view(K, H // K, 1, 1)], dim=-1)
    logits = torch.einsum("bqkgd,btkd->bkgqt", q.float().view(B, Q, K, H // K, D) / math.sqrt(D), k)
    logits = torch.where(visible[:, :, None], logits, hidden)  # [B, K, G, Q, T]
    output = torch.einsum("bkgqt,btkd->bqkgd", logits.softmax(-1), v)
    return output.reshape(B, Q, H, -1).to(q.dtype), logits


def _block_scores(logits: Tensor, keys: int, block: int) -> Tensor:
    """The logarithm of eq. 3; logits [B, K, G, Q, T, or T + 1 with a sink] -> [B, K, Q, T / block], T being `keys`.

    It is -inf where nothing is visible, orders like the probability and does not underflow where a head is very sure.
    """
    key_blocks = -(-keys // block)
    padded = F.pad(logits[..., :keys], (0, key_blocks * block - keys), value=-torch.inf)
    block_max = padded.unflatten(-1, (key_blocks, block)).amax(-1)  # [B, K, G, Q, key blocks]
    return (block_max - logits.logsumexp(-1, keepdim=True)).amax(2)  # the largest of the group


def best_blocks(score: Tensor, selected: int) -> Tensor:
    """The `selected` blocks of largest score; score [B, K, Q, blocks] -> [B, K, Q, selected] int32, -1 where unused."""
    score, index = score.sort(dim=-1, descending=True, stable=True)  # stable: ties go to the lower block
    index = index.masked_fill(score == -torch.inf, -1)[..., :selected].int()
    return F.pad(index, (0, selected - index.shape[-1]), value=-1)


def _by_query_chunk(chunk: Callable, q: Tensor, *inputs: Tensor, extra: list[Tensor] | None = None) -> Tensor:
    """Concatenate `chunk(start, q[:, start : stop], *inputs)` over the queries; second results go to `extra`."""
    S = q.shape[1]
    inputs = [x.float() for x in inputs]  # here, so that the gradients of all chunks are added up in FP32
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
