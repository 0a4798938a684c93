"""Checkpoints that are complete or invisible, verified before they are used, and independent of the layout.

A run's checkpoints lie side by side as `step-00000100/`. One is written as `step-00000100.partial`, gets a list of its
files with sizes and checksums, and is then renamed: whatever has the final name is whole. Tensors go through Megatron's
distributed checkpointing, under names and shapes of the whole model, so that any layout can load them.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

log = logging.getLogger(__name__)

FILES = "files.json"  # written last: sizes and checksums of all other files
ABOUT = "about.json"  # readable without torch: what the checkpoint is of


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message says why and what to do."""


def save(folder: Path, step: int, state: dict, about: dict) -> Path:
    """Write a checkpoint from all ranks and return its path. `about` must be JSON; `state` as the engine gives it."""
    final, partial = folder / f"step-{step:08d}", folder / f"step-{step:08d}.partial"
    if _rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(partial))
    if _rank() == 0:
        _write_durably(partial / ABOUT, json.dumps(about, indent=2))
    torch.distributed.barrier()

    names = sorted(path.name for path in partial.iterdir())
    mine = {name: _describe(partial / name) for name in names[_rank() :: _ranks()]}
    everyone: list = [None] * _ranks()
    torch.distributed.all_gather_object(everyone, mine)
    if _rank() == 0:
        _write_durably(partial / FILES, json.dumps({name: file for part in everyone for name, file in part.items()}))
        if final.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(final)
        partial.rename(final)
        _sync_folder(folder)
    torch.distributed.barrier()
    return final


def load(path: Path, make_state: Callable[[], dict]) -> dict:
    """Read a checkpoint that was verified into `make_state()`, a sharded state of the layout at hand."""
    try:
        return dist_checkpointing.load(make_state(), str(path))
    except (CheckpointingException, CheckpointException) as error:  # the latter is a BaseException
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"checkpoint {path} does not fit this model: {reason}") from error


def complete(folder: Path) -> list[Path]:
    """Checkpoints with their final name, newest first."""
    return sorted((path for path in folder.glob("step-????????") if path.is_dir()), reverse=True)


def about(path: Path) -> dict:
    """What was given to `save` as `about`."""
    try:
        return json.loads((path / ABOUT).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint: {ABOUT} cannot be read ({error})") from error


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, checked by all ranks together; None if all is well."""
    try:
        files = json.loads((path / FILES).read_text())
    except (OSError, ValueError) as error:
        return f"{FILES} cannot be read ({error})"
    wrong = None
    for name in sorted(files)[_rank() :: _ranks()]:
        if not (path / name).exists():
            wrong = f"{name} is missing"
        elif _describe(path / name) != files[name]:
            wrong = f"{name} differs from what was written"
    everyone: list = [None] * _ranks()
    torch.distributed.all_gather_object(everyone, wrong)
    return next((found for found in everyone if found), None)


def newest_usable(folder: Path) -> Path | None:
    """The newest complete checkpoint whose files are intact; damaged ones are named in the log and passed over."""
    for path in complete(folder):
        found = damage(path)
        if found is None:
            return path
        if _rank() == 0:
            log.warning("checkpoint %s is damaged and passed over: %s", path, found)
    return None


def remove_old(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what interrupted saves left; keep=0 deletes no whole one."""
    if _rank() == 0:
        old = complete(folder)[keep:] if keep else []
        for path in [*old, *folder.glob("step-*.partial")]:
            shutil.rmtree(path, ignore_errors=True)


def _describe(path: Path) -> dict:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _rank() -> int:
    return torch.distributed.get_rank()


def _ranks() -> int:
    return torch.distributed.get_world_size()
