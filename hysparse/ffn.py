"""The feed-forward half of a layer: dense SwiGLU, or a router and a mixture of such experts."""

import math
from functools import partial
from types import ModuleType

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hysparse.choices import Balance, Dispatcher
from hysparse.config import ModelConfig, MoEConfig
from hysparse.experts import Experts, MixtureOfExperts, engine_experts_spec
from hysparse.linears import MEGATRON, Linears
from kernels.moe_reference import Routing


class Router(TopKRouter):
    """Megatron's router: its weight, its expert bias and its losses; the choice is made by our operators.

    `load` counts the rows that every expert was chosen for since it was last read, `dropped` those of them that found
    no room; what a recomputation or an evaluation routes is not counted. In training an expert takes no more rows than
    `capacity_factor` times the mean of the micro-batch on this rank, unless that is 0.
    """

    def __init__(
        self,
        config: TransformerConfig,
        operators: ModuleType,
        capacity_factor: float,
        pg_collection: ProcessGroupCollection,
    ):
        super().__init__(config, pg_collection)
        self.operators, self.capacity_factor = operators, capacity_factor
        groups = config.moe_router_num_groups
        self.groups = (groups, config.moe_router_group_topk) if groups else None
        load = torch.zeros(config.num_moe_experts, dtype=torch.int64, device=torch.cuda.current_device())
        self.register_buffer("load", load, persistent=False)
        self.register_buffer("dropped", load.new_zeros(()), persistent=False)

    def choose(self, hidden: Tensor) -> tuple[Routing, Tensor]:
        """hidden [S, B, hidden], under sequence parallelism this rank's part of S; returned as well."""
        self._maintain_float32_expert_bias()
        logits, hidden = self._logits(hidden)  # [S, B, E] FP32
        logits = self.apply_z_loss(logits.flatten(0, 1)).view_as(logits)
        balance = self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled()
        routing = self.operators.route(logits, self.expert_bias, self.topk, self.score_function, balance, self.groups)
        if balance:
            routing = routing._replace(weights=self._with_balance_loss(routing, hidden.shape[0]))
        if self.training and torch.is_grad_enabled():
            self.operators.tally(routing, self.load, *([self.local_tokens_per_expert] * self.enable_expert_bias))
        if self.training and self.capacity_factor:
            routing = self._within_capacity(routing)
        return routing, hidden

    def _within_capacity(self, routing: Routing) -> Routing:
        capacity = math.ceil(self.capacity_factor * routing.experts.numel() / self.num_experts)
        if torch.is_grad_enabled():
            self.dropped += (routing.counts - capacity).clamp(min=0).sum()
        return self.operators.within_capacity(routing, capacity)

    def forward(self, hidden: Tensor, padding_mask: None = None, hand_on: bool = False) -> tuple[Tensor, Routing]:
        """What Megatron's layer hands to `experts.Dispatcher`. With `hand_on` `hidden` instead of the weights, for the
        experts: with their gradient of it the router's takes no further addition.
        """
        routing, hidden = self.choose(hidden)
        return hidden if hand_on else routing.weights, routing

    def _logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if hidden.is_cuda and hidden.dtype == torch.bfloat16:
            return _Logits.apply(hidden, self.weight)
        return self.gating(hidden), hidden

    def _with_balance_loss(self, routing: Routing, tokens: int) -> Tensor:
        """The weights, with the balance loss in their gradient: E sum f_e P_e, by sequence and then their mean, or of
        the micro-batch as a whole.

        `tokens` of each sequence are on this rank. f is counted over the ranks that share a sequence or the
        micro-batch; P is of this rank's tokens, and the gradients of the ranks add up.
        """
        sums, choices = routing.score_sums, routing.choices  # [B, E]
        group = self.tp_cp_group
        if self.routing_type == "aux_loss":
            group = self.tp_dp_cp_group
            tokens, sums, choices = tokens * len(sums), sums.sum(0, keepdim=True), choices.sum(0, keepdim=True)
        if group.size() > 1:
            choices = choices.clone(memory_format=torch.contiguous_format)
            torch.distributed.all_reduce(choices, group=group)
        scale = self.num_experts / (self.topk * (tokens * group.size()) ** 2 * len(choices))
        # All gradients are later divided by the tokens of the global batch, for which those of the micro-batch make up.
        # Megatron's own takes one sequence's share of this rank: under another layout it would balance less.
        scale *= self.config.moe_aux_loss_coeff * len(routing.weights) * group.size()
        return _WithBalanceLoss.apply(routing.weights, sums, choices, scale)

    def _maintain_float32_expert_bias(self) -> None:
        """Called before every routing. Under BF16 the counts behind the bias must stay exact as well."""
        super()._maintain_float32_expert_bias()
        if self.local_tokens_per_expert is not None:
            self.local_tokens_per_expert.data = self.local_tokens_per_expert.data.float()


class _WithBalanceLoss(torch.autograd.Function):
    """The weights as they are; the gradient of scale * sum(sums * choices) joins that of `sums`, times the scale that
    Megatron has given to such losses.
    """

    @staticmethod
    def forward(ctx, weights: Tensor, sums: Tensor, choices: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(choices)
        ctx.scale = scale
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (choices,) = ctx.saved_tensors
        loss_scale = MoEAuxLossAutoScaler.main_loss_backward_scale  # None: 1
        return grad, choices * (ctx.scale if loss_scale is None else ctx.scale * loss_scale), None, None


class _Logits(torch.autograd.Function):
    """BF16 hidden states times BF16 weights, exact products summed and left in FP32; and the hidden states again.

    The gradient of the logits is rounded to BF16 as that of any other projection's output: what it turns into, the
    gradients of hidden states and weights, is BF16 as well. The gradient of the hidden states handed on is added in the
    product.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight)
        ctx.set_materialize_grads(False)
        logits = torch.mm(hidden.flatten(0, -2), weight.t(), out_dtype=torch.float32)
        return logits.view(*hidden.shape[:-1], -1), hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor | None, others: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        if grad is None:
            return others, None
        grad = grad.flatten(0, -2).to(hidden.dtype)
        if others is None:
            hidden_grad = torch.mm(grad, weight)
        else:
            hidden_grad = others.flatten(0, -2).addmm_(grad, weight)  # nobody else holds it, and addmm would copy it
        return hidden_grad.view_as(hidden), torch.mm(grad.t(), hidden.flatten(0, -2))


def ffn_spec(model: ModelConfig, layer: int, operators: ModuleType, linears: Linears = MEGATRON) -> ModuleSpec:
    """Of layer number `layer`, from 0. `operators` are those of a mixture of experts."""
    dense = MLPSubmodules(linear_fc1=linears.column, linear_fc2=linears.row)
    if model.is_dense(layer):
        return ModuleSpec(MLP, submodules=dense)
    shared = {"operators": operators}
    return ModuleSpec(
        MixtureOfExperts,
        params=shared,
        submodules=MoESubmodules(
            experts=engine_experts_spec() if linears.experts_by_engine else ModuleSpec(Experts, params=shared),
            router=partial(Router, **shared, capacity_factor=model.moe.capacity_factor),
            shared_experts=ModuleSpec(SharedExpertMLP, submodules=dense),
        ),
    )


def moe_settings(moe: MoEConfig | None, sequence_ranks: int, dispatcher: Dispatcher = Dispatcher.alltoall) -> dict:
    """The fields of Megatron's TransformerConfig. `sequence_ranks` (tensor x context) share a sequence."""
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.experts,
        "moe_router_topk": moe.active,
        "moe_ffn_hidden_size": moe.ffn,
        "moe_router_score_function": str(moe.score),
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": moe.bias_update_rate > 0,
        "moe_router_bias_update_rate": moe.bias_update_rate,
        "moe_router_load_balancing_type": "seq_aux_loss" if moe.balance is Balance.sequence else "aux_loss",
        "moe_aux_loss_coeff": moe.aux_loss,
        # Megatron averages this loss over these ranks, and then weighs each by its own tokens only.
        "moe_z_loss_coeff": moe.z_loss * sequence_ranks or None,
        "moe_router_num_groups": moe.groups if moe.groups > 1 else None,
        "moe_router_group_topk": moe.active_groups if moe.groups > 1 else None,
        "moe_shared_expert_intermediate_size": moe.shared_ffn or None,
        "moe_token_dispatcher_type": "flex" if dispatcher is Dispatcher.deepep else "alltoall",
    }
