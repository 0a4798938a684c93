"""The router's kernels: scores, the best experts, their weights, and the row of every token at every expert.

`_route` reads the logits once. A program takes `CHUNK` tokens of one sequence, `TILE` at a time with a warp a token,
and extracts the best expert A times: the largest key, ties to the lower index, then out with it. That beats a sort, as
A is far below E. On the way it counts how often its tokens chose each expert.

These counts [E, chunks] make a counting sort: their running sum over the flattened array, experts outside, says where
the rows of an expert from a chunk begin. `_place` then walks through a chunk again and numbers its choices. Sums over
tokens are sums over chunks of fixed size and order: no atomics, the same bits each time.

A balance loss needs each sequence's sum of scores and count of choices by score alone; `_route` writes both by chunk.
`_route_backward` computes the scores again from the logits. Shapes and meaning as in `moe_reference.route`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.errors import KernelError

CHUNK = 32
WARPS = 4
TILE_NUMBERS = 2048  # tokens x experts of a tile: 16 numbers a thread
EPSILON = tl.constexpr(1e-20)


def route_forward(
    logits: Tensor, bias: Tensor | None, active: int, softmax: bool, balance: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """logits [S, B, E] FP32. Returns the fields of `moe_reference.Routing`."""
    if logits.ndim != 3 or logits.dtype != torch.float32:
        raise KernelError(f"logits are {logits.dtype} {list(logits.shape)}; they must be float32 [S, B, E]")
    S, B, E = logits.shape
    if not 0 < active <= E:
        raise KernelError(f"active={active} must be from 1 to the {E} experts of logits")
    logits = logits.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    per_sequence = triton.cdiv(S, CHUNK)
    chunks = B * per_sequence
    weights = logits.new_empty(S * B, active)
    experts = logits.new_empty(S * B, active, dtype=torch.int32)
    position = logits.new_empty(S * B, active, dtype=torch.int64)
    if chunks == 0:
        none = (logits.new_zeros(B, E), logits.new_zeros(B, E, dtype=torch.int32)) if balance else (None, None)
        return weights, experts, position, logits.new_zeros(E, dtype=torch.int32), *none
    counts = logits.new_empty(E, chunks, dtype=torch.int32)
    sums = logits.new_empty(B, per_sequence, E) if balance else None
    by_score = torch.empty_like(sums, dtype=torch.int32) if balance and bias is not None else None
    _route[(chunks,)](
        *(logits, bias, weights, experts, counts, sums, by_score),
        *(S, B, per_sequence, chunks),
        **_constants(E, active, softmax),
    )
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    _place[(chunks,)](experts, ends, position, S, B, per_sequence, chunks, **_constants(E, active))
    offsets = ends.view(E, chunks)[:, -1].contiguous()
    if not balance:
        return weights, experts, position, offsets, None, None
    if by_score is None:  # the same choices
        choices = counts.view(E, B, per_sequence).sum(2, dtype=torch.int32).t()
    else:
        choices = by_score.sum(1, dtype=torch.int32)
    return weights, experts, position, offsets, sums.sum(1), choices


def route_backward(
    logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    weights_grad: Tensor | None,
    sums_grad: Tensor | None,
    softmax: bool,
) -> Tensor:
    """Gradient of the logits from those of `weights` [T, A] and `score_sums` [B, E]; either may be missing."""
    S, B, E = logits.shape
    logits_grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if logits.numel():
        constants = _constants(E, weights.shape[1], softmax)
        weights_grad, sums_grad = (x if x is None else x.contiguous() for x in (weights_grad, sums_grad))
        _route_backward[(triton.cdiv(S * B, constants["TILE"]),)](
            *(logits.contiguous(), weights, experts, weights_grad, sums_grad, logits_grad, S * B, B), **constants
        )
    return logits_grad


def _constants(experts: int, active: int, softmax: bool | None = None) -> dict:
    padded = triton.next_power_of_2(experts)
    tile = max(1, min(CHUNK, TILE_NUMBERS // padded))
    chosen = {} if softmax is None else {"SOFTMAX": softmax}
    return {"E": experts, "PADDED": padded, "A": active, "TILE": tile, **chosen, "num_warps": WARPS}


@triton.jit
def _extract(key, e, E: tl.constexpr, PADDED: tl.constexpr):
    """The expert with the largest key of each token [TILE], its place as a mask, and the keys without it."""
    index = tl.min(tl.where(key == tl.max(key, 1)[:, None], e, PADDED), 1)
    index = tl.minimum(index, E - 1)  # a token whose logits are NaN finds none; it must not write elsewhere
    hit = e == index[:, None]
    return index, hit, tl.where(hit, float("-inf"), key)


@triton.jit
def _scores(logit, real, SOFTMAX: tl.constexpr):
    """Scores of a tile, 0 where there is no expert, and by what they are divided to sum to 1 over the experts."""
    if SOFTMAX:
        score = tl.exp(logit - tl.max(logit, 1)[:, None])
        total = tl.sum(score, 1)
    else:
        score = tl.where(real, tl.sigmoid(logit), 0.0)
        total = tl.sum(score, 1) + EPSILON
    return score, total


@triton.jit
def _route(
    logits, bias, weights, experts, counts, sums, by_score,
    S, B, per_sequence, chunks,
    E: tl.constexpr, PADDED: tl.constexpr, A: tl.constexpr, TILE: tl.constexpr, SOFTMAX: tl.constexpr,
    CHUNK: tl.constexpr = CHUNK,
):  # fmt: skip
    chunk = tl.program_id(0)
    e = tl.arange(0, PADDED)[None, :]
    real = e < E
    column = tl.arange(0, triton.next_power_of_2(A))[None, :]
    counted = tl.zeros([TILE, PADDED], tl.int32)
    counted_by_score = tl.zeros([TILE, PADDED], tl.int32)
    summed = tl.zeros([TILE, PADDED], tl.float32)
    for start in range(0, CHUNK, TILE):
        s = (chunk % per_sequence) * CHUNK + start + tl.arange(0, TILE)
        exists = (s < S)[:, None]
        token = (s.to(tl.int64) * B + chunk // per_sequence)[:, None]
        logit = tl.load(logits + token * E + e, mask=exists & real, other=float("-inf"))
        logit = tl.where(exists, logit, 0.0)  # no NaN where there is no token
        score, total = _scores(logit, real, SOFTMAX)
        unbiased = logit if SOFTMAX else score
        unbiased = tl.where(real, unbiased, float("-inf"))
        key = unbiased
        if bias is not None:
            key += tl.load(bias + e, mask=real, other=0.0)

        chosen = tl.full([TILE, column.shape[1]], float("-inf") if SOFTMAX else 0.0, tl.float32)
        for a in range(A):  # unrolled, it would take twice the registers
            index, hit, key = _extract(key, e, E, PADDED)
            value = tl.sum(tl.where(hit, logit if SOFTMAX else score, 0.0), 1)
            chosen = tl.where(column == a, value[:, None], chosen)
            tl.store(experts + token * A + a, index[:, None], mask=exists)
        if SOFTMAX:
            chosen = tl.exp(chosen - tl.max(chosen, 1)[:, None])
            chosen = chosen / tl.sum(chosen, 1)[:, None]
        elif A > 1:
            chosen = chosen / (tl.sum(chosen, 1)[:, None] + EPSILON)
        tl.store(weights + token * A + column, chosen, mask=exists & (column < A))

        counted += (exists & real & (key == float("-inf"))).to(tl.int32)
        if sums is not None:
            summed += tl.where(exists & real, score / total[:, None], 0.0)
        if by_score is not None:
            for _ in range(A):
                index, hit, unbiased = _extract(unbiased, e, E, PADDED)
            counted_by_score += (exists & real & (unbiased == float("-inf"))).to(tl.int32)
    e = tl.arange(0, PADDED)
    tl.store(counts + e.to(tl.int64) * chunks + chunk, tl.sum(counted, 0), mask=e < E)
    if sums is not None:
        tl.store(sums + chunk.to(tl.int64) * E + e, tl.sum(summed, 0), mask=e < E)
    if by_score is not None:
        tl.store(by_score + chunk.to(tl.int64) * E + e, tl.sum(counted_by_score, 0), mask=e < E)


@triton.jit
def _place(
    experts, ends, position,
    S, B, per_sequence, chunks,
    E: tl.constexpr, PADDED: tl.constexpr, A: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr = CHUNK,
):  # fmt: skip
    chunk = tl.program_id(0)
    e = tl.arange(0, PADDED)
    before = e.to(tl.int64) * chunks + chunk - 1  # in the flattened counts; nothing lies before the very first
    free = tl.load(ends + before, mask=(e < E) & (before >= 0), other=0)  # the next free row of each expert
    e = e[None, :]
    for start in range(0, CHUNK, TILE):
        s = (chunk % per_sequence) * CHUNK + start + tl.arange(0, TILE)
        exists = s < S
        token = s.to(tl.int64) * B + chunk // per_sequence
        chosen = tl.zeros([TILE, PADDED], tl.int32)
        for a in tl.static_range(A):
            index = tl.load(experts + token * A + a, mask=exists, other=-1)
            chosen += (index[:, None] == e).to(tl.int32)
        row = free[None, :] + tl.cumsum(chosen, 0) - chosen
        for a in tl.static_range(A):
            index = tl.load(experts + token * A + a, mask=exists, other=-1)
            mine = tl.sum(tl.where(index[:, None] == e, row, 0), 1)
            tl.store(position + token * A + a, mine.to(tl.int64), mask=exists)
        free += tl.sum(chosen, 0)


@triton.jit
def _route_backward(
    logits, weights, experts, weights_grad, sums_grad, logits_grad,
    T, B,
    E: tl.constexpr, PADDED: tl.constexpr, A: tl.constexpr, TILE: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    exists = token < T
    e = tl.arange(0, PADDED)[None, :]
    real = exists[:, None] & (e < E)
    logit = tl.load(logits + token[:, None] * E + e, mask=real, other=float("-inf"))
    logit = tl.where(exists[:, None], logit, 0.0)
    score, total = _scores(logit, e < E, SOFTMAX)
    share = score / total[:, None]
    grad = tl.zeros([TILE, PADDED], tl.float32)  # of the score; with softmax, of the logit
    if sums_grad is not None:
        asked = tl.load(sums_grad + (token % B)[:, None] * E + e, mask=real, other=0.0)
        asked -= tl.sum(asked * share, 1)[:, None]
        grad += asked * share if SOFTMAX else asked / total[:, None]
    if weights_grad is not None:
        column = tl.arange(0, triton.next_power_of_2(A))[None, :]
        mask = exists[:, None] & (column < A)
        here = token[:, None] * A + column
        weight = tl.load(weights + here, mask=mask, other=0.0)
        asked = tl.load(weights_grad + here, mask=mask, other=0.0)
        mean = tl.sum(weight * asked, 1)
        index = tl.load(experts + here, mask=mask, other=0)
        chosen = tl.sigmoid(tl.load(logits + token[:, None] * E + index, mask=mask, other=float("-inf")))
        chosen = tl.sum(chosen, 1) + EPSILON
        for a in tl.static_range(A):
            index = tl.load(experts + token * A + a, mask=exists, other=0)
            asked = tl.load(weights_grad + token * A + a, mask=exists, other=0.0)
            if SOFTMAX:
                asked = (asked - mean) * tl.load(weights + token * A + a, mask=exists, other=0.0)
            elif A > 1:
                asked = (asked - mean) / chosen
            grad += tl.where(e == index[:, None], asked[:, None], 0.0)
    if not SOFTMAX:
        grad *= score * (1 - score)
    tl.store(logits_grad + token[:, None] * E + e, grad, mask=real)
