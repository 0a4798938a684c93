"""What came out of a sweep: one table of all its runs, finished or not, and the loss over tokens and over FLOPs.

    python -m launch.report sweep=table4        or sweep=FOLDER, also of runs that were started one by one

Writes report.md, report.csv, loss_tokens.png and loss_flops.png into the folder. Runs that differ in run.seed alone are
one variant; its values are means over the seeds. The pictures are drawn by `launch/report_plot.py`.
"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
from omegaconf import OmegaConf

from hysparse.config import Config
from hysparse.ledger import Record, latest_by_step, read_ledger
from hysparse.mistakes import mistakes_without_traceback
from hysparse.plan import Plan
from hysparse.plot import column, smooth
from hysparse.report import count, flops, table
from launch.report_plot import Curve, plot_losses
from launch.sweep import MEMBERS, progress, target

RUNS = Path("runs")  # where run.dir and hydra.sweep.dir lie unless told otherwise
SEED = "run.seed"
AVERAGED = 0.05  # of all steps are averaged for a loss, at least so many:
FEWEST = 5
RISE = 1.1  # times its lowest value: a loss that ends above that has diverged; noise and a new phase cost less


class ReportError(Exception):
    """There is nothing to report; the message says what there is."""


@dataclass(frozen=True)
class Run:
    """A member as its folder shows it. `values` are what distinguishes it, by key."""

    folder: Path
    values: dict[str, str]

    @property
    def variant(self) -> str:
        return ", ".join(_short(key, value) for key, value in self.values.items() if key != SEED) or "all"

    @cached_property
    def config(self) -> Config | None:
        """None before the run has started."""
        try:
            saved = OmegaConf.load(self.folder / "config.yaml")
        except OSError:
            return None
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), saved))

    @cached_property
    def records(self) -> list[Record]:
        ledger = self.folder / "ledger.jsonl"
        return read_ledger(ledger) if ledger.exists() else []

    @cached_property
    def steps(self) -> list[Record]:
        return latest_by_step(self.records, "step")

    @property
    def finished(self) -> bool:
        return self.config is not None and progress(self.folder).finished(self.config)

    @property
    def state(self) -> str:
        if self.diverged:
            return "diverged"
        return "finished" if self.finished else "unfinished" if self.steps else "not started"

    @cached_property
    def curve(self) -> Curve:
        """Of the finite losses, a running mean."""
        plan, before, spent, flops_so_far = Plan(self.config.model, self.config.attention), 0, 0.0, []
        for step in self.steps:
            length = self.config.phases[step["phase"]].sequence_length
            spent += (step["tokens"] - before) * plan.flops_per_token(length).training
            before = step["tokens"]
            flops_so_far.append(spent)
        loss = smooth(column(self.steps, "loss"), _averaged(self.steps) // 2)
        return Curve(column(self.steps, "tokens"), np.array(flops_so_far), loss)

    @cached_property
    def loss(self) -> float | None:
        """Mean training loss of the last steps."""
        losses = [step["loss"] for step in self.steps[-_averaged(self.steps) :]]
        return mean(losses) if losses and None not in losses else None

    @cached_property
    def validation(self) -> float | None:
        found = latest_by_step(self.records, "validation")
        return found[-1]["loss"] if found else None

    @cached_property
    def diverged(self) -> str:
        """Why this run counts as diverged, "" if it does not."""
        if not self.steps:
            return ""
        last = self.steps[-1]
        if last["loss"] is None or last["gradient_norm"] is None:
            return f"loss or gradient is no number at step {last['step']:,}"
        losses = column(self.steps, "loss")
        number = _averaged(self.steps)
        means = [losses[end - number : end].mean() for end in range(number, len(losses) + 1)] or [losses.mean()]
        if means[-1] > RISE * min(means):
            return f"loss rose from {min(means):.3f} to {means[-1]:.3f}"
        return ""


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 1 or not arguments[0].startswith("sweep="):
        raise ReportError("usage: python -m launch.report sweep=NAME or sweep=FOLDER")
    folder = folder_of(arguments[0].removeprefix("sweep="))
    print("\n".join(write_report(folder)))


def folder_of(sweep: str) -> Path:
    """Of a sweep's name, such as table4, or a path. Raises ReportError."""
    for path in (Path(sweep), RUNS / sweep):
        if path.is_dir():
            return path
    found = sorted(path.parent for path in RUNS.glob(f"*/{MEMBERS}"))
    named = [path for path in found if path.name.startswith(f"{sweep}-")]
    if len(named) == 1:
        return named[0]
    there = named or found
    known = f"there are {', '.join(map(str, there))}" if there else f"there is none in {RUNS}/ yet"
    raise ReportError(f"sweep={sweep} is {'more than one' if named else 'no sweep and no folder'}; {known}")


def runs_of(folder: Path) -> list[Run]:
    """All members of a sweep, or all runs below a folder that is none. Raises ReportError."""
    members = folder / MEMBERS
    if members.is_file():
        return [Run(folder / name, values) for name, values in json.loads(members.read_text()).items()]
    runs = [Run(path.parent, {"run": path.parent.name}) for path in sorted(folder.glob("*/ledger.jsonl"))]
    if not runs:
        raise ReportError(f"{folder} holds neither a sweep ({MEMBERS}) nor folders of runs (*/ledger.jsonl)")
    return runs


def write_report(folder: Path) -> list[str]:
    """Write the files; returns lines for the terminal: the variants, what is missing, and where the files are."""
    runs = runs_of(folder)
    variants: dict[str, list[Run]] = {}
    for run in runs:
        variants.setdefault(run.variant, []).append(run)
    _write_csv(folder / "report.csv", runs)
    curves = {name: [run.curve for run in members if run.steps] for name, members in variants.items()}
    marks = {name: [run.curve for run in members if run.diverged] for name, members in variants.items()}
    pictures = [folder / "loss_tokens.png", folder / "loss_flops.png"]
    for picture, axis in zip(pictures, ("tokens", "flops"), strict=True):
        plot_losses(curves, marks, axis, folder.name, picture)
    by_variant = [VARIANT_HEADER, *(_variant_row(name, members) for name, members in variants.items())]
    troubles = [f"  {run.folder.name}: {run.diverged}" for run in runs if run.diverged]
    (folder / "report.md").write_text(_markdown(folder.name, by_variant, runs, pictures))
    states = ", ".join(f"{number} {state}" for state, number in Counter(run.state for run in runs).items())
    return [
        f"{folder.name}: {states}",
        *table(by_variant[0], by_variant[1:]),
        *(["Diverged", *troubles] if troubles else []),
        *(f"  {path}" for path in (folder / "report.md", folder / "report.csv", *pictures)),
    ]


VARIANT_HEADER = ["variant", "finished", "loss", "validation loss", "tokens", "training FLOPs"]
RUN_HEADER = ["run", "state", "step", "loss", "validation loss", "tokens", "training FLOPs", "tokens/s", "remark"]


def _variant_row(name: str, members: Sequence[Run]) -> list[str]:
    """Means over the finished seeds, ± their standard deviation: of others the losses are not those of the end."""
    done = [run for run in members if run.finished and not run.diverged]
    return [
        name,
        f"{len(done)} of {len(members)}",
        _spread([run.loss for run in done]),
        _spread([run.validation for run in done if run.validation is not None]),
        count(mean(run.curve.tokens[-1] for run in done)) if done else "–",
        flops(mean(run.curve.flops[-1] for run in done)) if done else "–",
    ]


def _run_row(run: Run) -> list[str]:
    if not run.steps:
        return [run.folder.name, run.state, *["–"] * (len(RUN_HEADER) - 3), ""]
    return [
        run.folder.name,
        run.state,
        f"{run.steps[-1]['step']:,} of {target(run.config):,}",
        "–" if run.loss is None else f"{run.loss:.4f}",
        "–" if run.validation is None else f"{run.validation:.4f}",
        count(run.curve.tokens[-1]),
        flops(run.curve.flops[-1]),
        count(_speed(run)),
        run.diverged,
    ]


def _write_csv(path: Path, runs: Sequence[Run]) -> None:
    """Plain numbers, empty where there are none."""
    keys = list(dict.fromkeys(key for run in runs for key in run.values))
    columns = ["state", "step", "steps", "loss", "validation_loss", "tokens", "training_flops", "tokens_per_second"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *keys, *columns, "remark"])
        for run in runs:
            numbers = [""] * (len(columns) - 1)
            if run.steps:
                reached = [run.steps[-1]["step"], target(run.config), run.loss, run.validation]
                numbers = [*reached, int(run.curve.tokens[-1]), run.curve.flops[-1], _speed(run)]
            chosen = [run.values.get(key, "") for key in keys]
            writer.writerow([run.folder.name, *chosen, run.state, *numbers, run.diverged])


def _markdown(title: str, by_variant: list[list[str]], runs: Sequence[Run], pictures: Sequence[Path]) -> str:
    def rows(cells: list[list[str]]) -> list[str]:
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        return [lines[0], "|---" + "|---:" * (len(cells[0]) - 1) + "|", *lines[1:]]

    parts = [[f"# {title}"], rows(by_variant), [f"![]({picture.name})" for picture in pictures]]
    return "\n\n".join("\n".join(part) for part in [*parts, rows([RUN_HEADER, *map(_run_row, runs)])]) + "\n"


def _averaged(steps: Sequence[Record]) -> int:
    return max(FEWEST, int(AVERAGED * len(steps)))


def _speed(run: Run) -> float:
    return median(step["tokens_per_second"] for step in run.steps)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _short(key: str, value: str) -> str:
    """ "hysparse" of a group's choice, "ratio=3" of attention.ratio=3."""
    return f"{key.rpartition('.')[2]}={value}" if "." in key else value


if __name__ == "__main__":
    with mistakes_without_traceback(ReportError):
        main(sys.argv[1:])
