"""Draws the loss curves of runs with the Triton kernels over those with the reference operators, or FP8 over BF16.

    python -m docs.loss_overlay FOLDER [kernels|fp8]

FOLDER holds the ledgers, such as NAME_kernels.jsonl and NAME_reference.jsonl, as `launch/kernels_check.sh` and
`launch/fp8_check.sh` write them; the picture becomes FOLDER/loss_overlay.png or fp8_overlay.png.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from docs.figures import FULL, MUTED, PAPER, SHARED, STYLE
from hysparse.ledger import latest_by_step, read_ledger

RUNS = {"tiny": "tiny", "dense7b_slice": "five layers of the 7B's width"}  # ledger: title


class Comparison(NamedTuple):
    """Two ways to train the same models: the name of each in the ledgers' names, and in the picture."""

    runs: dict[str, str]
    ways: tuple[str, str]
    labels: tuple[str, str]
    picture: str


KERNELS = Comparison(RUNS, ("kernels", "reference"), ("Triton kernels", "reference operators"), "loss_overlay.png")
FP8 = Comparison(
    {"moe80b_slice": "five layers of the 80B's width, 16 experts"}, ("fp8", "bf16"), ("FP8", "BF16"), "fp8_overlay.png"
)
COMPARISONS = {"kernels": KERNELS, "fp8": FP8}
WARM = 5  # steps that compile and fill caches, no measure of speed


def pair_of(folder: Path, name: str, ways: tuple[str, str] = KERNELS.ways) -> tuple[list[dict], list[dict]]:
    """Steps of both ways to train a model, as far as both runs went."""
    runs = [latest_by_step(read_ledger(folder / f"{name}_{way}.jsonl"), "step") for way in ways]
    common = min(map(len, runs))
    if not common:
        sys.exit(f"a ledger of {name} in {folder} has no step")
    return tuple(run[:common] for run in runs)


def differences(kernels: Sequence[dict], reference: Sequence[dict]) -> np.ndarray:
    """Relative difference of the losses, step by step."""
    of_kernels, of_reference = ([step["loss"] for step in run] for run in (kernels, reference))
    return np.abs(np.divide(of_kernels, of_reference) - 1)


def largest(kernels: Sequence[dict], reference: Sequence[dict]) -> str:
    found = differences(kernels, reference)
    return f"largest difference {100 * found.max():.2f} %, at step {kernels[found.argmax()]['step']}"


def speed(steps: Sequence[dict]) -> float:
    """Median tokens per second."""
    return float(np.median([step["tokens_per_second"] for step in steps[WARM:] or steps]))


def described(name: str, pair: tuple[list[dict], list[dict]], ways: tuple[str, str]) -> str:
    """One line with all figures of a pair."""
    both = " and ".join(
        f"{words} {run[0]['loss']:.4f} to {run[-1]['loss']:.4f} at {speed(run):,.0f} tokens/s"
        for words, run in zip(ways, pair, strict=True)
    )
    return f"{name}: {len(pair[0])} steps, loss with {both}; {largest(*pair)}"


def draw(pairs: dict[str, tuple[list[dict], list[dict]]], labels: tuple[str, str] = KERNELS.labels) -> Figure:
    """A panel for each pair, and under it how far the two are apart."""
    figure = Figure(figsize=(9, 4.2), facecolor=PAPER, layout="constrained")
    panels = figure.subplots(2, len(pairs), sharex="col", height_ratios=(4, 1), squeeze=False)
    for (above, below), (title, (kernels, reference)) in zip(panels.T, pairs.items(), strict=True):
        step = [record["step"] for record in kernels]
        above.plot(step, [r["loss"] for r in reference], color=SHARED[1], linewidth=5, label=labels[1])
        above.plot(step, [r["loss"] for r in kernels], color=FULL[0], linewidth=1.3, label=labels[0])
        above.set_title(title, loc="left", size=11, weight="bold")
        above.legend(frameon=False, fontsize=9, title=largest(kernels, reference), title_fontsize=9)
        below.fill_between(step, 100 * differences(kernels, reference), color=MUTED, linewidth=0)
        below.set_ylim(bottom=0)
        below.set_xlabel("step")
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
    panels[0, 0].set_ylabel("loss")
    panels[1, 0].set_ylabel("difference, %")
    return figure


def main(folder: Path, comparison: Comparison = KERNELS) -> None:
    pairs = {name: pair_of(folder, name, comparison.ways) for name in comparison.runs}
    for name, pair in pairs.items():
        print(described(name, pair, comparison.ways))
    titled = {comparison.runs[name]: pair for name, pair in pairs.items()}
    with matplotlib.rc_context(STYLE):
        draw(titled, comparison.labels).savefig(folder / comparison.picture, dpi=160)
    print(folder / comparison.picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), COMPARISONS[(sys.argv[2:] or ["kernels"])[0]])
