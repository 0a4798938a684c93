"""Checkpoints are whole or invisible, and a damaged one is found before it is used."""

import errno
import json
from pathlib import Path

import pytest
import torch

from parallel import checkpoint
from parallel.checkpoint import CheckpointError
from parallel.start import Sizes, start
from tests.conftest import run_processes
from tests.models import build_model, small_config

pytestmark = pytest.mark.usefixtures("megatron")


def save(folder: Path, step: int, config=None) -> Path:
    model = build_model(config or small_config())
    return checkpoint.save(folder, step, {"model": model.sharded_state_dict()}, {"step": step})


def flip_a_byte(path: Path) -> Path:
    largest = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    return largest


def test_a_saved_model_loads_into_one_with_other_weights(tmp_path):
    path = save(tmp_path, 7)
    model = build_model(small_config())
    expected = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    state = checkpoint.load(path, lambda: {"model": model.sharded_state_dict()})
    model.load_state_dict(state["model"], strict=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert checkpoint.about(path) == {"step": 7}


def test_a_flipped_byte_a_missing_file_and_a_torn_list_are_named(tmp_path):
    flipped = save(tmp_path, 1)
    assert checkpoint.damage(flipped) is None
    assert flip_a_byte(flipped).name in checkpoint.damage(flipped)
    assert checkpoint.is_whole(flipped)  # by names and sizes
    missing = save(tmp_path, 2)
    (missing / "common.pt").unlink()
    assert checkpoint.damage(missing) == "common.pt is missing" and not checkpoint.is_whole(missing)
    torn = save(tmp_path, 3)
    (torn / "files.json").write_text("{")
    assert "files.json cannot be read" in checkpoint.damage(torn) and not checkpoint.is_whole(torn)
    short = save(tmp_path, 4)
    (short / "about.json").write_text("{")
    assert not checkpoint.is_whole(short)


def test_the_newest_intact_checkpoint_is_used_and_partial_ones_are_invisible(tmp_path, caplog):
    older, newer = save(tmp_path, 10), save(tmp_path, 20)
    (tmp_path / "step-00000030.partial").mkdir()
    assert checkpoint.complete(tmp_path) == [newer, older]
    flip_a_byte(newer)
    assert checkpoint.newest_usable(tmp_path) == older
    assert str(newer) in caplog.text and "damaged" in caplog.text


def test_old_checkpoints_and_remains_of_interrupted_saves_are_removed(tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2, 3)]
    (tmp_path / "step-00000004.partial").mkdir()
    checkpoint.remove_old(paths[-1], keep=2)
    assert sorted(tmp_path.iterdir()) == paths[1:]
    checkpoint.remove_old(paths[-1], keep=0)
    assert sorted(tmp_path.iterdir()) == paths[1:]


def test_a_newer_checkpoint_that_was_found_damaged_does_not_count_among_those_that_are_kept(tmp_path):
    paths = [save(tmp_path, step) for step in (10, 20, 40)]
    flip_a_byte(paths[-1])
    saved = save(tmp_path, 30)  # the run has gone on from step 20
    checkpoint.remove_old(saved, keep=1)
    assert checkpoint.newest_usable(tmp_path) == saved and checkpoint.complete(tmp_path) == [paths[-1], saved]
    again = save(tmp_path, 40)
    checkpoint.remove_old(again, keep=1)
    assert checkpoint.newest_usable(tmp_path) == again and checkpoint.complete(tmp_path) == [again]


def newest_with_a_file_that_one_rank_cannot_read(folder: Path) -> tuple[Path, Path]:
    """What this rank finds where rank 1 may not read one of the newest's files, and where it sees none at all."""
    start(Sizes())
    rank, read = torch.distributed.get_rank(), Path.read_text

    def refused(path: Path, *arguments) -> str:
        if rank == 1 and path.parent.name == "step-00000020":
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path, *arguments)

    Path.read_text = refused
    passed_over = checkpoint.newest_usable(folder)
    Path.read_text = read
    if rank == 1:
        checkpoint.complete = lambda folder: []
    return passed_over, checkpoint.newest_usable(folder)


def test_ranks_that_see_different_files_go_on_from_the_same_checkpoint(tmp_path):
    older, newer = save(tmp_path, 10), save(tmp_path, 20)
    assert run_processes(newest_with_a_file_that_one_rank_cannot_read, 2, tmp_path) == [(older, newer)] * 2


def test_a_checkpoint_of_another_shape_is_refused_by_name(tmp_path):
    path = save(tmp_path, 1)
    wider = small_config()
    wider.model.vocabulary = 256
    model = build_model(wider)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        checkpoint.load(path, lambda: {"model": model.sharded_state_dict()})


def test_about_of_something_else_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        checkpoint.about(tmp_path)
    (tmp_path / "about.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(CheckpointError, match="another version"):
        checkpoint.about(tmp_path)


def test_a_save_that_fails_is_an_error_in_a_sentence_and_leaves_older_ones_alone(tmp_path):
    older = save(tmp_path, 1)
    (tmp_path / "step-00000002.partial").write_text("in the way of a folder")
    with pytest.raises(CheckpointError, match="could not be written: .*step-00000002.partial"):
        save(tmp_path, 2)
    assert checkpoint.complete(tmp_path) == [older] and checkpoint.damage(older) is None
