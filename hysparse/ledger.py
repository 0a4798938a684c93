"""The metrics of a run: an append-only JSONL file that survives a kill, and its views for TensorBoard and W&B.

The file is the record, the views may fail. Only the process that owns the run directory (global rank 0) opens a ledger.
What is measured is decided in the trainer; the picture is drawn by `plot.py`.
"""

import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from hysparse.config import ConfigError, LoggingConfig

log = logging.getLogger(__name__)

Kind = Literal["start", "phase", "step", "experts", "validation", "end"]
Record = dict[str, Any]

MISSING = "logging.{0}=true needs the package {0}: pip install {0}, or set logging.{0}=false"
WANDB_INIT_SECONDS = 20  # W&B retries an unreachable server for as long as it is allowed to
WANDB_FINISH_SECONDS = 60  # to upload the rest at the end; without a limit, it waits for the network to come back


class LoggingError(ConfigError):
    """An enabled view that cannot work here."""


class LedgerError(Exception):
    """The record cannot be written any more; the message says why and what to do."""


class View(Protocol):
    """Shows the records of a ledger elsewhere. One that raises is dropped; the ledger goes on without it."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Ledger:
    """One JSON object per line, on disk before `write` returns."""

    def __init__(self, path: str | Path, views: Iterable[View] = ()):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        self._file.truncate(self.path.read_bytes().rfind(b"\n") + 1)  # nothing is appended to a line that a kill tore
        self._views = list(views)

    def write(self, kind: Kind, step: int, **values: Any) -> None:
        """Append a record with the time in unix seconds; a NaN or an infinity is written as null, JSON has neither.

        `step` counts the finished optimizer steps of the whole run, whatever the kind: one that is smaller than before
        says that training went back to a checkpoint (see `latest_by_step`). Raises LedgerError, on a full disk say.
        """
        record = {"kind": kind, "step": step, "time": time.time(), **_finite(values)}
        try:
            self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise LedgerError(
                f"step {step}: {self.path} cannot be written ({error.strerror}); make room, or whatever it takes, and "
                "start the same command again, which goes on from the newest checkpoint"
            ) from error
        self._show(lambda view: view.write(record))

    def close(self) -> None:
        with suppress(OSError):  # only what `write` has failed to write is left, and tried again here
            self._file.close()
        self._show(lambda view: view.close())

    def _show(self, action: Callable[[View], None]) -> None:
        for view in tuple(self._views):
            try:
                action(view)
            except Exception as error:  # whatever it is, training is worth more
                self._views.remove(view)
                log.warning("%s failed and is dropped, %s goes on: %s", type(view).__name__, self.path, _line(error))


def open_ledger(config_logging: LoggingConfig, run_dir: str | Path, run_name: str, full_config: dict) -> Ledger:
    """The ledger `run_dir/ledger.jsonl` with the enabled views. Raises LoggingError if one of them is not installed."""
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    views: list[View] = []
    if config_logging.tensorboard:
        views.append(TensorBoardView(folder / "tensorboard"))
    if config_logging.wandb:
        try:
            views.append(WandbView(config_logging.wandb_project, run_name, folder, full_config))
        except LoggingError:
            raise
        except Exception as error:  # an incompatible release, no room for its files, ...
            log.warning("W&B failed to start, the run goes on without it: %s", _line(error))
    return Ledger(folder / "ledger.jsonl", views)


def read_ledger(path: str | Path) -> list[Record]:
    """All finished records in the order of writing, also while the run goes on. Torn lines are skipped."""
    records = []
    for line in Path(path).read_bytes().split(b"\n")[:-1]:  # what follows the last newline is not finished
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def latest_by_step(records: Iterable[Record], kind: Kind) -> list[Record]:
    """The records of a kind that count, one a step in rising order: what a kill lost and a resume repeated is left out.

    The order of writing decides. Steps rise within one life of a run; a record of any kind (usually "start") at step s
    takes back everything that was written earlier about the steps after s, as training goes on from there.
    """
    kept: list[Record] = []
    for record in records:
        while kept and kept[-1]["step"] > record["step"]:
            kept.pop()
        if record["kind"] == kind:
            if kept and kept[-1]["step"] == record["step"]:
                kept.pop()
            kept.append(record)
    return kept


class TensorBoardView:
    """Numbers as scalars over the step, such as "step/loss" and "validation/by_position/3"."""

    def __init__(self, folder: str | Path):
        try:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds, so only where it is wanted
        except ImportError as error:
            raise LoggingError(MISSING.format("tensorboard")) from error
        self._open = partial(SummaryWriter, str(folder))
        self._writer = None

    def write(self, record: Record) -> None:
        if self._writer is None:  # TensorBoard hides what an earlier life of the run wrote about later steps
            self._writer = self._open(purge_step=record["step"] + 1)
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record["step"], walltime=record["time"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbView:
    """The same numbers in W&B: online where WANDB_API_KEY is set and the server answers, otherwise offline.

    A resumed run continues the W&B run whose id lies in `folder/wandb_id`. Offline, every start has a folder of its own
    under `folder/wandb`; `wandb sync` merges them.
    """

    def __init__(self, project: str, name: str, folder: str | Path, config: dict):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # where nobody answers, it delays the exit by 20 s
        try:
            import wandb
        except ImportError as error:
            raise LoggingError(MISSING.format("wandb")) from error
        limits = dict(init_timeout=WANDB_INIT_SECONDS, finish_timeout=WANDB_FINISH_SECONDS, finish_timeout_raises=True)
        settings = wandb.Settings(console="off", silent=True, **limits)  # the terminal belongs to the progress bar
        identity = Path(folder) / "wandb_id"
        if not identity.exists() or not identity.read_text():
            identity.write_text(secrets.token_hex(8))
        run = dict(project=project, name=name, id=identity.read_text(), resume="allow", dir=str(folder), config=config)
        start = partial(wandb.init, **run, settings=settings)
        mode = os.environ.get("WANDB_MODE", "online") if os.environ.get("WANDB_API_KEY") else "offline"
        try:
            self._run = start(mode=mode)
        except wandb.Error as error:
            log.warning("W&B is offline, `wandb sync %s/wandb/offline-run-*` uploads later: %s", folder, _line(error))
            wandb.teardown()  # the failed start holds the run's id
            self._run = start(mode="offline")
        self._run.define_metric("*", step_metric="step")  # W&B's own step may not fall, as it does after a resume

    def write(self, record: Record) -> None:
        self._run.log({"step": record["step"], **_scalars(record)})

    def close(self) -> None:
        self._run.finish()


def _scalars(record: Record) -> dict[str, float]:
    """Numbers of a record as "kind/name", those of a list as "kind/name/index"; text and null are left out."""
    values = {}
    for name, value in record.items():
        if isinstance(value, list):
            values |= {f"{record['kind']}/{name}/{index}": item for index, item in enumerate(value)}
        elif name not in ("step", "time"):
            values[f"{record['kind']}/{name}"] = value
    return {label: value for label, value in values.items() if isinstance(value, int | float)}


def _finite(value: Any) -> Any:
    """The same value with null for every NaN and infinity inside it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())
