"""The pictures of a run, drawn from its ledger: loss and learning rate over tokens, loss by position, experts' load.

python -m hysparse.plot RUN_DIR    draws RUN_DIR/curves.png and experts.png, of a running run as well
"""

import sys
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from hysparse.ledger import Record, latest_by_step, read_ledger
from hysparse.report import count

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"  # Okabe and Ito: safe for colour-blind readers
SMOOTHING = 0.02  # of all steps are averaged for the smooth line
FEW = 100  # steps, below which each of them is a point
LABEL = 0.22  # width that a phase label needs, of the axis
HOT = 2.0  # times the mean load, where the colours of the heat map end


def plot_run(ledger_path: str | Path, output_png: str | Path) -> None:
    """Draw what the ledger holds by now, 1200 x 800 pixels."""
    records = read_ledger(ledger_path)
    steps, validations, phases = (latest_by_step(records, kind) for kind in ("step", "validation", "phase"))
    positions = next((record for record in reversed(validations) if record.get("by_position")), None)

    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    grid = figure.add_gridspec(
        2, 2 if positions else 1, height_ratios=(2, 1), width_ratios=(3, 1) if positions else None
    )
    loss = figure.add_subplot(grid[0, 0])
    rate = figure.add_subplot(grid[1, 0], sharex=loss)
    _draw_loss(loss, steps, validations)
    rate.plot(
        column(steps, "tokens"), column(steps, "learning_rate"), color=BLUE, marker="." if len(steps) < FEW else None
    )
    rate.set_ylabel("learning rate")
    rate.set_xlabel("tokens")
    rate.set_ylim(bottom=0)
    rate.set_xlim(0, 1.01 * max((record["tokens"] for record in (*steps, *validations)), default=0) or 1)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: count(tokens)))
    _mark_phases(loss, rate, phases)
    loss.tick_params(labelbottom=False)
    if positions:
        _draw_positions(figure.add_subplot(grid[:, 1]), positions, phases)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(_title(Path(ledger_path), steps), fontsize=12)
    figure.savefig(output_png)


def plot_run_folder(folder: Path) -> list[Path]:
    """Draw all pictures that the ledger in `folder` has something for; returns their paths."""
    ledger, curves, experts = (folder / name for name in ("ledger.jsonl", "curves.png", "experts.png"))
    plot_run(ledger, curves)
    records = latest_by_step(read_ledger(ledger), "experts")
    if not records:
        return [curves]
    plot_experts(records, experts)
    return [curves, experts]


def plot_experts(records: Sequence[Record], output_png: Path) -> None:
    """The load of every expert by the newest record of kind "experts", and the course of the busiest one over all."""
    load = np.array(records[-1]["load"], dtype=float) / 100
    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    heat, course = figure.subplots(2, 1, height_ratios=(2, 1))
    first = records[-1].get("first_layer", 0)
    where = (-0.5, load.shape[1] - 0.5, first + len(load) - 0.5, first - 0.5)
    picture = heat.imshow(load, aspect="auto", cmap="cividis", vmin=0, vmax=HOT, interpolation="nearest", extent=where)
    figure.colorbar(picture, ax=heat, label="rows, in units of the mean", extend="max")
    heat.set(xlabel="expert", ylabel="layer")
    for axis in (heat.xaxis, heat.yaxis):
        axis.get_major_locator().set_params(integer=True)
    steps = column(records, "step")
    busiest = np.array([record["max_over_mean"] for record in records], dtype=float)  # [records, layers]
    style = ".-" if len(steps) < FEW else "-"
    course.plot(steps, busiest.max(1), style, color=ORANGE, label="worst layer")
    course.plot(steps, np.median(busiest, 1), style, color=BLUE, label="median layer")
    course.set(xlabel="step", ylabel="busiest expert, in units of the mean", ylim=(1, None))
    course.spines[["top", "right"]].set_visible(False)
    course.grid(alpha=0.25)
    course.legend(framealpha=1, edgecolor="none")
    figure.suptitle(f"{output_png.resolve().parent.name}: experts at step {records[-1]['step']:,}", fontsize=12)
    figure.savefig(output_png)


def _draw_loss(axes: Axes, steps: Sequence[Record], validations: Sequence[Record]) -> None:
    tokens, loss, validation = column(steps, "tokens"), column(steps, "loss"), column(validations, "loss")
    if len(steps) < FEW:
        axes.plot(tokens, loss, ".-", color=BLUE, label="training")
    else:
        axes.plot(tokens, loss, color=BLUE, linewidth=0.7, alpha=0.35, label="training, each step")
        stretches = [column(list(stretch), "loss") for _, stretch in groupby(steps, lambda step: step["phase"])]
        averaged = np.concatenate([smooth(stretch, int(SMOOTHING * len(steps) / 2)) for stretch in stretches])
        axes.plot(tokens, averaged, color=BLUE, linewidth=1.8, label="training, running mean")
    if validations:
        axes.plot(column(validations, "tokens"), validation, "o", color=ORANGE, markersize=5, label="validation")
    finite = loss[np.isfinite(loss)]
    if finite.size:  # the first steps of a long run lie far above everything else and may leave the picture
        shown = np.concatenate(
            [finite[finite <= np.percentile(finite, 99, method="higher")], validation[np.isfinite(validation)]]
        )
        margin = 0.06 * np.ptp(shown) or 0.1
        axes.set_ylim(shown.min() - margin, shown.max() + margin)
    if finite.size < loss.size:
        broken = tokens[~np.isfinite(loss)]
        axes.plot(
            broken,
            np.full_like(broken, 0.01),
            "x",
            color=GREY,
            transform=axes.get_xaxis_transform(),
            label="not finite",
        )
    axes.set_ylabel("loss")
    axes.legend(loc="upper right", framealpha=1, edgecolor="none")


def _draw_positions(axes: Axes, validation: Record, phases: Sequence[Record]) -> None:
    """Validation loss of equal stretches of the sequence, each at its middle."""
    loss = np.array(validation["by_position"], dtype=float)
    length = next((phase["sequence_length"] for phase in reversed(phases) if phase["time"] <= validation["time"]), None)
    axes.plot((np.arange(loss.size) + 0.5) * (length or 1) / loss.size, loss, "o-", color=GREEN, markersize=4)
    axes.set_title(f"validation loss by position\nat {count(validation['tokens'])} tokens", fontsize=10)
    axes.set_xlabel("position in the sequence, tokens" if length else "position, fraction of the sequence")
    axes.set_xlim(0, length or 1)
    if length:
        axes.xaxis.set_major_formatter("{x:,.0f}")


def _mark_phases(top: Axes, bottom: Axes, phases: Sequence[Record]) -> None:
    """A line where each phase begins, described above; a resume may have repeated the record of a phase."""
    begins = [phase for before, phase in pairwise([{"name": None}, *phases]) if phase["name"] != before["name"]]
    width = top.get_xlim()[1]
    right_end = [0.0, 0.0]  # of the last label in the lower and in the upper row, as a fraction of the axis
    for phase in begins:
        at = phase["tokens"] / width
        left, side = (at, "left") if at + LABEL <= 1 else (at - LABEL, "right")
        row = 0 if left >= right_end[0] else 1
        right_end[row] = left + LABEL
        for axes in (top, bottom):
            axes.axvline(phase["tokens"], color=GREY, linewidth=1, linestyle="--")
        text = f"{phase['name']}\n{phase['sequence_length']:,} tokens, RoPE {count(phase['rope_base'])}"
        top.annotate(text, (at, 1.01 + 0.09 * row), xycoords="axes fraction", fontsize=9, color=GREY, ha=side)


def _title(path: Path, steps: Sequence[Record]) -> str:
    name = path.resolve().parent.name
    if not steps:
        return f"{name}: no step yet"
    return f"{name}: step {steps[-1]['step']:,}, {count(steps[-1]['tokens'])} tokens"


def column(records: Sequence[Record], key: str) -> np.ndarray:
    """One value of each record, NaN for null."""
    return np.array([record[key] for record in records], dtype=float)  # None becomes NaN


def smooth(values: np.ndarray, half: int) -> np.ndarray:
    """Mean over what is finite within `half` steps on both sides; NaN where nothing is."""
    index = np.arange(values.size)
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, values.size)
    finite = np.isfinite(values)
    total, number = (np.concatenate([[0], np.cumsum(x)]) for x in (np.where(finite, values, 0), finite))
    with np.errstate(invalid="ignore"):
        return (total[last] - total[first]) / (number[last] - number[first])


def main() -> None:
    """Redraw the pictures of the run in the folder on the command line."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "ledger.jsonl").is_file():
        sys.exit("usage: python -m hysparse.plot RUN_DIR, the folder of a run, with its ledger.jsonl")
    print(*plot_run_folder(Path(sys.argv[1])), sep="\n")


if __name__ == "__main__":
    main()
