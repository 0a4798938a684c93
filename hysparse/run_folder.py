"""What a run keeps on disk beside its ledger: the resolved configuration, where it came from, and its checkpoints."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import yaml
from omegaconf import OmegaConf

from hysparse.config import Config, ConfigError
from parallel import checkpoint
from parallel.checkpoint import CheckpointError
from parallel.ranks import automatic_restarts, rank

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
        self.checkpoints = self.path / "checkpoints"
        self.resolved = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
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
        """What `resume` asks for. Called by all ranks; raises CheckpointError."""
        resume = self.config.resume
        own = checkpoint.complete_for_all(self.checkpoints)
        if resume == "never":
            if own:
                raise CheckpointError(
                    f"resume=never, but {own[0]} exists and would be overwritten; choose another run.dir, "
                    f"delete {self.checkpoints}, or use resume=auto"
                )
            return None
        path = Path(resume)
        if resume == "auto" or (own and path.resolve() not in [folder.resolve() for folder in own]):
            # With a path from elsewhere, this is a restart of the run that began there.
            path = checkpoint.newest_usable(self.checkpoints)
            if path is None and own:
                raise CheckpointError(
                    f"all checkpoints in {self.checkpoints} are damaged; give another with resume=PATH, or delete them"
                )
            return path
        if own and path.resolve() != own[0].resolve():
            raise CheckpointError(
                f"resume={resume} is older than {own[0]} in the same run, whose steps would be taken again; give "
                "another run.dir=FOLDER to branch off, or delete the newer checkpoints to go back"
            )
        if (path / "checkpoints").is_dir():  # a run's folder: its newest one
            path = checkpoint.newest_usable(path / "checkpoints") or path
        if not path.is_dir():
            raise CheckpointError(f"resume={resume} is no checkpoint; use resume=auto, resume=never or a folder step-…")
        checkpoint.about(path)
        if found := checkpoint.damage(path):
            raise CheckpointError(f"checkpoint {path} is damaged: {found}; choose an older one beside it")
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
        """Raise CheckpointError where the checkpoint is of another architecture, other phases or other data.

        What passes becomes the configuration that the folder states; one that was refused leaves no trace.
        """
        for section in ("model", "attention"):
            there, here = leaves(about[section]), leaves(self.resolved[section])
            for key in sorted((there.keys() | here.keys()) - FREE):
                if not _goes_on(key, there.get(key), here.get(key)):
                    raise CheckpointError(
                        f"checkpoint {path} is of another architecture: {section}.{key} is {there.get(key)} there and "
                        f"{here.get(key)} here; choose another run.dir, or use the checkpoint's value"
                    )
        self._check_phases(path, about["phases"], about["progress"])
        if data != about["data"] and not self.config.data.allow_change:
            raise CheckpointError(
                f"checkpoint {path} saw other data (corpus, blend or run.seed differ); set data.allow_change=true to "
                "go on with this one, counting samples as before"
            )
        if rank() == 0:
            self._save_configuration()

    def _check_phases(self, path: Path, there: dict[str, dict], progress: dict) -> None:
        then, now = list(there), list(self.config.phases)
        through = then[: progress["phase"] + (progress["samples"] > 0)]
        if now[: len(through)] != through:
            raise CheckpointError(
                f"checkpoint {path} was reached through the phases {', '.join(through)}, "
                f"this run has {', '.join(now)}; keep those that are done or begun, and change only what follows"
            )
        if progress["samples"]:
            begun = through[-1]
            was, is_now = there[begun]["sequence_length"], self.config.phases[begun].sequence_length
            if was != is_now:
                raise CheckpointError(
                    f"checkpoint {path} stands in the middle of phases.{begun} with sequence_length={was}, this run "
                    f"sets phases.{begun}.sequence_length={is_now}; go on with {was}, and change it in a new phase"
                )

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


def _goes_on(key: str, there: str | None, here: str | None) -> bool:
    """Whether a run can go on with this value of a key that is not free."""
    if key == "moe.bias_update_rate" and there and here:  # any other, but the bias itself neither comes nor goes
        return bool(float(there)) == bool(float(here))
    return there == here


def leaves(node: dict, prefix: str = "") -> dict[str, str]:
    """Values by dotted key, without those that are null."""
    found = {}
    for name, value in node.items():
        if isinstance(value, dict):
            found.update(leaves(value, f"{prefix}{name}."))
        elif value is not None:
            found[f"{prefix}{name}"] = str(value)
    return found
