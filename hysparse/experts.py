"""The experts of a layer as one grouped matrix product, and the layer that sends tokens to them.

Where a rank holds all experts, nothing leaves the device and nothing waits for it: where each expert's rows begin stays
a tensor from the router to the products. With `parallel.expert` > 1 rows travel through Megatron's all-to-all, which
must know their number and so waits once; everything on both sides of it is as without. What the numbers of a routing
mean is in `kernels.moe_reference`.
"""

from types import ModuleType

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from hysparse.deep_dispatcher import DeepDispatcher
from kernels.moe_reference import Routing


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

    def forward(
        self, rows: Tensor, tokens_per_expert: Tensor | None, weights: Tensor, offsets: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """What Megatron's layer calls: rows [N, hidden] grouped by expert, and the weight of each.

        Instead of tokens_per_expert there may be `offsets`, where the rows of each end.
        """
        offsets = tokens_per_expert.cumsum(0, dtype=torch.int32) if offsets is None else offsets
        return self.compute(rows, offsets, weights), None

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


def engine_experts_spec() -> ModuleSpec:
    """Megatron's experts on Transformer Engine's grouped products, which take the rows of each from the host."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelGroupedLinear,
        TERowParallelGroupedLinear,
    )

    def stateless(linear: type) -> type:
        """Megatron 0.16.1 takes FP8 state apart by expert; with current scaling that is an empty tensor."""
        return type(linear.__name__, (linear,), {"_split_extra_state": lambda self, state: [state] * self.num_gemms})

    submodules = MLPSubmodules(
        linear_fc1=stateless(TEColumnParallelGroupedLinear), linear_fc2=stateless(TERowParallelGroupedLinear)
    )
    return ModuleSpec(TEGroupedMLP, submodules=submodules)


class Dispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's all-to-all between our operators, in place of its masks and of its many slices.

    What the base class calls `routing_map` is a `kernels.moe_reference.Routing`.
    """

    def __init__(self, operators: ModuleType, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.operators = operators

    def dispatch_preprocess(self, hidden: Tensor, routing: Routing, weights: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [S, B, hidden], weights [T, active]. Returns rows grouped by expert, so by rank, and their weights."""
        self.hidden_shape, self.position = hidden.shape, routing.position
        counts = self.preprocess(routing.counts.unsqueeze(0))  # only sums over the first dimension
        if self.num_local_experts == 1:
            self.arriving = counts.unsqueeze(0)
        else:
            self.arriving = self.num_global_tokens_per_local_expert  # [ranks, local experts], here still on the device
        self.tokens_per_expert = None  # the base class would copy it to the host; ours stays
        self._maybe_dtoh_and_synchronize("before_permutation_1")
        return self.operators.spread(hidden.flatten(0, 1), weights, routing.position, routing.kept)

    def dispatch_postprocess(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What arrived, grouped by rank and then by expert, regrouped by expert."""
        self.regrouped = regrouped(self.arriving, len(rows))
        rows, weights = self.operators.spread(rows, weights.unsqueeze(1), self.regrouped)
        return rows, self.arriving.sum(0), weights

    def combine_preprocess(self, rows: Tensor) -> Tensor:
        return self.operators.combine(rows, self.regrouped)

    def combine_postprocess(self, rows: Tensor) -> Tensor:
        return self.operators.combine(rows, self.position).view(self.hidden_shape)


def regrouped(counts: Tensor, rows: int) -> Tensor:
    """The new place of each row [rows, 1]: they lie by (rank, expert) and shall lie by (expert, rank).

    counts [ranks, experts]; `rows`, their sum, is known on the host.
    """
    chunks = counts.flatten()
    ends = chunks.cumsum(0)
    turned = counts.t().flatten()
    starts = (turned.cumsum(0) - turned).view(counts.t().shape).t().flatten()  # of the same chunks, in the new order
    row = torch.arange(rows, device=counts.device)
    chunk = torch.searchsorted(ends, row, right=True)
    return (row + (starts - ends + chunks)[chunk]).unsqueeze(1)


class MixtureOfExperts(MoELayer):
    """Megatron's layer with our dispatcher, and a shorter way through it where this rank holds all experts."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        operators: ModuleType,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection)
        self.operators = operators
        dispatcher = DeepDispatcher if config.moe_token_dispatcher_type == "flex" else Dispatcher
        self.token_dispatcher = dispatcher(
            operators,
            self.num_local_experts,
            self.local_expert_indices,
            config=config,
            pg_collection=pg_collection,
        )

    def forward(
        self, hidden: Tensor, intermediate_tensors: None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """hidden [S, B, hidden]; the other arguments are the base class's, and stay unused."""
        if self.ep_group.size() > 1:
            return super().forward(hidden)
        operators = self.operators
        # Modules are called, not their methods: hooks that wait for weights must run.
        hidden, routing = self.router(hidden, hand_on=True)
        rows, weights = operators.spread(hidden.flatten(0, 1), routing.weights, routing.position, routing.kept)
        if isinstance(self.experts, Experts):
            rows, _ = self.experts(rows, None, weights, routing.offsets)
        else:
            rows, _ = self.experts(rows, routing.counts, weights)
        output = operators.combine(rows, routing.position).view_as(hidden)
        return output if self.shared_experts is None else output + self.shared_experts(hidden), None
