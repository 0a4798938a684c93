"""Compares the planner's memory estimate with what a rank allocates: layouts of a scaled-down 80B and 7B on one GPU.

    python -m hysparse.bench_memory [--cases NAME ...] [--at-once 2] [--json FILE] [--markdown FILE] [key=value ...]

Each rank of a layout that is measured has a process of its own, in which it takes two training steps in a world whose
other ranks do not exist (`parallel/mirror.py`): the first rank, and the last one where stages differ. Measured is
`torch.cuda.max_memory_allocated`; the estimate is taken without the part that it reserves for what PyTorch does not
allocate. Further arguments go to every case, as for train.py. Without a GPU only the estimates are shown.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MOE = [
    "+experiment=moe80b_1to11",
    "model={name: 80B-13, layers: 13, vocabulary: 37920, moe: {experts: 32}}",  # F11S F
    "phases.pretrain.sequence_length=16384",
]
DENSE = [
    "+experiment=dense7b_1to3",
    "~phases.long_context",
    "model={name: 7B-8, layers: 8, vocabulary: 37920}",  # FSSS FSSF: three blocks
]
CASES = {  # name: the model, its layout, ranks
    "80B one GPU": (MOE, ["parallel.recompute=selective"], 1),
    "80B tensor 2": (MOE, ["parallel.tensor=2"], 2),
    "80B tensor 8, KV heads shared": (MOE, ["parallel.tensor=8"], 8),
    "80B expert 4": (MOE, ["parallel.expert=4"], 4),
    "80B pipeline 2 x expert 4": (MOE, ["parallel.pipeline=2", "parallel.expert=4"], 8),
    "80B recomputed": (MOE, ["parallel.recompute=full"], 1),
    "7B one GPU": (DENSE, [], 1),
    "7B tensor 4": (DENSE, ["parallel.tensor=4"], 4),
    "7B pipeline 3, recomputed selectively": (DENSE, ["parallel.pipeline=3", "parallel.recompute=selective"], 3),
    "7B tensor 2 x data 4, recomputed": (DENSE, ["parallel.tensor=2", "parallel.recompute=full"], 8),
}
MICRO_BATCHES = 6  # of a data-parallel rank in a step: more than any of these pipelines holds
GIB = 2**30


def measure(name: str, rank: int, more: list[str]) -> dict:
    """In a process of its own: bytes estimated and allocated, for one rank of a case."""
    from parallel import mirror

    mirror.install()
    import torch

    from hysparse.bench_engine import configuration, make_engine, random_batches
    from hysparse.estimate import RESERVED, Cluster, Layout
    from hysparse.model import group_sizes
    from hysparse.plan import Plan, pipeline_stages
    from parallel.start import make_groups

    config, phase, ranks = _config_of(name, more, configuration)
    plan = Plan(config.model, config.attention)
    with mirror.mirrored_rank(rank, ranks, lambda: make_groups(group_sizes(config))) as device:
        from megatron.core import parallel_state

        stage = parallel_state.get_pipeline_model_parallel_rank()
        layout = Layout(config, plan, pipeline_stages(config, plan), Cluster(ranks))
        estimate = layout.memory(phase)[stage]._asdict()
        estimate["buffers"] -= RESERVED
        on_gpu = device.type == "cuda"
        engine = make_engine(config, device)
        held = torch.cuda.memory_allocated() if on_gpu else 0
        batches = random_batches(config, phase, device)
        for _ in range(2):
            loss = engine.step(batches, 1e-5, rope_base=phase.rope_base).loss
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return {"case": name, "rank": rank, "ranks": ranks, "loss": loss, "estimate": estimate, "held": held, "peak": peak}


def _config_of(name: str, more: list[str], configuration):
    model, layout, ranks = CASES[name]
    arguments = [*model, *layout, *more]
    data = ranks // _product(arguments)
    phase = "pretrain"
    config = configuration(
        [*arguments, f"phases.{phase}.global_batch={MICRO_BATCHES * data}", f"phases.{phase}.micro_batch=1"], ranks
    )
    return config, config.phases[phase], ranks


def _product(arguments: list[str]) -> int:
    """Ranks of one copy of the model."""
    sizes = dict(argument.split("=", 1) for argument in arguments if argument.startswith("parallel."))
    return int(sizes.get("parallel.tensor", 1)) * int(sizes.get("parallel.pipeline", 1))


def in_a_process(name: str, rank: int, more: list[str]) -> dict:
    command = [sys.executable, "-m", "hysparse.bench_memory", "--measure", name, "--rank", str(rank), *more]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        return {"case": name, "rank": rank, "error": last}
    return json.loads(result.stdout.strip().splitlines()[-1])


def table(found: list[dict]) -> str:
    header = ["layout", "rank", "weights, states", "activations", "buffers", "estimated", "measured", "ratio"]
    lines = [" | ".join(header), " | ".join(["---"] * len(header))]
    for row in found:
        if "error" in row:
            lines.append(f"{row['case']} | {row['rank']} | {row['error']} | | | | | ")
            continue
        parts = row["estimate"]
        kept = parts["weights"] + parts["gradients"] + parts["optimizer"]
        total = sum(parts.values())
        sizes = [kept, parts["activations"], parts["buffers"], total, row["peak"]]
        numbers = [f"{size / GIB:.2f} GiB" for size in sizes]
        ratio = f"{total / row['peak']:.2f}" if row["peak"] else ""
        lines.append(" | ".join([row["case"], f"{row['rank']} of {row['ranks']}", *numbers, ratio]))
    return "\n".join(f"| {line} |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hysparse.bench_memory", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--at-once", type=int, default=2, help="processes that share the GPU")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--markdown", type=Path, help="write the table here as well")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    options, more = parser.parse_known_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.measure, options.rank, more)))
        return
    jobs = []
    for name in options.cases:
        _, layout, ranks = CASES[name]
        staged = any(argument.startswith("parallel.pipeline") for argument in layout)
        jobs += [(name, rank) for rank in ([0, ranks - 1] if staged else [0])]
    found = []
    with ThreadPoolExecutor(options.at_once) as pool:
        for row in pool.map(lambda job: in_a_process(*job, more), jobs):
            found.append(row)
            print(table([row]).splitlines()[-1], flush=True)
    print(f"\n{table(found)}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if options.markdown:
        options.markdown.write_text(table(found) + "\n")


if __name__ == "__main__":
    main()
