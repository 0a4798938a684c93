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
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException

log = logging.getLogger(__name__)

FILES = "files.json"  # written last: sizes and checksums of all other files
ABOUT = "about.json"  # readable without torch: what the checkpoint is of
FORMAT = 1  # of about.json


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message says why and what to do."""


def save(folder: Path, step: int, state: dict, about: dict) -> Path:
    """Write a checkpoint from all ranks and return its path. `about` must be JSON; `state` as the engine gives it."""
    final, partial = folder / f"step-{step:08d}", folder / f"step-{step:08d}.partial"

    def prepare() -> None:
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write() -> None:
        # Ranks that hold the same weights share the writing of them; this strategy checks that all is written once.
        together = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), together)
        dist_checkpointing.save(state, str(partial), strategy, validate_access_integrity=False)
        if _rank() == 0:
            _write_durably(partial / ABOUT, json.dumps({"format": FORMAT, **about}, indent=2))

    def describe() -> dict:
        names = sorted(path.name for path in partial.iterdir())
        return {name: _describe(partial / name) for name in names[_rank() :: _ranks()]}

    def publish() -> None:
        if _rank() == 0:
            _write_durably(partial / FILES, json.dumps(files))
            if final.exists():  # the same step again, after a newer one was found damaged
                shutil.rmtree(final)
            partial.rename(final)
            _sync_folder(folder)

    _on_all_ranks(prepare, partial)
    _on_all_ranks(write, partial)
    files = {name: file for part in _on_all_ranks(describe, partial) for name, file in part.items()}
    _on_all_ranks(publish, partial)
    return final


def _on_all_ranks(action: Callable[[], object], path: Path) -> list:
    """What each rank's `action` returned. If one failed, all raise CheckpointError instead of waiting for it."""
    try:
        mine = (action(), None)
    except (OSError, RuntimeError, CheckpointException, CheckpointingException) as error:
        mine = (None, str(error).strip().splitlines()[-1])
    everyone: list = [None] * _ranks()
    torch.distributed.all_gather_object(everyone, mine)
    if problem := next((problem for _, problem in everyone if problem), None):
        raise CheckpointError(f"checkpoint {path} could not be written: {problem}; older ones beside it are untouched")
    return [result for result, _ in everyone]


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
        found = json.loads((path / ABOUT).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint: {ABOUT} cannot be read ({error})") from error
    if found.pop("format", None) != FORMAT:
        raise CheckpointError(f"checkpoint {path} was written by another version; {ABOUT} has no format {FORMAT}")
    return found


def complete_for_all(folder: Path) -> list[Path]:
    """The same for all ranks, as the first one sees the folder: a shared file system may show each another state."""
    found = [complete(folder) if _rank() == 0 else None]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def is_whole(path: Path) -> bool:
    """Whether its files are there with their sizes, which takes no time; their contents are `damage`'s matter."""
    try:
        files = json.loads((path / FILES).read_text())
        return all((path / name).stat().st_size == file["bytes"] for name, file in files.items())
    except (OSError, ValueError):
        return False


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, checked by all ranks together; None if all is well."""
    everyone: list = [None] * _ranks()
    torch.distributed.all_gather_object(everyone, _damage_in_share(path))
    return next((found for found in everyone if found), None)


def _damage_in_share(path: Path) -> str | None:
    """What is wrong with this rank's share of the files."""
    name = FILES
    try:
        files = json.loads((path / FILES).read_text())
        for name in sorted(files)[_rank() :: _ranks()]:
            if not (path / name).exists():
                return f"{name} is missing"
            if _describe(path / name) != files[name]:
                return f"{name} differs from what was written"
    except (OSError, ValueError) as error:
        return f"{name} cannot be read ({error})"
    return None


def newest_usable(folder: Path) -> Path | None:
    """The newest complete checkpoint whose files are intact; damaged ones are named in the log and passed over."""
    for path in complete_for_all(folder):
        found = damage(path)
        if found is None:
            return path
        if _rank() == 0:
            log.warning("checkpoint %s is damaged and passed over: %s", path, found)
    return None


def remove_old(saved: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints up to `saved`, and what interrupted saves left; keep=0 deletes no
    whole one. Any that are newer were found damaged: they do not count, and wait until their step is saved again.
    """
    folder = saved.parent
    if _rank() == 0:
        old = [path for path in complete(folder) if path <= saved][keep:] if keep else []
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
