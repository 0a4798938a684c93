"""The layers of one pipeline stage, and the loop that carries the shared K/V through them.

What a full layer hands on is a value that travels from layer to layer. It is an explicit input and output of every
recomputed layer, so that gradients of K and V arrive from all sparse layers.
"""

from collections.abc import Sequence

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint as recomputed
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from hysparse.attention import FullAttention, Positions, Shared
from hysparse.norm import RMSNorm


class HybridLayer(TransformerLayer):
    """A pre-norm transformer layer whose attention reads and hands on the shared K/V.

    With `recompute` its inputs are all that it keeps for its backward pass.
    """

    def __init__(self, *arguments, recompute: bool, **more):
        super().__init__(*arguments, **more)
        self.recompute = recompute

    @property
    def is_full(self) -> bool:
        return isinstance(self.self_attention, FullAttention)

    def forward(self, hidden: Tensor, positions: Positions, shared: Shared | None) -> tuple[Tensor, Shared | None]:
        """hidden [S, B, hidden], under sequence parallelism [S / tensor, B, hidden].

        `shared` is what a full layer handed on: to a sparse layer that of its block, to a full one its own of before.
        """
        with get_fp8_context(self.config):  # here and not around the stack: a recomputation enters it again
            output, shared = self.self_attention(self.input_layernorm(hidden), positions, shared)
            return self._forward_mlp(hidden + output), shared


class HybridStack(MegatronModule):
    """The layers of this stage, `specs` in order, and the final norm where the stage is the last."""

    def __init__(
        self,
        config: TransformerConfig,
        specs: Sequence[ModuleSpec],
        pg_collection: ProcessGroupCollection,
        post_process: bool,
        vp_stage: int | None,
    ):
        super().__init__(config)
        self.tp_group = pg_collection.tp
        self.layers = torch.nn.ModuleList(
            build_module(spec, config=config, layer_number=number, pg_collection=pg_collection, vp_stage=vp_stage)
            for number, spec in enumerate(specs, start=1)
        )
        self.final_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon) if post_process else None

    def forward(self, hidden: Tensor, positions: Positions) -> Tensor:
        """[S, B, hidden] -> [S, B, hidden]."""
        shared = None
        for layer in self.layers:
            run = _run_recomputed if layer.recompute and torch.is_grad_enabled() else _run
            hidden, shared = run(layer, hidden, positions, None if layer.is_full else shared)
        return hidden if self.final_norm is None else self.final_norm(hidden)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Layers under their number in the whole model, so that checkpoints do not depend on the pipeline."""
        state = {}
        for index, layer in enumerate(self.layers):
            here, name = f"{prefix}layers.{index}.", f"{prefix}layers.{layer.layer_number - 1}."
            layer_state = layer.sharded_state_dict(here, sharded_offsets, metadata)
            replace_prefix_for_sharding(layer_state, here, name)
            state.update(layer_state)
        if self.final_norm is not None:
            state.update(
                sharded_state_dict_default(
                    self.final_norm, f"{prefix}final_norm.", sharded_offsets, metadata, tp_group=self.tp_group
                )
            )
        return state


def _run(
    layer: HybridLayer, hidden: Tensor, positions: Positions, shared: Shared | None
) -> tuple[Tensor, Shared | None]:
    return layer(hidden, positions, shared)


def _run_recomputed(
    layer: HybridLayer, hidden: Tensor, positions: Positions, shared: Shared | None
) -> tuple[Tensor, Shared | None]:
    """Like `_run`, keeping only the inputs. Every tensor passes through the arguments: one that the unit saw from
    outside would get no gradient. The second run of a full layer takes over what the first one selected."""
    earlier = None

    def unit(hidden: Tensor, *tensors: Tensor | None) -> Tensor | Shared:
        nonlocal earlier
        given = earlier if shared is None else tensors[len(positions) :]
        hidden, handed_on = layer(hidden, Positions(*tensors[: len(positions)]), given)
        if not layer.is_full or handed_on is None:
            return hidden
        # detached: autograd makes the unit the origin of what it returns, and each would keep the other alive
        earlier = tuple(None if tensor is None else tensor.detach() for tensor in handed_on)
        return hidden, *handed_on

    result = recomputed(unit, False, hidden, *positions, *(shared or ()))
    return (result, shared) if torch.is_tensor(result) else (result[0], result[1:])
