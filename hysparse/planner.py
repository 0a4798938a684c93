"""`python -m parallel.plan +experiment=NAME gpus=512 memory=141GiB`: the layouts that fit, the quickest first.

Tries every valid combination of tensor, pipeline, virtual, expert and context parallelism, recomputation and
micro-batch of each phase; keys given on the command line stay as they are. Memory and time are those of `estimate.py`,
with its caveats.
"""

import math
import re
import shlex
from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hysparse.compose import CONF, refuse_unknown, register
from hysparse.config import AUTO, Config, ConfigError
from hysparse.estimate import Cluster
from hysparse.layouts import Choice, NothingFits, choices, overrides
from hysparse.mistakes import mistakes_without_traceback
from hysparse.report import bytes_, count, host_memory, table

SHOWN = 10
CLUSTER_KEYS = ("gpus", "memory", "host_memory", "node", "nvlink", "network")
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

USAGE = """python -m parallel.plan +experiment=NAME gpus=N [memory=80GiB] [node=8] [nvlink=300GB/s] [network=40GB/s]
    [host_memory=1TiB]   of a node; without it host memory is printed, and no limit
    [key=value ...]      as for train.py; parallel.* and phases.*.micro_batch given here are kept"""


def report(found: Sequence[Choice], cluster: Cluster, given: Sequence[str]) -> str:
    """The best ten, the parts of the first one's memory, and the command that runs it; `given` on the command line."""
    keys = ("tensor", "pipeline", "virtual", "expert", "context")
    header = [*keys, "data", "recompute", "micro-batch", "memory", "host memory", "step", "tokens/s/GPU", "days"]
    rows = []
    for choice in found[:SHOWN]:
        parallel, phases = choice.config.parallel, list(choice.config.phases.values())
        data = cluster.ranks // (parallel.tensor * parallel.pipeline * parallel.context)
        micro = ", ".join(str(phase.micro_batch) for phase in phases)
        steps = ", ".join(f"{seconds:.1f} s" for seconds in choice.seconds)
        speeds = ", ".join(
            count(phase.tokens_per_step / seconds / cluster.ranks)
            for phase, seconds in zip(phases, choice.seconds, strict=True)
        )
        some = f" ({parallel.recompute_layers})" if parallel.recompute_layers else ""
        layout = [*(str(getattr(parallel, key)) for key in keys), str(data), f"{parallel.recompute}{some}"]
        sizes = [bytes_(choice.memory.total), bytes_(choice.host.total)]
        rows.append([*layout, micro, *sizes, steps, speeds, f"{choice.days:.1f}"])
    best = found[0]
    parts = ", ".join(f"{name} {bytes_(size)}" for name, size in best.memory._asdict().items())
    phases, chosen = ", ".join(best.config.phases), overrides(best)
    written = {override.partition("=")[0] for override in chosen}
    kept = [argument for argument in given if argument.lstrip("+").partition("=")[0] not in written]
    limit = f" with {bytes_(cluster.host_memory)} of host memory" if cluster.host_memory < math.inf else ""
    return "\n".join(
        [
            f"{best.config.model.name} on {cluster.ranks} GPUs of {bytes_(cluster.memory)}, {cluster.node} in a node"
            f"{limit}: {len(found)} layouts fit; estimates, not measured",
            *table(header, rows),
            f"micro-batch, step and tokens/s of {phases}; memory of the fullest stage, host memory of the fullest node",
            f"Memory of the first: {parts}",
            f"Host memory of the first: {host_memory(best.host)}",
            "",
            shlex.join(["python", "train.py", *kept, *chosen]),
        ]
    )


def _nothing_fits(config: Config, cluster: Cluster, error: NothingFits) -> str:
    smallest, host = error.smallest, error.host
    if host is not None:
        fixes = [f"host_memory={math.ceil(host.total / 2**30)}GiB", "more GPUs"]
        share, left = config.parallel.offload_optimizer, cluster.host_memory - host.checkpoint
        if share and left > 0:
            fixes.append(f"parallel.offload_optimizer={math.floor(100 * share * left / host.optimizer) / 100}")
        return (
            f"host_memory={bytes_(cluster.host_memory).replace(' ', '')}: what fits on gpus={cluster.ranks} takes more "
            f"in a node; the smallest estimate is {bytes_(host.total)} ({host_memory(host)}); "
            f"use {', '.join(fixes[:-1])} or {fixes[-1]}"
        )
    if smallest == math.inf:
        return (
            f"gpus={cluster.ranks}: no layout of {config.model.name} is valid with what was given; "
            "leave out parallel.* and phases.*.micro_batch, or try a number of GPUs that divides the global batches"
        )
    return (
        f"memory={bytes_(cluster.memory).replace(' ', '')}: no layout of {config.model.name} fits on "
        f"gpus={cluster.ranks}; the smallest estimate is {bytes_(smallest)}; use more GPUs or "
        f"memory={math.ceil(smallest / 2**30)}GiB"
    )


def cluster_of(arguments: Sequence[str]) -> tuple[Cluster, list[str]]:
    """The cluster that gpus=, memory= and so on describe, and the other arguments. Raises ConfigError."""
    given, others = {}, []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in CLUSTER_KEYS:
            given[key] = _number(key, value)
        else:
            others.append(argument)
    if "gpus" not in given:
        raise ConfigError(f"gpus is missing: give the number of GPUs, for example gpus=512\n{USAGE}")
    given["ranks"] = given.pop("gpus")
    return Cluster(**{key: int(value) if key in ("ranks", "node") else value for key, value in given.items()}), others


def _number(key: str, text: str) -> float:
    """512, 141GiB or 50GB/s."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?(?:B(?:/s)?)?", text)
    whole = key in ("gpus", "node")
    if not match or float(match[1]) <= 0 or (whole and not text.isdigit()):
        example = {"memory": "141GiB", "host_memory": "1TiB", "nvlink": "300GB/s", "network": "40GB/s"}.get(key, "8")
        raise ConfigError(f"{key}={text} is no size; write for example {key}={example}")
    return float(match[1]) * UNITS[match[2] or ""]


def main(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__.splitlines()[0]}\n\n{USAGE}")
        return
    with mistakes_without_traceback():
        cluster, others = cluster_of(arguments)
        register()
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            composed = compose("config", others)
        refuse_unknown(composed, Config, "")
        config = OmegaConf.to_object(composed)
        if AUTO in (config.parallel.pipeline, config.parallel.virtual):
            raise ConfigError("parallel.pipeline and parallel.virtual are chosen by the planner anyway; leave out auto")
        if config.parallel.layout is not None:
            raise ConfigError("parallel.layout is balanced by the planner; leave it out, and give it to train.py")
        fixed = [argument.lstrip("+").partition("=")[0] for argument in others]
        try:
            found = choices(config, cluster, fixed)
        except NothingFits as error:
            raise ConfigError(_nothing_fits(config, cluster, error)) from None
        print(report(found, cluster, others))
