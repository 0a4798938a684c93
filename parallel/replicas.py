"""More tensor-parallel ranks than groups of rows that a projection's output falls into: neighbours share a group.

With T ranks and K groups, R = T / K neighbours hold one group. Some of its parts are split over them, others are on
each: such weights are replicas, whose gradients must be summed. A checkpoint shows none of it: it holds the groups one
after the other, as under fewer ranks.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor
from torch.nn import Parameter

_group: dist.ProcessGroup | None = None  # Megatron's parallel_state has none like it


def make_group(size: int) -> None:
    """Called by all ranks once Megatron's groups exist, in which tensor-parallel ranks are neighbours."""
    global _group
    _group = dist.new_subgroups(group_size=size)[0] if size > 1 else None


def forget_group() -> None:
    global _group
    _group = None


def largest(x: Tensor) -> Tensor:
    """The elementwise maximum over the replicas, in place."""
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=_group)
    return x


@torch.no_grad()
def sum_gradients(chunks: Sequence[torch.nn.Module]) -> None:
    """Add up what the replicas of a weight received. Called when data-parallel ranks have reduced their gradients."""
    if _group is None:
        return
    shared = [weight for chunk in chunks for weight in chunk.parameters() if getattr(weight, "is_replica", False)]
    if not shared:
        return
    flat = torch.cat([weight.main_grad.flatten() for weight in shared])
    dist.all_reduce(flat, group=_group)
    for weight, total in zip(shared, flat.split([weight.numel() for weight in shared]), strict=True):
        weight.main_grad.copy_(total.view_as(weight.main_grad))


class SharedGroupsLinear(ColumnParallelLinear):
    """A projection to `groups` equal groups of rows, fewer than ranks. `parts` are the rows of one group in order.

    The neighbours that hold a group split its parts evenly, but for those numbered in `shared`, which follow each other
    and are on each. The output is this rank's share of the parts, in order.
    """

    def __init__(
        self,
        input_size: int,
        groups: int,
        parts: Sequence[int],
        shared: range,
        config: TransformerConfig,
        tp_group: dist.ProcessGroup,
    ):
        ranks, rank = tp_group.size(), tp_group.rank()
        self.groups, self.parts, self.shared, self.replicas = groups, list(parts), shared, ranks // groups
        self.index, self.replica = divmod(rank, self.replicas)
        self.mine = [rows if part in shared else rows // self.replicas for part, rows in enumerate(parts)]
        super().__init__(
            input_size,
            ranks * sum(self.mine),
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=True,
            tp_group=tp_group,
        )
        place = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        copied = sum(self.mine[shared.start : shared.stop])
        self.split_weight = Parameter(torch.empty(sum(self.mine) - copied, input_size, **place))
        set_tensor_model_parallel_attributes(self.split_weight, is_parallel=True, dim=0, stride=1)
        if copied:
            self.shared_weight = Parameter(torch.empty(copied, input_size, **place))
            self.shared_weight.is_replica = True
            # Unmarked, a weight counts in the gradient norm on the first tensor-parallel rank only.
            if self.replica == 0:
                set_tensor_model_parallel_attributes(self.shared_weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[..., input] -> [..., rows of this rank]. One product, so that the input is gathered once."""
        weight = self.split_weight
        if self.shared:
            before = sum(self.mine[: self.shared.start])
            weight = torch.cat([weight[:before], self.shared_weight, weight[before:]])
        return super().forward(x, weight)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Parts of the one `weight` [groups x rows of a group, input] that a ColumnParallelLinear would have."""
        if sharded_offsets:
            raise ValueError("weights of several layers in one tensor are not supported here")
        key, data_rank = f"{prefix}weight", metadata["dp_cp_group"].rank()
        numbers = range(len(self.parts))
        split = [part for part in numbers if part not in self.shared]
        state = {f"{prefix}split_weight": self._described(key, self.split_weight, split, (0, 0, data_rank))}
        nothing = f"{prefix}_extra_state"  # which Megatron's layers have as well
        replica = (0, self.tp_group.rank(), data_rank)
        state[nothing] = make_sharded_object_for_checkpoint(None, nothing, replica_id=replica)
        if self.shared:
            replica = (0, self.replica, data_rank)
            state[f"{prefix}shared_weight"] = self._described(key, self.shared_weight, list(self.shared), replica)
        return state

    def _described(self, key: str, weight: Parameter, numbers: list[int], replica_id: tuple) -> ShardedTensorFactory:
        rows = [self.mine[part] for part in numbers]
        before = [sum(self.parts[:part]) for part in numbers]
        own = [0 if part in self.shared else self.replica * self.mine[part] for part in numbers]
        first = self.index * sum(self.parts)
        whole = (self.groups * sum(self.parts), weight.shape[1])

        def build(key: str, data: Tensor, replica_id: tuple, flattened_range: None) -> dict[str, ShardedTensor]:
            return {
                str(number): ShardedTensor(
                    key, piece, piece.dtype, tuple(piece.shape), whole, (first + start + offset, 0), None, replica_id
                )
                for number, piece, start, offset in zip(numbers, data.split(rows), before, own, strict=True)
            }

        def merge(pieces: dict[str, Tensor]) -> Tensor:
            return torch.cat([pieces[str(number)] for number in numbers])

        return ShardedTensorFactory(key, weight, build, merge, replica_id)
