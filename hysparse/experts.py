"""The experts of a layer as one grouped matrix product, and the layer that sends tokens to them.

Where a rank holds all experts, nothing leaves the device and nothing waits for it: where each expert's rows begin stays
a tensor from the router to the products. With `parallel.expert` > 1 tokens travel through Megatron's all-to-all
dispatcher to the same experts. Both take what the router chose; what the numbers mean is in `kernels.moe_reference`.
"""

from types import ModuleType

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter


class Experts(MegatronModule):
    """SwiGLU experts side by side: fc1 [local experts, gate and up, hidden], fc2 [local experts, hidden, ffn].

    These are the matrices of `torch.nn.Linear` stacked, and so is the checkpoint: [experts, out, in] under the names
    that Megatron gives to its own experts, cut at any expert.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        operators: ModuleType,
        pg_collection: ProcessGroupCollection,
    ):
        super().__init__(config)
        self.operators, self.ep_group, self.dp_group = operators, pg_collection.ep, pg_collection.expt_dp
        hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size
        place = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.fc1 = Parameter(config.init_method(torch.empty(num_local_experts, 2 * ffn, hidden, **place)))
        self.fc2 = Parameter(config.output_layer_init_method(torch.empty(num_local_experts, hidden, ffn, **place)))
        for weight in (self.fc1, self.fc2):  # no copies on tensor-parallel ranks: all count in the gradient norm
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)

    def forward(self, rows: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """What Megatron's dispatchers call: rows [N, hidden] grouped by expert, and the weight of each."""
        counts = tokens_per_expert.to(rows.device, non_blocking=True)
        return self.compute(rows, counts.cumsum(0, dtype=torch.int32), weights.float()), None

    def compute(self, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        """rows [N, hidden]; offsets [local experts] int32, where the rows of each end; weights [N] FP32."""
        hidden = self.operators.grouped_linear(rows, self.fc1, offsets)
        hidden = self.operators.weighted_swiglu(hidden, weights)
        return self.operators.grouped_linear(hidden, self.fc2, offsets)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The same tensors as Megatron's SequentialMLP and TEGroupedMLP write."""
        axis = len(sharded_offsets)
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}experts.linear_{name}.weight",
                weight,
                *sharded_offsets,
                (axis, self.ep_group.rank(), self.ep_group.size()),
                replica_id=(0, 0, self.dp_group.rank()),
                prepend_axis_num=axis,
            )
            for name, weight in (("fc1", self.fc1), ("fc2", self.fc2))
        }


class MixtureOfExperts(MoELayer):
    """Megatron's layer, and a shorter way through it where this rank holds all experts."""

    def forward(
        self, hidden: Tensor, intermediate_tensors: None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """hidden [S, B, hidden]; the other arguments are the base class's, and stay unused."""
        if self.ep_group.size() > 1:
            return super().forward(hidden)
        operators = self.experts.operators
        routing = self.router.choose(hidden)
        rows = operators.spread(hidden.flatten(0, 1), routing.position)
        weights = operators.by_row(routing.weights, routing.position)
        rows = self.experts.compute(rows, routing.offsets, weights)
        output = operators.combine(rows, routing.position).view_as(hidden)
        return output if self.shared_experts is None else output + self.shared_experts(hidden), None
