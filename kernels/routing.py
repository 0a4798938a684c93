"""The router's kernels: scores, the best experts, their weights, and the row of every token at every expert.

`_route` reads the logits once. A program takes a chunk of tokens of one sequence, one after the other, and extracts the
best expert A times: the largest key, the lowest index among equals, then out with it. That beats a sort, as A is far
below E. A program is one warp and its keys are integers: then it takes one instruction, and no barrier, to find the
maximum over all lanes. Where the best by score are wanted as well, both extractions take turns. On the way it counts
how often its tokens chose each expert.

These counts [E, chunks] make a counting sort: their running sum over the flattened array, experts outside, says where
the rows of an expert from a chunk begin. `_place` then numbers the choices of a chunk: each comes behind those of the
same expert before it. Its first program also notes where the rows of each expert end. Sums over tokens are sums over
chunks in a fixed order: no atomics, the same bits each time.

A balance loss needs each sequence's sum of scores and count of choices by score alone; `_route` writes both by chunk.
`_route_backward` computes the scores again from the logits. Shapes and meaning as in `moe_reference.route`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.errors import KernelError
from kernels.overlap import overlapping, wait_for_previous

CHUNKS = (4, 16)  # tokens of one: few of a short micro-batch, so that all multiprocessors have some
MANY = 1024  # chunks
WARP_EXPERTS = 512  # that a warp of `_route` has the registers for
GRADIENT_NUMBERS = 2048  # tokens x experts of a program of `_route_backward`
TALLIED = 512  # experts of a program of `_add_counts`
AT_ONCE = 8  # choices with which `_place` compares all those of a chunk
EPSILON = tl.constexpr(1e-20)
TAKEN = tl.constexpr(-(2**31))  # the rank of an expert that has been extracted


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
        none = (logits.new_zeros(B, E), logits.new_zeros(B, E)) if balance else (None, None)
        return weights, experts, position, logits.new_zeros(E, dtype=torch.int32), *none
    counts = logits.new_empty(E, chunks, dtype=torch.int32)
    # Of each chunk the sum of scores and, unless `counts` has them, the choices by score; FP32 holds those exactly.
    sums = logits.new_empty(B, per_sequence, 1 if bias is None else 2, E) if balance else None
    constants = _constants(E, active, softmax)
    _route[(chunks,)](
        *(logits, bias, weights, experts, counts, sums),
        *(S, B, per_sequence, chunks),
        **constants,
        **overlapping(),
        CHUNK=chunk,
        num_warps=max(constants["PADDED"] // WARP_EXPERTS, 1),
    )
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    numbers = triton.next_power_of_2(chunk * active)
    offsets = logits.new_empty(E, dtype=torch.int32)
    _place[(chunks,)](
        *(experts, ends, position, offsets, S, B, per_sequence, chunks),
        *(E, constants["PADDED"], active, numbers, AT_ONCE, chunk),
        **overlapping(),
    )
    if not balance:
        return weights, experts, position, offsets, None, None
    sums = sums.sum(1)
    choices = sums[:, 1] if bias is not None else counts.view(E, B, per_sequence).sum(2, dtype=torch.int32).t().float()
    return weights, experts, position, offsets, sums[:, 0], choices


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
        tile = max(1, min(CHUNKS[-1], GRADIENT_NUMBERS // constants["PADDED"]))
        weights_grad, sums_grad = (x if x is None else x.contiguous() for x in (weights_grad, sums_grad))
        _route_backward[(triton.cdiv(S * B, tile),)](
            *(logits.contiguous(), weights, experts, weights_grad, sums_grad, logits_grad, S * B, B),
            **constants,
            **overlapping(),
            TILE=tile,
            num_warps=4,
        )
    return logits_grad


def add_counts(offsets: Tensor, first: Tensor, second: Tensor | None) -> None:
    """Add the differences of `offsets` [E] int32, the rows of each expert, to `first` and `second` [E]."""
    E = len(offsets)
    _add_counts[(triton.cdiv(E, TALLIED),)](offsets, first, second, E, TALLIED, **overlapping())


def _constants(experts: int, active: int, softmax: bool) -> dict:
    return {"E": experts, "PADDED": triton.next_power_of_2(experts), "A": active, "SOFTMAX": softmax}


@triton.jit
def _ranks(key):
    """int32 numbers in the order of the keys."""
    bits = (key + 0.0).to(tl.int32, bitcast=True)  # -0 counts as 0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _extract(rank, e):
    """The expert of the highest rank, the first of several, and the ranks without it."""
    best = tl.min(tl.where(rank == tl.max(rank, 0), e, rank.shape[0] - 1), 0)
    return best, tl.where(e == best, TAKEN, rank)


@triton.jit
def _scores(logit, real, SOFTMAX: tl.constexpr):
    """Scores [..., experts], 0 where there is no expert, and [..., 1] by what they are divided to sum to 1."""
    EXPERTS: tl.constexpr = len(logit.shape) - 1
    if SOFTMAX:
        score = tl.exp(logit - tl.max(logit, EXPERTS, keep_dims=True))
        total = tl.sum(score, EXPERTS, keep_dims=True)
    else:
        score = tl.where(real, tl.sigmoid(logit), 0.0)
        total = tl.sum(score, EXPERTS, keep_dims=True) + EPSILON
    return score, total


@triton.jit
def _route(
    logits, bias, weights, experts, counts, sums,
    S, B, per_sequence, chunks,
    E: tl.constexpr, PADDED: tl.constexpr, A: tl.constexpr, SOFTMAX: tl.constexpr, CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    chunk = tl.program_id(0)
    e = tl.arange(0, PADDED)
    real = e < E
    column = tl.arange(0, triton.next_power_of_2(A))
    counted = tl.zeros([PADDED], tl.int32)  # in the upper half the choices by score, to need fewer registers
    summed = tl.zeros([PADDED], tl.float32)
    first = chunk % per_sequence * CHUNK
    for step in range(tl.minimum(CHUNK, S - first)):
        token = (first + step).to(tl.int64) * B + chunk // per_sequence
        logit = tl.load(logits + token * E + e, mask=real, other=float("-inf"))
        score, total = _scores(logit, real, SOFTMAX)
        if sums is not None:
            summed += score / total
        key = logit if SOFTMAX else tl.where(real, score, float("-inf"))
        rank_by_score = _ranks(key)
        rank = rank_by_score
        if bias is not None:
            rank = _ranks(key + tl.load(bias + e, mask=real, other=0.0))

        best = tl.zeros(column.shape, tl.int32)
        for a in range(A):  # unrolled, it would take twice the registers
            index, rank = _extract(rank, e)
            best = tl.where(column == a, index, best)
            if bias is not None and sums is not None:
                _, rank_by_score = _extract(rank_by_score, e)
        best = tl.minimum(best, E - 1)  # a token whose logits are NaN may find what is none
        chosen = tl.load(logits + token * E + best, mask=column < A, other=float("-inf"))
        if SOFTMAX:
            chosen = tl.exp(chosen - tl.max(chosen, 0))
            chosen = chosen / tl.sum(chosen, 0)
        else:
            chosen = tl.sigmoid(chosen)
            if A > 1:
                chosen = chosen / (tl.sum(chosen, 0) + EPSILON)
        tl.store(experts + token * A + column, best, mask=column < A)
        tl.store(weights + token * A + column, chosen, mask=column < A)

        counted += (real & (rank == TAKEN)).to(tl.int32)
        if bias is not None and sums is not None:
            counted += (real & (rank_by_score == TAKEN)).to(tl.int32) << 16
    tl.store(counts + e.to(tl.int64) * chunks + chunk, counted & 0xFFFF, mask=real)
    if sums is not None:
        sums += chunk.to(tl.int64) * (E if bias is None else 2 * E)
        tl.store(sums + e, summed, mask=real)
        if bias is not None:
            tl.store(sums + E + e, (counted >> 16).to(tl.float32), mask=real)


@triton.jit
def _place(
    experts, ends, position, offsets,
    S, B, per_sequence, chunks,
    E: tl.constexpr, PADDED: tl.constexpr, A: tl.constexpr,
    NUMBERS: tl.constexpr, AT_ONCE: tl.constexpr, CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    chunk = tl.program_id(0)
    e = tl.arange(0, PADDED)
    noted = (e < E) & (chunk == 0)
    end = tl.load(ends + e.to(tl.int64) * chunks + chunks - 1, mask=noted)
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
    tl.store(offsets + e, end, mask=noted)


@triton.jit
def _choices(experts, choice, chunk, S, B, per_sequence, A: tl.constexpr, CHUNK: tl.constexpr):
    """The expert of each choice of a chunk, -1 where there is none, and its place in [T, A]."""
    s = (chunk % per_sequence) * CHUNK + choice // A
    here = (s.to(tl.int64) * B + chunk // per_sequence) * A + choice % A
    return tl.load(experts + here, mask=(choice < CHUNK * A) & (s < S), other=-1), here


@triton.jit
def _add_counts(offsets, first, second, E, TALLIED: tl.constexpr, OVERLAP: tl.constexpr):
    wait_for_previous(OVERLAP)
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
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    exists = token < T
    e = tl.arange(0, PADDED)[None, :]
    real = exists[:, None] & (e < E)
    logit = tl.load(logits + token[:, None] * E + e, mask=real, other=float("-inf"))
    logit = tl.where(exists[:, None], logit, 0.0)
    score, total = _scores(logit, e < E, SOFTMAX)
    share = score / total
    grad = tl.zeros([TILE, PADDED], tl.float32)  # of the score; with softmax, of the logit
    if sums_grad is not None:
        asked = tl.load(sums_grad + (token % B)[:, None] * E + e, mask=real, other=0.0)
        asked -= tl.sum(asked * share, 1)[:, None]
        grad += asked * share if SOFTMAX else asked / total
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
