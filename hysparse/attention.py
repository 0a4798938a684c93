"""The two kinds of attention layer, as the paper writes them (section 3), on Megatron's tensor-parallel projections.

Shapes: S tokens, B sequences, H query heads, K KV heads, G = H / K, D head dimension; H and K are this rank's share
under tensor parallelism. Megatron keeps activations [S, B, ...]; the operators in `kernels` take [B, S, ...]
views of them. Under context parallelism S are this rank's tokens, in two chunks; T are those of the whole sequence.
"""

from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint as recomputed
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from hysparse.choices import Gate, Source
from hysparse.config import AttentionConfig
from hysparse.linears import Linears
from hysparse.norm import RMSNorm
from kernels.reference import rotate
from kernels.shared import Branch, SharedKV
from parallel import replicas
from parallel.context import Chunk, Context
from parallel.replicas import SharedGroupsLinear

# What a full layer hands on, flat, since that is how recomputation takes it: K and V, then what `SharedKV` holds beside
# them for each chunk of queries. With one chunk these are the fields of a SharedKV in their order.
Shared = tuple[Tensor | None, ...]


class Positions(NamedTuple):
    """Where tokens stand: their document and their rotation. The same for all layers of a forward pass."""

    document_start: Tensor  # [B, S] int32, where the token's document begins in the (whole) sequence
    cos: Tensor  # [S, B, 1, D] FP32
    sin: Tensor  # [S, B, 1, D] FP32


def rotary_positions(document_start: Tensor, head_dim: int, base: float, context: Context) -> Positions:
    """Rotations for tokens counted from the start of their document. document_start [B, S]."""
    device = document_start.device
    place = context.places(document_start.shape[1], device) - document_start  # [B, S]
    frequency = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = place.t().unsqueeze(-1).float() * frequency  # [S, B, D/2]
    angle = torch.cat([angle, angle], dim=-1).unsqueeze(2)  # [S, B, 1, D]
    return Positions(document_start, angle.cos(), angle.sin())


def batch_first(x: Tensor) -> Tensor:
    """[S, B, ...] -> [B, S, ...], a view."""
    return x.transpose(0, 1)


def joined(chunks: list[Tensor]) -> Tensor:
    """Chunks of this rank's tokens, one behind the other."""
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def flat(chunks: list[SharedKV]) -> Shared:
    """K and V are the same in all."""
    return (*chunks[0][:2], *(tensor for chunk in chunks for tensor in chunk[2:]))


def by_chunk(shared: Shared) -> list[SharedKV]:
    size = len(SharedKV._fields) - 2
    return [SharedKV(*shared[:2], *shared[at : at + size]) for at in range(2, len(shared), size)]


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
        linears: Linears,
    ):
        super().__init__(config)
        self.attention, self.operators, self.recompute = attention, operators, recompute
        self.layer_number, self.tp_group, self.context = layer_number, pg_collection.tp, Context(pg_collection.cp)
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
        linear = {"config": config, "init_method": config.init_method, "tp_group": pg_collection.tp}
        linear |= {"bias": False, "is_expert": False}
        if self.replicas > 1:
            parts, kv = rows_of(self.group * self.replicas), range(1, 1 + 2 * own_kv)
            self.linear_in = SharedGroupsLinear(config.hidden_size, groups, parts, kv, config, pg_collection.tp)
        else:
            self.linear_in = linears.column(
                config.hidden_size, groups * sum(self.rows), gather_output=False, skip_bias_add=False, **linear
            )
        self.linear_out = linears.row(
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

    def forward(self, x: Tensor, positions: Positions, earlier: Shared | None) -> tuple[Tensor, Shared | None]:
        """x [S, B, hidden]; `earlier` is what an earlier run of this forward pass handed on: its selection is not made
        again, its K and V are not gathered again.

        Returns [S, B, hidden] and what the sparse layers of the block read.
        """
        query, *kv, gates = self.project(x, positions)
        known = None if earlier is None else tuple(map(batch_first, earlier[:2]))
        k, v = map(batch_first, self.context.gather(*kv, known=known))  # [B, T, K, D]
        chunks = self.context.chunks(len(query))
        before = [None] * len(chunks) if earlier is None else by_chunk(earlier)
        # The ranks of a KV head see only their own query heads, and must choose the same blocks.
        merge = replicas.largest if self.replicas > 1 else None
        outputs, shared = [], []
        for chunk, given in zip(chunks, before, strict=True):
            inputs = (batch_first(query[chunk.rows]), k, v, positions.document_start[:, chunk.rows])
            if self.has_readers and self.attention.selects:
                block, selected = self.attention.block, self.attention.selected
                selection = None if given is None else given.selection
                output, found = self.operators.oracle_attention(*inputs, block, selected, selection, merge, chunk.start)
            else:
                output, found = self.operators.causal_attention(*inputs, query_start=chunk.start), SharedKV(k, v)
            outputs.append(batch_first(output))
            shared.append(found)
        output = joined(outputs)
        for gate in gates:
            output = gate * output
        return self.project_out(output), flat(shared) if self.has_readers else None


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

    def forward(self, x: Tensor, positions: Positions, shared: Shared | None) -> tuple[Tensor, Shared]:
        """x [S, B, hidden]. Returns [S, B, hidden] and `shared` as it came."""
        if shared is None:
            raise RuntimeError(f"sparse layer {self.layer_number} got nothing from a full layer of its hybrid block")
        query, key, value, gates = self.project(x, positions)
        chunks = self.context.chunks(len(query))
        inputs = zip(chunks, by_chunk(shared), self._own(key, value, chunks), strict=True)
        outputs = [self._of_chunk(query, gates, positions.document_start, *of_chunk) for of_chunk in inputs]
        return self.project_out(joined(outputs)), shared

    def _own(self, key: Tensor | None, value: Tensor | None, chunks: list[Chunk]) -> list[tuple[int, Tensor, Tensor]]:
        """For each chunk the keys and values of this layer that it reads, [B, T', K, D], after their first position."""
        if not self.own_kv:
            return [(0, None, None)] * len(chunks)
        if self.branches.get("sparse") is Source.own:  # may select any
            return [(0, *map(batch_first, self.context.gather(key, value)))] * len(chunks)
        halo = self.attention.window - 1
        kv = self.context.with_halo(key, value, halo=halo)
        first = [0] if len(chunks) == 1 else [chunk.start - halo for chunk in chunks]
        return [(start, *map(batch_first, both)) for start, both in zip(first, kv, strict=True)]

    def _of_chunk(
        self,
        query: Tensor,
        gates: list[Tensor],
        document_start: Tensor,
        chunk: Chunk,
        shared: SharedKV,
        own: tuple[int, Tensor, Tensor],
    ) -> Tensor:
        """The attention [chunk, B, H, D] of some of the queries."""
        window_start, *own_kv = own
        kv = {Source.own: (*own_kv, None, None), Source.shared: shared[:4]}
        gates = [batch_first(gate[chunk.rows]) for gate in gates] or [None] * len(self.branches)
        branches = {
            name: Branch(*kv[source], getattr(self, f"{name}_sink"), gate)
            for (name, source), gate in zip(self.branches.items(), gates, strict=True)
        }
        nothing = Branch(None, None)
        inputs = (batch_first(query[chunk.rows]), document_start[:, chunk.rows])
        tensors = (*branches.get("sparse", nothing), *branches.get("window", nothing), *shared)
        attend = partial(self._attend, chunk.start, window_start)
        if self.recompute and torch.is_grad_enabled():
            return batch_first(recomputed(attend, False, *inputs, *tensors))
        return batch_first(attend(*inputs, *tensors))

    def _attend(
        self, query_start: int, window_start: int, query: Tensor, document_start: Tensor, *tensors: Tensor | None
    ) -> Tensor:
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
            query_start,
            window_start,
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
