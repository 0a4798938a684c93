"""A real Slurm on this machine: runs and sweeps survive a bad node, a warning, a kill, and another number of nodes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.forks import LAUNCHED, ROOT
from tests.small_run import TINY, Ranks, losses, records

CLUSTER = Path(__file__).parent / "cluster.sh"
PATH = f"{os.environ['PATH']}:/usr/sbin"
LONG = "phases.pretrain.tokens=51200"  # 200 steps: none is to end before Slurm's commands reach it on a busy machine
# Node n1 has lost its GPU; nvlink answers nothing.
NVIDIA_SMI = """#!/bin/sh
case "$1" in --query-gpu*) [ "$SLURMD_NODENAME" = n1 ] || echo "0, 0" ;; esac
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a minute each where nothing else runs


@pytest.fixture(scope="module")
def slurm():
    """The environment in which Slurm's commands work."""
    if missing := [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(name, path=PATH)]:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install --no-install-recommends slurm-wlm munge")
    folder = tempfile.mkdtemp(prefix="slurm")  # a socket lies in it, whose path must be short
    port = str(26000 + os.getpid() % 1000 * 4)
    log = Path(folder) / "up.log"
    with log.open("w") as output:  # not a pipe, which the daemons would hold open
        up = subprocess.run([CLUSTER, "up", folder, port], stdout=output, stderr=output, timeout=60)
    try:
        if up.returncode:
            pytest.skip("Slurm's daemons do not start here: " + " ".join(log.read_text().split())[-300:])
        clean = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
        yield clean | {"PATH": PATH, "SLURM_CONF": f"{folder}/slurm.conf", "CUDA_VISIBLE_DEVICES": ""}
    finally:
        subprocess.run([CLUSTER, "down", folder], timeout=60)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> list[tuple[int, float]]:
    """The losses of the small run on two ranks that nothing happens to."""
    run = tmp_path_factory.mktemp("undisturbed")
    assert Ranks(corpus, run, LONG, ranks=2).end()[0] == [0, 0]
    return losses(run)


def _output(environment: dict[str, str], *words: str) -> str:
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Running:
    """A job and the folder of its run."""

    def __init__(self, slurm: dict[str, str], run: Path, number: str):
        self.environment, self.run, self.number = slurm, run, number

    def command(self, *words: str) -> str:
        return _output(self.environment, *words)

    def state(self) -> dict[str, str]:
        shown = self.command("scontrol", "--oneliner", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def until(self, condition: Callable[[], bool], seconds: int = 360) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def trains(self, lives: int, step: int) -> Callable[[], bool]:
        """Whether the run has started `lives` times and its present life has reached `step`."""

        def reached() -> bool:
            found = records(self.run)
            return sum(r["kind"] == "start" for r in found) == lives and found[-1]["step"] >= step

        return reached

    def has(self, *states: str) -> Callable[[], bool]:
        return lambda: self.state()["JobState"] in states

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted((self.run / "slurm").glob("*.log")))


class Submitted(Running):
    """The small run as a job with one rank on each of some nodes."""

    def __init__(self, slurm: dict[str, str], corpus: Path, run: Path, nodes: int = 2):
        job = [f"nodes={nodes}", "gpus_per_node=1", "time=00:10:00", "warning=60", "checkpoint.every=15"]
        command = [sys.executable, "-m", "launch.slurm", *TINY, LONG, f"data.path={corpus}", f"run.dir={run}", *job]
        self.said = _output(slurm, *command)
        super().__init__(slurm, run, re.match(r"Job (\d+): ", self.said)[1])


def test_a_job_avoids_a_bad_node_and_survives_a_warning_and_a_kill_with_the_losses_of_an_undisturbed_run(
    slurm, corpus, undisturbed, tmp_path
):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(NVIDIA_SMI)
    (tools / "nvidia-smi").chmod(0o755)
    job = Submitted(slurm | {"PATH": f"{tools}:{PATH}"}, corpus, tmp_path / "run")

    job.until(job.trains(lives=1, step=3))
    assert job.state()["NodeList"] == "n[2-3]" and job.state()["ExcNodeList"] == "n1"
    job.command("scancel", "--signal=USR1", job.number)  # what Slurm itself sends before the time is over

    job.until(job.trains(lives=2, step=20))
    first, second = [r["step"] for r in records(job.run) if r["kind"] == "start"]
    assert first == 0 and second >= 3
    _kill_rank_1(job.run)

    job.until(job.has("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))
    assert job.state()["JobState"] == "COMPLETED", job.logs()
    assert int(job.state()["Restarts"]) >= 3  # bad node, warning, kill
    log = (job.run / "slurm" / "job.log").read_text()
    assert "n1: bad, 0 of 1 GPUs answer" in log and "saved and stopped" in log and "a rank ended with code" in log

    assert losses(job.run) == undisturbed


def test_a_job_that_was_stopped_with_the_line_that_was_printed_goes_on_with_another_number_of_nodes(
    slurm, corpus, undisturbed, tmp_path
):
    job = Submitted(slurm, corpus, tmp_path / "my run")
    job.until(job.trains(lives=1, step=1))
    (stop,) = re.findall(r"^  stop +(.*?)  +\(", job.said, re.MULTILINE)
    job.command("bash", "-c", stop)
    job.until(job.has("FAILED", "COMPLETED", "CANCELLED"))
    assert job.state()["ExitCode"] == "75:0"
    assert "to go on: sbatch" in job.logs()
    assert records(job.run)[-1]["stopped"] == "SIGUSR1" and list((job.run / "checkpoints").iterdir())

    job = Submitted(slurm, corpus, job.run, nodes=1)
    job.until(job.has("COMPLETED", "FAILED", "CANCELLED"))
    assert job.state()["JobState"] == "COMPLETED", job.logs()
    assert [record["ranks"] for record in records(job.run) if record["kind"] == "start"] == [2, 1]
    steps, found = zip(*losses(job.run), strict=True)
    expected_steps, expected = zip(*undisturbed, strict=True)
    assert steps == expected_steps
    # Another sample in a batch changes its loss by a percent; sums in another order do by far less, for a while
    assert found[:60] == pytest.approx(expected[:60], rel=1e-4)


def test_members_of_a_sweep_run_on_two_nodes_each_and_are_queued_again_after_a_warning_and_a_kill(
    slurm, corpus, undisturbed, tmp_path
):
    """Through submitit, as an array; the array's own names of its jobs are NUMBER_0 and NUMBER_1."""
    folder, steps = tmp_path / "sweep", 60
    command = [sys.executable, "train.py", "-m", *TINY, LONG, f"data.path={corpus}", f"hydra.sweep.dir={folder}"]
    command += ["attention=hysparse,full", f"max_steps={steps}", "hydra/launcher=slurm", "hydra.launcher.nodes=2"]
    command += ["hydra.launcher.gpus_per_node=1", "hydra.launcher.timeout_min=10", "hydra.launcher.signal_delay_s=60"]
    said = _output(slurm, *command)
    number = re.search(r"^Job (\d+): 2 members, each on 2 nodes x 1 tasks", said, re.MULTILINE)[1]
    members = [Running(slurm, folder / name, f"{number}_{index}") for index, name in enumerate(("hysparse", "full"))]

    members[0].until(members[0].trains(lives=1, step=3))
    _output(slurm, "scancel", "--signal=USR1", members[0].number)
    assert f"hysparse is queued or running as job {number}_0" in _output(slurm, *command)
    members[1].until(members[1].trains(lives=1, step=0))
    _kill_rank_1(members[1].run)
    for member in members:
        member.until(member.has("COMPLETED", "FAILED", "CANCELLED"))
        assert member.state()["JobState"] == "COMPLETED", member.logs()
        assert records(member.run)[-1]["step"] == steps
        assert [record["ranks"] for record in records(member.run) if record["kind"] == "start"] == [2, 2]
    assert losses(members[0].run) == undisturbed[:steps]
    assert "2 members in" in (said := _output(slurm, *command)) and "2 of them finished" in said and "Job" not in said


def test_a_refusal_by_all_ranks_ends_with_its_own_exit_code(slurm):
    """The first rank explains and ends with 2; the other, which Slurm then kills, must not make a crash of it."""
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    command = [*srun, sys.executable, "train.py", "+experiment=tiny", "nonsense=1"]
    done = subprocess.run(command, cwd=ROOT, env=slurm, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: nonsense is no key of the configuration") == 1


def test_a_sweep_that_slurm_rejects_is_refused_in_its_words(slurm, corpus, tmp_path):
    command = [sys.executable, "train.py", "-m", *TINY, f"data.path={corpus}", f"hydra.sweep.dir={tmp_path}/sweep"]
    command += ["run.seed=1,2", "hydra/launcher=slurm", "hydra.launcher.gpus_per_node=1", "hydra.launcher.account=a"]
    done = subprocess.run(
        [*command, "hydra.launcher.partition=nowhere"], cwd=ROOT, env=slurm, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: Slurm refused the job: invalid partition specified: nowhere" in done.stderr
    assert "hydra.launcher.partition=nowhere hydra.launcher.account=a" in done.stderr
    assert not (tmp_path / "sweep").exists()


def test_what_slurm_rejects_is_said_in_its_words_and_the_corrected_command_is_accepted(slurm, corpus, tmp_path):
    """Without its database of accounts Slurm takes any where a partition does not ask for certain ones."""
    job = ["nodes=2", "gpus_per_node=1", "time=01:00:00"]
    command = [sys.executable, "-m", "launch.slurm", *TINY, f"data.path={corpus}", f"run.dir={tmp_path}/run", *job]
    for wrong, words in (
        (["partition=nowhere"], "invalid partition specified: nowhere; Invalid partition name specified"),
        (["partition=closed", "account=no"], "Invalid account or account/partition combination specified"),
    ):
        done = subprocess.run([*command, *wrong], cwd=ROOT, env=slurm, capture_output=True, text=True)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr == (
            f"error: Slurm refused the job: {words} (asked for nodes=2 time=01:00:00 gpus_per_node=1 "
            f"{' '.join(wrong)} memory=0); partitions are debug, closed (account=mine); "
            "sacctmgr show associations lists your accounts\n"
        )
        assert not (tmp_path / "run").exists()
    number = re.match(r"Job (\d+): ", _output(slurm, *command, "partition=debug", "account=no"))[1]
    _output(slurm, "scancel", number)
    gone = ["squeue", "--noheader", f"--job={number}"]  # else its daemons outlive the cluster
    Running(slurm, tmp_path / "run", number).until(lambda: not _output(slurm, *gone))


def _kill_rank_1(run: Path) -> None:
    next(p for p in psutil.process_iter() if _is_rank(p, 1, run)).send_signal(signal.SIGKILL)


def _is_rank(process: psutil.Process, rank: int, run: Path) -> bool:
    try:
        return f"run.dir={run}" in process.cmdline() and process.environ().get("SLURM_PROCID") == str(rank)
    except psutil.Error:
        return False
