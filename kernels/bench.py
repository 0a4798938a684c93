"""Measures every operator at the paper's two attention shapes, beside the public kernels, in one run on one GPU.

    python -m kernels.bench [--only full,documents,sparse,window,index,decode,small] [--lengths 8192,32768]
                            [--shapes 80b,7b] [--profile] [--json FILE] [--markdown FILE]

One BF16 sequence of fresh random numbers, medians on the device. A row that fails says why, and the next one follows.
With --profile the kernels of each of our operators are listed above its row.
The numbers to reach are those of the project's plan: (floor, goal) of the speed in units of the peer's.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor

from kernels import bench_decode, bench_peers, bench_small
from kernels.bench_inputs import (
    BLOCK,
    CAPTURE,
    DIMENSION,
    SELECTED,
    SELECTIONS,
    SHAPES,
    WINDOW,
    Case,
    causal_pairs,
    document_starts,
    selected_pairs,
    union_size,
)
from kernels.causal_backward import causal_backward
from kernels.roofline import (
    BACKWARD,
    Ceilings,
    Row,
    Target,
    kernel_times,
    line,
    measure_ceilings,
    milliseconds,
    milliseconds_in_turns,
    size,
    table,
)
from kernels.scored import scored_forward
from kernels.selection import build_index
from kernels.sparse_backward import sparse_backward
from kernels.sparse_forward import sparse_forward
from kernels.window import window_backward, window_forward

FLOPS_A_PAIR = 4 * DIMENSION  # of a query head and a key: two products, an addition and a multiplication each
SPARSE_TARGETS = {  # (floor, goal) by shape and length
    ("80b", 8192): (1.5, 2),
    ("80b", 32768): (6, 9),
    ("80b", 131072): (22, 34),
    ("7b", 8192): (1.4, 2),
    ("7b", 32768): (5, 8),
    ("7b", 131072): (18, 30),
}
Against = tuple[Row, float, float] | tuple[Row] | tuple[()]  # a peer, and where there are, floor and goal


class Report:
    """The rows so far, printed as they come."""

    def __init__(self, ceilings: Ceilings, profile: bool):
        self.ceilings, self.profile = ceilings, profile
        self.rows: list[Row] = []
        self._cudnn: dict[Case, list[Row]] = {}

    def add(self, row: Row) -> Row:
        row.best_ms = self.ceilings.best_ms(row)
        self.rows.append(row)
        print(line(row), flush=True)
        return row

    @contextmanager
    def row(self, section: str, operator: str, case: Case, against: Against = (), **more) -> Iterator[Row]:
        """A row to be filled in; what goes wrong meanwhile becomes its result."""
        row = Row(section, operator, case.shape, case.length, **more)
        try:
            yield row
            row.compare(*against)
        except Exception as error:  # whatever a kernel or a peer raises, the other rows are still wanted
            row.ms, row.targets, row.note = None, [], self.reason(error)
        self.add(row)

    def time(self, row: Row, function: Callable, *arguments, **options) -> None:
        """Fill in how long one of our operators takes, and list its kernels where that is asked for."""
        row.ms = milliseconds(function, *arguments, **options)
        if self.profile:
            print(kernel_times(function, *arguments, **options), flush=True)

    def reason(self, error: Exception) -> str:
        """One short line; also makes room after a shortage of memory."""
        torch.cuda.empty_cache()
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:120]

    def total(self, operator: str, *parts: Row, against: Against = ()) -> Row:
        """A row for operators that follow each other."""
        row = Row.total(operator, *parts)
        row.compare(*against)
        return self.add(row)

    def peer(
        self, section: str, name: str, case: Case, make: Callable[..., bench_peers.Calls], *tensors, **more
    ) -> list[Row]:
        """Forward and backward of a public kernel that `make(*tensors)` prepares; `more` describes the forward pass."""
        rows = [Row(section, f"{name} {way}", case.shape, case.length, **more) for way in ("forward", "backward")]
        rows[1].flops, rows[1].bytes = BACKWARD * rows[0].flops, 2 * rows[0].bytes
        try:
            for row, run in zip(rows, make(*tensors), strict=True):
                row.ms = milliseconds(run)
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}", flush=True)
            return rows
        except Exception as error:
            for row in rows:
                row.note = "" if row.ms else self.reason(error)
        return [self.add(row) for row in rows]

    def cudnn(self, case: Case) -> list[Row]:
        """The peer that most rows are held against, measured once."""
        if case not in self._cudnn:
            tensors = case.queries(), case.keys(), case.keys()
            work = {"flops": causal_flops(case), "bytes": size(*tensors, tensors[0])}
            self._cudnn[case] = self.peer("full", "cuDNN", case, bench_peers.cudnn, *tensors, **work)
        return self._cudnn[case]


def causal_flops(case: Case, window: int | None = None) -> int:
    return FLOPS_A_PAIR * case.heads * causal_pairs(case.length, window)


def full(report: Report, case: Case) -> None:
    """The full layer, with the selection and without."""
    peer = report.cudnn(case)
    at_32k = case.length == 32768
    q, k, v = case.queries(), case.keys(), case.keys()
    document_start = case.one_document()
    work = {"flops": causal_flops(case), "bytes": size(q, k, v, q)}
    flash = []
    for name, deterministic in (("FlashAttention-4", False), ("deterministic FlashAttention-4", True)):
        make = partial(bench_peers.flash_attention_4, deterministic=deterministic)
        flash.append(Row.total(name, *report.peer("full", name, case, make, q, k, v, **work)))
    forward = partial(scored_forward, q, k, v, document_start, block=BLOCK)
    with report.row("full", "causal forward, no scores", case, (peer[0],), **work) as plain:
        report.time(plain, forward, selected=0)
    against = (peer[0], 0.8, 1.05) if at_32k else (peer[0],)
    with report.row("full", "scored forward", case, against, **work) as scored:
        report.time(scored, forward, selected=SELECTED)
        without, with_them = milliseconds_in_turns(partial(forward, selected=0), partial(forward, selected=SELECTED))
        cost = Target("above no scores", 100 * (with_them / without - 1), *((10, 3) if at_32k else ()), unit="%")
        scored.targets.append(cost)
    output, lse = scored_forward(q, k, v, document_start, block=BLOCK, selected=0)[:2]
    grad_output = torch.randn_like(output)
    shared = [torch.zeros(x.shape, device="cuda") for x in (k, v)]  # what the sparse layers' backward has added up
    work = {"flops": BACKWARD * causal_flops(case), "bytes": 2 * size(q, k, v, q) + size(*shared)}
    peer_both = Row.total("cuDNN forward + backward", *peer)
    with report.row("full", "causal backward", case, (peer[1],), **work) as backward:
        arguments = (q, k, v, output, lse, grad_output, document_start)
        report.time(backward, causal_backward, *arguments, dk_add=shared[0], dv_add=shared[1])
    both = Row.total("scored forward + backward", scored, backward)
    both.compare(peer_both, *((0.9, 1.0) if at_32k else ()))
    for other in flash:
        both.compare(other)
    report.add(both)


def documents(report: Report, case: Case) -> None:
    """The full layer with documents of 1,024 tokens on average packed into the sequence."""
    q, k, v = case.queries(), case.keys(), case.keys()
    lengths = case.packed_documents()
    flops = FLOPS_A_PAIR * case.heads * sum(map(causal_pairs, lengths))
    work = {"flops": flops, "bytes": size(q, k, v, q)}
    document_start = document_starts(lengths)
    flash = report.peer(
        "documents", "FlashAttention-4", case, bench_peers.flash_attention_4_documents, q, k, v, lengths, **work
    )
    tensors = q, k, v, document_start
    peer = report.peer("documents", "FlexAttention", case, bench_peers.flex_documents, *tensors, **work)
    options = {"block": BLOCK, "selected": SELECTED}
    with report.row("documents", "scored forward", case, (peer[0],), **work) as scored:
        report.time(scored, scored_forward, q, k, v, document_start, **options)
    work = {"flops": BACKWARD * flops, "bytes": 2 * work["bytes"]}
    with report.row("documents", "causal backward", case, (peer[1],), **work) as backward:
        output, lse = scored_forward(q, k, v, document_start, **options)[:2]
        report.time(backward, causal_backward, q, k, v, output, lse, torch.randn_like(q), document_start)
    both = Row.total("scored forward + backward", scored, backward)
    both.compare(Row.total("FlexAttention", *peer))
    both.compare(Row.total("FlashAttention-4", *flash))
    report.add(both)


def sparse(report: Report, case: Case) -> None:
    """The sparse layer, and its block-sparse branch alone where a peer exists, for every kind of selection."""
    dense = Row.total("cuDNN's full forward + backward", *report.cudnn(case))
    for kind, select in SELECTIONS.items():
        blocks = select(case)
        if blocks is None:
            print(f"no captured selection: {CAPTURE.name} is missing", flush=True)
            continue
        targets = SPARSE_TARGETS.get((case.shape, case.length), ()) if kind == "captured" else ()
        rows = sparse_layer(report, case, kind, blocks)
        report.total("sparse layer forward + backward", *rows, against=(dense, *targets))
        if case.group >= 16:
            q, k, v = tensors = case.queries(), case.keys(), case.keys()
            work = {"flops": FLOPS_A_PAIR * case.group * selected_pairs(blocks), "bytes": size(q, k, v, q, blocks)}
            make = bench_peers.nsa_selected
            peers = report.peer("sparse", "fla-core NSA", case, make, *tensors, blocks, indices=kind, **work)
            sparse_layer(report, case, kind, blocks, branch_against=((peers[0], 1.5, 3), (peers[1], 1.5, 2.5)))


def sparse_layer(
    report: Report, case: Case, kind: str, blocks: Tensor, branch_against: tuple[Against, Against] | None = None
) -> tuple[Row, Row]:
    """Forward and backward with both branches, sinks and gates; or of the block-sparse branch alone, against peers."""
    whole = branch_against is None
    against = branch_against or ((), ())
    q, kv, window_kv = case.queries(), (case.keys(), case.keys()), (case.keys(), case.keys()) if whole else None
    document_start = case.one_document()
    index = build_index(blocks, BLOCK, case.length, case.group)  # before: once per hybrid block
    sinks = [torch.randn(case.heads, device="cuda") if whole else None for _ in range(2)]
    gates = [torch.rand(q.shape[:3], device="cuda").bfloat16() if whole else None for _ in range(2)]
    arguments = (q, kv, blocks, index, window_kv, document_start, sinks, gates)
    options = {"block": BLOCK, "window": WINDOW}
    name = "sparse layer" if whole else "selected branch"
    facts = {"indices": kind, "union": union_size(blocks)}
    flops = FLOPS_A_PAIR * case.group * selected_pairs(blocks) + (causal_flops(case, WINDOW) if whole else 0)
    tensors = size(q, *kv, *(window_kv or ()), *gates)
    with report.row("sparse", f"{name} forward", case, against[0], flops=flops, **facts) as forward:
        forward.bytes = tensors + size(q, blocks)
        report.time(forward, sparse_forward, *arguments, **options)
    with report.row("sparse", f"{name} backward", case, against[1], flops=BACKWARD * flops, **facts) as backward:
        result = sparse_forward(*arguments, **options)
        grad = torch.randn_like(result.output)
        backward.bytes = 2 * tensors + size(q, q, *kv, blocks)  # output and its gradient; dK and dV in FP32
        report.time(backward, sparse_backward, *arguments, result, (grad, grad), **options)
    return forward, backward


def window(report: Report, case: Case) -> None:
    """The sliding window with a sink, beside FlexAttention with the sink and without, and FlashAttention-4 with it."""
    q, k, v = case.queries(), case.keys(), case.keys()
    sink, document_start = torch.randn(case.heads, device="cuda"), case.one_document()
    flops, moved = causal_flops(case, WINDOW), size(q, k, v, q)
    peers = []
    for name, make in (
        ("FlexAttention", bench_peers.flex_window_with_sink),
        ("FlexAttention, no sink", bench_peers.flex_window),
        ("FlashAttention-4", bench_peers.flash_attention_4),
    ):
        calls = report.peer("window", name, case, make, q, k, v, sink, WINDOW, flops=flops, bytes=moved)
        peers.append(Row.total(name, *calls))
    with report.row("window", "window forward", case, flops=flops, bytes=moved) as forward:
        report.time(forward, window_forward, q, k, v, sink, document_start, window=WINDOW)
    with report.row("window", "window backward", case, flops=BACKWARD * flops, bytes=2 * moved) as backward:
        output, lse = window_forward(q, k, v, sink, document_start, window=WINDOW)
        arguments = (q, k, v, sink, document_start, output, lse, torch.randn_like(output))
        report.time(backward, window_backward, *arguments, window=WINDOW)
    both = Row.total("window forward + backward", forward, backward)
    both.compare(peers[0], 1.5, 2.5)
    for peer in peers[1:]:
        both.compare(peer)
    report.add(both)


def index(report: Report, case: Case) -> None:
    """What a hybrid block pays once for all of its sparse layers."""
    for kind, select in SELECTIONS.items():
        blocks = select(case)
        if blocks is None:
            continue
        with report.row("index", "index build", case, indices=kind) as row:
            report.time(row, build_index, blocks, BLOCK, case.length, case.group)
            if case.length == 32768:
                row.targets.append(Target("", row.ms, 1.5, 0.5, unit=" ms"))


def small(report: Report) -> None:
    """What stands around attention, each in several libraries' versions."""
    for row in bench_small.rows():
        name = f"{row['operator']}, {row['implementation']}"
        moved = (row["gigabytes_per_second"] or 0) * (row["milliseconds"] or 0) * 1e6
        report.add(Row("small", name, row["shape"], 0, ms=row["milliseconds"], bytes=moved, note=row["note"]))


def decode(report: Report) -> None:
    """One new token of each sequence, from a long cache."""
    for row in bench_decode.rows(report.ceilings.bandwidth):
        shape, _, size_words = row["shape"].partition(", ")
        moved = row["gigabytes_per_second"] * row["milliseconds"] * 1e6
        operator = ", ".join(filter(None, (row["operator"], size_words)))
        new = Row("decode", operator, shape, 0, ms=row["milliseconds"], bytes=moved)
        new.note = "; ".join(filter(None, (row["peer"], row["note"])))
        if shape in SHAPES:
            new.length = bench_decode.LENGTH
            new.flops = moved * Case(shape, new.length).group  # 4 D a query head and key, which is 4 D bytes a KV head
            targets = () if row["note"] else (60, 80)
            new.targets.append(Target("of the copy's speed", 100 * row["fraction_of_copy"], *targets, unit="%"))
        report.add(new)


BY_CASE = {  # run for each shape and length
    "full": full,
    "documents": documents,
    "sparse": sparse,
    "window": window,
    "index": index,
}
BY_THEMSELVES = {"decode": decode, "small": small}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(0)
    ceilings, about = measure_ceilings(), software()
    about["ceilings"] = (
        f"{ceilings.flops / 1e12:.0f} TFLOP/s (8192³ product), {ceilings.bandwidth / 1e9:.0f} GB/s (copy)"
    )
    print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    report = Report(ceilings, options.profile)
    for section in options.only:
        run(report, section, options)
        if options.json:  # after each section: a later one may run out of time
            rows = [asdict(row) for row in report.rows]
            options.json.write_text(json.dumps({"about": about, "ceilings": asdict(ceilings), "rows": rows}, indent=1))
    text = "\n\n".join(
        f"**{section}**\n\n{table([row for row in report.rows if row.section == section])}"
        for section in dict.fromkeys(row.section for row in report.rows)
    )
    print("\n" + text)
    if options.markdown:
        head = "\n".join(f"- {name}: {value}" for name, value in about.items())
        options.markdown.write_text(f"{head}\n\n{text}\n")


def run(report: Report, section: str, options: argparse.Namespace) -> None:
    cases = [(Case(shape, length),) for shape in options.shapes for length in options.lengths]
    for arguments in cases if section in BY_CASE else [()]:
        try:
            (BY_CASE | BY_THEMSELVES)[section](report, *arguments)
        except Exception as error:  # not in a row but in what prepares them
            print(f"{section} {arguments} stopped: {report.reason(error)}", flush=True)


def software() -> dict[str, str]:
    """Command, machine, versions and date, for the page that shows the numbers."""
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, CUDA {torch.version.cuda}"
    return {
        "command": " ".join(["python -m kernels.bench", *sys.argv[1:]]),
        "GPU": torch.cuda.get_device_name(),
        "versions": f"{versions}, cuDNN {torch.backends.cudnn.version()}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def listed(known: list, kind: type = str) -> Callable[[str], list]:
        def read(text: str) -> list:
            chosen = [kind(word) for word in text.split(",")]
            if known and (unknown := set(chosen) - set(known)):
                raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
            return chosen

        return read

    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.split("\n")[0])
    sections, shapes = [*BY_CASE, *BY_THEMSELVES], list(SHAPES)
    parser.add_argument("--only", type=listed(sections), default=sections, metavar=",".join(sections))
    parser.add_argument("--lengths", type=listed([], int), default=[8192, 32768], metavar="8192,32768")
    parser.add_argument("--shapes", type=listed(shapes), default=shapes, metavar=",".join(shapes))
    parser.add_argument("--profile", action="store_true", help="list the kernels of each of our operators")
    parser.add_argument("--json", type=Path, help="write all rows here; docs/roofline_figure.py draws from it")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
