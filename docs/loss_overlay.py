"""Draws the loss curves of runs with the Triton kernels over those with the reference operators.

    python -m docs.loss_overlay FOLDER

FOLDER holds the ledgers, NAME_kernels.jsonl and NAME_reference.jsonl, as `launch/kernels_check.sh` writes them; the
picture becomes FOLDER/loss_overlay.png.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from docs.figures import FULL, MUTED, PAPER, SHARED, STYLE
from hysparse.ledger import latest_by_step, read_ledger

RUNS = {"tiny": "tiny", "dense7b_slice": "five layers of the 7B's width"}  # ledger: title
WARM = 5  # steps that compile and fill caches, no measure of speed


def pair_of(folder: Path, name: str) -> tuple[list[dict], list[dict]]:
    """Steps with the kernels and with the reference, as far as both runs went."""
    runs = [
        latest_by_step(read_ledger(folder / f"{name}_{operators}.jsonl"), "step")
        for operators in ("kernels", "reference")
    ]
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


def described(name: str, kernels: Sequence[dict], reference: Sequence[dict]) -> str:
    """One line with all figures of a pair."""
    both = " and ".join(
        f"{words} {run[0]['loss']:.4f} to {run[-1]['loss']:.4f} at {speed(run):,.0f} tokens/s"
        for words, run in (("kernels", kernels), ("reference", reference))
    )
    return f"{name}: {len(kernels)} steps, loss with {both}; {largest(kernels, reference)}"


def draw(pairs: dict[str, tuple[list[dict], list[dict]]]) -> Figure:
    """A panel for each pair, and under it how far the two are apart."""
    figure = Figure(figsize=(9, 4.2), facecolor=PAPER, layout="constrained")
    panels = figure.subplots(2, len(pairs), sharex="col", height_ratios=(4, 1), squeeze=False)
    for (above, below), (title, (kernels, reference)) in zip(panels.T, pairs.items(), strict=True):
        step = [record["step"] for record in kernels]
        above.plot(step, [r["loss"] for r in reference], color=SHARED[1], linewidth=5, label="reference operators")
        above.plot(step, [r["loss"] for r in kernels], color=FULL[0], linewidth=1.3, label="Triton kernels")
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


def main(folder: Path) -> None:
    pairs = {name: pair_of(folder, name) for name in RUNS}
    for name, pair in pairs.items():
        print(described(name, *pair))
    with matplotlib.rc_context(STYLE):
        draw({RUNS[name]: pair for name, pair in pairs.items()}).savefig(folder / "loss_overlay.png", dpi=160)
    print(folder / "loss_overlay.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
