"""Contradictions between groups of the configuration, found before any process group exists.

Each rule names the keys as the user types them, both values, and what would work.
"""

from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec

from hysparse.choices import EngineName, ExpertProducts, Gate, Precision, Source
from hysparse.config import (
    Config,
    ConfigError,
    DeepSpeedConfig,
    OptimConfig,
    PhaseConfig,
    RanksError,
    multiples_near,
    positive,
)
from hysparse.layout_checks import (
    chosen_by,
    context_parallel,
    expert_parallel,
    is_hybrid,
    nearest_ranks,
    of_ranks,
    pipeline,
    recomputation,
    tensor_parallel,
)
from hysparse.plan import Plan
from parallel.ranks import world_size


def check(config: Config, ranks: int | None) -> None:
    """Raise ConfigError at the first contradiction. `ranks` is the number of processes, None where none will run.

    It is a RanksError where another number of them would do.
    """
    for problem in _whatever_the_ranks(config, ranks):
        raise ConfigError(problem)
    for problem in of_ranks(config, ranks):
        raise RanksError(problem, nearest_ranks(config, ranks))


def problems(config: Config, ranks: int) -> Iterator[str]:
    """Sentences about what does not go together; what is wrong within a section raises ConfigError."""
    yield from _whatever_the_ranks(config, ranks)
    yield from of_ranks(config, ranks)


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
    yield from tensor_parallel(config)
    yield from pipeline(config)
    yield from expert_parallel(config)
    yield from recomputation(config)
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
    if attention.output_gate is not Gate.none and is_hybrid(attention):
        yield (
            f"attention.output_gate={attention.output_gate} belongs to the all-full baseline (paper, section 4.1), but "
            f"{chosen_by(attention)} has sparse layers; use attention.output_gate=none or attention=full"
        )


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
                "or parallel=default for all sizes, or engine=megatron"
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
    length, attention, hybrid = phase.sequence_length, config.attention, is_hybrid(config.attention)
    if hybrid and attention.selects and length % attention.block:
        yield (
            f"{name}.sequence_length={length} is no multiple of attention.block={attention.block}; "
            f"use {multiples_near(length, attention.block)}"
        )
    if hybrid and attention.window_kv is not Source.none and attention.window > length:
        yield (
            f"attention.window={attention.window} is larger than {name}.sequence_length={length}; "
            f"use attention.window={length} or less"
        )
    yield from context_parallel(name, phase, config)
    tensor, context = config.parallel.tensor, config.parallel.context
    if length % (tensor * context):
        yield (
            f"parallel.tensor={tensor} x parallel.context={context} = {tensor * context} does not divide "
            f"{name}.sequence_length={length}, which sequence and context parallelism split; use "
            f"{multiples_near(length, tensor * context)}"
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
