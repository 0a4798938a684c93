"""A sweep: its members, each a run with a folder of its own, checked together before any of them starts.

    python train.py -m +experiment=… attention=full,hysparse run.seed=1,2
    python train.py -m +sweep=table4 +experiment=…

A member is `python train.py` with one combination of the values. Its folder is named after them, so that the same
command finds finished members and leaves them out, and takes up the others. Hydra's launcher starts them: `local.py` or
`slurm_array.py`. `launch/report.py` compares them.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from data import DataError
from hysparse.checks import check
from hysparse.compose import refuse_unknown
from hysparse.config import Config, ConfigError, RanksError
from hysparse.layouts import with_chosen_pipeline
from hysparse.ledger import read_ledger
from hysparse.mistakes import mistakes_without_traceback
from launch.errors import LaunchError
from launch.traces import written
from parallel.terminal import quiet_third_parties, show_own_messages

MEMBERS = "members.json"  # in the sweep's folder: what each member's folder was made for
STEERING = {"plan", "dry_run", "resume", "run.dir", "run.name"}  # not for sweeping over


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str  # of its folder in the sweep's
    values: dict[str, str]  # what distinguishes it, by key as typed
    overrides: list[str]  # of train.py
    config: Config  # as composed; auto in place of numbers stays

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    def finished(self) -> bool:
        return progress(self.folder).finished(self.config)


@dataclass(frozen=True)
class Progress:
    """Where a run's ledger says that it is."""

    step: int  # of its last record; 0 without one
    ended: bool  # whether that is how a run ends that was not stopped

    def finished(self, config: Config) -> bool:
        return self.ended and self.step >= target(config)


def target(config: Config) -> int:
    """The step at which a run is finished."""
    steps = sum(phase.steps for phase in config.phases.values())
    return steps if config.max_steps is None else min(steps, config.max_steps)


def progress(folder: Path) -> Progress:
    try:
        last = read_ledger(folder / "ledger.jsonl")[-1]
    except (OSError, IndexError):
        return Progress(0, False)
    return Progress(last["step"], last["kind"] == "end" and last["stopped"] is None)


def run_sweep(composed: DictConfig, loader: ConfigLoader, given: Sequence[Override], launcher: Launcher) -> None:
    """Check all members, then start those that are not finished. Ends the process where that is no success."""
    quiet_third_parties()
    show_own_messages()
    with mistakes_without_traceback(LaunchError, DataError):
        if not hasattr(launcher, "ranks"):
            raise LaunchError(
                f"{type(launcher).__name__} cannot start the members of a sweep; use hydra/launcher=local or slurm"
            )
        members = list(members_of(composed, loader, given))
        check_members(members, launcher.ranks)
        folder = Path(composed.hydra.sweep.dir)
        waiting = [member for member in members if not member.finished()]
        if composed.plan:
            print("\n".join(described(members)))
            return
        done = len(members) - len(waiting)
        with written(folder / MEMBERS, _remembered(folder, members), f"hydra.sweep.dir={folder}"):
            print(f"{len(members)} members in {folder}" + (f", {done} of them finished" if done else ""), flush=True)
            code = launcher.launch(waiting, 0) if waiting else 0
        print(f"  report      python -m launch.report sweep={folder}")
    if code:
        sys.exit(code)


def members_of(composed: DictConfig, loader: ConfigLoader, given: Sequence[Override]) -> Iterator[Member]:
    """One member for each combination, in the order of the values. Raises ConfigError, and what Hydra raises."""
    by_key = {override.get_key_element(): override for override in given}  # the last one of a key counts
    if taken := STEERING & {key.lstrip("+") for key, override in by_key.items() if override.is_sweep_override()}:
        raise ConfigError(f"{sorted(taken)[0]} cannot be swept over: it says how to run, not what")
    if "run.dir" in by_key:
        raise ConfigError(
            f"{by_key['run.dir'].input_line} would be the folder of every member; give hydra.sweep.dir=FOLDER instead, "
            "in which each has its own"
        )
    swept = {key: list(_values(override)) for key, override in by_key.items() if override.is_sweep_override()}
    fixed = [override.input_line for override in by_key.values() if not override.is_sweep_override()]
    if not swept:
        raise ConfigError(
            "there is nothing to sweep over: give a key several values, such as attention=full,hysparse, or "
            "+sweep=NAME; a single run goes without -m"
        )
    for values in product(*swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        name = "-".join(_word(key, value) for key, value in chosen.items())
        overrides = [*fixed, *(f"{key}={value}" for key, value in chosen.items())]
        folder = Path(composed.hydra.sweep.dir) / name
        overrides.append(f"run.dir={_quoted(str(folder))}")
        if "run.name" not in by_key:
            overrides.append(f"run.name={_quoted(f'{folder.parent.name}-{name}')}")
        try:
            config = _composed(composed, loader, overrides)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        overrides += [word for word in composed.hydra.overrides.hydra if word.startswith("hydra.searchpath=")]
        yield Member(name, {key.lstrip("+"): _plain(value) for key, value in chosen.items()}, overrides, config)


def check_members(members: Sequence[Member], ranks: int) -> None:
    """Refuse all if one would be refused later. Raises ConfigError, DataError or LaunchError that names it."""
    # These bring torch, which the other mistakes do not need.
    from hysparse.run_data import RunData
    from hysparse.run_folder import starting_point
    from parallel.checkpoint import CheckpointError

    if type(ranks) is not int or ranks < 1:
        raise LaunchError(f"hydra.launcher gives each member {ranks} processes; use a whole number of at least 1")
    name, number = Counter(member.name for member in members).most_common(1)[0]
    if number > 1:
        raise ConfigError(f"{number} members would share the folder {name}; leave out values that are there twice")
    fingerprints = {}
    for member in members:
        if member.config.dry_run is not None:
            raise LaunchError("dry_run=N is for a single run; plan=true lists the members and starts none")
        if member.config.resume == "never":
            raise LaunchError("resume=never: a sweep takes its members up again; give another hydra.sweep.dir=FOLDER")
        try:
            config = with_chosen_pipeline(member.config, ranks)
            check(config, ranks)
            validates, vocabulary = bool(config.logging.validate_every), config.model.vocabulary
            needs = repr((config.data, config.phases, config.parallel, config.run.seed, vocabulary, validates))
            if needs not in fingerprints:  # opening a corpus takes a while
                data = RunData(config)
                data.validation_sizes(ranks)
                fingerprints[needs] = data.fingerprint
            starting_point(config, fingerprints[needs])
        except RanksError as error:
            more = f"hydra.launcher gives a member {ranks}, see its ranks, or its nodes with hydra/launcher=slurm"
            raise RanksError(f"{member.name}: {error}; {more}") from error
        except (ConfigError, DataError) as error:
            raise type(error)(f"{member.name}: {error}") from error
        except CheckpointError as error:
            where = f"members get their run.dir from hydra.sweep.dir={member.folder.parent}"
            raise LaunchError(f"{member.name}: {error}; {where}") from error


def described(members: Iterable[Member]) -> list[str]:
    """A line a member: how far it is."""
    lines = []
    for member in members:
        now, last = progress(member.folder), target(member.config)
        state = "finished" if now.finished(member.config) else f"at step {now.step:,}" if now.step else "not started"
        lines.append(f"{member.folder}  {state} of {last:,} steps")
    return lines


def _composed(composed: DictConfig, loader: ConfigLoader, overrides: list[str]) -> Config:
    everything = loader.load_sweep_config(composed, overrides)
    with open_dict(everything):
        del everything["hydra"]
    refuse_unknown(everything, Config, "")
    return OmegaConf.to_object(everything)


def _remembered(folder: Path, members: Sequence[Member]) -> str:
    """What the report reads; members of earlier commands stay."""
    path = folder / MEMBERS
    known = json.loads(path.read_text()) if path.exists() else {}
    return json.dumps(known | {member.name: member.values for member in members}, indent=1) + "\n"


def _values(override: Override) -> Iterator[str]:
    if not override.is_discrete_sweep():
        raise ConfigError(f"{override.input_line}: write the values out, such as {override.key_or_group}=1,2,3")
    yield from override.sweep_string_iterator()


def _word(key: str, value: str) -> str:
    """A part of a folder's name: "hysparse" of a group's choice, "seed1" of run.seed=1."""
    name = key.lstrip("+").rpartition(".")[2] if "." in key else ""
    return re.sub(r"[^\w.]+", "_", name + _plain(value)).strip("_.") or "empty"


def _plain(value: str) -> str:
    return value.strip("'\"")


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w./-]+", text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
