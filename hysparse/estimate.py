"""What a layout needs: memory of each pipeline stage and seconds of a step, from the configuration alone.

Weights, gradients and optimizer states are counted exactly; what activations and buffers hold is read off the layers'
code. Against what an H200 allocated for eleven layouts, memory was 1 % too low to 10 % too high, and steps on one and
two took from 4 % less to 12 % more (docs/layouts.md): the rates below were measured on single operators, the link
speeds are given by the user, and everything else is assumed to cost nothing: launch overhead, uneven experts, small
matrix products under much tensor parallelism; activations and time of dense layers before the experts are taken for
those of expert layers. Good enough to order layouts, and to tell which are hopeless.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from hysparse.choices import EngineName, Offload, Recompute, Source
from hysparse.config import Config, PhaseConfig
from hysparse.plan import LayerFlops, LayerKind, Plan

BF16, FP32, INT32 = 2, 4, 4  # bytes

# FLOP/s, one H200, BF16, at the 80B's shapes; useful work as `kernels.bench` counts it
DENSE = 600e12  # an 8192³ product reached 655 to 793
EXPERTS = 523e12  # grouped products of 512 experts, 262,144 rows, forward and backward: 9.3 to 9.6 ms
ATTENTION = {  # (forward, backward) at 32,768 tokens
    LayerKind.full: (570e12, 500e12),  # scored forward 29.4 ms, causal backward 89.0 ms
    LayerKind.sparse: (165e12, 260e12),  # sparse layer, captured selection: 6.7 to 7.3 ms and 10.7 to 11.5 ms
}
ATTENTION_BACKWARD = 2.5  # of the forward pass: five products instead of two
MEMORY = 4.0e12  # bytes/s; a copy on the device reached 4.3

HOST = 60e9  # bytes/s of host memory that a rank's update takes; alone, with 8 threads, it was 110; a guess for eight
UPDATE = 7 * 4  # bytes of that for each weight: gradient, master weight and two moments read, all but the first written

STREAM_PASSES = 30  # reads and writes of the residual stream in a layer, both directions; a guess
ROW_PASSES = 12  # reads and writes of what an expert takes in, both directions; a guess

# As in `kernels`, from where they cannot be imported without Triton; a test holds them together.
PART_BYTES = 6 * 2**30  # what sparse_forward and sparse_backward leave between their kernels at most
MOST_CHUNKS, CELL_ROWS, SMALLEST_CHUNK, PIECE_ROWS = 16, 512, 64, 4096  # of `kernels.selection`
RESERVED = 5 * 2**30  # CUDA context, NCCL, workspaces, fragmentation; a guess

PINNED = 2  # PyTorch rounds pinned memory up to powers of two: at most so many bytes for one


@dataclass(frozen=True)
class Cluster:
    ranks: int
    memory: float = 80 * 2**30  # bytes of a GPU
    host_memory: float = math.inf  # bytes of a node
    node: int = 8  # GPUs that NVLink connects
    nvlink: float = 300e9  # bytes/s each GPU sends in a collective
    network: float = 40e9  # the same between nodes: 400 Gb/s a GPU, four fifths of it used


class Memory(NamedTuple):
    """Bytes on the ranks of one pipeline stage, at their peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # of all micro-batches in flight
    buffers: float  # what one layer needs while it runs, logits, and what is reserved

    @property
    def total(self) -> float:
        return sum(self)


class HostMemory(NamedTuple):
    """Bytes of a node's host memory that the model takes; processes and data are not counted."""

    optimizer: float  # what is offloaded, all the time, at most
    checkpoint: float  # copies of what a rank writes, while one is saved

    @property
    def total(self) -> float:
        return sum(self)


def offloaded(config: Config) -> tuple[float, float]:
    """The share of the optimizer that is not on the GPU, and bytes of host memory for each weight, at most.

    FP32 master weight, two moments and the gradient; with DeepSpeed BF16 weights on their way and gradients between
    micro-batches as well. What lies in files (nvme) has some buffers there, which are not counted.
    """
    if config.engine is EngineName.megatron:
        share = config.parallel.offload_optimizer
        return share, share * (2 * FP32 + PINNED * 2 * FP32)  # the moments are not pinned
    zero, held = config.deepspeed, 0
    if zero.offload_optimizer is Offload.cpu:
        held += 3 * FP32 + PINNED * 2 * FP32 if zero.zero == 3 else 2 * FP32 + PINNED * (2 * FP32 + 2 * BF16)
    if zero.offload_parameters is Offload.cpu:
        held += PINNED * BF16
    return float(zero.offload_optimizer is not Offload.none), held


class Layout:
    """A configuration on a cluster. `stages` as `parallel.placement.place` returns them."""

    def __init__(self, config: Config, plan: Plan, stages: Sequence[range], cluster: Cluster):
        self.config, self.plan, self.stages, self.cluster = config, plan, stages, cluster
        self.model, self.parallel = config.model, config.parallel
        self.data = cluster.ranks // (self.parallel.tensor * self.parallel.pipeline * self.parallel.context)
        self.last_of_block = {block[-1] for block in plan.blocks}

    def memory(self, phase: PhaseConfig) -> list[Memory]:
        """Of each pipeline stage in turn."""
        return [self._memory_of(stage, phase) for stage in range(self.parallel.pipeline)]

    def host_memory(self) -> HostMemory:
        """Of the node that needs most."""
        ranks, size, pipeline = self.cluster.ranks, self.cluster.node, self.parallel.pipeline
        of_stage, owned = ranks // pipeline, [self._owned(stage) for stage in range(pipeline)]
        # Of all nodes with the same stages one will do: those where a stage begins, and those behind them
        firsts = {(stage * of_stage // size + more) * size for stage in range(pipeline) for more in (0, 1)}
        nodes = (range(first, min(first + size, ranks)) for first in firsts)
        weights = max(sum(owned[rank // of_stage] for rank in node) for node in nodes)
        return HostMemory(offloaded(self.config)[1] * weights, (BF16 + 3 * FP32) * weights)

    def step_seconds(self, phase: PhaseConfig) -> float:
        """Micro-batches through the costliest stage, the bubble, and what the data-parallel ranks exchange."""
        parallel, count = self.parallel, phase.global_batch // (phase.micro_batch * self.data)
        costliest = max(self._micro_batch_seconds(stage, phase) for stage in range(parallel.pipeline))
        bubble = (parallel.pipeline - 1) / parallel.virtual
        stages = range(parallel.pipeline)
        exchange = max(self._exchange_seconds(*self.weights(stage)) for stage in stages)
        update = max(offloaded(self.config)[0] * self._owned(stage) * UPDATE / HOST for stage in stages)
        return (count + bubble) * costliest + exchange + update

    def weights(self, stage: int) -> tuple[int, int]:
        """Of a rank of this pipeline stage: weights that all data-parallel ranks share, and weights of experts."""
        model, tensor, moe = self.model, self.parallel.tensor, self.model.moe
        shared = experts = 0
        for layer in self._layers(stage):
            parts = self.plan.layer_parameters(layer.kind, model.is_dense(layer.index))
            kv = self.plan.kv_weights(layer.kind)
            shared += (parts.attention - kv) // tensor + kv // min(tensor, model.kv_heads) + parts.norms
            if model.is_dense(layer.index):
                shared += parts.ffn // tensor
            else:
                shared += moe.experts * model.hidden + 3 * model.hidden * moe.shared_ffn // tensor
                experts += 3 * model.hidden * moe.ffn * moe.experts // self.parallel.expert
        ends = (stage == 0) + (stage == self.parallel.pipeline - 1)
        shared += ends * model.vocabulary * model.hidden // tensor
        return shared + model.hidden * (stage == self.parallel.pipeline - 1), experts  # + the final norm

    # Memory

    def _memory_of(self, stage: int, phase: PhaseConfig) -> Memory:
        shared, experts = self.weights(stage)
        tokens = self._tokens(phase)
        held = tokens * sum(self._held_bytes(layer.index) for layer in self._layers(stage))
        largest = max(self._layer_bytes(layer.kind, Recompute.none) for layer in self._layers(stage))
        buffers = RESERVED + tokens * largest  # gradients of one layer, or the layer that is recomputed
        if any(layer.kind is LayerKind.sparse for layer in self._layers(stage)) and self.config.attention.selects:
            # and FP32 gradients of K and V, of the whole sequence: the sum for each piece, and what is added
            sums = 2 if self.parallel.context == 1 else 3
            buffers += self._part_bytes(phase) + sums * tokens * self.parallel.context * self._kv_width * 2 * FP32
        if stage == self.parallel.pipeline - 1:
            buffers += tokens * self.model.vocabulary // self.parallel.tensor * BF16
        return Memory(
            weights=BF16 * (shared + experts),
            gradients=FP32 * (shared + experts),
            # the master copy and Adam's two, as far as they are on the GPU
            optimizer=3 * FP32 * self._owned(stage) * (1 - offloaded(self.config)[0]),
            activations=held * self._in_flight(stage, phase),
            buffers=buffers,
        )

    def _owned(self, stage: int) -> float:
        """Weights that a rank of this stage updates: the distributed optimizer's share."""
        return sum(weights / ranks for weights, ranks in zip(self.weights(stage), self._sharing, strict=True))

    @property
    def _sharing(self) -> tuple[int, int]:
        """Ranks that have the same weights and share their optimizer: shared by all, and of experts."""
        return self.data * self.parallel.context, self.cluster.ranks // self.parallel.pipeline // self.parallel.expert

    def _in_flight(self, stage: int, phase: PhaseConfig) -> float:
        """Micro-batches whose activations this stage holds at the worst moment of 1F1B, interleaved or not."""
        pipeline, virtual = self.parallel.pipeline, self.parallel.virtual
        count = phase.global_batch // (phase.micro_batch * self.data)
        if virtual == 1:
            return min(pipeline - stage, count)
        return min(2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1, count * virtual) / virtual

    def _held_bytes(self, index: int) -> float:
        """Bytes per token that layer `index` keeps until its backward pass; its selection and K, V included."""
        kind, recompute, attention = self.plan.layers[index].kind, self._recompute[index], self.config.attention
        has_readers = kind is LayerKind.full and index not in self.last_of_block
        selection = 2 * INT32 * attention.selected * self._kv_heads  # blocks and their index
        extra = selection if has_readers and attention.selects else 0
        if recompute is Recompute.full:
            stream = BF16 * self.model.hidden / self.parallel.tensor
            return stream + (extra + BF16 * 2 * self._kv_width * self.parallel.context if has_readers else 0)
        return self._layer_bytes(kind, recompute) + extra

    def _layer_bytes(self, kind: LayerKind, recompute: Recompute) -> float:
        """Bytes per token that autograd keeps of a layer: what its operators save."""
        model, tensor, attention = self.model, self.parallel.tensor, self.config.attention
        heads, width = model.heads / tensor, model.heads * model.head_dim / tensor
        stream = 4 * BF16 * model.hidden / tensor  # what both norms take and give
        branches = sum(source is not Source.none for source in (attention.sparse_kv, attention.window_kv))
        own_kv = kind is LayerKind.full or Source.own in (attention.sparse_kv, attention.window_kv)
        kv = own_kv * 2 * self._kv_width * (self.parallel.context if self._gathers(kind) else 1)
        outputs = 1  # each of the width of the queries
        if kind is LayerKind.sparse and recompute is Recompute.none:
            outputs += branches  # each branch before its gate
        kept = BF16 * ((1 + outputs) * width + kv) + FP32 * heads * max(1, branches)
        return stream + kept + self._ffn_bytes

    def _gathers(self, kind: LayerKind) -> bool:
        """Whether a layer's own K and V come together on every context-parallel rank: any token may select them."""
        return kind is LayerKind.full or self.config.attention.sparse_kv is Source.own

    def _tokens(self, phase: PhaseConfig) -> int:
        """Of a micro-batch on one rank."""
        return phase.micro_batch * phase.sequence_length // self.parallel.context

    @cached_property
    def _ffn_bytes(self) -> float:
        model, moe = self.model, self.model.moe
        if moe is None:
            return BF16 * 3 * model.ffn / self.parallel.tensor  # gate and up, and their product
        rows = moe.active * BF16 * (model.hidden + 3 * moe.ffn)
        router = 2 * FP32 * moe.experts
        return (rows + router + BF16 * 3 * moe.shared_ffn) / self.parallel.tensor

    @cached_property
    def _kv_width(self) -> float:
        """Values of K of one token on this rank."""
        return self._kv_heads * self.model.head_dim

    @cached_property
    def _kv_heads(self) -> int:
        """On this rank: with more ranks than KV heads each holds one, as do its neighbours."""
        return max(self.model.kv_heads // self.parallel.tensor, 1)

    def _part_bytes(self, phase: PhaseConfig) -> float:
        """Partial sums of the sparse backward pass, of as many KV heads as it takes at a time (the forward has fewer).

        Of each query and chosen block the gradient of the query, of each piece of the index those of K and V.
        """
        model, T, context = self.model, phase.sequence_length, self.parallel.context
        attention, S = self.config.attention, T if context == 1 else T // (2 * context)  # queries of one call
        group = model.heads // self.parallel.tensor // self._kv_heads
        choices = S * attention.selected * group * model.head_dim * BF16
        chunks = min(max(attention.tokens * group // CELL_ROWS, 1), MOST_CHUNKS, -(-S // SMALLEST_CHUNK))
        cells = chunks * -(-T // attention.block)
        pieces = min(cells, S * attention.selected) + S * attention.selected // (PIECE_ROWS // group)
        each = choices + pieces * attention.block * 2 * model.head_dim * FP32
        heads = phase.micro_batch * self._kv_heads
        rounds = -(-heads // max(PART_BYTES // each, 1))
        return each * -(-heads // rounds)

    # Time

    def _micro_batch_seconds(self, stage: int, phase: PhaseConfig) -> float:
        """Forward and backward of one micro-batch through all chunks of a pipeline stage."""
        tokens, tensor, parallel = self._tokens(phase), self.parallel.tensor, self.parallel
        layers = self._layers(stage)
        kinds = Counter((layer.kind, self._recompute[layer.index]) for layer in layers)
        seconds = sum(number * self._layer_seconds(*kind, phase) for kind, number in kinds.items())
        if stage == parallel.pipeline - 1:
            seconds += 3 * tokens * self.plan.head_flops() / tensor / DENSE
        if parallel.pipeline > 1 and parallel.virtual == 1:  # interleaved, it is sent while others compute
            seconds += 2 * tokens * self.model.hidden * BF16 / tensor / self._link(self.cluster.ranks)
        return seconds

    def _layer_seconds(self, kind: LayerKind, recompute: Recompute, phase: PhaseConfig) -> float:
        model, parallel, tensor = self.model, self.parallel, self.parallel.tensor
        tokens, cost = self._tokens(phase), self.plan.layer_flops(kind, phase.sequence_length)
        forward, backward = self._forward(cost, kind), self._backward(cost, kind)
        if recompute is Recompute.full:
            backward += forward
        elif recompute is Recompute.selective and kind is LayerKind.sparse:
            backward += cost.attention / ATTENTION[kind][0]
        passes = STREAM_PASSES * model.hidden
        if model.moe:
            passes += ROW_PASSES * model.moe.active * model.hidden
        compute = tokens / tensor * (forward + backward + passes * BF16 / MEMORY)
        sent = self.context_bytes(kind, recompute, phase) / self._link(tensor * parallel.context)
        return compute + self._layer_traffic(recompute, tokens) + sent

    def context_bytes(self, kind: LayerKind, recompute: Recompute, phase: PhaseConfig) -> float:
        """What a rank sends to others of its context-parallel group in one layer, forward and backward.

        K and V where they are gathered, and as much back for their gradients; else the halos of both chunks.
        """
        context, attention = self.parallel.context, self.config.attention
        if context == 1:
            return 0.0
        kv = 2 * phase.micro_batch * self._kv_width * BF16  # of one token of each sequence
        if self._gathers(kind):
            kept = kind is LayerKind.full and self.plan.count(LayerKind.sparse)  # for sparse layers anyway
            times = 3 if recompute is Recompute.full and not kept else 2
            return times * kv * phase.sequence_length * (context - 1) / context
        if attention.window_kv is not Source.own:
            return 0.0
        times = 3 if recompute is Recompute.full else 2
        return times * 2 * kv * (attention.window - 1)

    def _forward(self, cost: LayerFlops, kind: LayerKind) -> float:
        """Seconds of a token on one rank."""
        return cost.projections / DENSE + cost.attention / ATTENTION[kind][0] + cost.ffn / self._ffn_rate

    def _backward(self, cost: LayerFlops, kind: LayerKind) -> float:
        attention = ATTENTION_BACKWARD * cost.attention / ATTENTION[kind][1]
        return 2 * (cost.projections / DENSE + cost.ffn / self._ffn_rate) + attention

    @property
    def _ffn_rate(self) -> float:
        return EXPERTS if self.model.moe else DENSE

    def _layer_traffic(self, recompute: Recompute, tokens: int) -> float:
        """Seconds of the collectives in a layer, which nothing hides."""
        model, parallel, moe = self.model, self.parallel, self.model.moe
        stream, seconds = tokens * model.hidden * BF16, 0.0
        again = 1.5 if recompute is Recompute.full else 1.0
        if parallel.tensor > 1:
            # A gather and a scatter for attention and for a dense FFN; backward the same and the gathered input again
            halves = 1 if moe else 2
            share = (parallel.tensor - 1) / parallel.tensor
            seconds += halves * (2 + 3) * again * stream * share / self._link(parallel.tensor)
        if moe and parallel.expert > 1:
            share = (parallel.expert - 1) / parallel.expert
            rows = moe.active * stream / parallel.tensor
            seconds += 4 * again * rows * share / self._link(parallel.expert)  # there and back, twice
        return seconds

    def _exchange_seconds(self, shared: int, experts: int) -> float:
        """Gradients are summed in FP32, weights come back in BF16, after the last micro-batch."""
        ranks = self.cluster.ranks // self.parallel.pipeline
        seconds = 0.0
        for weights, group in zip((shared, experts), self._sharing, strict=True):
            link = self._link(self.cluster.ranks if group > 1 and ranks > self.cluster.node else group)
            seconds += weights * (FP32 + BF16) * (group - 1) / group / link
        return seconds

    def _link(self, ranks: int) -> float:
        """Bytes/s within a group of so many neighbouring ranks."""
        return self.cluster.nvlink if ranks <= self.cluster.node else self.cluster.network

    @cached_property
    def _recompute(self) -> dict[int, Recompute]:
        """Of each layer of the model."""
        return {index: self.parallel.recompute_of(index - chunk.start) for chunk in self.stages for index in chunk}

    def _layers(self, stage: int) -> list:
        """Layers of a pipeline stage, in all of its chunks."""
        chunks = self.stages[stage :: self.parallel.pipeline]
        return [self.plan.layers[index] for chunk in chunks for index in chunk]
