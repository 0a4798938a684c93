"""All layouts of a model on a cluster that fit by the estimates of `estimate.py`, and what `auto` stands for.

What a layout must fulfil is said in `layout_checks.py`: here every combination is made, and those checks sort it out.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from hysparse.checks import check, problems
from hysparse.choices import Dispatcher, EngineName, Recompute
from hysparse.config import AUTO, Config, ConfigError, PhaseConfig, RanksError
from hysparse.estimate import Cluster, HostMemory, Layout, Memory
from hysparse.layout_checks import tensor_sizes
from hysparse.plan import Plan, pipeline_stages
from hysparse.report import bytes_

MICRO_BATCHES = (1, 2, 4, 8)
SHORTEST = 4096  # tokens of a sequence on a rank, below which no larger context is proposed: kernels get too little


class NothingFits(Exception):
    """No valid layout, or none within the memory; `smallest` is the least estimate in bytes, infinite without any.

    `host` is the least of the layouts that fit on the GPUs, where none of them fits into their nodes.
    """

    def __init__(self, smallest: float, host: HostMemory | None = None):
        super().__init__(smallest, host)
        self.smallest, self.host = smallest, host


@dataclass(frozen=True)
class Choice:
    """A layout that fits. `config` has it written in."""

    config: Config
    memory: Memory  # of the fullest stage in the most demanding phase
    host: HostMemory  # of the fullest node
    seconds: tuple[float, ...]  # of a step, by phase

    @property
    def days(self) -> float:
        """The whole schedule, without evaluation, checkpoints and failures."""
        phases = self.config.phases.values()
        return sum(phase.steps * seconds for phase, seconds in zip(phases, self.seconds, strict=True)) / 86400


def choices(config: Config, cluster: Cluster, fixed: Sequence[str]) -> list[Choice]:
    """All layouts of `config` that fit, the quickest first; `fixed` keys keep their values.

    Raises NothingFits, or ConfigError where something else than the layout is wrong.
    """
    one_rank = {"tensor": 1, "pipeline": 1, "virtual": 1, "expert": 1, "context": 1}
    check(_laid_out(config, **one_rank, dispatcher=Dispatcher.alltoall), None)
    plan = Plan(config.model, config.attention)
    found, smallest, refused = [], math.inf, []
    placed = cache(
        lambda pipeline, virtual: pipeline_stages(_laid_out(config, pipeline=pipeline, virtual=virtual), plan)
    )
    for candidate in _layouts(config, plan, cluster, fixed):
        stages = placed(candidate.parallel.pipeline, candidate.parallel.virtual)
        chosen, seconds, worst, least = {}, [], None, 0.0
        for name, phase in candidate.phases.items():
            best, least_here = None, math.inf
            for micro in _micro_batches(phase, f"phases.{name}.micro_batch" in fixed):
                tried = replace(phase, micro_batch=micro)
                one = replace(candidate, phases={name: tried})
                if next(problems(one, cluster.ranks), None):
                    continue
                layout = Layout(one, plan, stages, cluster)
                memory = max(layout.memory(tried), key=lambda memory: memory.total)
                least_here = min(least_here, memory.total)
                if memory.total <= cluster.memory:
                    best = min(filter(None, (best, (layout.step_seconds(tried), micro, memory))))
            least = max(least, least_here)
            if best is not None:
                seconds.append(best[0])
                chosen[name] = replace(phase, micro_batch=best[1])
                worst = max(filter(None, (worst, best[2])), key=lambda memory: memory.total)
        smallest = min(smallest, least)
        if len(chosen) == len(candidate.phases):
            host = Layout(candidate, plan, stages, cluster).host_memory()
            if host.total > cluster.host_memory:
                refused.append(host)
                continue
            found.append(Choice(replace(candidate, phases=chosen), worst, host, tuple(seconds)))
    if not found:
        raise NothingFits(smallest, min(refused, key=lambda host: host.total, default=None))
    return sorted(found, key=lambda choice: (choice.days, choice.memory.total))


def with_chosen_pipeline(config: Config, ranks: int | None) -> Config:
    """`config` with numbers for parallel.pipeline=auto and parallel.virtual=auto: the quickest that fit."""
    automatic = [f"parallel.{key}" for key in ("pipeline", "virtual") if getattr(config.parallel, key) == AUTO]
    if not automatic:
        return config
    words = " and ".join(f"{key}={AUTO}" for key in automatic)
    if ranks is None:
        raise ConfigError(f"{words} needs the number of ranks: use dry_run=N instead of plan=true, or give numbers")
    layout = ("tensor", "pipeline", "virtual", "expert", "context", "recompute")
    fixed = {f"parallel.{key}" for key in layout} | {f"phases.{name}.micro_batch" for name in config.phases}
    memory = config.parallel.memory
    try:
        best, *_ = choices(config, Cluster(ranks, memory * 2**30), sorted(fixed - set(automatic)))
    except NothingFits as error:
        if error.smallest < math.inf:
            raise RanksError(
                f"{words}: nothing fits into parallel.memory={memory:g} GiB on {ranks} ranks, the smallest estimate is "
                f"{error.smallest / 2**30:.0f} GiB; raise parallel.tensor or parallel.expert, or use "
                f"{_less_memory(config)}"
            ) from None
        numbers = {key.removeprefix("parallel."): 1 for key in automatic} | {"virtual": 1}
        check(_laid_out(config, **numbers), ranks)  # most often the reason is one that no number of stages changes
        raise RanksError(
            f"{words}: no number of stages is valid on {ranks} ranks with parallel.virtual={config.parallel.virtual}; "
            f"use parallel.virtual={AUTO}"
        ) from None
    return replace(config, parallel=best.config.parallel)


def _less_memory(config: Config) -> str:
    """What the user can set for it, beside a larger layout."""
    if config.parallel.recompute is not Recompute.full:
        return "parallel.recompute=full"
    return "no parallel.recompute_layers" if config.parallel.recompute_layers else "parallel.offload_optimizer=1"


def overfull(config: Config, ranks: int, memory: float) -> str | None:
    """A sentence where the estimate of a GPU is above its `memory` in bytes, otherwise None.

    What DeepSpeed takes there is not estimated.
    """
    if config.engine is not EngineName.megatron:
        return None
    plan = Plan(config.model, config.attention)
    layout = Layout(config, plan, pipeline_stages(config, plan), Cluster(ranks))
    need = max(stage.total for phase in config.phases.values() for stage in layout.memory(phase))
    if need <= memory:
        return None
    return (
        f"by estimate this layout needs {bytes_(need)} on a GPU, and this one has {bytes_(memory)}. For others give "
        f"these arguments to `python -m parallel.plan`, with gpus={ranks} memory={memory / 2**30:.0f}GiB"
    )


def overrides(choice: Choice) -> list[str]:
    """The layout as arguments of train.py."""
    parallel = choice.config.parallel
    keys = ("tensor", "pipeline", "virtual", "expert", "context", "recompute")
    micro = [f"phases.{name}.micro_batch={phase.micro_batch}" for name, phase in choice.config.phases.items()]
    return [*(f"parallel.{key}={getattr(parallel, key)}" for key in keys), *micro]


def _layouts(config: Config, plan: Plan, cluster: Cluster, fixed: Sequence[str]) -> Iterator[Config]:
    """Every layout with the values that are not fixed varied; whether it is valid is for the checks to say."""
    blocks, moe = len(plan.blocks), config.model.moe
    stages = range(1, blocks + 1)
    ranges = {
        "tensor": [size for size in tensor_sizes(config) if size <= cluster.node],
        "pipeline": [size for size in stages if cluster.ranks % size == 0],
        "virtual": list(stages),
        "expert": [size for size in range(1, moe.experts + 1) if moe.experts % size == 0] if moe else [1],
        "context": [2**power for power in range(cluster.ranks.bit_length()) if cluster.ranks % 2**power == 0],
        "recompute": [Recompute.full] if config.parallel.recompute_layers else list(Recompute),
    }
    for key in ranges:
        if f"parallel.{key}" in fixed:
            ranges[key] = [getattr(config.parallel, key)]
    longest = max(phase.sequence_length for phase in config.phases.values())
    for values in product(*ranges.values()):
        sizes = dict(zip(ranges, values, strict=True))
        pipeline, model = sizes["pipeline"], sizes["tensor"] * sizes["pipeline"] * sizes["context"]
        stages, tokens = pipeline * sizes["virtual"], longest // sizes["context"]
        if stages > blocks or cluster.ranks % model or cluster.ranks % (sizes["expert"] * pipeline):
            continue
        if sizes["context"] > 1 and tokens < SHORTEST and "parallel.context" not in fixed:
            continue
        yield _laid_out(config, **sizes)


def _laid_out(config: Config, **parallel) -> Config:
    return replace(config, parallel=replace(config.parallel, **parallel))


def _micro_batches(phase: PhaseConfig, fixed: bool) -> Sequence[int]:
    return [phase.micro_batch] if fixed else [micro for micro in MICRO_BATCHES if micro <= phase.global_batch]
