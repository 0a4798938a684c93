"""The pictures of a sweep: loss by variant, the mean over its seeds in a band from the lowest to the highest."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hysparse.report import count, flops

# Okabe and Ito: safe for colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#595959", "#000000")
STYLES = ("-", "--", ":", "-.")  # of what comes after the last colour
POINTS = 400  # at which seeds are compared
HIDDEN = 5  # percent of the points, the first and highest ones, that may leave the picture


class Curve(NamedTuple):
    """Of one run, each [steps]."""

    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray


def plot_losses(
    variants: Mapping[str, Sequence[Curve]],
    diverged: Mapping[str, Sequence[Curve]],
    axis: Literal["tokens", "flops"],
    title: str,
    output_png: Path,
) -> None:
    """Draw all variants that have a curve over `axis`, 1000 x 600 pixels; a cross ends those that diverged."""
    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    shown = []
    for number, (name, curves) in enumerate(variants.items()):
        if not curves:
            continue
        at, losses = _on_one_grid(curves, axis)
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        axes.plot(at, np.nanmean(losses, 0), style, color=colour, linewidth=1.6, label=f"{name} ({len(curves)})")
        axes.fill_between(at, np.nanmin(losses, 0), np.nanmax(losses, 0), color=colour, alpha=0.18, linewidth=0)
        for curve in diverged[name]:
            axes.plot(getattr(curve, axis)[-1], curve.loss[np.isfinite(curve.loss)][-1:], "x", color=colour)
        shown.append(losses.ravel())
    if shown:
        finite = np.concatenate(shown)
        finite = finite[np.isfinite(finite)]
        low, high = finite.min(), np.percentile(finite, 100 - HIDDEN)
        axes.set_ylim(low - 0.05 * (high - low or 1), high + 0.02 * (high - low or 1))
        axes.legend(title="variant (seeds)", framealpha=1, edgecolor="none")
    unit = count if axis == "tokens" else flops
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: unit(value)))
    axes.set(xlabel=axis if axis == "tokens" else "training FLOPs", ylabel="training loss, running mean", title=title)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(output_png)


def _on_one_grid(curves: Sequence[Curve], axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Where the longest of the curves reaches [P], and all losses there [curves, P], NaN after the end of one."""
    positions = [getattr(curve, axis) for curve in curves]
    grid = np.linspace(min(at[0] for at in positions), max(at[-1] for at in positions), POINTS)
    losses = [np.interp(grid, at, curve.loss, right=np.nan) for at, curve in zip(positions, curves, strict=True)]
    return grid, np.array(losses)
