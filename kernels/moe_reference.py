"""The operators of a mixture of experts in plain PyTorch: what each means, and what `moe.py` is tested against.

    routing = route(logits, bias, active=8, score="sigmoid", balance=True)    which experts, with which weights
    rows, weights = spread(x, routing.weights, routing.position)              one row for each token and active expert
    hidden  = grouped_linear(rows, fc1, routing.offsets)                      rows of an expert lie together
    hidden  = weighted_swiglu(hidden, weights)
    y       = combine(grouped_linear(hidden, fc2, routing.offsets), routing.position)

Everything has its gradient, and no function but `within_capacity` waits for the device. Tokens are counted along
[S, B]: token t = s B + b.
Legend: S tokens of a sequence, B sequences, T = S B, E experts, A active ones of each token, N = T A rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-20  # keeps a sum of sigmoid scores from dividing by zero, as Megatron-core has it


class Routing(NamedTuple):
    """Where each token goes. Only `weights` and `score_sums` carry gradients."""

    weights: Tensor  # [T, A] FP32, best expert first
    experts: Tensor  # [T, A] int32
    position: Tensor  # [T, A] int64: the row of this token at this expert, -1: dropped; rows are grouped by expert
    offsets: Tensor  # [E] int32: where the rows of each expert end
    score_sums: Tensor | None  # [B, E] FP32: scores that sum to 1 over the experts, summed over a sequence
    # [B, E] FP32, exact below 2^24: how often an expert is among the best by score alone, without the bias
    choices: Tensor | None

    kept: int | None = None  # rows in all, where some were dropped; None: N

    @property
    def counts(self) -> Tensor:
        """Rows of each expert [E]."""
        return self.offsets.diff(prepend=self.offsets.new_zeros(1))


def route(
    logits: Tensor,
    bias: Tensor | None,
    active: int,
    score: str,
    balance: bool,
    groups: tuple[int, int] | None = None,
) -> Routing:
    """logits [S, B, E] FP32; bias [E], moves the choice of experts and nothing else.

    With score="sigmoid" a token's weights are its scores, normalised over the chosen experts unless there is one only;
    with "softmax" they are the softmax over the chosen logits. Ties go to the lower expert. `balance` asks for
    `score_sums` and `choices`, what a balance loss is made of. With groups=(n, m) experts form n groups in their order,
    and a token chooses among those of its m best groups only, by the sum of a group's active / m largest keys
    (DeepSeek-V3; a group for each node limits what a token sends).
    """
    E = logits.shape[-1]
    flat = logits.reshape(-1, E)
    if score == "sigmoid":
        scores = flat.sigmoid()
        experts = _best(_within_groups(scores if bias is None else scores + bias, active, groups), active)
        weights = scores.gather(1, experts)
        if active > 1:
            weights = weights / (weights.sum(1, keepdim=True) + EPSILON)
        shares = scores / (scores.sum(1, keepdim=True) + EPSILON)
    else:
        shares = flat.softmax(1)
        experts = _best(_within_groups(flat if bias is None else flat + bias, active, groups), active)
        weights = flat.gather(1, experts).softmax(1)
    order = experts.flatten().sort(dim=0, stable=True).indices  # row -> (token, active expert)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    offsets = _count(experts.flatten().unsqueeze(0), E).cumsum(1, dtype=torch.int32).squeeze(0)
    sums = choices = None
    if balance:
        sums = shares.view_as(logits).sum(0)
        by_score = experts if bias is None and groups is None else _best(scores if score == "sigmoid" else flat, active)
        choices = _count(by_score.view(*logits.shape[:2], active).transpose(0, 1).flatten(1), E).float()
    return Routing(weights, experts.int(), position.view(-1, active), offsets, sums, choices)


def tally(routing: Routing, *totals: Tensor) -> None:
    """Add the rows of each expert to `totals` [E], of any dtype."""
    for total in totals:
        total += routing.counts


def within_capacity(routing: Routing, capacity: int) -> Routing:
    """The first `capacity` rows of each expert; the rest are dropped: later tokens, so that none depends on its future.

    The weights of a token's other experts stay what they are. Waits for the device to learn how many rows are left.
    """
    counts = routing.counts
    kept = counts.clamp(max=capacity)
    offsets = kept.cumsum(0, dtype=torch.int32)
    expert = routing.experts.long()
    within = routing.position - (routing.offsets - counts)[expert]  # which of its expert's rows
    position = torch.where(within < capacity, within + (offsets - kept)[expert], -1)
    return routing._replace(position=position, offsets=offsets, kept=int(offsets[-1]))


def _within_groups(key: Tensor, active: int, groups: tuple[int, int] | None) -> Tensor:
    """The keys [T, E], -inf outside of each token's best groups."""
    if groups is None:
        return key
    number, chosen = groups
    grouped = key.unflatten(1, (number, -1))
    best = _best(grouped.topk(active // chosen).values.sum(-1), chosen)
    outside = torch.ones(grouped.shape[:2], dtype=torch.bool, device=key.device).scatter_(1, best, False)
    return grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(1)


def _best(key: Tensor, active: int) -> Tensor:
    return key.sort(dim=1, descending=True, stable=True).indices[:, :active]


def _count(experts: Tensor, number: int) -> Tensor:
    """How often each expert occurs in each row of `experts`: int32 [rows, number]."""
    zeros = torch.zeros(experts.shape[0], number, dtype=torch.int32, device=experts.device)
    return zeros.scatter_add_(1, experts, torch.ones_like(experts, dtype=torch.int32))


def spread(x: Tensor, weights: Tensor, position: Tensor, kept: int | None = None) -> tuple[Tensor, Tensor]:
    """x [T, hidden], weights [T, A], position [T, A]. Returns rows [N or `kept`, hidden] and the weight of each
    [N or `kept`]: row position[t, a] is token t with weights[t, a].
    """
    kept = position.numel() if kept is None else kept
    choice = position.new_empty(kept + 1)  # what is dropped goes to the last place, -1
    choice[position.flatten()] = torch.arange(position.numel(), device=x.device)
    choice = choice[:kept]
    return x[choice // position.shape[1]], weights.flatten()[choice]


def combine(rows: Tensor, position: Tensor) -> Tensor:
    """The sum of each token's rows: rows [N, hidden] -> [T, hidden], summed in FP32 in the order of `position`."""
    return F.pad(rows, (0, 0, 0, 1))[position].float().sum(1).to(rows.dtype)  # a dropped row, -1, is zero


def weighted_swiglu(hidden: Tensor, weight: Tensor) -> Tensor:
    """weight * silu(gate) * up of hidden [N, gate | up], weight [N] FP32. FP32 inside."""
    gate, up = hidden.float().chunk(2, dim=-1)
    return (F.silu(gate) * up * weight.unsqueeze(-1)).to(hidden.dtype)


def described(hidden: int, ffn: int) -> str:
    """Who computes the products of experts of these widths."""
    return "PyTorch's grouped product"


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Each expert's rows times its own matrix: rows [N, in], weight [E, out, in], offsets [E] int32 -> [N, out].

    One call of PyTorch's grouped product for all experts, which reads the offsets on the device.
    """
    return _GroupedLinear.apply(rows, weight, offsets)


class _GroupedLinear(torch.autograd.Function):
    """The product's own gradient, which in PyTorch 2.13 fails where all rows are gone or a gradient was expanded."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, offsets)
        if rows.shape[0] == 0:
            return rows.new_empty(0, weight.shape[1])
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, offsets = ctx.saved_tensors
        if rows.shape[0] == 0:
            return torch.zeros_like(rows), torch.zeros_like(weight), None
        grad = grad.contiguous()
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = F.grouped_mm(grad, weight, offs=offsets)
        if ctx.needs_input_grad[1]:
            grad_weight = F.grouped_mm(grad.t(), rows, offs=offsets)
        return grad_rows, grad_weight, None
