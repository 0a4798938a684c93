"""Compiles the Triton kernels for Hopper (sm_90) on a machine without a GPU, and prints what they need.

    python -m kernels.compile_sm90 [--shapes 80b,7b] [--only NAME,...] [--json FILE]

The functions that launch the kernels run as they are, on meta tensors, so that every tile size and constant is the one
that a training run gets; only the launch itself is left out. Triton's own ptxas does the rest.
"""

import argparse
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels import causal_hopper, grouped_hopper, sparse_hopper
from kernels.bench_inputs import BLOCK, DIMENSION, SELECTED, SHAPES, WINDOW, Case
from kernels.causal_backward import causal_backward
from kernels.decode import launch_full, launch_sparse
from kernels.expert_rows import spread_rows, sum_rows, swiglu_backward, swiglu_forward
from kernels.rotary import rotary_split_backward, rotary_split_forward
from kernels.routing import add_counts, route_backward, route_forward
from kernels.scored import scored_forward
from kernels.selection import build_index
from kernels.sparse_backward import sparse_backward
from kernels.sparse_forward import sparse_forward
from kernels.window import window_backward, window_forward

MULTIPROCESSORS = 132
LENGTH = 32768


@dataclass(frozen=True)
class Compiled:
    """One kernel as ptxas left it."""

    operator: str
    kernel: str
    shape: str
    warps: int
    registers: int
    spilled: int  # bytes of stack per thread
    in_loops: int  # instructions that move spilled registers inside the innermost loops with matrix products
    shared: int  # bytes per CTA
    wgmma: int  # warp-group matrix instructions
    waits: int  # places that wait for the kernel before it, see `overlap.py`, or 0 if something touches memory before
    seconds: float


class Hopper:
    """As much of a Triton driver as compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def launches() -> Iterator[list]:
    """Inside, a kernel that is launched is compiled instead: the list receives (Triton's compiled kernel, seconds)."""
    kernels = []
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        start = time.monotonic()
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        kernels.append((kernel, time.monotonic() - start))
        return kernel

    properties = SimpleNamespace(
        multi_processor_count=MULTIPROCESSORS, major=9, minor=0, shared_memory_per_block_optin=232448
    )
    driver.set_active(Hopper())
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(torch.cuda, "get_device_properties", lambda *_: properties),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
    ):
        yield kernels


def compiled(name: str, shape: str, launch: Callable[[], object]) -> list[Compiled]:
    """The kernels that `launch()` would start, each once."""
    with launches() as kernels:
        launch()
    rows = {}
    for kernel, seconds in kernels:
        if kernel.hash not in rows:
            metadata, needs = kernel.metadata, resources(kernel.asm["cubin"])
            spilled = max(needs["STACK"], needs["LOCAL"])
            in_loops, wgmma = matrix_loops(kernel.asm["cubin"])
            rows[kernel.hash] = Compiled(
                *(name, metadata.name, shape, metadata.num_warps, needs["REG"]),
                *(spilled, in_loops, metadata.shared, wgmma, waits(kernel.asm["cubin"]), round(seconds, 1)),
            )
    return list(rows.values())


def resources(cubin: bytes) -> dict[str, int]:
    """What a thread takes: registers (REG), and bytes for what did not fit into them (STACK, LOCAL)."""
    usage = cuobjdump(cubin, "--dump-resource-usage")
    return {word: int(re.search(rf"\b{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL")}


def matrix_loops(cubin: bytes) -> tuple[int, int]:
    """Accesses to spilled registers in the innermost loops that hold matrix products; such products in all."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", cuobjdump(cubin, "--dump-sass"))
    code = [(int(address, 16), text) for address, text in code]
    loops = []  # from the target of a backward branch to the branch; one without condition returns from a wait
    for stop, text in code:
        branch = re.search(r"^@.*\bBRA\b.*\b0x([0-9a-f]+)", text)
        if branch and (start := int(branch[1], 16)) < stop:
            body = [inner for address, inner in code if start <= address <= stop]
            if any("HGMMA" in inner for inner in body):
                loops.append((start, stop, sum("STL" in inner or "LDL" in inner for inner in body)))
    innermost = [
        spills
        for start, stop, spills in loops
        if not any(start <= first and last <= stop and (start, stop) != (first, last) for first, last, _ in loops)
    ]
    return sum(innermost), sum("HGMMA" in text for _, text in code)


def waits(cubin: bytes) -> int:
    """How many waits there are, one for each kind of warps; 0 if an access to global memory stands before the first."""
    accesses = re.findall(r"\b(ACQBULK|LDG\w*|STG|ATOMG?|REDG?|UTMA\w+)\b", cuobjdump(cubin, "--dump-sass"))
    return accesses.count("ACQBULK") if accesses[:1] == ["ACQBULK"] else 0


def cuobjdump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


class Launches:
    """Meta tensors of one sequence of a paper model; every method launches the kernels of one operator."""

    def __init__(self, shape: str):
        self.case = Case(shape, LENGTH)
        H, K = self.case.heads, self.case.kv_heads
        self.q = self.output = tensor(1, LENGTH, H, DIMENSION)
        self.k = self.v = tensor(1, LENGTH, K, DIMENSION)
        self.lse = tensor(1, H, LENGTH, dtype=torch.float32)
        self.gates = (tensor(1, LENGTH, H), tensor(1, LENGTH, H))
        self.sinks = (tensor(H, dtype=torch.float32), tensor(H, dtype=torch.float32))
        self.document_start = tensor(1, LENGTH, dtype=torch.int32)

    def causal_forward(self) -> None:
        for sink in (None, self.sinks[0]):  # the version for Hopper, and the other one
            scored_forward(self.q, self.k, self.v, self.document_start, block=BLOCK, selected=0, sink=sink)

    def scored_forward(self) -> None:
        for sink in (None, self.sinks[0]):
            scored_forward(self.q, self.k, self.v, self.document_start, block=BLOCK, selected=SELECTED, sink=sink)

    def causal_backward(self) -> None:
        shared = [tensor(*x.shape, dtype=torch.float32) for x in (self.k, self.v)]
        arguments = (self.q, self.k, self.v, self.output, self.lse, self.output, self.document_start)
        for supported in (causal_hopper.supported, lambda *_: False):  # the version for Hopper, and the other one
            with mock.patch.object(causal_hopper, "supported", supported):
                causal_backward(*arguments, dk_add=shared[0], dv_add=shared[1])

    def window(self) -> None:
        arguments = (self.q, self.k, self.v, self.sinks[1], self.document_start)
        output, lse = window_forward(*arguments, window=WINDOW)
        window_backward(*arguments, output, lse, self.output, window=WINDOW)

    def sparse(self) -> None:
        for supported in (sparse_hopper.supported, lambda *_: False):
            with mock.patch.object(sparse_hopper, "supported", supported):
                self._sparse(self.q, self.k, self.v)

    def wide_sparse(self) -> None:
        """Heads of the same number, with queries and keys of 192 and values of 128."""
        q, k = (tensor(1, LENGTH, heads, 192) for heads in (self.case.heads, self.case.kv_heads))
        self._sparse(q, k, self.v)

    def plain_sparse(self) -> None:
        """Without sinks and gates, with and without a window."""
        nothing = (None, None)
        self._sparse(self.q, self.k, self.v, sinks=nothing, gates=nothing)
        self._sparse(self.q, self.k, self.v, sinks=nothing, gates=nothing, has_window=False)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, sinks=None, gates=None, has_window: bool = True) -> None:
        blocks = tensor(1, self.case.kv_heads, LENGTH, SELECTED, dtype=torch.int32)
        index = build_index(blocks, BLOCK, LENGTH, self.case.group)
        window_kv = (k, v) if has_window else None
        sinks, gates = sinks or self.sinks, gates or self.gates
        arguments = (q, (k, v), blocks, index, window_kv, self.document_start, sinks, gates)
        options = {"block": BLOCK, "window": WINDOW}
        forward = sparse_forward(*arguments, **options)
        sparse_backward(*arguments, forward, (self.output, self.output), **options)

    def decode(self) -> None:
        sequences, H, K = 8, self.case.heads, self.case.kv_heads
        q, lengths = tensor(sequences, H, DIMENSION), tensor(sequences, dtype=torch.int32)
        cache, ring = ([*[tensor(sequences, tokens, K, DIMENSION)] * 2, None] for tokens in (LENGTH, WINDOW))
        _, blocks = launch_full(q, *cache, lengths, None, BLOCK, SELECTED)
        gates = tensor(sequences, H), tensor(sequences, H)
        launch_sparse(q, *cache, blocks, *ring, lengths, *self.sinks, *gates, BLOCK, WINDOW)

    def rotary(self) -> None:
        K, G = self.case.kv_heads, self.case.group
        y = tensor(LENGTH, 1, K, (G + 2) * DIMENSION + 2 * G)
        cos = sin = tensor(LENGTH, 1, 1, DIMENSION, dtype=torch.float32)
        q, k, v, gates = rotary_split_forward(y, cos, sin, G, own_kv=True, gates=2)
        rotary_split_backward(q, k, v, gates, gates, cos, sin, G)

    def experts(self) -> None:
        """Of the 80B: 512 experts of width 512, 8 active, hidden 2048."""
        experts, active, hidden, ffn = 512, 8, 2048, 512
        logits, bias = (tensor(*shape, dtype=torch.float32) for shape in ((LENGTH, 1, experts), (experts,)))
        for softmax in (False, True):
            weights, chosen, position, offsets, sums, _ = route_forward(logits, bias, active, softmax, balance=True)
            route_backward(logits, weights, chosen, weights, sums, softmax)
        for carried in (None, weights):  # without routing weights, and with them
            rows, row_weights = spread_rows(tensor(LENGTH, hidden), carried, position)
            sum_rows(rows, row_weights, position)
        inner, weights = tensor(len(rows), 2 * ffn), tensor(len(rows), dtype=torch.float32)
        swiglu_backward(inner, weights, swiglu_forward(inner, weights))
        add_counts(offsets, tensor(experts, dtype=torch.int64), tensor(experts, dtype=torch.float32))

    def grouped(self) -> None:
        """The products of the same experts."""
        experts, hidden, ffn, rows = 512, 2048, 512, 8 * LENGTH
        offsets = tensor(experts, dtype=torch.int32)
        groups = grouped_hopper.Groups(offsets, rows)
        wide, narrow = tensor(rows, hidden), tensor(rows, ffn)
        for turned, x in ((False, narrow), (True, wide)):
            grouped_hopper.multiply(x, tensor(experts, hidden, ffn), groups, turned)
        for some in (rows, rows // 8):  # as many as a long and a short micro-batch has
            grouped_hopper.weight_gradient(wide[:some], narrow[:some], offsets)


OPERATORS = (
    "causal_forward",
    "scored_forward",
    "causal_backward",
    "window",
    "sparse",
    "wide_sparse",
    "plain_sparse",
    "decode",
    "rotary",
    "experts",
    "grouped",
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.compile_sm90", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default=",".join(SHAPES), metavar=",".join(SHAPES))
    parser.add_argument("--only", default=",".join(OPERATORS), metavar=",".join(OPERATORS))
    parser.add_argument("--json", type=Path, help="write the table here as well")
    options = parser.parse_args(arguments)
    rows = []
    form = "{:16}{:24}{:>6}{:>7}{:>11}{:>9}{:>10}{:>9}{:>7}{:>7}{:>9}".format
    print(form(*(field.name for field in fields(Compiled))))
    for shape in options.shapes.split(","):
        launches = Launches(shape)
        for name in options.only.split(","):
            for row in compiled(name, shape, getattr(launches, name)):
                print(form(*asdict(row).values()), flush=True)
                rows.append(asdict(row))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
