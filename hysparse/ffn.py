"""The feed-forward half of a layer: dense SwiGLU, or a mixture of such experts with Megatron's dispatcher."""

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from hysparse.config import ModelConfig, MoEConfig


class Router(TopKRouter):
    """Megatron's router with the weight of its balance loss put right.

    Megatron 0.16.1 multiplies the loss by a number of tokens because all gradients are later divided by the tokens of
    the global batch. For the sequence-wise loss it takes one sequence's share of this rank: too little by the
    micro-batch size and by the tensor-parallel size, so that the same run would balance less under another layout.
    """

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff, aux_loss, aux_loss_name, reduce_group, **keywords
    ) -> Tensor:
        keywords["valid_token_count"] = activation.shape[0] * reduce_group.size()
        return super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, aux_loss_name, reduce_group, **keywords
        )

    def _maintain_float32_expert_bias(self) -> None:
        """Called before every routing. Under BF16 the counts behind the bias must stay exact as well."""
        super()._maintain_float32_expert_bias()
        if self.local_tokens_per_expert is not None:
            self.local_tokens_per_expert.data = self.local_tokens_per_expert.data.float()


def ffn_spec(model: ModelConfig) -> ModuleSpec:
    if model.moe is None:
        return ModuleSpec(MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))
    spec = get_moe_module_spec_for_backend(LocalSpecProvider(), num_experts=model.moe.experts, moe_grouped_gemm=False)
    spec.submodules.router = Router
    return spec


def moe_settings(moe: MoEConfig | None, sequence_ranks: int) -> dict:
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
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": moe.aux_loss,
        # Megatron averages this loss over these ranks, and then weighs each by its own tokens only.
        "moe_z_loss_coeff": moe.z_loss * sequence_ranks or None,
        "moe_token_dispatcher_type": "alltoall",
    }
