"""Contradictions between groups of the configuration, found before any process group exists.

Each rule names the keys as the user types them, both values, and what would work.
"""

import math
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec

from hysparse.config import (
    AttentionConfig,
    Config,
    ConfigError,
    DeepSpeedConfig,
    Dispatcher,
    EngineName,
    ExpertProducts,
    Gate,
    ModelConfig,
    OptimConfig,
    PhaseConfig,
    Precision,
    RanksError,
    Source,
    positive,
)
from hysparse.plan import Plan
from parallel.placement import possible_stages
from parallel.ranks import world_size


def check(config: Config, ranks: int | None) -> None:
    """Raise ConfigError at the first contradiction. `ranks` is the number of processes, None where none will run.

    It is a RanksError where another number of them would do.
    """
    for problem in _whatever_the_ranks(config, ranks):
        raise ConfigError(problem)
    for problem in _ranks(config, ranks):
        raise RanksError(problem, _nearest(config, ranks))


def problems(config: Config, ranks: int) -> Iterator[str]:
    """Sentences about what does not go together; what is wrong within a section raises ConfigError."""
    yield from _whatever_the_ranks(config, ranks)
    yield from _ranks(config, ranks)


def _whatever_the_ranks(config: Config, ranks: int | None) -> Iterator[str]:
    """What no other number of processes would change; `ranks` says only whether there will be any."""
    if not config.phases:
        yield "phases is empty: a run needs at least one phase, for example phases=tiny"
    for name, phase in config.phases.items():
        yield from _phase_alone(f"phases.{name}", phase)
    for key in ("name", "dir"):
        if not getattr(config.run, key).strip():
            yield f"run.{key} is empty; give it a value, or leave it out for run.dir=runs/MODEL-ATTENTION"
    yield from _rhythm(config)
    yield from _optimizer(config.optim)
    yield from _branches(config)
    yield from _deepspeed(config, ranks)
    yield from _tensor_parallel(config)
    yield from _pipeline(config)
    yield from _expert_parallel(config)
    yield from _engine(config)
    for name, phase in config.phases.items():
        yield from _lengths(f"phases.{name}", phase, config)
    yield from _dry_run(config)
    if config.max_steps is not None and config.max_steps < 1:
        yield f"max_steps={config.max_steps} must be at least 1, or null for the whole schedule"


def _phase_alone(name: str, phase: PhaseConfig) -> Iterator[str]:
    positive(name, phase, "tokens", "sequence_length", "global_batch", "micro_batch", "learning_rate", "rope_base")
    for key in ("warmup_tokens", "decay_tokens", "minimum_learning_rate"):
        if getattr(phase, key) < 0:
            yield f"{name}.{key}={getattr(phase, key)} is negative; use 0 or more"
    if phase.warmup_tokens + phase.decay_tokens > phase.tokens:
        yield (
            f"{name}.warmup_tokens={phase.warmup_tokens:_} + {name}.decay_tokens={phase.decay_tokens:_} exceed "
            f"{name}.tokens={phase.tokens:_}; shorten one of them"
        )
    if phase.minimum_learning_rate > phase.learning_rate:
        yield (
            f"{name}.minimum_learning_rate={phase.minimum_learning_rate} exceeds "
            f"{name}.learning_rate={phase.learning_rate}; the decay goes down"
        )


def _rhythm(config: Config) -> Iterator[str]:
    """How often something happens, and how much is kept."""
    positive("checkpoint", config.checkpoint, "every")
    positive("logging", config.logging, "every")
    if config.data.validation_samples < 1:
        yield (
            f"data.validation_samples={config.data.validation_samples} must be at least 1; "
            f"logging.validate_every={config.logging.validate_every} decides whether there is validation, 0 is never"
        )
    if config.checkpoint.keep < 0:
        yield f"checkpoint.keep={config.checkpoint.keep} is negative; use the number to keep, or 0 for all"
    if config.logging.validate_every < 0:
        yield f"logging.validate_every={config.logging.validate_every} is negative; use 0 to switch validation off"
    if config.logging.experts_every < 0:
        yield f"logging.experts_every={config.logging.experts_every} is negative; use 0 for no records of the experts"


def _optimizer(optim: OptimConfig) -> Iterator[str]:
    positive("optim", optim, "epsilon")
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(optim, key) < 1:
            yield f"optim.{key}={getattr(optim, key)} must be at least 0 and below 1, such as 0.95"
    for key in ("weight_decay", "clip"):
        if getattr(optim, key) < 0:
            yield f"optim.{key}={getattr(optim, key)} is negative; use 0 for none"


def _branches(config: Config) -> Iterator[str]:
    Plan(config.model, config.attention)  # raises its own ConfigErrors
    attention = config.attention
    if attention.output_gate is not Gate.none and _hybrid(attention):
        yield (
            f"attention.output_gate={attention.output_gate} belongs to the all-full baseline (paper, section 4.1), but "
            f"{_chosen(attention)} has sparse layers; use attention.output_gate=none or attention=full"
        )


def _hybrid(attention: AttentionConfig) -> bool:
    """Whether there are sparse layers."""
    return attention.ratio > 0 if attention.pattern is None else "S" in attention.pattern


def _chosen(attention: AttentionConfig) -> str:
    """The key that decides which layers are full."""
    if attention.pattern is None:
        return f"attention.ratio={attention.ratio}"
    return f"attention.pattern={attention.pattern}"


def _deepspeed(config: Config, ranks: int | None) -> Iterator[str]:
    """What DeepSpeed cannot do; that it is installed is checked only where processes will run."""
    if config.engine is EngineName.megatron:
        for field in fields(DeepSpeedConfig):
            if (value := getattr(config.deepspeed, field.name)) != field.default:
                yield (
                    f"deepspeed.{field.name}={value} means nothing to engine=megatron; add engine=deepspeed, or leave "
                    f"out deepspeed.{field.name}"
                )
        return
    if config.parallel.layout is not None:
        yield "parallel.layout places pipeline stages, which engine=deepspeed has none of; leave it out"
    for key in ("tensor", "pipeline", "virtual", "expert", "context"):
        if (size := getattr(config.parallel, key)) != 1:
            yield (
                f"parallel.{key}={size}: engine=deepspeed has data parallelism and ZeRO only; use parallel.{key}=1, "
                "or engine=megatron"
            )
    if share := config.parallel.offload_optimizer:
        yield (
            f"parallel.offload_optimizer={share} is for engine=megatron; with engine=deepspeed use "
            "deepspeed.offload_optimizer=cpu, and leave out parallel.offload_optimizer"
        )
    if config.dry_run is not None:
        yield (
            f"dry_run={config.dry_run} builds what ranks of engine=megatron hold; with engine=deepspeed use plan=true"
        )
    if ranks is not None and find_spec("deepspeed") is None:
        yield (
            "engine=deepspeed needs the package deepspeed, which is not installed here; "
            "pip install deepspeed==0.19.8, or use engine=megatron"
        )


def _tensor_parallel(config: Config) -> Iterator[str]:
    tensor, model = config.parallel.tensor, config.model
    if tensor in tensor_sizes(config):
        return
    fix = f"use one of {_listed(tensor_sizes(config))}"
    if not _shares_heads(model, tensor):
        yield (
            f"parallel.tensor={tensor} neither divides model.kv_heads={model.kv_heads} nor is a multiple of it that "
            f"divides model.heads={model.heads}; {fix}"
        )
    for key, value in _split_widths(model).items():
        if value % tensor:
            yield f"parallel.tensor={tensor} does not divide {key}={value}; {fix}"


def tensor_sizes(config: Config) -> list[int]:
    """Values of parallel.tensor that this model can be split into."""
    model, widths = config.model, _split_widths(config.model).values()
    return [
        size
        for size in range(1, model.heads + 1)
        if _shares_heads(model, size) and not any(width % size for width in widths)
    ]


def _shares_heads(model: ModelConfig, tensor: int) -> bool:
    """Whether each rank gets whole KV heads, or one that it shares with its neighbours and some of its query heads."""
    return model.kv_heads % tensor == 0 or tensor % model.kv_heads == model.heads % tensor == 0


def _split_widths(model: ModelConfig) -> dict[str, int]:
    """What else tensor parallelism splits."""
    widths = {"model.vocabulary": model.vocabulary}
    if model.is_dense(0):
        widths["model.ffn"] = model.ffn
    if model.moe is not None and model.moe.shared_ffn:
        widths["model.moe.shared_ffn"] = model.moe.shared_ffn
    return widths


def _pipeline(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.virtual > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual={parallel.virtual} needs parallel.pipeline of at least 2, not {parallel.pipeline}; "
            "use parallel.virtual=1"
        )
    blocks = Plan(config.model, config.attention).block_sizes
    stages = parallel.pipeline * parallel.virtual
    if stages not in possible_stages(blocks):
        yield (
            f"parallel.pipeline={parallel.pipeline} x parallel.virtual={parallel.virtual} = {stages} stages, but "
            f"{_chosen(config.attention)} gives {len(blocks)} hybrid blocks of {_listed(blocks)} layers, "
            f"which are never cut; use at most {len(blocks)} stages"
        )
    elif parallel.layout is not None:
        layout, example = parallel.layout, [*[1] * (stages - 1), len(blocks) - stages + 1]
        if len(layout) != stages:
            yield (
                f"parallel.layout={layout} has {len(layout)} entries, but parallel.pipeline={parallel.pipeline} x "
                f"parallel.virtual={parallel.virtual} = {stages} stages; use for example {example}"
            )
        elif sum(layout) != len(blocks) or min(layout) < 1:
            yield (
                f"parallel.layout={layout} must give each stage 1 or more of the {len(blocks)} hybrid blocks, "
                f"{_listed(blocks)} layers long; use for example {example}"
            )


def _expert_parallel(config: Config) -> Iterator[str]:
    expert, moe = config.parallel.expert, config.model.moe
    widths = {"model.hidden": config.model.hidden, "model.moe.ffn": moe.ffn} if moe else {}
    for key, width in widths.items():
        if width % 8:  # rows of 16 bytes in BF16
            yield (
                f"{key}={width} must be a multiple of 8 for the product of all experts at once; "
                f"use {key}={-(-width // 8) * 8}"
            )
    if expert > 1 and moe is None:
        yield f"parallel.expert={expert} needs experts, but model.moe is null; use parallel.expert=1"
    if config.parallel.dispatcher is Dispatcher.deepep:
        if moe is not None and moe.capacity_factor:
            yield (
                f"model.moe.capacity_factor={moe.capacity_factor} drops rows, parallel.dispatcher=deepep does not; "
                "use parallel.dispatcher=alltoall, or model.moe.capacity_factor=0"
            )
        if expert == 1:
            yield (
                "parallel.dispatcher=deepep needs experts on other ranks, but parallel.expert=1; "
                "use parallel.dispatcher=alltoall"
            )
        elif find_spec("deep_ep") is None:
            yield (
                "parallel.dispatcher=deepep needs the package deep_ep, which is not installed; build it from "
                "github.com/deepseek-ai/DeepEP, or use parallel.dispatcher=alltoall"
            )
    if moe is not None and moe.experts % expert:
        yield (
            f"parallel.expert={expert} does not divide model.moe.experts={moe.experts}; use one of "
            f"{_listed([size for size in range(1, moe.experts + 1) if moe.experts % size == 0])}"
        )


def _engine(config: Config) -> Iterator[str]:
    """What Transformer Engine's products are asked for, and the sizes that those in FP8 take: multiples of 16."""
    if config.experts is not ExpertProducts.auto and config.model.moe is None:
        yield f"experts={config.experts} needs experts, but model.moe is null; use experts=auto"
    if config.precision is not Precision.fp8:
        return
    if config.experts is ExpertProducts.grouped:
        yield "experts=grouped computes in BF16, not in precision=fp8; use experts=auto, or precision=bf16"
    model, tensor = config.model, config.parallel.tensor
    if tensor > model.kv_heads:
        yield (
            f"parallel.tensor={tensor} exceeds model.kv_heads={model.kv_heads}, and shared heads are not computed in "
            f"precision=fp8; use parallel.tensor={model.kv_heads} or less, or precision=bf16"
        )
    if config.engine is EngineName.deepspeed:
        yield "engine=deepspeed computes in BF16, not in precision=fp8; use engine=megatron, or precision=bf16"
    plan = Plan(model, config.attention)
    widths = {"model.hidden": model.hidden, "model.heads x model.head_dim": model.heads * model.head_dim // tensor}
    for kind in sorted({layer.kind for layer in plan.layers}):
        widths[f"the rows of a {kind} layer's queries, keys, values and gates"] = plan.projection_rows(kind) // tensor
    if model.is_dense(0):
        widths["model.ffn"] = model.ffn // tensor
    if model.moe is not None:
        widths |= {"model.moe.ffn": model.moe.ffn, "model.moe.shared_ffn": model.moe.shared_ffn // tensor}
    for key, width in widths.items():
        if width % 16:
            share = "" if tensor == 1 else f" on each of parallel.tensor={tensor} ranks"
            yield f"precision=fp8 takes multiples of 16, but {key} is {width}{share}; change it, or use precision=bf16"


def _lengths(name: str, phase: PhaseConfig, config: Config) -> Iterator[str]:
    length, attention, hybrid = phase.sequence_length, config.attention, _hybrid(config.attention)
    if hybrid and attention.selects and length % attention.block:
        below, above = length // attention.block * attention.block, -(-length // attention.block) * attention.block
        yield (
            f"{name}.sequence_length={length} is no multiple of attention.block={attention.block}; "
            f"use {below or above} or {above}"
        )
    if hybrid and attention.window_kv is not Source.none and attention.window > length:
        yield (
            f"attention.window={attention.window} is larger than {name}.sequence_length={length}; "
            f"use attention.window={length} or less"
        )
    yield from _context_parallel(name, phase, config)
    tensor, context = config.parallel.tensor, config.parallel.context
    if length % (tensor * context):
        yield (
            f"parallel.tensor={tensor} x parallel.context={context} = {tensor * context} does not divide "
            f"{name}.sequence_length={length}, which sequence and context parallelism split; use a multiple of "
            f"{tensor * context}"
        )


def _context_parallel(name: str, phase: PhaseConfig, config: Config) -> Iterator[str]:
    """Each rank has two chunks of the sequence; a chunk holds whole key blocks, and all tokens of a halo."""
    length, attention, context = phase.sequence_length, config.attention, config.parallel.context
    if context == 1:
        return
    blocks, hybrid = f"multiples of attention.block={attention.block}", _hybrid(attention)
    unit, must_be = (attention.block, blocks) if hybrid and attention.selects else (1, "equal")
    sizes = [1, *(size for size in range(2, length // (2 * unit) + 1) if length % (2 * size * unit) == 0)]
    step = 2 * context * unit
    if length % step:
        lengths = [near for near in (length // step * step, -(-length // step) * step) if near]
        near = [size for size in sizes if size < context][-1:] + [size for size in sizes if size > context][:1]
        yield (
            f"parallel.context={context} cuts {name}.sequence_length={length} into {2 * context} chunks, which must be "
            f"{must_be}; use {name}.sequence_length={_either(lengths)}, or parallel.context={_either(near)}"
        )
        return
    chunk, halo = length // (2 * context), attention.window - 1
    has_halo = attention.window_kv is Source.own and attention.sparse_kv is not Source.own  # else all is gathered
    if hybrid and has_halo and chunk < halo:
        most = max([1, *(size for size in sizes if length // (2 * size) >= halo)])
        yield (
            f"attention.window={attention.window} reaches {halo} tokens back, further than a chunk of {chunk}, half of "
            f"what each of parallel.context={context} ranks has of {name}.sequence_length={length}; use "
            f"parallel.context={most}, attention.window={chunk + 1} or less, or "
            f"{name}.sequence_length={-(-2 * context * halo // step) * step}"
        )


def _dry_run(config: Config) -> Iterator[str]:
    if config.dry_run is None:
        return
    if config.dry_run < 1:
        yield f"dry_run={config.dry_run} must be the number of ranks of the run, at least 1"
    if config.plan:
        yield f"plan=true and dry_run={config.dry_run}: a dry run prints the plan as well; leave out plan=true"
    if world_size() > 1:
        yield (
            f"dry_run={config.dry_run} takes one process, not {world_size()}; "
            "start it with python train.py, without torchrun or srun"
        )


def _nearest(config: Config, ranks: int) -> str:
    """The numbers of processes next to `ranks` that this layout and these batches run on, as the end of a message."""
    parallel = config.parallel
    model_parallel = parallel.tensor * parallel.pipeline * parallel.context
    most = min(phase.global_batch // phase.micro_batch for phase in config.phases.values())
    sizes = [model_parallel * data for data in range(1, most + 1)]
    working = [size for size in sizes if next(_ranks(config, size), None) is None]
    below = [size for size in working if size < ranks][-1:]
    above = [size for size in working if size > ranks][:1]
    if not working:
        return ""
    near = _either(below + above)
    return f"; or set dry_run={near}" if config.dry_run is not None else f"; or start {near} processes"


def _ranks(config: Config, ranks: int | None) -> Iterator[str]:
    if ranks is None:
        return
    parallel = config.parallel
    model_parallel = parallel.tensor * parallel.pipeline * parallel.context
    if ranks % model_parallel:
        yield (
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} x "
            f"parallel.context={parallel.context} = {model_parallel} does not divide the {ranks} processes of this "
            f"run; their number must be a multiple of {model_parallel}"
        )
    if ranks % (parallel.expert * parallel.pipeline):
        yield (
            f"parallel.expert={parallel.expert} x parallel.pipeline={parallel.pipeline} does not divide the {ranks} "
            f"processes of this run; experts are split over the ranks of a pipeline stage, "
            f"use parallel.expert={math.gcd(ranks // parallel.pipeline, parallel.expert)}"
        )
    data_parallel = max(1, ranks // model_parallel)
    for phase_name, phase in config.phases.items():
        name = f"phases.{phase_name}"
        share = data_parallel * phase.micro_batch
        if phase.global_batch % share:
            near = max(share, phase.global_batch // share * share)
            split = -(-share // phase.global_batch) * model_parallel
            fewer = f", or parallel.tensor x parallel.pipeline of {split} or more" if share > phase.global_batch else ""
            yield (
                f"{name}.micro_batch={phase.micro_batch} x {data_parallel} data-parallel ranks does not divide "
                f"{name}.global_batch={phase.global_batch}; use {name}.global_batch={near} or {near + share}{fewer}"
            )
        micro_batches = phase.global_batch // share
        if parallel.virtual > 1 and micro_batches % parallel.pipeline:
            yield (
                f"parallel.virtual={parallel.virtual} needs {name}'s {micro_batches} micro-batches (global_batch / "
                f"micro_batch / data-parallel ranks) to be a multiple of parallel.pipeline={parallel.pipeline}; "
                f"use {name}.global_batch={share * parallel.pipeline} or a multiple of it"
            )


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))


def _either(sizes: list[int]) -> str:
    return " or ".join(map(str, sizes))
