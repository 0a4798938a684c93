"""Measures training steps of one model under several layouts: tokens/s and MFU on one GPU and on two over NCCL.

    python -m hysparse.bench_layouts [--cases NAME ...] [--profile] [--json FILE] [--markdown FILE] [key=value ...]

The model is a twelve-layer cut of the 80B (two hybrid blocks F5S, 32 of its experts, a vocabulary of 32,768) on
sequences of 16,384 tokens, 16 of them in a step: large enough to keep one GPU busy, small enough for its memory.
Data, weights and batch are the same for all layouts. Times are medians over whole steps, the optimizer included. The
last column is tokens/s over those of one GPU times the number of GPUs. MFU counts useful FLOPs only, against the BF16
peak of an H100 or H200 unless --peak says otherwise. --profile adds, for each layout, what the first rank's GPU did in
one step. Further arguments go to every case, as for train.py; without GPUs it runs over gloo.
"""

import argparse
import json
import os
import socket
import statistics
import time
import traceback
from pathlib import Path

from parallel.terminal import quiet_third_parties

MODEL = [
    "+experiment=moe80b_1to11",
    "parallel=default",
    "parallel.recompute=selective",
    "model={name: 80B-12, layers: 12, vocabulary: 32768, moe: {experts: 32}}",
    "attention.pattern=FSSSSSFSSSSS",
    "phases.pretrain.sequence_length=16384",
    "phases.pretrain.global_batch=16",
    "phases.pretrain.micro_batch=1",
]
CASES = {
    "one GPU": ([], 1),
    "tensor 2": (["parallel.tensor=2"], 2),
    "pipeline 2": (["parallel.pipeline=2"], 2),
    "expert 2": (["parallel.expert=2"], 2),
    "context 2": (["parallel.context=2"], 2),
    "data 2": ([], 2),
}
PEAK = 989e12  # FLOP/s of H100 SXM and H200, BF16, dense
SHOWN = 14  # kernels of a profile
TIMEOUT = 3  # minutes that ranks wait for each other


def run_case(name: str, more: list[str], steps: int, profile: bool) -> dict:
    """On each rank of the case, in a process of its own: seconds of each step, and more."""
    quiet_third_parties()
    import torch

    from hysparse.bench_engine import configuration, random_batches
    from hysparse.model import group_sizes
    from hysparse.plan import Plan, pipeline_stages
    from hysparse.trainer import build_engine, select_operators
    from parallel.start import start, stop

    layout, ranks = CASES[name]
    config = configuration([*MODEL, *layout, *more], ranks)
    phase = config.phases["pretrain"]
    device = start(group_sizes(config), TIMEOUT)
    plan = Plan(config.model, config.attention)
    engine = build_engine(config, pipeline_stages(config, plan), select_operators(config), device)
    batches = random_batches(config, phase, device)
    seconds = []
    for _ in range(1 + steps):  # the first one compiles
        torch.distributed.barrier()
        since = time.perf_counter()
        loss = engine.step(batches, 1e-5, rope_base=phase.rope_base).loss  # waits for the device
        seconds.append(time.perf_counter() - since)
    kernels = profiled(lambda: engine.step(batches, 1e-5, rope_base=phase.rope_base)) if profile else None
    flops = plan.flops_per_token(phase.sequence_length).training
    on_gpu = device.type == "cuda"
    result = {
        "case": name,
        "ranks": ranks,
        "loss": loss,
        "first": seconds[0],
        "seconds": seconds[1:],
        "tokens": phase.tokens_per_step,
        "flops_per_token": flops,
        "memory": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "kernels": kernels,
    }
    stop()  # not after an error: it would wait for the other rank
    return result


def profiled(step) -> list[tuple[str, float, int]]:
    """(kernel, milliseconds, calls) of one step on this rank, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
    events = [
        (event.key, event.self_device_time_total / 1e3, event.count)
        for event in recorded.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(events, key=lambda event: -event[1])


def _worker(queue, rank: int, ranks: int, port: int, arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # collectives start in the order of the program
    try:
        result = run_case(*arguments)
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")[:200]
        queue.put((rank, {"case": arguments[0], "error": f"{type(error).__name__}: {first}"}))
        traceback.print_exc()
        os._exit(1)
    queue.put((rank, result))


def on_processes(name: str, more: list[str], steps: int, profile: bool) -> dict:
    """What the first rank of the case measured, or the first error; the others are then ended."""
    import torch

    ranks = CASES[name][1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (name, more, steps, profile)
    workers = [context.Process(target=_worker, args=(queue, rank, ranks, port, arguments)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    found = {}
    while len(found) < ranks and not any("error" in result for result in found.values()):
        died = [worker.exitcode for worker in workers if worker.exitcode]
        if not queue.empty():
            rank, result = queue.get()
            found[rank] = result
        elif died:
            found[-1] = {"case": name, "error": f"a rank died with code {died[0]}"}
        else:
            time.sleep(0.2)
    failed = next((result for result in found.values() if "error" in result), None)
    for worker in workers:
        if failed:
            worker.kill()
        worker.join()
    return failed or found[0]


def table(found: list[dict], peak: float) -> str:
    """A Markdown row for each case; `peak` in FLOP/s of one GPU."""
    one = next((row for row in found if row.get("ranks") == 1 and "error" not in row), None)
    header = ["layout", "GPUs", "step", "tokens/s", "tokens/s/GPU", "MFU", "memory", "of linear"]
    lines = [" | ".join(header), " | ".join(["---"] * len(header))]
    for row in found:
        if "error" in row:
            lines.append(f"{row['case']} | {row['error']} | | | | | | ")
            continue
        seconds = statistics.median(row["seconds"])
        speed, ranks = row["tokens"] / seconds, row["ranks"]
        linear = speed / ranks / (one["tokens"] / statistics.median(one["seconds"])) if one else None
        mfu = row["flops_per_token"] * speed / ranks / peak
        cells = [row["case"], str(ranks), f"{seconds:.2f} s", f"{speed:,.0f}", f"{speed / ranks:,.0f}", f"{mfu:.1%}"]
        cells += [f"{row['memory'] / 2**30:.1f} GiB", f"{linear:.0%}" if linear else ""]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def profile_table(row: dict) -> str:
    """The longest kernels, and how much of all is communication; copies and computation may overlap."""
    kernels, total = row["kernels"], sum(ms for _, ms, _ in row["kernels"])
    sent = sum(ms for name, ms, _ in kernels if "nccl" in name.lower())
    lines = [
        f"{row['case']}: {total:.0f} ms of kernels in a step of {statistics.median(row['seconds']) * 1e3:.0f} ms, "
    ]
    lines[0] += f"{sent:.0f} ms of them communication, waiting for the other rank included"
    lines += [f"  {ms:9.1f} ms  {calls:6} x  {name[:90]}" for name, ms, calls in kernels[:SHOWN]]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hysparse.bench_layouts", description=__doc__.split("\n")[0])
    usual = [name for name in CASES if name != "data 2"]
    parser.add_argument("--cases", nargs="+", choices=CASES, default=usual, metavar="NAME")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each layout, after one that is not")
    parser.add_argument("--peak", type=float, default=PEAK, help="FLOP/s that MFU is measured against")
    parser.add_argument("--profile", action="store_true", help="list the longest kernels of each layout")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--markdown", type=Path, help="write the table here as well")
    options, more = parser.parse_known_args(arguments)
    found = []
    for name in options.cases:
        found.append(on_processes(name, more, options.steps, options.profile))
        print(table(found[-1:], options.peak).splitlines()[-1], flush=True)
    print(f"\n{next((row['device'] for row in found if 'device' in row), '')}\n{table(found, options.peak)}")
    if options.profile:
        print("\n" + "\n\n".join(profile_table(row) for row in found if row.get("kernels")))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if options.markdown:
        options.markdown.write_text(table(found, options.peak) + "\n")


if __name__ == "__main__":
    main()
