"""The router's kernels: scores, the best experts, their weights, and the row of every token at every expert.

`_route` reads the logits once. A program takes a chunk of tokens of one sequence, `TILE` at a time with a warp a token,
and extracts the best expert A times: the largest key, ties to the lower index, then out with it. That beats a sort, as
A is far below E. What takes time is waiting for one maximum after the other; so key and index are one number, and where
the best by score are wanted as well, both extractions take turns. On the way it counts how often its tokens chose each
expert.

These counts [E, chunks] make a counting sort: their running sum over the flattened array, experts outside, says where
the rows of an expert from a chunk begin. `_place` then numbers the choices of a chunk: each comes behind those of the
same expert before it. Sums over tokens are sums over chunks in a fixed order: no atomics, the same bits each time.

A balance loss needs each sequence's sum of scores and count of choices by score alone; `_route` writes both by chunk.
`_route_backward` computes the scores again from the logits. Shapes and meaning as in `moe_reference.route`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.errors import KernelError

CHUNKS = (8, 32)  # tokens of one: few of a short micro-batch, so that all multiprocessors have some
MANY = 512  # chunks
WARPS = 4
TILE_NUMBERS = 2048  # tokens x experts of a tile: 16 numbers a thread
TALLIED = 512  # experts of a program of `_add_counts`
AT_ONCE = 8  # choices with which `_place` compares all those of a chunk
ROUTE_REGISTERS = 168  # for three programs a multiprocessor: they wait a lot
EPSILON = tl.constexpr(1e-20)
TAKEN = tl.constexpr(-(2**63))  # the rank of an expert that has been extracted


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
    chunk = next((tokens for tokens in reversed(CHUNKS) if B * triton.cdiv(S, tokens) >= MANY), CHUNKS[0])
    per_sequence = triton.cdiv(S, chunk)
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
        CHUNK=chunk,
        maxnreg=ROUTE_REGISTERS,
    )
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    numbers = triton.next_power_of_2(chunk * active)
    _place[(chunks,)](experts, ends, position, S, B, per_sequence, chunks, active, numbers, AT_ONCE, chunk)
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


def add_counts(offsets: Tensor, first: Tensor, second: Tensor | None) -> None:
    """Add the differences of `offsets` [E] int32, the rows of each expert, to `first` and `second` [E]."""
    E = len(offsets)
    _add_counts[(triton.cdiv(E, TALLIED),)](offsets, first, second, E, TALLIED)


def _constants(experts: int, active: int, softmax: bool) -> dict:
    padded = triton.next_power_of_2(experts)
    tile = max(1, min(CHUNKS[0], TILE_NUMBERS // padded))
    return {"E": experts, "PADDED": padded, "A": active, "TILE": tile, "SOFTMAX": softmax, "num_warps": WARPS}


@triton.jit
def _ranks(key, e):
    """int64 numbers that are all different and in the order of the keys, those of lower experts first among equals."""
    bits = (key + 0.0).to(tl.int32, bitcast=True)  # -0 counts as 0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # in the order of the numbers
    return (bits.to(tl.int64) << 32) - e


@triton.jit
def _extract(rank):
    """The expert of the highest rank for each token [TILE, 1], and the ranks without it."""
    best = tl.max(rank, 1)[:, None]
    return (-best).to(tl.int32), tl.where(rank == best, TAKEN, rank)


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
    CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    e = tl.arange(0, PADDED)[None, :]
    real = e < E
    column = tl.arange(0, triton.next_power_of_2(A))[None, :]
    counted = tl.zeros([TILE, PADDED], tl.int32)  # in the upper half the choices by score, to need fewer registers
    summed = tl.zeros([TILE, PADDED], tl.float32)
    for start in range(0, CHUNK, TILE):
        s = (chunk % per_sequence) * CHUNK + start + tl.arange(0, TILE)
        exists = (s < S)[:, None]
        token = (s.to(tl.int64) * B + chunk // per_sequence)[:, None]
        logit = tl.load(logits + token * E + e, mask=exists & real, other=float("-inf"))
        logit = tl.where(exists, logit, 0.0)  # no NaN where there is no token
        score, total = _scores(logit, real, SOFTMAX)
        if sums is not None:  # before the extraction, which needs the registers
            summed += tl.where(exists & real, score / total[:, None], 0.0)
        unbiased = logit if SOFTMAX else score
        unbiased = tl.where(real, unbiased, float("-inf"))
        rank_by_score = _ranks(unbiased, e)
        if bias is None:
            rank = rank_by_score
        else:
            rank = _ranks(unbiased + tl.load(bias + e, mask=real, other=0.0), e)

        best = tl.zeros([TILE, column.shape[1]], tl.int32)
        for a in range(A):  # unrolled, it would take twice the registers
            index, rank = _extract(rank)
            best = tl.where(column == a, index, best)
            if by_score is not None:
                _, rank_by_score = _extract(rank_by_score)
        best = tl.minimum(best, E - 1)  # a token whose logits are NaN may find what is none
        mask = exists & (column < A)
        chosen = tl.load(logits + token * E + best, mask=mask, other=float("-inf"))
        if SOFTMAX:
            chosen = tl.exp(chosen - tl.max(tl.where(exists, chosen, 0.0), 1)[:, None])
            chosen = chosen / tl.sum(chosen, 1)[:, None]
        else:
            chosen = tl.sigmoid(chosen)
            if A > 1:
                chosen = chosen / (tl.sum(chosen, 1)[:, None] + EPSILON)
        tl.store(experts + token * A + column, best, mask=mask)
        tl.store(weights + token * A + column, chosen, mask=mask)

        counted += (exists & real & (rank == TAKEN)).to(tl.int32)
        if by_score is not None:
            counted += (exists & real & (rank_by_score == TAKEN)).to(tl.int32) << 16
    e = tl.arange(0, PADDED)
    counted = tl.sum(counted, 0)
    tl.store(counts + e.to(tl.int64) * chunks + chunk, counted & 0xFFFF, mask=e < E)
    if sums is not None:
        tl.store(sums + chunk.to(tl.int64) * E + e, tl.sum(summed, 0), mask=e < E)
    if by_score is not None:
        tl.store(by_score + chunk.to(tl.int64) * E + e, counted >> 16, mask=e < E)


@triton.jit
def _place(
    experts, ends, position,
    S, B, per_sequence, chunks,
    A: tl.constexpr, NUMBERS: tl.constexpr, AT_ONCE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    choice = tl.arange(0, NUMBERS)
    expert, here = _choices(experts, choice, chunk, S, B, per_sequence, A, CHUNK)
    before = expert.to(tl.int64) * chunks + chunk - 1  # in the flattened counts; nothing lies before the very first
    row = tl.load(ends + before, mask=(expert >= 0) & (before >= 0), other=0)
    for start in range(0, CHUNK * A, AT_ONCE):
        earlier = start + tl.arange(0, AT_ONCE)
        other, _ = _choices(experts, earlier, chunk, S, B, per_sequence, A, CHUNK)
        same = (other[None, :] == expert[:, None]) & (earlier[None, :] < choice[:, None])
        row += tl.sum(same.to(tl.int32), 1)
    tl.store(position + here, row.to(tl.int64), mask=expert >= 0)


@triton.jit
def _choices(experts, choice, chunk, S, B, per_sequence, A: tl.constexpr, CHUNK: tl.constexpr):
    """The expert of each choice of a chunk, -1 where there is none, and its place in [T, A]."""
    s = (chunk % per_sequence) * CHUNK + choice // A
    here = (s.to(tl.int64) * B + chunk // per_sequence) * A + choice % A
    return tl.load(experts + here, mask=(choice < CHUNK * A) & (s < S), other=-1), here


@triton.jit
def _add_counts(offsets, first, second, E, TALLIED: tl.constexpr):
    e = tl.program_id(0) * TALLIED + tl.arange(0, TALLIED)
    count = tl.load(offsets + e, mask=e < E, other=0) - tl.load(offsets + e - 1, mask=(e > 0) & (e < E), other=0)
    total = tl.load(first + e, mask=e < E, other=0)
    tl.store(first + e, total + count.to(total.dtype), mask=e < E)
    if second is not None:
        total = tl.load(second + e, mask=e < E, other=0)
        tl.store(second + e, total + count.to(total.dtype), mask=e < E)


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
