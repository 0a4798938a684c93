"""The two kinds of attention layer, as the paper writes them (section 3), on Megatron's tensor-parallel projections.

Shapes: S tokens, B sequences, H query heads, K KV heads, G = H / K, D head dimension; H and K are this rank's share
under tensor parallelism. Megatron keeps activations [S, B, ...]; the operators in `kernels` take [B, S, ...]
views of them.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel import checkpoint as recomputed
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from hysparse.config import AttentionConfig, Gate, Source
from hysparse.norm import RMSNorm
from kernels.reference import rotate
from kernels.shared import Branch, SharedKV
from parallel import replicas
from parallel.replicas import SharedGroupsLinear


class Positions(NamedTuple):
    """Where tokens stand: their document and their rotation. The same for all layers of a forward pass."""

    document_start: Tensor  # [B, S] int32, where the token's document begins in the sequence
    cos: Tensor  # [S, B, 1, D] FP32
    sin: Tensor  # [S, B, 1, D] FP32


def rotary_positions(document_start: Tensor, head_dim: int, base: float) -> Positions:
    """Rotations for tokens counted from the start of their document. document_start [B, S]."""
    place = torch.arange(document_start.shape[1], device=document_start.device) - document_start  # [B, S]
    frequency = base ** (-torch.arange(0, head_dim, 2, device=place.device, dtype=torch.float32) / head_dim)
    angle = place.t().unsqueeze(-1).float() * frequency  # [S, B, D/2]
    angle = torch.cat([angle, angle], dim=-1).unsqueeze(2)  # [S, B, 1, D]
    return Positions(document_start, angle.cos(), angle.sin())


def batch_first(x: Tensor) -> Tensor:
    """[S, B, ...] -> [B, S, ...], a view."""
    return x.transpose(0, 1)


class Attention(MegatronModule):
    """What both kinds share: one fused input projection, RoPE, gates, and the output projection.

    The rows of the input projection are grouped by KV head, so that tensor parallelism keeps a group's queries, its key
    and value and its gates on one rank: for each KV head [query G x D | key D, value D | each gate G or G x D].
    On more ranks than KV heads neighbours share one: its key and value are on each of them, the rest is split.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        attention: AttentionConfig,
        operators: ModuleType,
        own_kv: bool,
        gates: tuple[Gate, ...],
        qk_norm: bool,
        recompute: bool,
    ):
        super().__init__(config)
        self.attention, self.operators, self.recompute = attention, operators, recompute
        self.layer_number, self.tp_group = layer_number, pg_collection.tp
        self.head_dim, groups = config.kv_channels, config.num_query_groups
        self.replicas = max(1, pg_collection.tp.size() // groups)  # ranks of a KV head
        self.kv_heads = max(1, groups // pg_collection.tp.size())
        self.group = config.num_attention_heads // groups // self.replicas
        self.heads = self.kv_heads * self.group

        def rows_of(group: int) -> list[int]:
            """Of a KV head with so many query heads."""
            gate_rows = {Gate.headwise: group, Gate.elementwise: group * self.head_dim}
            return [group * self.head_dim, *([self.head_dim] * 2 * own_kv), *(gate_rows[gate] for gate in gates)]

        self.rows = rows_of(self.group)
        self.own_kv, self.gates = own_kv, len(gates)
        self.in_one_pass = not qk_norm and Gate.elementwise not in gates
        linear = {"config": config, "init_method": config.init_method, "bias": False, "tp_group": pg_collection.tp}
        if self.replicas > 1:
            parts, kv = rows_of(self.group * self.replicas), range(1, 1 + 2 * own_kv)
            self.linear_in = SharedGroupsLinear(config.hidden_size, groups, parts, kv, config, pg_collection.tp)
        else:
            self.linear_in = ColumnParallelLinear(
                config.hidden_size, groups * sum(self.rows), gather_output=False, skip_bias_add=False, **linear
            )
        self.linear_out = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            input_is_parallel=True,
            skip_bias_add=True,
            **linear,
        )
        self.query_norm = RMSNorm(config, self.head_dim, config.layernorm_epsilon) if qk_norm else None
        self.key_norm = RMSNorm(config, self.head_dim, config.layernorm_epsilon) if qk_norm and own_kv else None

    def project(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:
        """x [S, B, hidden] -> query [S, B, H, D], key and value [S, B, K, D] or None, gates [S, B, H, 1 or D]."""
        y = self.linear_in(x)[0]
        y = y.view(*y.shape[:2], self.kv_heads, -1)  # [S, B, K, rows]
        if self.in_one_pass:
            query, key, value, gates = self.operators.rotary_split(
                y, positions.cos, positions.sin, self.group, self.own_kv, self.gates
            )
            return query, key, value, [gate.unsqueeze(-1) for gate in gates]
        query, *rest = y.split(self.rows, dim=-1)
        query = query.reshape(*y.shape[:2], self.heads, self.head_dim)
        if self.query_norm is not None:
            query = self.query_norm(query)
        key = value = None
        if self.own_kv:
            key, value, *rest = rest
            if self.key_norm is not None:
                key = self.key_norm(key)
            key = rotate(key, positions.cos, positions.sin)
        gates = [gate.reshape(*y.shape[:2], self.heads, -1).sigmoid() for gate in rest]
        return rotate(query, positions.cos, positions.sin), key, value, gates

    def project_out(self, output: Tensor) -> Tensor:
        """[S, B, H, D] -> [S, B, hidden]."""
        return self.linear_out(output.flatten(2))[0]


class FullAttention(Attention):
    """Causal attention; as the oracle of its hybrid block it also selects key blocks (paper, section 3.2)."""

    def __init__(self, *arguments, attention: AttentionConfig, has_readers: bool, **keywords):
        gates = () if attention.output_gate is Gate.none else (attention.output_gate,)
        super().__init__(*arguments, attention=attention, own_kv=True, gates=gates, **keywords)
        self.has_readers = has_readers

    def forward(
        self, x: Tensor, positions: Positions, selection: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, SharedKV | None]:
        """x [S, B, hidden]; `selection` of an earlier run of this forward pass, which is then not made again.

        Returns [S, B, hidden] and what the sparse layers of the block read.
        """
        query, key, value, gates = self.project(x, positions)
        inputs = (*map(batch_first, (query, key, value)), positions.document_start)
        if self.has_readers and self.attention.selects:
            # The ranks of a KV head see only their own query heads, and must choose the same blocks.
            merge = replicas.largest if self.replicas > 1 else None
            output, shared = self.operators.oracle_attention(
                *inputs, self.attention.block, self.attention.selected, selection, merge
            )
        else:
            output = self.operators.causal_attention(*inputs)
            shared = SharedKV(*inputs[1:3]) if self.has_readers else None
        output = batch_first(output)
        for gate in gates:
            output = gate * output
        return self.project_out(output), shared


class SparseAttention(Attention):
    """One query, up to two branches: selected key blocks, and a sliding window (paper, section 3.3).

    o = sigmoid gate of SA * SA(q', K, V) + sigmoid gate of SWA * SWA(q', K', V')
    """

    def __init__(self, *arguments, attention: AttentionConfig, **keywords):
        sources = {"sparse": attention.sparse_kv, "window": attention.window_kv}
        branches = {name: source for name, source in sources.items() if source is not Source.none}
        super().__init__(
            *arguments,
            attention=attention,
            own_kv=Source.own in branches.values(),
            gates=() if attention.gate is Gate.none else (attention.gate,) * len(branches),
            **keywords,
        )
        self.branches = branches
        for name in branches:
            self.register_parameter(f"{name}_sink", self._sink() if attention.sinks else None)

    def _sink(self) -> torch.nn.Parameter:
        zeros = torch.zeros(self.heads, device=torch.cuda.current_device(), dtype=self.config.params_dtype)
        sink = torch.nn.Parameter(zeros)
        set_tensor_model_parallel_attributes(sink, is_parallel=True, dim=0, stride=1)
        return sink

    def forward(self, x: Tensor, positions: Positions, shared: SharedKV | None) -> tuple[Tensor, SharedKV]:
        """x [S, B, hidden]. Returns [S, B, hidden] and `shared` as it came."""
        if shared is None:
            raise RuntimeError(f"sparse layer {self.layer_number} got nothing from a full layer of its hybrid block")
        query, key, value, gates = self.project(x, positions)
        kv = {
            Source.own: (batch_first(key), batch_first(value), None, None) if self.own_kv else None,
            Source.shared: shared[:4],
        }
        gates = [batch_first(gate) for gate in gates] or [None] * len(self.branches)
        branches = {
            name: Branch(*kv[source], getattr(self, f"{name}_sink"), gate)
            for (name, source), gate in zip(self.branches.items(), gates, strict=True)
        }
        nothing = Branch(None, None)
        inputs = (batch_first(query), positions.document_start)
        tensors = (*branches.get("sparse", nothing), *branches.get("window", nothing), *shared)
        if self.recompute and torch.is_grad_enabled():
            output = recomputed(self._attend, False, *inputs, *tensors)
        else:
            output = self._attend(*inputs, *tensors)
        return self.project_out(batch_first(output)), shared

    def _attend(self, query: Tensor, document_start: Tensor, *tensors: Tensor | None) -> Tensor:
        """[B, S, H, D]. `tensors` are those of both branches and of the shared K/V: recomputation takes no tuples."""
        size = len(Branch._fields)
        sparse, window = (
            branch if branch.k is not None else None
            for branch in (Branch(*tensors[:size]), Branch(*tensors[size : 2 * size]))
        )
        return self.operators.hybrid_attention(
            query,
            sparse,
            window,
            SharedKV(*tensors[2 * size :]),
            document_start,
            self.attention.block,
            self.attention.window,
        )

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The projections describe themselves; the sinks are split over heads."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        sinks = dict(self.named_parameters(recurse=False))
        state.update(
            make_sharded_tensors_for_checkpoint(
                sinks,
                prefix,
                tensor_parallel_layers_axis_map=dict.fromkeys(sinks, 0),
                sharded_offsets=sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
        )
        return state
