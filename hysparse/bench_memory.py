"""Compares the planner's memory estimate with what a rank allocates: layouts of a scaled-down 80B and 7B on one GPU.

    python -m hysparse.bench_memory [--cases NAME ...] [--at-once 4] [--json FILE] [--markdown FILE] [key=value ...]

Each rank of a layout that is measured has a process of its own, in which it takes two training steps in a world whose
other ranks do not exist (`parallel/mirror.py`): the first rank, and the last one where stages differ. Measured is
`torch.cuda.max_memory_allocated`; the estimate is taken without the part that it reserves for what PyTorch does not
allocate. Further arguments go to every case, as for train.py. Without a GPU only the estimates are shown.
"""

import argparse
import fcntl
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from parallel.terminal import quiet_third_parties

MOE = [
    "+experiment=moe80b_1to11",
    "parallel=default",
    "parallel.recompute=selective",
    "model={name: 80B-13, layers: 13, vocabulary: 37920, moe: {experts: 32}}",  # F11S F
    "phases.pretrain.sequence_length=8192",
]
DENSE = [
    "+experiment=dense7b_1to3",
    "parallel=default",
    "parallel.recompute=selective",
    "~phases.long_context",
    "model={name: 7B-8, layers: 8, vocabulary: 37920}",  # FSSS FSSF: three blocks
]
CASES = {  # name: the model, its layout, ranks
    "80B one GPU": (MOE, [], 1),
    "80B tensor 2": (MOE, ["parallel.tensor=2"], 2),
    "80B tensor 8, KV heads shared": (MOE, ["parallel.tensor=8"], 8),
    "80B expert 4": (MOE, ["parallel.expert=4"], 4),
    "80B pipeline 2 x expert 4": (MOE, ["parallel.pipeline=2", "parallel.expert=4"], 8),
    "80B recomputed in full": (MOE, ["parallel.recompute=full"], 1),
    "7B one GPU": (DENSE, [], 1),
    "7B one GPU, half of the optimizer in host memory": (DENSE, ["parallel.offload_optimizer=0.5"], 1),
    "7B tensor 4": (DENSE, ["parallel.tensor=4"], 4),
    "7B pipeline 3": (DENSE, ["parallel.pipeline=3"], 3),
    "7B tensor 2 x data 4, recomputed in full": (DENSE, ["parallel.tensor=2", "parallel.recompute=full"], 8),
}
MICRO_BATCHES = 6  # of a data-parallel rank in a step: more than any of these pipelines holds
GIB = 2**30


def measure(name: str, rank: int, more: list[str]) -> dict:
    """In a process of its own: bytes estimated and allocated, for one rank of a case."""
    quiet_third_parties()
    from parallel import mirror

    mirror.install()
    import torch

    from hysparse.bench_engine import configuration, random_batches
    from hysparse.estimate import RESERVED, Cluster, Layout
    from hysparse.model import group_sizes
    from hysparse.plan import Plan, pipeline_stages
    from hysparse.trainer import build_engine, select_operators
    from parallel.start import make_groups

    given, ranks = _arguments_of(name, more)
    config = configuration(given, ranks)
    phase = config.phases["pretrain"]
    plan = Plan(config.model, config.attention)
    stages = pipeline_stages(config, plan)
    with _alone_on_the_gpu(), mirror.mirrored_rank(rank, ranks, lambda: make_groups(group_sizes(config))) as device:
        from megatron.core import parallel_state

        stage = parallel_state.get_pipeline_model_parallel_rank()
        layout = Layout(config, plan, stages, Cluster(ranks))
        estimate = layout.memory(phase)[stage]._asdict()
        estimate["buffers"] -= RESERVED
        found = {"case": name, "rank": rank, "ranks": ranks, "estimate": estimate, "held": 0, "peak": 0}
        if device.type != "cuda":
            return found
        engine = build_engine(config, stages, select_operators(config), device)
        found["held"] = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()  # weights are drawn whole
        batches = random_batches(config, phase, device)
        for _ in range(2):
            found["loss"] = engine.step(batches, 1e-5, rope_base=phase.rope_base).loss
        found["peak"] = torch.cuda.max_memory_allocated()
    return found


@contextmanager
def _alone_on_the_gpu() -> Iterator[None]:
    """Processes import side by side and measure one after the other."""
    with (Path(tempfile.gettempdir()) / "hysparse_bench_memory.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _arguments_of(name: str, more: list[str]) -> tuple[list[str], int]:
    """What train.py would be given, and the number of ranks."""
    model, layout, ranks = CASES[name]
    sizes = dict(argument.split("=", 1) for argument in layout)
    data = ranks // (int(sizes.get("parallel.tensor", 1)) * int(sizes.get("parallel.pipeline", 1)))
    batch = [f"phases.pretrain.global_batch={MICRO_BATCHES * data}", "phases.pretrain.micro_batch=1"]
    return [*model, *layout, *batch, *more], ranks


def in_a_process(name: str, rank: int, more: list[str]) -> dict:
    command = [sys.executable, "-m", "hysparse.bench_memory", "--measure", name, "--rank", str(rank), *more]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        return {"case": name, "rank": rank, "error": last}
    return json.loads(result.stdout.strip().splitlines()[-1])


def table(found: list[dict]) -> str:
    """A Markdown row for each rank measured: estimated and allocated, in GiB."""
    header = ["layout", "rank", "states estimated", "measured", "the rest estimated", "measured"]
    header += ["total estimated", "measured", "ratio"]
    lines = [" | ".join(header), " | ".join(["---"] * len(header))]
    for row in found:
        if "error" in row:
            lines.append(f"{row['case']} | {row['rank']} | {row['error']} | | | | | | ")
            continue
        parts = row["estimate"]
        kept = parts["weights"] + parts["gradients"] + parts["optimizer"]
        total = sum(parts.values())
        held, peak = row["held"], row["peak"]
        sizes = [kept, held, total - kept, peak - held, total, peak]
        if not peak:  # no GPU
            sizes[1::2] = [None] * 3
        numbers = ["" if size is None else f"{size / GIB:.2f} GiB" for size in sizes]
        ratio = f"{total / peak:.2f}" if peak else ""
        lines.append(" | ".join([row["case"], f"{row['rank']} of {row['ranks']}", *numbers, ratio]))
    return "\n".join(f"| {line} |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hysparse.bench_memory", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--at-once", type=int, default=4, help="processes, of which one at a time uses the GPU")
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
