"""The members of a sweep as an array of jobs: how each goes on, and what a refusal leaves; without Slurm."""

import os
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hydra_plugins.hysparse_sweeps import SlurmLauncher
from launch import sweep
from tests.launch.members import composed
from tests.launch.stand_ins import stand_in


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """Where the stand-ins lie and, once there is one, the script of the array."""
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        stand_in(tmp_path / "bin", name)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path / "bin"


def submit(*arguments: str) -> None:
    given = composed(*arguments, "hydra/launcher=slurm", "hydra.launcher.gpus_per_node=1")
    params = OmegaConf.to_container(given[0].hydra.launcher, resolve=True)
    del params["_target_"]
    sweep.run_sweep(*given, SlurmLauncher(**params))


def test_a_member_is_queued_again_as_often_as_it_gets_further(small, slurm, tmp_path):
    submit(*small, "attention=full,hysparse", "run.max_restarts=1")

    def start(restart: int, code: int, task: int = 1) -> str:
        job = {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}
        job |= {"SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": str(restart), "CODE": str(code)}
        done = subprocess.run(["bash", slurm / "submitted.sh"], capture_output=True, text=True, env=os.environ | job)
        assert done.returncode == code and not done.stderr
        return done.stdout

    for code, again in ((0, False), (2, False), (75, True)):
        assert ("scontrol requeue 8" in start(0, code)) == again
    checkpoints = tmp_path / "sweep" / "hysparse" / "checkpoints"
    for restart in (48, 49, 50):
        (checkpoints / f"step-{restart:08d}").mkdir(parents=True)
        assert "scontrol requeue 8" in start(restart, 137)
    assert "scontrol requeue 8" in start(51, 1, task=0)  # the other member counts by itself
    told = start(51, 1)
    assert f"a rank ended with code 1, see {tmp_path}/sweep/slurm/7_1/*.log" in told
    assert "2 starts from" in told and "step-00000050 failed, not queued again; to go on: the same command" in told
    assert "scontrol requeue" not in told
    assert "scontrol requeue 8" in start(0, 1)  # a new job


@pytest.mark.parametrize("seeds", ["choice(3)", "3,4"])  # a single job, and an array
def test_a_sweep_that_slurm_rejects_leaves_no_trace(seeds, small, slurm, tmp_path, capsys):
    accepted = (slurm / "sbatch").read_text()
    rejected = "echo 'sbatch: error: Batch job submission failed: Invalid qos specification' >&2; exit 1"
    folder = tmp_path / "sweep"
    for beforehand in ("nothing", "another sweep"):
        if beforehand == "another sweep":
            submit(*small, "attention=full,hysparse")
        stand_in(slurm, "sbatch", rejected)
        before = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
        with pytest.raises(SystemExit, match="2"):
            submit(*small, f"run.seed={seeds}", "hydra.launcher.qos=silver")
        said = capsys.readouterr().err
        assert "error: Slurm refused the job: Invalid qos specification (asked for hydra.launcher.nodes=1 " in said
        assert " hydra.launcher.qos=silver); " in said
        assert {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")} == before
        assert folder.exists() == (beforehand == "another sweep")
        stand_in(slurm, "sbatch", accepted.removeprefix("#!/bin/bash\n"))
