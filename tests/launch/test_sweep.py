"""Sweeps: their members, what is refused before one starts, and how they run side by side on one machine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hydra.errors import HydraException

from data import DataError
from hysparse.config import ConfigError
from launch import local, sweep
from launch.errors import LaunchError
from tests.forks import LAUNCHED, ROOT
from tests.launch.members import composed, members
from tests.small_run import losses, records

VARIANTS = ("full", "hybrid_swa", "hysparse", "hysparse_no_swa", "hysparse_own_kv", "hysparse_shared_swa")


def test_table_4_is_every_variant_with_three_seeds_in_folders_named_after_them():
    found = members("+experiment=tiny_short", "+sweep=table4")
    names = [f"{variant}-seed{seed}" for variant in VARIANTS for seed in (1, 2, 3)]
    assert [member.folder for member in found] == [Path("runs/table4-tiny") / name for name in names]
    assert [member.config.run.seed for member in found] == [1, 2, 3] * 6
    assert [member.config.attention.name for member in found[::3]] == list(VARIANTS)
    assert found[0].values == {"attention": "full", "run.seed": "1"}


def test_what_the_command_line_says_replaces_what_the_sweep_says():
    found = members("+experiment=tiny_short", "+sweep=ratio", "attention.ratio=1,2", "run.seed=7", "max_steps=5")
    assert [(m.name, m.config.attention.ratio, m.config.run.seed) for m in found] == [
        ("ratio1", 1, 7),
        ("ratio2", 2, 7),
    ]
    assert all(member.config.max_steps == 5 and "max_steps=5" in member.overrides for member in found)


def test_members_find_an_experiment_in_a_folder_of_the_users_own(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\ndefaults: [tiny_short]\noptim: {clip: 0.5}\n")
    member, _ = members(f"hydra.searchpath=[file://{tmp_path}]", "+experiment=mine", "run.seed=1,2")
    assert member.config.optim.clip == 0.5 and f"hydra.searchpath=[file://{tmp_path}]" in member.overrides


def test_the_paper_sized_sweeps_go_together_with_the_7b():
    for name, number in (("table4", 6), ("ratio", 5), ("topk", 9)):
        assert len(members("+experiment=dense7b_1to3", f"+sweep={name}", "run.seed=1")) == number


@pytest.mark.parametrize(
    "given, error, sentence",
    [
        (["atention=full,hysparse"], HydraException, "atention"),
        (["+model.depth=3,4"], ConfigError, "depth3: model.depth is no key of the configuration"),
        (["attention.block=16,7"], ConfigError, "block7: attention.tokens=32 is no multiple of attention.block=7"),
        (["run.dir=one", "run.seed=1,2"], ConfigError, "run.dir=one would be the folder of every member"),
        (["resume=auto,never"], ConfigError, "resume cannot be swept over"),
        (["max_steps=5"], ConfigError, "there is nothing to sweep over: give a key several values"),
        (["run.seed=interval(1,5)"], ConfigError, "write the values out, such as run.seed=1,2,3"),
    ],
)
def test_a_sweep_over_what_does_not_exist_is_refused(given, error, sentence, small):
    with pytest.raises(error, match=".*") as caught:
        members(*small, *given)
    assert sentence in str(caught.value) or sentence in str(caught.value.__cause__)


@pytest.mark.parametrize(
    "given, ranks, error, sentence",
    [
        (["run.seed=1,1"], 1, ConfigError, "2 members would share the folder seed1"),
        (
            ["phases.pretrain.tokens=15360,0"],
            1,
            ConfigError,
            "tokens0: phases.pretrain.tokens=0 must be greater than 0",
        ),
        (["run.seed=1,2"], 8, ConfigError, "seed1: phases.pretrain.micro_batch=2 x 8 data-parallel ranks"),
        (["run.seed=1,2"], 8, ConfigError, "hydra.launcher gives a member 8, see its ranks"),
        (["run.seed=1,2", "data.path=nowhere"], 1, DataError, "seed1: corpus nowhere does not exist"),
        (["run.seed=1,2", "resume=never"], 1, LaunchError, "resume=never: a sweep takes its members up again"),
        (["run.seed=1,2"], 0, LaunchError, "hydra.launcher gives each member 0 processes"),
        (["run.seed=1,2", "dry_run=2"], 1, LaunchError, "dry_run=N is for a single run"),
        (
            ["phases.pretrain.micro_batch=2,512", "phases.pretrain.global_batch=512", "logging.validate_every=10"],
            1,
            DataError,
            "micro_batch512: the held-out data have",
        ),
    ],
)
def test_a_member_that_would_be_refused_stops_the_sweep_before_anything_starts(given, ranks, error, sentence, small):
    with pytest.raises(error) as caught:
        sweep.check_members(members(*small, *given), ranks)
    assert sentence in str(caught.value)


def test_a_member_whose_folder_holds_another_model_stops_the_sweep_before_anything_starts(small, tmp_path):
    given = members(*small, "attention=full,hysparse")
    checkpoint = given[1].folder / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    about = {"format": 1, "model": asdict(given[1].config.model) | {"layers": 9}}
    (checkpoint / "files.json").write_text("{}")
    (checkpoint / "about.json").write_text(json.dumps(about))
    with pytest.raises(LaunchError) as caught:
        sweep.check_members(given, ranks=1)
    assert str(caught.value) == (
        f"hysparse: checkpoint {checkpoint} is of another architecture: model.layers is 9 there and 3 here; choose "
        "another run.dir, or use the checkpoint's value; members get their run.dir from "
        f"hydra.sweep.dir={tmp_path}/sweep"
    )


def test_from_the_command_line_an_unknown_key_is_one_sentence_and_nothing_is_written(small, tmp_path):
    command = [sys.executable, "train.py", "-m", *small, "attention=full,hysparse", "attention.windo=16,32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"RANK": "0"})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: attention.windo is no key of the configuration; did you mean "
        "attention.window or attention.window_kv or attention.sinks?\n"
    )
    assert not (tmp_path / "sweep").exists()


def test_finished_members_are_left_out_and_the_others_go_on(small, tmp_path, capsys):
    given = composed(*small, "run.seed=1,2,3", "logging.validate_every=0")
    for name, step, stopped in (("seed1", 60, None), ("seed2", 33, "SIGUSR1")):
        folder = tmp_path / "sweep" / name
        folder.mkdir(parents=True)
        (folder / "ledger.jsonl").write_text(json.dumps({"kind": "end", "step": step, "stopped": stopped}) + "\n")
    started = []
    launcher = SimpleNamespace(ranks=1, launch=lambda members, _: started.extend(m.name for m in members) or 0)
    sweep.run_sweep(*given, launcher)
    assert started == ["seed2", "seed3"]
    assert f"3 members in {tmp_path}/sweep, 1 of them finished" in capsys.readouterr().out
    assert json.loads((tmp_path / "sweep" / "members.json").read_text())["seed3"] == {"run.seed": "3"}


# On one machine, with a stand-in for train.py that notes where it runs

STAND_IN = """
import json, os, pathlib, signal, sys, time
folder = next(argument for argument in sys.argv if argument.startswith("run.dir=")).removeprefix("run.dir=")
name, rank = pathlib.Path(folder).name, os.environ["RANK"]
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
began = time.time()
note = {key: os.environ[key] for key in ("CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "LOCAL_RANK")}
pathlib.Path(folder, f"began{rank}").write_text("")
if name == "seed2" and rank == "1" or "seed2" in name and os.environ["WORLD_SIZE"] == "1":
    print("error: no such luck", file=sys.stderr)
    sys.exit(2)
time.sleep(float(os.environ.get("SLEEP", "0.3")))
pathlib.Path(folder, f"note{rank}").write_text(json.dumps(note | {"began": began, "ended": time.time()}))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "sweep").mkdir()
    monkeypatch.setattr(local, "TRAIN", tmp_path / "stand_in.py")
    monkeypatch.setattr(local, "PATIENCE", 0.3)
    return tmp_path / "sweep"


def notes(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/note*"))]


def test_members_side_by_side_have_gpus_of_their_own(stand_in, small, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert local.run_members(members(*small, "run.seed=1,3,4"), stand_in, ranks=2, side_by_side="auto") == 0
    found = notes(stand_in)
    assert len(found) == 6 and {note["WORLD_SIZE"] for note in found} == {"2"}
    assert [note["LOCAL_RANK"] for note in found] == ["0", "1"] * 3
    assert {note["CUDA_VISIBLE_DEVICES"] for note in found} == {"4,5", "6,7"}
    for one, other in ((a, b) for a in found[::2] for b in found[::2] if a is not b):
        together = one["began"] < other["ended"] and other["began"] < one["ended"]
        assert not together or one["CUDA_VISIBLE_DEVICES"] != other["CUDA_VISIBLE_DEVICES"]


def test_a_member_that_fails_does_not_stop_the_others(stand_in, small, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.run_members(members(*small, "run.seed=1,2,3"), stand_in, ranks=1, side_by_side=1) == 1
    told = capsys.readouterr().out
    assert f"[2/3] seed2: failed with code 2, see {stand_in}/seed2/train.log; error: no such luck" in told
    assert "1 failed; the same command takes them up again: seed2" in told and "[3/3] seed3: finished" in told
    (first, second) = notes(stand_in)
    assert first["ended"] <= second["began"]  # one after another


def test_ranks_that_wait_for_one_that_died_are_ended(stand_in, small, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("SLEEP", "60")
    began = time.monotonic()
    assert local.run_members(members(*small, "run.seed=2,2"), stand_in, ranks=2, side_by_side=2) == 1
    assert time.monotonic() - began < 20


def test_a_signal_reaches_the_members_at_work_and_no_other_starts(stand_in, small, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("SLEEP", "60")

    def ask() -> None:
        while not (stand_in / "seed1" / "began0").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=ask).start()
    assert local.run_members(members(*small, "run.seed=1,3"), stand_in, ranks=1, side_by_side=1) == 75
    told = capsys.readouterr().out
    assert "seed1: saved and stopped at step 0 of 60" in told and "the same command goes on, exit code 75" in told
    assert not (stand_in / "seed3").exists()


def test_a_sweep_that_is_at_work_is_not_started_twice(stand_in):
    with local._only_one(stand_in) as lock:
        member = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
        with pytest.raises(LaunchError, match="is at work already"):
            local.run_members([], stand_in, ranks=1, side_by_side=1)
    with pytest.raises(LaunchError, match="is at work already"):  # a member lives that lost its sweep
        local.run_members([], stand_in, ranks=1, side_by_side=1)
    member.kill()
    member.wait()
    assert local.run_members([], stand_in, ranks=1, side_by_side=1) == 0


@pytest.mark.parametrize(
    "ranks, side_by_side, sentence",
    [
        (2, 2, "side_by_side=2 x hydra.launcher.ranks=2 need more than the 3 GPUs of this machine"),
        (4, "auto", "need more than the 3 GPUs"),
        (1, "many", "hydra.launcher.side_by_side=many must be a whole number"),
    ],
)
def test_more_than_the_machine_has_is_refused(ranks, side_by_side, sentence, stand_in, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(LaunchError) as caught:
        local.run_members([], stand_in, ranks, side_by_side)
    assert sentence in str(caught.value)


@pytest.mark.slow
def test_a_member_that_was_killed_is_taken_up_alone_by_the_same_command(small, tmp_path):
    folder = tmp_path / "sweep"
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", "-m", *small, "attention=hybrid_swa,hysparse", "checkpoint.every=10"]
    command += ["hydra.launcher.side_by_side=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    victim = folder / "hysparse"
    while not any(record["kind"] == "step" and record["step"] >= 12 for record in records(victim)):
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    for process in psutil.Process(running.pid).children():
        if f"run.dir={victim}" in process.cmdline():
            process.kill()
    told, _ = running.communicate(timeout=120)
    assert running.returncode == 1
    assert f"hysparse: failed with code -9, see {victim}/train.log" in told and "hybrid_swa: finished, 60 steps" in told

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 members" in done.stdout and "1 of them finished" in done.stdout
    assert "[1/1] hysparse: finished, 60 steps" in done.stdout
    assert [r["step"] for r in records(victim) if r["kind"] == "start"] in ([0, 10], [0, 20], [0, 30], [0, 40], [0, 50])
    assert [step for step, _ in losses(victim)] == list(range(1, 61))
    assert (folder / "loss_tokens.png").stat().st_size > 10_000  # the report was written without being asked for
