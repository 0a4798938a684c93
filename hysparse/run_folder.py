"""What a run keeps on disk beside its ledger: the resolved configuration, where it came from, and its checkpoints."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import yaml
from omegaconf import OmegaConf

from hysparse.config import Config, ConfigError
from hysparse.schedule import Progress
from parallel import checkpoint
from parallel.checkpoint import CheckpointError
from parallel.ranks import automatic_restarts, rank

CHECKPOINTS = "checkpoints"  # in run.dir
RESTARTS = "restarts.json"  # beside the checkpoints: which one the last start began from, and how often in a row
# Keys of model and attention that a resumed run may change: names, what other keys are derived from, and training
FREE = {
    *("name", "full_attention_gate", "hybrid_ratio", "init_std"),
    *("moe.aux_loss", "moe.balance", "moe.z_loss", "moe.capacity_factor"),
}


class RunFolder:
    """`run.dir`, made writable before anything else happens. `sources` as `compose.provenance` returns it."""

    def __init__(self, config: Config, sources: dict[str, dict]):
        self.config, self.sources = config, sources
        self.path = Path(config.run.dir)
        self.checkpoints = self.path / CHECKPOINTS
        self.resolved = as_written(config)
        if rank() == 0:
            with self._writing():
                self.checkpoints.mkdir(parents=True, exist_ok=True)
            if not checkpoint.complete(self.checkpoints):  # else once the configuration is known to fit them
                self._save_configuration()

    def described(self) -> list[str]:
        """The settings that differ from the defaults, by source, in lines of at most 100 characters."""
        lines = []
        for source, settings in self.sources.items():
            line = f"  {source}:"
            for key, value in settings.items():
                word = f" {key}={value}"
                if len(line) + len(word) > 100:
                    lines.append(line)
                    line = "   "
                line += word
            lines.append(line)
        return lines

    def checkpoint_to_resume(self) -> Path | None:
        """What `resume` asks for, intact. Called by all ranks; raises CheckpointError."""
        paths = possible_checkpoints(self.config, checkpoint.complete_for_all)
        if not paths:
            return None
        if paths == [Path(self.config.resume)]:  # one that was named is not passed over
            if found := checkpoint.damage(paths[0]):
                raise CheckpointError(f"checkpoint {paths[0]} is damaged: {found}; choose an older one beside it")
            return paths[0]
        path = checkpoint.newest_usable(paths[0].parent)
        if path is None:
            raise CheckpointError(
                f"all checkpoints in {paths[0].parent} are damaged; give another with resume=PATH, or delete them"
            )
        return path

    def count_restart(self, path: Path | None) -> None:
        """Raise CheckpointError after too many restarts from the same checkpoint `path`. Called by all ranks.

        A person who starts the run begins a new count; only what restarts it without looking is held back.
        """
        counter, restarts = self.path / RESTARTS, [0]
        if rank() == 0:
            here = {"from": path.name if path else None, "restarts": 0}
            if automatic_restarts():
                with suppress(OSError, ValueError):  # none yet, or torn by a kill
                    before = json.loads(counter.read_text())
                    here["restarts"] = before["restarts"] + 1 if before["from"] == here["from"] else 0
            with self._writing():
                counter.write_text(json.dumps(here))
            restarts = [here["restarts"]]
        torch.distributed.broadcast_object_list(restarts)
        if restarts[0] > self.config.run.max_restarts:
            raise CheckpointError(
                f"restarted {restarts[0] - 1} times from {path or 'the beginning'} without a newer checkpoint, "
                f"run.max_restarts={self.config.run.max_restarts}; read what the last attempts said, then start the "
                "run again yourself; a smaller checkpoint.every helps where attempts end too early"
            )

    def check_same(self, path: Path, about: dict, data: str) -> None:
        """As the function of that name. What passes becomes the configuration that the folder states; one that was
        refused leaves no trace.
        """
        check_same(self.config, path, about, data)
        if rank() == 0:
            self._save_configuration()

    def _save_configuration(self) -> None:
        with self._writing():
            (self.path / "config.yaml").write_text(yaml.safe_dump(self.resolved, sort_keys=False))
            (self.path / "settings.txt").write_text("\n".join(self.described()) + "\n")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"run.dir={self.config.run.dir} cannot be written ({error.strerror}); give another run.dir=FOLDER"
            ) from error


def possible_checkpoints(config: Config, complete: Callable[[Path], list[Path]]) -> list[Path]:
    """Those that `resume` asks for, newest first: a start goes on from the first that is intact. Empty: a new run.

    `complete` lists those of a folder: for all ranks alike, or for a process that is alone. Raises CheckpointError.
    """
    resume, folder = config.resume, Path(config.run.dir) / CHECKPOINTS
    own = complete(folder)
    if resume == "never":
        if own:
            raise CheckpointError(
                f"resume=never, but {own[0]} exists and would be overwritten; choose another run.dir, "
                f"delete {folder}, or use resume=auto"
            )
        return []
    path = Path(resume)
    if resume == "auto" or (own and path.resolve() not in [each.resolve() for each in own]):
        return own  # with a path from elsewhere, this is a restart of the run that began there
    if own and path.resolve() != own[0].resolve():
        raise CheckpointError(
            f"resume={resume} is older than {own[0]} in the same run, whose steps would be taken again; give "
            "another run.dir=FOLDER to branch off, or delete the newer checkpoints to go back"
        )
    if others := complete(path / CHECKPOINTS):  # a run's folder
        return others
    if not path.is_dir():
        raise CheckpointError(f"resume={resume} is no checkpoint; use resume=auto, resume=never or a folder step-…")
    checkpoint.about(path)
    return [path]


def starting_point(config: Config, data: str) -> Progress:
    """Where a run would go on, found out before it starts: by one process, without process groups or tensors.

    `data` is `RunData.fingerprint`. Raises CheckpointError where the run would refuse to.
    """
    for path in possible_checkpoints(config, checkpoint.complete):
        if checkpoint.is_whole(path):  # else the run, which reads all of it, says so and passes it over
            about = checkpoint.about(path)
            check_same(config, path, about, data)
            return Progress(**about["progress"])
    return Progress()


def check_same(config: Config, path: Path, about: dict, data: str) -> None:
    """Raise CheckpointError where the checkpoint is of another architecture, other phases or other data."""
    for section in ("model", "attention"):
        there, here = leaves(about[section]), leaves(as_written(config)[section])
        for key in sorted((there.keys() | here.keys()) - FREE):
            if not _goes_on(key, there.get(key), here.get(key)):
                raise CheckpointError(
                    f"checkpoint {path} is of another architecture: {section}.{key} is {there.get(key)} there and "
                    f"{here.get(key)} here; choose another run.dir, or use the checkpoint's value"
                )
    _check_phases(config, path, about["phases"], about["progress"])
    if data != about["data"] and not config.data.allow_change:
        raise CheckpointError(
            f"checkpoint {path} saw other data (corpus, blend or run.seed differ); set data.allow_change=true to "
            "go on with this one, counting samples as before"
        )


def _goes_on(key: str, there: str | None, here: str | None) -> bool:
    """Whether a run can go on with this value of a key that is not free."""
    if key == "moe.bias_update_rate" and there and here:  # any other, but the bias itself neither comes nor goes
        return bool(float(there)) == bool(float(here))
    return there == here


def _check_phases(config: Config, path: Path, there: dict[str, dict], progress: dict) -> None:
    then, now = list(there), list(config.phases)
    through = then[: progress["phase"] + (progress["samples"] > 0)]
    if now[: len(through)] != through:
        raise CheckpointError(
            f"checkpoint {path} was reached through the phases {', '.join(through)}, "
            f"this run has {', '.join(now)}; keep those that are done or begun, and change only what follows"
        )
    if progress["samples"]:
        begun = through[-1]
        was, is_now = there[begun]["sequence_length"], config.phases[begun].sequence_length
        if was != is_now:
            raise CheckpointError(
                f"checkpoint {path} stands in the middle of phases.{begun} with sequence_length={was}, this run "
                f"sets phases.{begun}.sequence_length={is_now}; go on with {was}, and change it in a new phase"
            )


def as_written(config: Config) -> dict:
    """The configuration as plain values, as it is written to files."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


def leaves(node: dict, prefix: str = "") -> dict[str, str]:
    """Values by dotted key, without those that are null."""
    found = {}
    for name, value in node.items():
        if isinstance(value, dict):
            found.update(leaves(value, f"{prefix}{name}."))
        elif value is not None:
            found[f"{prefix}{name}"] = str(value)
    return found
