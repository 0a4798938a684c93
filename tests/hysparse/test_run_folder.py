"""Which checkpoint a start goes on from, and which ones it refuses."""

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest

from hysparse.config import MoEConfig, PhaseConfig
from hysparse.run_folder import RunFolder, starting_point
from hysparse.schedule import Progress
from parallel import checkpoint
from parallel.checkpoint import CheckpointError
from tests.models import small_config

pytestmark = pytest.mark.usefixtures("megatron")


def folder(path: Path, resume: str = "auto", **phases: PhaseConfig) -> RunFolder:
    config = small_config()
    config.run.dir, config.resume = str(path), resume
    config.phases = phases or config.phases
    return RunFolder(config, {})


def fake_checkpoint(run: Path, step: int) -> Path:
    """Whole as far as anyone looks before loading: its list of files and its description."""
    path = run / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "files.json").write_text("{}")
    (path / "about.json").write_text(f'{{"format": {checkpoint.FORMAT}}}')
    return path


def test_auto_goes_on_from_the_newest_and_starts_where_there_is_none(tmp_path):
    assert folder(tmp_path / "new").checkpoint_to_resume() is None
    fake_checkpoint(tmp_path, 5)
    newest = fake_checkpoint(tmp_path, 10)
    assert folder(tmp_path).checkpoint_to_resume() == newest


def test_a_run_begun_from_elsewhere_goes_on_from_its_own_checkpoints_when_restarted(tmp_path):
    elsewhere = fake_checkpoint(tmp_path / "other", 7)
    assert folder(tmp_path / "run", str(elsewhere)).checkpoint_to_resume() == elsewhere
    own = fake_checkpoint(tmp_path / "run", 9)
    assert folder(tmp_path / "run", str(elsewhere)).checkpoint_to_resume() == own


def test_a_run_can_be_named_instead_of_its_newest_checkpoint(tmp_path):
    fake_checkpoint(tmp_path / "other", 7)
    newest = fake_checkpoint(tmp_path / "other", 8)
    assert folder(tmp_path / "run", str(tmp_path / "other")).checkpoint_to_resume() == newest


def test_going_back_in_the_same_run_is_refused_since_newer_steps_would_be_mixed_with_older(tmp_path):
    older, newest = fake_checkpoint(tmp_path, 5), fake_checkpoint(tmp_path, 10)
    assert folder(tmp_path, str(newest)).checkpoint_to_resume() == newest
    with pytest.raises(CheckpointError, match="older than .*step-00000010.*another run.dir"):
        folder(tmp_path, str(older)).checkpoint_to_resume()


def about(run: RunFolder, **progress) -> dict:
    """What the trainer saves, of the same model and data, at another position."""
    there = {"phase": 0, "samples": 0, "step": 0, "tokens": 0} | progress
    resolved = run.resolved
    return {
        "model": resolved["model"],
        "attention": resolved["attention"],
        "phases": {"first": {"sequence_length": 64}, "second": {"sequence_length": 128}},
        "progress": there,
        "data": "same",
    }


def test_before_a_run_starts_a_torn_checkpoint_is_passed_over_as_the_run_will_do(tmp_path):
    run = folder(tmp_path)
    assert starting_point(run.config, "same") == Progress()
    described = about(run, step=7) | {"format": checkpoint.FORMAT, "phases": dict.fromkeys(run.config.phases)}
    (fake_checkpoint(tmp_path, 7) / "about.json").write_text(json.dumps(described))
    torn = fake_checkpoint(tmp_path, 9)
    (torn / "files.json").write_text('{"about.json": {"bytes": 100}}')
    (torn / "about.json").write_text('{"format": 1, "mod')
    assert starting_point(run.config, "same") == Progress(step=7)
    with pytest.raises(CheckpointError, match="step-00000007 saw other data"):
        starting_point(run.config, "another")


def phase(length: int) -> PhaseConfig:
    return PhaseConfig(tokens=4096, sequence_length=length, global_batch=4, learning_rate=1e-3)


def test_a_phase_that_has_begun_keeps_its_sequence_length_and_later_ones_are_free(tmp_path):
    same = folder(tmp_path, first=phase(64), second=phase(256))
    same.check_same(tmp_path, about(same, samples=8), "same")
    other = folder(tmp_path, first=phase(32), second=phase(128))
    with pytest.raises(CheckpointError, match="sequence_length=64.*phases.first.sequence_length=32"):
        other.check_same(tmp_path, about(other, samples=8), "same")


def test_phases_may_be_added_after_those_that_are_done_but_not_exchanged(tmp_path):
    longer = folder(tmp_path, first=phase(64), second=phase(128), third=phase(256))
    longer.check_same(tmp_path, about(longer, phase=2), "same")
    exchanged = folder(tmp_path, other=phase(64), second=phase(128))
    with pytest.raises(CheckpointError, match="reached through the phases first, second"):
        exchanged.check_same(tmp_path, about(exchanged, phase=1, samples=4), "same")
    instead = folder(tmp_path, first=phase(64), other=phase(32))
    instead.check_same(tmp_path, about(instead, phase=1), "same")  # the second has not begun
    with pytest.raises(CheckpointError, match="through the phases first, second, this run has first, other"):
        instead.check_same(tmp_path, about(instead, phase=1, samples=4), "same")


def test_the_rate_of_the_expert_bias_may_change_but_a_bias_neither_comes_nor_goes(tmp_path):
    run = folder(tmp_path)
    for then, now, fits in ((1e-3, 1e-4, True), (1e-3, 0.0, False), (0.0, 1e-3, False)):
        there = about(run)
        there["model"] = there["model"] | {"moe": asdict(MoEConfig(bias_update_rate=then))}
        run.config.model.moe = MoEConfig(bias_update_rate=now)
        with nullcontext() if fits else pytest.raises(CheckpointError, match="model.moe.bias_update_rate is"):
            run.check_same(tmp_path, there, "same")


def test_automatic_restarts_from_one_checkpoint_are_capped_until_a_person_starts_the_run(tmp_path, monkeypatch):
    run = folder(tmp_path)
    run.config.run.max_restarts = 2
    run.count_restart(None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    older, newer = fake_checkpoint(tmp_path, 5), fake_checkpoint(tmp_path, 10)
    for path in (None, older, older, older, newer, newer, newer):  # a newer one begins a new count
        run.count_restart(path)
    with pytest.raises(CheckpointError, match="restarted 2 times from .*step-00000010 without a newer checkpoint"):
        run.count_restart(newer)
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    run.count_restart(newer)
