"""The operators of a mixture of experts on Triton kernels, with gradients: the functions of `moe_reference.py`."""

import torch
from torch import Tensor

from kernels import grouped_hopper, moe_reference
from kernels.expert_rows import spread_rows, sum_rows, swiglu_backward, swiglu_forward
from kernels.moe_reference import Routing, within_capacity
from kernels.routing import add_counts, route_backward, route_forward

__all__ = [
    "Routing",
    "combine",
    "grouped_linear",
    "route",
    "spread",
    "tally",
    "weighted_swiglu",
    "within_capacity",
]


def route(
    logits: Tensor,
    bias: Tensor | None,
    active: int,
    score: str,
    balance: bool,
    groups: tuple[int, int] | None = None,
) -> Routing:
    """The active experts of each token, and where their rows go; arguments and result as in `moe_reference.route`."""
    if groups is not None:  # PyTorch's operators: more passes over the logits, the same on the device
        return moe_reference.route(logits, bias, active, score, balance, groups)
    return Routing(*_Route.apply(logits, bias, active, score == "softmax", balance))


def tally(routing: Routing, load: Tensor, tokens: Tensor | None = None) -> None:
    """Adds the rows of each expert to `load`; as in `moe_reference.tally`."""
    add_counts(routing.offsets, load, tokens)


def spread(x: Tensor, weights: Tensor, position: Tensor, kept: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows of tokens, and their weights, in the order of the experts; as in `moe_reference.spread`."""
    return _Spread.apply(x, weights, position, kept)


def combine(rows: Tensor, position: Tensor) -> Tensor:
    """The sum of each token's rows; as in `moe_reference.combine`."""
    return _Combine.apply(rows, position)


def weighted_swiglu(hidden: Tensor, weight: Tensor) -> Tensor:
    """SwiGLU of each row, times its weight; as in `moe_reference.weighted_swiglu`."""
    return _WeightedSwiGLU.apply(hidden, weight)


def described(hidden: int, ffn: int) -> str:
    """Who computes the experts' products."""
    if grouped_hopper.takes(2 * ffn, hidden) and grouped_hopper.takes(hidden, ffn):
        return "this project's grouped products"
    return moe_reference.described(hidden, ffn)


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The rows of each expert times its matrix; as in `moe_reference.grouped_linear`."""
    if grouped_hopper.supported(rows, weight):
        return _GroupedLinear.apply(rows, weight, offsets)
    return moe_reference.grouped_linear(rows, weight, offsets)  # PyTorch's grouped product


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, bias: Tensor | None, active: int, softmax: bool, balance: bool):
        weights, experts, position, offsets, sums, choices = route_forward(logits, bias, active, softmax, balance)
        ctx.save_for_backward(logits, weights, experts)
        ctx.softmax = softmax
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(experts, position, offsets, *([choices] if balance else []))
        return weights, experts, position, offsets, sums, choices

    @staticmethod
    def backward(ctx, weights_grad: Tensor | None, _experts, _position, _offsets, sums_grad: Tensor | None, _choices):
        logits, weights, experts = ctx.saved_tensors
        return route_backward(logits, weights, experts, weights_grad, sums_grad, ctx.softmax), None, None, None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, position: Tensor, kept: int | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(position)
        return spread_rows(x, weights, position, kept)

    @staticmethod
    def backward(ctx, rows_grad: Tensor, row_weights_grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *sum_rows(rows_grad, row_weights_grad, *ctx.saved_tensors), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(position)
        ctx.kept = len(rows)
        return sum_rows(rows, None, position)[0]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return spread_rows(grad, None, *ctx.saved_tensors, ctx.kept)[0], None


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return swiglu_forward(hidden, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return swiglu_backward(*ctx.saved_tensors, grad)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, offsets)
        ctx.groups = grouped_hopper.Groups(offsets, len(rows))
        return grouped_hopper.multiply(rows, weight, ctx.groups, turned=False)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, offsets = ctx.saved_tensors
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = grouped_hopper.multiply(grad, weight, ctx.groups, turned=True)
        if ctx.needs_input_grad[1]:
            grad_weight = grouped_hopper.weight_gradient(grad, rows, offsets)
        return grad_rows, grad_weight, None
