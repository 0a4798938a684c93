"""The layer plan: which layer is full, which hybrid block it belongs to, and every quantity that follows from that.

The model, the pipeline split, MFU and the printed table read parameters, FLOPs and KV bytes off one `Plan`. Everything
here is a pure function of the configuration: nothing is allocated, torch is not needed. Where layers are placed is
decided in `parallel/placement.py`; how the plan is printed, in `report.py`.
"""

from dataclasses import dataclass, fields, replace
from enum import StrEnum
from itertools import groupby

from hysparse.choices import Gate, Source
from hysparse.config import AttentionConfig, Config, ConfigError, ModelConfig
from parallel.placement import place, place_as_given

BACKWARD = 2  # FLOPs of the backward pass per forward FLOP: each matmul has two gradients, and each is such a matmul


class LayerKind(StrEnum):
    full = "full"
    sparse = "sparse"


@dataclass(frozen=True)
class Layer:
    index: int
    kind: LayerKind
    block: int  # number of its hybrid block


@dataclass(frozen=True)
class LayerParameters:
    """Weights of one layer."""

    attention: int  # projections, gates and sinks
    ffn: int  # the dense FFN, or the router and all experts
    norms: int  # RMSNorm weights, those of qk_norm included

    @property
    def total(self) -> int:
        return self.attention + self.ffn + self.norms


@dataclass(frozen=True)
class LayerFlops:
    """Forward FLOPs of one token, averaged over its sequence."""

    projections: float  # q, k, v, output and gates
    attention: float  # q·k and p·v
    ffn: float  # the dense FFN, or the router and the active experts

    @property
    def total(self) -> float:
        return self.projections + self.attention + self.ffn


@dataclass(frozen=True)
class TokenFlops:
    """Forward FLOPs of one token through the whole model, averaged over its sequence."""

    full: LayerFlops  # all full layers together
    sparse: LayerFlops  # all sparse layers together
    head: float

    @property
    def forward(self) -> float:
        return self.full.total + self.sparse.total + self.head

    @property
    def training(self) -> float:
        """Forward and backward: three times the forward pass. Recomputation is no useful work and is not counted."""
        return (1 + BACKWARD) * self.forward


class Plan:
    """The layers of a model under an attention variant, and what they cost.

    `layers`, `pattern` ("FSSSF") and `blocks` (a range of layer indices for each hybrid block, which is a full layer
    and the sparse layers after it) are the only statement of the layer order in the project.
    """

    def __init__(self, model: ModelConfig, attention: AttentionConfig):
        self.model = model
        self.attention = attention
        self.pattern = layer_pattern(model, attention)
        starts = [index for index, letter in enumerate(self.pattern) if letter == "F"]
        self.blocks = tuple(map(range, starts, [*starts[1:], model.layers]))
        self.layers = tuple(
            Layer(index, LayerKind.full if index == block.start else LayerKind.sparse, number)
            for number, block in enumerate(self.blocks)
            for index in block
        )

    @property
    def full_layers(self) -> tuple[int, ...]:
        return tuple(block.start for block in self.blocks)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Layers in each hybrid block."""
        return tuple(map(len, self.blocks))

    @property
    def compressed_pattern(self) -> str:
        """The pattern with equal hybrid blocks counted: "F11S ×4, F"."""
        parts = []
        for size, run in groupby(self.block_sizes):
            block = "F" if size == 1 else "FS" if size == 2 else f"F{size - 1}S"
            times = len(list(run))
            parts.append(f"{block} ×{times}" if times > 1 else block)
        return ", ".join(parts)

    def count(self, kind: LayerKind) -> int:
        """Layers of this kind."""
        full = len(self.blocks)
        return full if kind is LayerKind.full else self.model.layers - full

    def full_attention_twin(self) -> "Plan":
        """The same model with every layer full and the output gate of the model's full-attention baseline."""
        if len(self.blocks) == self.model.layers:
            return self
        gate = self.model.full_attention_gate
        return Plan(self.model, replace(self.attention, name="full", ratio=0, pattern=None, output_gate=gate))

    # Parameters

    def parameters(self) -> int:
        """All trainable weights. The expert bias of the router is a buffer and is not among them."""
        layers = sum(self.layer_parameters(layer.kind, self._is_dense(layer)).total for layer in self.layers)
        return self.embedding_parameters() + layers + self.model.hidden  # + the final norm

    def active_parameters(self) -> int:
        """Weights that take part in computing one token: everything but the experts it is not routed to."""
        moe = self.model.moe
        idle = 3 * self.model.hidden * moe.ffn * (moe.experts - moe.active) if moe else 0  # of a layer
        return self.parameters() - idle * sum(not self._is_dense(layer) for layer in self.layers)

    def embedding_parameters(self) -> int:
        """The input embedding and the LM head, which are not tied."""
        return 2 * self.model.vocabulary * self.model.hidden

    def layer_parameters(self, kind: LayerKind, dense: bool = False) -> LayerParameters:
        """Of a layer of this kind; `dense`: of one without experts, in a model that has some."""
        model = self.model
        sinks = self._branches() * model.heads if kind is LayerKind.sparse and self.attention.sinks else 0
        normed = 1 + self._projects_kv(kind) if model.qk_norm else 0  # q, and the layer's own k
        return LayerParameters(
            attention=self._projection_weights(kind) + sinks,
            ffn=self._ffn_weights(model.moe.experts if model.moe else 0, dense),
            norms=2 * model.hidden + normed * model.head_dim,
        )

    # FLOPs

    def flops_per_token(self, sequence_length: int) -> TokenFlops:
        """Useful FLOPs of one token, averaged over a sequence that is one document.

        Two for each multiply-add of a matmul, all keys that the causal mask leaves and no others. The embedding lookup,
        norms, softmax and top-k count as 0, the LM head in full.
        """
        kinds = {}
        for kind in LayerKind:
            costs = [self._flops_of(layer, sequence_length) for layer in self.layers if layer.kind is kind]
            names = (field.name for field in fields(LayerFlops))
            kinds[kind.value] = LayerFlops(**{name: sum(getattr(cost, name) for cost in costs) for name in names})
        return TokenFlops(**kinds, head=self.head_flops())

    def layer_flops(self, kind: LayerKind, sequence_length: int, dense: bool = False) -> LayerFlops:
        """Forward FLOPs of one token in one layer of this kind; `dense` as in `layer_parameters`."""
        model = self.model
        keys = self._mean_keys(kind, sequence_length)
        return LayerFlops(
            projections=2 * self._projection_weights(kind),
            attention=2 * 2 * model.heads * model.head_dim * keys,  # q·k and p·v
            ffn=2 * self._ffn_weights(model.moe.active if model.moe else 0, dense),
        )

    def head_flops(self) -> int:
        """Forward FLOPs of one token in the LM head."""
        return 2 * self.model.hidden * self.model.vocabulary

    def layer_costs(self, sequence_length: int) -> list[float]:
        """Forward FLOPs of one token in each layer, in model order: what pipeline stages are balanced by."""
        return [self._flops_of(layer, sequence_length).total for layer in self.layers]

    # KV cache

    def kv_bytes(self, sequence_length: int, bytes_per_value: int = 2) -> int:
        """Bytes of the KV cache of one sequence of this length; 2 bytes are BF16.

        A full layer keeps all its keys and values. A sparse layer keeps its own: all of them where the block-sparse
        branch may select any, the last `window` where only the window branch reads them. Shared ones are stored once,
        by the full layer.
        """
        tokens = {LayerKind.full: sequence_length, LayerKind.sparse: 0}
        if self.attention.sparse_kv is Source.own:
            tokens[LayerKind.sparse] = sequence_length
        elif self.attention.window_kv is Source.own:
            tokens[LayerKind.sparse] = min(sequence_length, self.attention.window)
        stored = sum(self.count(kind) * tokens[kind] for kind in LayerKind)
        return 2 * self.model.kv_heads * self.model.head_dim * stored * bytes_per_value

    def kv_bytes_per_token(self, sequence_length: int, bytes_per_value: int = 2) -> float:
        """Bytes of the KV cache of one sequence of this length, divided by its tokens."""
        return self.kv_bytes(sequence_length, bytes_per_value) / sequence_length

    # What a layer consists of

    def _is_dense(self, layer: Layer) -> bool:
        return self.model.is_dense(layer.index)

    def _flops_of(self, layer: Layer, sequence_length: int) -> LayerFlops:
        return self.layer_flops(layer.kind, sequence_length, self._is_dense(layer))

    def _projects_kv(self, kind: LayerKind) -> bool:
        return kind is LayerKind.full or Source.own in (self.attention.sparse_kv, self.attention.window_kv)

    def _branches(self) -> int:
        """Attention branches of a sparse layer."""
        return sum(source is not Source.none for source in (self.attention.sparse_kv, self.attention.window_kv))

    def kv_weights(self, kind: LayerKind) -> int:
        """Weights of the layer's own key and value projections."""
        return 2 * self.model.hidden * self.model.kv_heads * self.model.head_dim * self._projects_kv(kind)

    def _projection_weights(self, kind: LayerKind) -> int:
        """Weights of all attention matrices: q, k and v where the layer has its own, gates, output."""
        return self.model.hidden * (self.projection_rows(kind) + self.model.heads * self.model.head_dim)

    def projection_rows(self, kind: LayerKind) -> int:
        """Width of what the input projection of a layer computes: q, k and v where the layer has its own, gates."""
        model, attention = self.model, self.attention
        width = model.heads * model.head_dim
        gate_widths = {Gate.none: 0, Gate.headwise: model.heads, Gate.elementwise: width}
        if kind is LayerKind.full:
            gates = gate_widths[attention.output_gate]
        else:
            gates = self._branches() * gate_widths[attention.gate]
        return width + gates + self.kv_weights(kind) // model.hidden

    def _ffn_weights(self, experts: int, dense: bool) -> int:
        """Weights of the dense SwiGLU (gate, up, down), or of the router, the shared and this many other experts."""
        hidden, moe = self.model.hidden, self.model.moe
        if dense or moe is None:
            return 3 * hidden * self.model.ffn
        return moe.experts * hidden + 3 * hidden * (experts * moe.ffn + moe.shared_ffn)

    def _mean_keys(self, kind: LayerKind, sequence_length: int) -> float:
        """Keys that a query attends to, over all branches, averaged over the sequence."""
        if kind is LayerKind.full:
            return mean_visible(sequence_length, sequence_length)
        attention = self.attention
        selected = mean_visible(sequence_length, attention.tokens) if attention.sparse_kv is not Source.none else 0
        window = mean_visible(sequence_length, attention.window) if attention.window_kv is not Source.none else 0
        return selected + window


def layer_pattern(model: ModelConfig, attention: AttentionConfig) -> str:
    """One letter a layer, F full or S sparse (paper, section 3.1; the last layer is full: section 4.1)."""
    pattern = attention.pattern
    if pattern is None:
        pattern = ("F" + "S" * attention.ratio) * model.layers
        pattern = pattern[: model.layers - 1] + "F" if attention.last_full else pattern[: model.layers]
    elif len(pattern) != model.layers:
        raise ConfigError(
            f"attention.pattern={pattern} has {len(pattern)} layers, model.layers={model.layers}; "
            f"make them equal: write {model.layers} letters or set model.layers={len(pattern)}"
        )
    if "S" in pattern and attention.sparse_kv is attention.window_kv is Source.none:
        raise ConfigError(
            "attention.sparse_kv=none and attention.window_kv=none leave sparse layers without a branch; "
            "give one of them own or shared, or use attention=full"
        )
    return pattern


def mean_visible(sequence_length: int, most: int) -> float:
    """Mean over the tokens t = 0 … sequence_length-1 of min(t + 1, most)."""
    rising = min(sequence_length, most)  # tokens that see all tokens up to their own
    return (rising * (rising + 1) / 2 + (sequence_length - rising) * most) / sequence_length


def pipeline_stages(config: Config, plan: Plan) -> tuple[range, ...]:
    """The layers of each pipeline stage and virtual chunk: as given, or balanced for the phase with the most tokens."""
    if config.parallel.layout is not None:
        return place_as_given(plan.block_sizes, config.parallel.layout)
    main = max(config.phases.values(), key=lambda phase: phase.tokens)
    stages = config.parallel.pipeline * config.parallel.virtual
    costs = plan.layer_costs(main.sequence_length)
    return place(plan.block_sizes, costs, stages, last_cost=plan.head_flops())
