"""`dry_run=N`: what N ranks would hold and compute, checked on one process, without a GPU and without memory.

Every kind of rank is built on meta tensors: each pipeline stage, tensor slice and share of the experts, once. Their
shards must cover each weight of the model exactly once, and their weights must add up to the number that the plan
derives from the configuration alone. The first, the middle and the last rank of the whole world also run a micro-batch
of every phase forward and backward. Nothing is computed, so that what depends on values (which expert a token goes to)
is taken as even; communication answers at once. The optimizer is not built.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica
from torch import Tensor

import kernels
from data import micro_batches
from hysparse.choices import ExpertProducts, Kernels, Precision
from hysparse.config import Config, PhaseConfig
from hysparse.estimate import Cluster, Layout
from hysparse.experts import MixtureOfExperts
from hysparse.model import HySparseModel, build_chunk, group_sizes, transformer_config
from hysparse.plan import Plan, pipeline_stages
from hysparse.report import bytes_, count, plan_report, table
from kernels.capability import unsuited
from parallel.fake import fake_rank
from parallel.megatron_engine import chunks_of_this_stage
from parallel.placement import megatron_layout


class DryRunError(Exception):
    """What the ranks hold does not fit together: a defect of this project, not of the configuration."""


MISTAKES = (DryRunError, kernels.KernelError)


class Shard(NamedTuple):
    """A box of a tensor of the whole model."""

    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Held(NamedTuple):
    """What one rank holds."""

    wholes: dict[str, tuple[int, ...]]  # the shape of the whole tensor, by its name
    shards: set[Shard]
    written: list[Shard]  # those that this rank, of all that hold them, writes into a checkpoint
    parameters: int  # weights, without buffers
    buffers: set[str]  # last names of tensors that are not trained


def dry_run(config: Config) -> str:
    """Check everything; returns the report. Raises DryRunError.

    Without Transformer Engine, whose layers have the shapes of Megatron's: as with precision=bf16.
    """
    if config.precision is Precision.fp8:
        config = replace(config, precision=Precision.bf16)
    config = replace(config, experts=ExpertProducts.auto)
    plan, ranks, parallel = Plan(config.model, config.attention), config.dry_run, config.parallel
    stages, operators = pipeline_stages(config, plan), _operators(config)
    sizes = group_sizes(config)
    kinds = parallel.pipeline * math.lcm(parallel.tensor * parallel.context, parallel.expert)

    every = []
    for rank in range(kinds):  # of the smallest world that has them all: each weight is written by one of them
        with fake_rank(rank, kinds, sizes):
            every.append(_held(_build(config, stages, operators)))
    weights = check_cover(every)
    if weights != plan.parameters():
        raise DryRunError(f"the ranks hold {weights:,} weights in total, the plan says {plan.parameters():,}")

    layout = Layout(config, plan, stages, Cluster(ranks))
    known = {shard for held in every for shard in held.shards}
    rows = []
    for rank in sorted({0, ranks // 2, ranks - 1}):
        with fake_rank(rank, ranks, sizes):
            chunks = _build(config, stages, operators)
            held = _held(chunks)
            if strange := held.shards - known:
                raise DryRunError(f"rank {rank} of {ranks} holds {strange.pop()}, which no other kind of rank does")
            for name, phase in config.phases.items():
                _run(config, phase, _length(config, phase, operators), chunks, f"rank {rank}, phases.{name}")
            stage = parallel_state.get_pipeline_model_parallel_rank()
            if sum(layout.weights(stage)) != held.parameters:
                raise DryRunError(f"rank {rank} has {held.parameters:,} weights, not {sum(layout.weights(stage)):,}")
            memory = max(layout.memory(phase)[stage].total for phase in config.phases.values())
            rows.append([str(rank), *map(str, _place()), count(held.parameters), bytes_(memory)])

    lengths = sorted({_length(config, phase, operators) for phase in config.phases.values()})
    tensors = len({shard.name for shard in known})
    return "\n\n".join(
        [
            plan_report(config, plan, stages, ranks),
            "\n".join(["Ranks built, with a micro-batch forward and backward", *table(RANK_COLUMNS, rows)]),
            "\n".join(["Batches", *table(BATCH_COLUMNS, list(_batches(config, ranks)))]),
            f"Dry run of {ranks} ranks: all is well\n"
            f"  weights     {weights:,} on {kinds} kinds of rank, as many as the plan says\n"
            f"  checkpoint  {tensors:,} tensors in {len(known):,} shards, each part in exactly one of them\n"
            f"  shapes      forward and backward on ranks {', '.join(row[0] for row in rows)}, sequences of "
            f"{', '.join(f'{length:,}' for length in lengths)}, operators as in {operators.__name__}",
        ]
    )


RANK_COLUMNS = ("rank", "stage", "tensor", "data", "expert", "context", "weights", "memory, estimated")
BATCH_COLUMNS = ("phase", "sequences a step", "data ranks", "micro-batches", "of sequences", "tokens a step", "steps")


def check_cover(every: Sequence[Held]) -> int:
    """The number of weights, if what is written covers each tensor of the model exactly once; else DryRunError."""
    wholes: dict[str, tuple[int, ...]] = {}
    written: dict[str, list[Shard]] = {}
    for held in every:
        for name, whole in held.wholes.items():
            if wholes.setdefault(name, whole) != whole:
                raise DryRunError(f"{name} is {wholes[name]} on one rank and {whole} on another")
        for shard in held.written:
            written.setdefault(shard.name, []).append(shard)
    for name, whole in wholes.items():
        shards = written.get(name, [])
        for shard in shards:
            if any(o + n > limit for o, n, limit in zip(shard.offset, shard.shape, whole, strict=True)):
                raise DryRunError(f"{name} {whole}: the shard at {shard.offset} with shape {shard.shape} lies outside")
        if twice := _overlap(shards):
            raise DryRunError(f"{name} {whole}: what lies at {twice.offset} with shape {twice.shape} is written twice")
        if (size := sum(shard.size for shard in shards)) != math.prod(whole):
            raise DryRunError(f"{name} {whole}: {size:,} of {math.prod(whole):,} values are written")
    buffers = set.union(*(held.buffers for held in every))
    return sum(math.prod(whole) for name, whole in wholes.items() if name.rpartition(".")[2] not in buffers)


def _overlap(shards: Sequence[Shard]) -> Shard | None:
    """One that shares an element with another. All pairs: there are at most some hundred shards of a tensor."""
    for index, one in enumerate(shards):
        for other in shards[:index]:
            meets = (
                a < b + m and b < a + n
                for a, n, b, m in zip(one.offset, one.shape, other.offset, other.shape, strict=True)
            )
            if all(meets):
                return one
    return None


def _operators(config: Config) -> ModuleType | SimpleNamespace:
    """The Triton operators' shapes, where Triton is installed and takes the model; else PyTorch's reference.

    The operators of a mixture of experts are PyTorch's in both cases: the Triton ones are not registered with shapes.
    """
    model = config.model
    try:
        reasons = unsuited(kernels.Needs(model.head_dim, model.group, config.attention.block, _dtype(config)))
    except ImportError:
        reasons = ["the package triton is not installed"]
    if config.kernels is Kernels.triton and reasons:
        raise kernels.KernelError(f"kernels=triton cannot run: {'; '.join(reasons)}")
    if config.kernels is Kernels.reference or reasons:
        return kernels.reference
    from kernels import operators  # needs Triton, but no GPU

    return SimpleNamespace(**{**vars(operators), "moe": kernels.reference.moe})


def _length(config: Config, phase: PhaseConfig, operators: ModuleType | SimpleNamespace) -> int:
    """Tokens of a sequence in the dry run: all of them, or some thousands for the reference, which loops over them."""
    length, context = phase.sequence_length, config.parallel.context
    unit = math.lcm(config.parallel.tensor, config.attention.block) * (1 if context == 1 else 2 * context)
    least = max(4096, 4 * context * config.attention.window)  # a window reaches no further than the chunk before
    while operators is kernels.reference and length > least and length % (2 * unit) == 0:
        length //= 2
    return length


def _dtype(config: Config) -> torch.dtype:
    return torch.float32 if config.precision is Precision.fp32 else torch.bfloat16  # auto: there will be GPUs


def _build(config: Config, stages: Sequence[range], operators: ModuleType) -> list[HySparseModel]:
    """The chunks of this fake rank."""
    transformer = transformer_config(config, megatron_layout(stages), _dtype(config) is torch.bfloat16)
    chunks = [
        build_chunk(config, transformer, stages, operators, *where) for where in chunks_of_this_stage(transformer)
    ]
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, MixtureOfExperts):
                module.forward = _EvenlyRouted(module)
                module.router.capacity_factor = 0.0  # to know what is dropped takes values
    return chunks


class _EvenlyRouted:
    """A mixture of experts whose ranks receive as many rows as they send: the numbers are values, and there are none.

    The rows stay where they are, so that the all-to-all itself is not run.
    """

    def __init__(self, layer: MixtureOfExperts):
        self.layer = layer

    def __call__(self, hidden: Tensor, *unused, **keywords) -> tuple[Tensor, None]:
        layer, operators = self.layer, self.layer.operators
        hidden, routing = layer.router(hidden, hand_on=True)
        rows, weights = operators.spread(hidden.flatten(0, 1), routing.weights, routing.position)
        rows = layer.experts.compute(rows, routing.offsets[: layer.num_local_experts], weights)
        output = operators.combine(rows, routing.position).view_as(hidden)
        return output if layer.shared_experts is None else output + layer.shared_experts(hidden), None


def _held(chunks: Sequence[HySparseModel]) -> Held:
    """Read off the description that also writes checkpoints and draws the initial weights."""
    wholes, shards, written = {}, set(), []
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for chunk in chunks:
        state = chunk.sharded_state_dict(metadata={"dp_cp_group": group})
        apply_factories(state)  # a SwiGLU projection is two tensors, gate and up
        for tensor in nested_values(state):
            if not isinstance(tensor, ShardedTensor):
                continue
            wholes[tensor.key] = tuple(tensor.global_shape)
            shard = Shard(tensor.key, tuple(tensor.global_offset), tuple(tensor.local_shape))
            shards.add(shard)
            if is_main_replica(tensor.replica_id):
                written.append(shard)
    buffers = {name.rpartition(".")[2] for chunk in chunks for name, _ in chunk.named_buffers()}
    parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    described = sum(shard.size for shard in shards if shard.name.rpartition(".")[2] not in buffers)
    if parameters != described:
        raise DryRunError(f"a rank has {parameters:,} weights, and {described:,} in its checkpoint")
    return Held(wholes, shards, written, parameters, buffers)


def _place() -> tuple[int, int, int, int, int]:
    return (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
    )


def _run(config: Config, phase: PhaseConfig, S: int, chunks: Sequence[HySparseModel], where: str) -> None:
    """A micro-batch through every chunk and back: the shapes that a stage hands on, and those of all gradients."""
    B, S = phase.micro_batch, S // config.parallel.context  # of this rank
    tokens = torch.empty(B, S, dtype=torch.int64)
    travels = (S // config.parallel.tensor, B, config.model.hidden)
    for chunk in chunks:
        received = torch.empty(travels, dtype=chunk.config.pipeline_dtype, requires_grad=True)
        chunk.set_input_tensor(received)
        chunk.zero_grad(set_to_none=True)
        output = chunk(tokens, tokens.int(), phase.rope_base, labels=tokens)
        _expect(where, "output of the stage", output, (B, S) if chunk.post_process else travels)
        output.sum().backward()
        if not chunk.pre_process:
            _expect(where, "gradient of its input", received.grad, travels)
        for name, parameter in chunk.named_parameters():
            _expect(where, f"gradient of {name}", parameter.grad, parameter.shape)


def _expect(where: str, what: str, tensor: Tensor | None, shape: Sequence[int]) -> None:
    found = None if tensor is None else tuple(tensor.shape)
    if found != tuple(shape):
        raise DryRunError(f"{where}: {what} should have shape {tuple(shape)}, not {found}")


def _batches(config: Config, ranks: int) -> Iterator[list[str]]:
    """How each phase's batch is shared out, after a check that every sequence goes to exactly one rank."""
    parallel = config.parallel
    data_ranks = ranks // (parallel.tensor * parallel.pipeline * parallel.context)
    for name, phase in config.phases.items():
        batch, micro = phase.global_batch, phase.micro_batch
        shares = [micro_batches(_Numbered(), 0, batch, rank, data_ranks, micro) for rank in range(data_ranks)]
        taken = sorted(int(number) for share in shares for rows in share for number in rows["tokens"])
        if taken != list(range(batch)):
            raise DryRunError(f"phases.{name}: {data_ranks} data-parallel ranks do not share out {batch} sequences")
        sizes = [batch, data_ranks, len(shares[0]), micro, phase.tokens_per_step, phase.steps]
        yield [name, *(f"{size:,}" for size in sizes)]


class _Numbered:
    """Samples that hold nothing but their number."""

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return dict.fromkeys(("tokens", "labels", "loss_mask", "document_start"), torch.tensor(number))
