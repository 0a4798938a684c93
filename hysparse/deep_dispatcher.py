"""DeepEP between our router and our experts: a token travels once to each rank that has experts for it.

Megatron's flex dispatcher does the same from a mask of tokens and experts, which our router does not make. It has run
against a stand-in for the package deep_ep only, which needs GPUs on NVLink or RDMA.
"""

from types import ModuleType

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher
from torch import Tensor

from kernels.moe_reference import Routing


class DeepDispatcher(MoEFlexTokenDispatcher):
    """What the base class calls `routing_map` is a `kernels.moe_reference.Routing`."""

    def __init__(self, operators: ModuleType, *arguments, **keywords):
        super().__init__(*arguments, **keywords)

    def dispatch_preprocess(self, hidden: Tensor, routing: Routing, weights: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [S, B, hidden], weights [T, active] FP32. Returns tokens [T, hidden] and the weights."""
        self.hidden_shape = hidden.shape
        self._comm_manager.token_indices, self._comm_manager.token_probs = routing.experts.long(), weights
        return hidden.flatten(0, 1), weights

    def dispatch_postprocess(self, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [N, hidden] that arrived, weights [N, active], 0 for experts of other ranks. Rows by expert."""
        expert = self._comm_manager.dispatched_indices  # [N, active] of this rank, -1 of another one
        counts = self._comm_manager.tokens_per_expert  # on the host
        total = int(counts.sum())
        key = torch.where(expert < 0, self.num_local_experts, expert).flatten()
        order = key.argsort(stable=True)[:total]
        place = torch.full_like(key, total)
        place[order] = torch.arange(total, device=key.device)
        self.token, self.place = order // expert.shape[1], place.view_as(expert)
        rows = _Spread.apply(tokens, self.token, self.place)
        return rows, counts.to(tokens.device), weights.flatten()[order]

    def combine_preprocess(self, rows: Tensor) -> Tensor:
        return _Gather.apply(rows, self.token, self.place)


def _sum_of_places(rows: Tensor, place: Tensor) -> Tensor:
    """rows [N, hidden], place [T, active], N where there is no row -> [T, hidden], summed in FP32 in a fixed order."""
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return sum(padded[column].float() for column in place.unbind(1)).to(rows.dtype)


class _Spread(torch.autograd.Function):
    """A row for each expert of a token on this rank. PyTorch's own backward would add in an order that varies."""

    @staticmethod
    def forward(ctx, tokens: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return tokens[token]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _sum_of_places(grad, *ctx.saved_tensors), None, None


class _Gather(torch.autograd.Function):
    """The sum of each token's rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return _sum_of_places(rows, place)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (token,) = ctx.saved_tensors
        return grad[token], None, None
