"""What tensor, pipeline, expert and context parallelism and a number of ranks ask of the rest of the configuration.

Generators of sentences, which `checks.py` collects; each names the keys as the user types them, both values, and what
would work.
"""

import math
from collections.abc import Iterator
from importlib.util import find_spec

from hysparse.choices import Dispatcher, Recompute, Source
from hysparse.config import AttentionConfig, Config, ModelConfig, PhaseConfig, multiples_near
from hysparse.plan import Plan
from parallel.placement import possible_stages


def tensor_parallel(config: Config) -> Iterator[str]:
    """Heads, FFN widths and vocabulary can be split over parallel.tensor ranks."""
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


def recomputation(config: Config) -> Iterator[str]:
    """A number of layers goes with the kind of recomputation that it counts."""
    layers, recompute = config.parallel.recompute_layers, config.parallel.recompute
    if layers is not None and recompute is not Recompute.full:
        yield (
            f"parallel.recompute_layers={layers} says how many layers are recomputed in full, and parallel.recompute="
            f"{recompute}; use parallel.recompute=full, or leave parallel.recompute_layers out"
        )


def pipeline(config: Config) -> Iterator[str]:
    """There is a hybrid block for every stage and chunk, and an explicit layout deals all of them out."""
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
            f"{chosen_by(config.attention)} gives {len(blocks)} hybrid blocks of {_listed(blocks)} layers, "
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


def expert_parallel(config: Config) -> Iterator[str]:
    """The experts can be multiplied together, split over ranks, and reached by the dispatcher."""
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


def context_parallel(name: str, phase: PhaseConfig, config: Config) -> Iterator[str]:
    """Each rank has two chunks of the sequence; a chunk holds whole key blocks, and all tokens of a halo."""
    length, attention, context = phase.sequence_length, config.attention, config.parallel.context
    if context == 1:
        return
    blocks, hybrid = f"multiples of attention.block={attention.block}", is_hybrid(attention)
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


def of_ranks(config: Config, ranks: int | None) -> Iterator[str]:
    """The number of processes, where it is known, suits the layout, and data-parallel ranks share batches evenly."""
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
            split = -(-share // phase.global_batch) * parallel.tensor * parallel.pipeline
            fewer = f", or parallel.tensor x parallel.pipeline of {split} or more" if share > phase.global_batch else ""
            yield (
                f"{name}.micro_batch={phase.micro_batch} x {data_parallel} data-parallel ranks does not divide "
                f"{name}.global_batch={phase.global_batch}; "
                f"use {name}.global_batch={multiples_near(phase.global_batch, share)}{fewer}"
            )
        micro_batches = phase.global_batch // share
        if parallel.virtual > 1 and micro_batches % parallel.pipeline:
            yield (
                f"parallel.virtual={parallel.virtual} needs {name}'s {micro_batches} micro-batches (global_batch / "
                f"micro_batch / data-parallel ranks) to be a multiple of parallel.pipeline={parallel.pipeline}; "
                f"use {name}.global_batch={multiples_near(phase.global_batch, share * parallel.pipeline)}"
            )


def nearest_ranks(config: Config, ranks: int) -> str:
    """The numbers of processes next to `ranks` that this layout and these batches run on, as the end of a message."""
    parallel = config.parallel
    model_parallel = parallel.tensor * parallel.pipeline * parallel.context
    most = min(phase.global_batch // phase.micro_batch for phase in config.phases.values())
    sizes = [model_parallel * data for data in range(1, most + 1)]
    working = [size for size in sizes if next(of_ranks(config, size), None) is None]
    below = [size for size in working if size < ranks][-1:]
    above = [size for size in working if size > ranks][:1]
    if not working:
        return ""
    near = _either(below + above)
    return f"; or set dry_run={near}" if config.dry_run is not None else f"; or start {near} processes"


def is_hybrid(attention: AttentionConfig) -> bool:
    """Whether there are sparse layers."""
    return attention.ratio > 0 if attention.pattern is None else "S" in attention.pattern


def chosen_by(attention: AttentionConfig) -> str:
    """The key that decides which layers are full."""
    if attention.pattern is None:
        return f"attention.ratio={attention.ratio}"
    return f"attention.pattern={attention.pattern}"


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))


def _either(sizes: list[int]) -> str:
    return " or ".join(map(str, sizes))
