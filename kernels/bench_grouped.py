"""Measures the grouped matrix products of the 80B's experts one by one on a Hopper GPU: PyTorch's and ours.

    python -m kernels.bench_grouped [--markdown FILE]

512 experts, hidden 2,048, FFN 512, 8 active, BF16, medians on the device; rows are spread over the experts as random
routing does it. "of roofline" is against an 8192^3 product and a copy of the same run.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.grouped_hopper import Groups, multiply, weight_gradient
from kernels.roofline import Row, line, measure_ceilings, milliseconds, size, table

HIDDEN, EXPERTS, ACTIVE, FFN = 2048, 512, 8, 512
TOKENS = (32_768, 4_096)
UNEVEN = 0.1  # standard deviation of an expert's logarithmic popularity
BACKENDS = ("PyTorch", "ours")


def offsets_of(rows: int) -> Tensor:
    """Where the rows of each expert end: a multinomial draw with somewhat uneven experts."""
    popularity = torch.randn(EXPERTS, device="cuda").mul(UNEVEN).exp()
    experts = torch.multinomial(popularity, rows, replacement=True)
    return torch.bincount(experts, minlength=EXPERTS).cumsum(0, dtype=torch.int32)


def forward(rows: Tensor, weight: Tensor, offsets: Tensor, ours: bool) -> Callable[[], Tensor]:
    if not ours:
        return lambda: F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)
    groups = Groups(offsets, len(rows))
    return lambda: multiply(rows, weight, groups, turned=False)


def input_gradient(grad: Tensor, weight: Tensor, offsets: Tensor, ours: bool) -> Callable[[], Tensor]:
    if not ours:
        return lambda: F.grouped_mm(grad, weight, offs=offsets)
    groups = Groups(offsets, len(grad))
    return lambda: multiply(grad, weight, groups, turned=True)


def of_weight(grad: Tensor, rows: Tensor, offsets: Tensor, ours: bool) -> Callable[[], Tensor]:
    if not ours:
        return lambda: F.grouped_mm(grad.t(), rows, offs=offsets)
    return lambda: weight_gradient(grad, rows, offsets)


def measure(tokens: int) -> list[Row]:
    """Rows of all products; where our result differs from PyTorch's, its row says so."""
    number = tokens * ACTIVE
    offsets = offsets_of(number)
    ceilings = measure_ceilings()
    rows = []
    for name, out, inside in (("gate and up", 2 * FFN, HIDDEN), ("down", HIDDEN, FFN)):
        x, grad = (torch.randn(number, width, device="cuda", dtype=torch.bfloat16) for width in (inside, out))
        weight = torch.randn(EXPERTS, out, inside, device="cuda", dtype=torch.bfloat16).mul_(inside**-0.5)
        for product, make, arguments in (
            ("forward", forward, (x, weight)),
            ("gradient of its rows", input_gradient, (grad, weight)),
            ("gradient of its matrices", of_weight, (grad, x)),
        ):
            peer, truth = None, None
            for backend in BACKENDS:
                run = make(*arguments, offsets, backend == "ours")
                result = run()
                row = Row("grouped", f"{name}, {product}: {backend}", "80b", tokens, flops=2 * number * out * inside)
                row.bytes = size(*arguments, result)
                row.ms = milliseconds(run)
                row.best_ms = ceilings.best_ms(row)
                if peer is None:
                    peer, truth = row, result
                else:
                    row.compare(peer)
                    error = (result - truth).float().norm() / truth.float().norm()
                    row.note = "" if error < 1e-2 else f"WRONG: differs by {error:.1e}"  # both round to BF16: 3e-3
                print(line(row), flush=True)
                rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench_grouped", description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", type=Path, help="write the table here as well")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    rows = [row for tokens in TOKENS for row in measure(tokens)]
    print(f"\n{table(rows)}")
    for backend in BACKENDS:
        sums = [sum(row.ms for row in rows if row.length == n and row.operator.endswith(backend)) for n in TOKENS]
        print(f"{backend}: {', '.join(f'{ms:.2f} ms at {n:,} tokens' for ms, n in zip(sums, TOKENS, strict=True))}")
    if options.markdown:
        options.markdown.write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
