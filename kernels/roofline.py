"""What a benchmark row is: how it is timed, what the operator had to compute and move, and what the machine could do.

Only useful work counts: of causal attention the half that is visible, of sparse attention the selected tokens a query
may see, and for the bytes every argument and every result once. A backward pass counts 2.5 times its forward pass: five
products instead of two.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

BUDGET_MS = 250.0  # of device time per row, after the warm-up
FLUSH_BYTES = 256 << 20  # more than the L2 cache holds
QUEUED = 16  # calls at a time: with more than about a thousand kernels in the queue the host has to wait
CLOCK_HZ = 2e9  # about that of the GPU, whose sleep is counted in cycles
BACKWARD = 2.5  # FLOPs of a backward pass in forward passes


@dataclass(frozen=True)
class Target:
    """A number to reach: at least the floor and better the goal; at most, where the goal is the smaller of the two.

    Without a floor it is a comparison only.
    """

    what: str
    value: float
    floor: float | None = None
    goal: float | None = None
    unit: str = "×"

    @property
    def mark(self) -> str:
        if self.floor is None:
            return ""
        sign = 1 if self.goal >= self.floor else -1
        if sign * self.value >= sign * self.goal:
            return "goal"
        return "floor" if sign * self.value >= sign * self.floor else "MISSED"

    def __str__(self) -> str:
        reached = f"{self.value:.{1 if self.unit == '%' else 2}f}{self.unit} {self.what}".strip()
        return f"{reached} ({self.floor:g}, {self.goal:g}): {self.mark}" if self.mark else reached


@dataclass
class Row:
    """One operator at one size; where there is no time, `note` says why."""

    section: str
    operator: str
    shape: str
    length: int
    indices: str = ""  # how the selected blocks came about, for operators that have some
    union: float | None = None  # distinct blocks that eight neighbouring tokens select, on average
    ms: float | None = None
    flops: float = 0.0
    bytes: float = 0.0
    best_ms: float = 0.0  # what the ceilings of its run allow
    targets: list[Target] = field(default_factory=list)
    note: str = ""

    @classmethod
    def total(cls, operator: str, *parts: "Row") -> "Row":
        """A row for several operators that follow each other."""
        first = parts[0]
        row = cls(first.section, operator, first.shape, first.length, first.indices, first.union)
        row.flops, row.bytes = sum(part.flops for part in parts), sum(part.bytes for part in parts)
        if all(part.ms for part in parts):
            row.ms = sum(part.ms for part in parts)
        else:
            row.note = "a part of it failed"
        return row

    def compare(self, peer: "Row | None" = None, floor: float | None = None, goal: float | None = None) -> None:
        """Note the speed in units of the peer's, where both have a time."""
        if peer and peer.ms and self.ms:
            self.targets.append(Target(f"the speed of {peer.operator}", peer.ms / self.ms, floor, goal))


@dataclass(frozen=True)
class Ceilings:
    """The machine, measured in the same run."""

    flops: float  # per second, of a BF16 matrix product
    bandwidth: float  # bytes per second, read and written, of a copy

    def best_ms(self, row: Row) -> float:
        return 1e3 * max(row.flops / self.flops, row.bytes / self.bandwidth)


def measure_ceilings() -> Ceilings:
    """An 8192^3 BF16 product of random numbers, and a copy of 4 GiB."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(torch.matmul, a, b)
    source = torch.empty(1 << 32, device="cuda", dtype=torch.int8).random_(-128, 127)
    copy = torch.empty_like(source)
    moved = milliseconds(copy.copy_, source)
    return Ceilings(2 * 8192**3 / product * 1e3, 2 * source.numel() / moved * 1e3)


def milliseconds(function: Callable, *arguments, **options) -> float:
    """Median time of `function(*arguments, **options)` on the device, with the L2 cache emptied before each call.

    The device sleeps while the calls are queued, so that what launching costs the host does not count, unless the
    function waits for the device. Where one takes longer than the budget, a single further one has to do.
    """
    return milliseconds_in_turns(partial(function, *arguments, **options))[0]


def milliseconds_in_turns(*functions: Callable) -> list[float]:
    """As `milliseconds`, of each of several functions that take turns: for times of which the difference counts.

    A GPU at the limit of its power changes its clock from one second to the next, by more than such a difference.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    host = sum(map(host_seconds, functions))
    at_once = max(1, QUEUED // len(functions))

    def timed(rounds: int) -> list[list[float]]:
        """The times of each function."""
        events = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in functions] for _ in range(rounds)]
        for i, pairs in enumerate(events):
            if i % at_once == 0:
                torch.cuda.synchronize()
                torch.cuda._sleep(int(1.5 * host * min(at_once, rounds - i) * CLOCK_HZ))
            for function, (start, stop) in zip(functions, pairs, strict=True):
                flush.zero_()
                start.record()
                function()
                stop.record()
        torch.cuda.synchronize()
        return [[start.elapsed_time(stop) for start, stop in pairs] for pairs in zip(*events, strict=True)]

    first = timed(1)
    longest = max(map(max, first))
    if longest > BUDGET_MS:
        again = timed(1)
        return [statistics.median(a + b) for a, b in zip(first, again, strict=True)]
    return [statistics.median(times) for times in timed(max(3, min(100, int(BUDGET_MS / longest))))]


def host_seconds(function: Callable, *arguments, **options) -> float:
    """What it takes the host to queue a call of a function that has been compiled."""
    function(*arguments, **options)
    torch.cuda.synchronize()
    began = time.perf_counter()
    function(*arguments, **options)
    seconds = time.perf_counter() - began
    torch.cuda.synchronize()
    return seconds


def kernel_times(function: Callable, *arguments, calls: int = 4, most: int = 30, **options) -> str:
    """The kernels of a call by PyTorch's profiler, the longest first: ms and launches of one call, and the name."""
    function(*arguments, **options)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            function(*arguments, **options)
        torch.cuda.synchronize()
    kernels = sorted(profile.key_averages(), key=lambda kernel: -kernel.self_device_time_total)[:most]
    return "\n".join(
        f"{kernel.self_device_time_total / calls / 1e3:9.3f} ms {kernel.count / calls:5.3g}x  {kernel.key[:90]}"
        for kernel in kernels
    )


def size(*tensors: Tensor | None) -> int:
    """Bytes of the tensors together."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


COLUMNS: dict[str, Callable[[Row], str]] = {  # of the tables: what a row shows there
    "operator": lambda row: row.operator,
    "indices": lambda row: row.indices,
    "shape": lambda row: row.shape,
    "length": lambda row: f"{row.length:,}" if row.length else "",
    "union": lambda row: "" if row.union is None else f"{row.union:.1f}",
    "ms": lambda row: f"{row.ms:.3f}" if row.ms else "",
    "TFLOP/s": lambda row: f"{row.flops / row.ms / 1e9:.0f}" if row.ms and row.flops else "",
    "GB/s": lambda row: f"{row.bytes / row.ms / 1e6:.0f}" if row.ms and row.bytes else "",
    "of roofline": lambda row: f"{row.best_ms / row.ms:.0%}" if row.ms and row.best_ms else "",
    "against (floor, goal)": lambda row: "; ".join([*map(str, row.targets), *([row.note] if row.note else [])]),
}
WORDS = ("operator", "indices", "against (floor, goal)")  # columns that are aligned to the left


def line(row: Row) -> str:
    """The row as one line of the running log."""
    units = {"union": "union ", "ms": " ms", "TFLOP/s": " TFLOP/s", "GB/s": " GB/s", "of roofline": " of roofline"}
    cells = [(units.get(title, ""), show(row)) for title, show in COLUMNS.items()]
    return "  ".join(unit + cell if unit.endswith(" ") else cell + unit for unit, cell in cells if cell)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, without the columns that are empty in all of them."""
    columns = [[title, *(show(row) for row in rows)] for title, show in COLUMNS.items()]
    padded = []
    for title, *cells in (column for column in columns if any(column[1:])):
        left, width = title in WORDS, max(map(len, [title, *cells]))
        rule = "-" * width if left else "-" * (width - 1) + ":"
        padded.append([cell.ljust(width) if left else cell.rjust(width) for cell in (title, rule, *cells)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in zip(*padded, strict=True))
