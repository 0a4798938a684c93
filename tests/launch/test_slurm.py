"""What `launch.slurm` refuses before anything is queued, and the script that it writes otherwise; without Slurm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hysparse.config import ConfigError
from launch import health, slurm
from launch.slurm import LaunchError
from tests.launch.stand_ins import stand_in
from tests.small_run import TINY, Ranks

JOB = ["nodes=2", "gpus_per_node=2", "time=01:00:00"]


@pytest.fixture
def run(corpus, tmp_path) -> list[str]:
    return [*TINY, f"data.path={corpus}", f"run.dir={tmp_path}/run", "phases.pretrain.micro_batch=1"]


@pytest.fixture
def submitted(tmp_path, monkeypatch) -> Path:
    """What was given to sbatch, a stand-in."""
    (tmp_path / "bin").mkdir()
    stand_in(tmp_path / "bin", "sbatch")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path / "bin" / "submitted.sh"


@pytest.mark.parametrize(
    "given, sentence",
    [
        (["nodes=0", "time=01:00:00"], "nodes=0 must be a whole number of at least 1"),
        (["nodes=two", "time=01:00:00"], "nodes=two must be a whole number of at least 1"),
        (["time=01:00:00"], "nodes is missing: give it, such as nodes=2"),
        (["nodes=2"], "time is missing: give it, such as time=24:00:00"),
        (["node=2", "time=01:00:00"], "node=2 is no key of the job; did you mean nodes=2?"),
        (["nodes=2", "time"], "time is no key of the job; did you mean time=VALUE?"),
        (["nodes=2", "time=24"], "time=24 is no limit: write HH:MM:SS or D-HH:MM:SS"),
        (["nodes=2", "time=1.5"], "time=1.5 is no limit"),
        (["nodes=2", "time=tomorrow"], "time=tomorrow is no limit"),
        (
            ["nodes=2", "time=00:05:00"],
            "time=00:05:00 leaves nothing to train in: ranks save warning=300 s before the end",
        ),
        (["nodes=2", "time=01:00:00", "partition="], "partition= is nothing that sbatch could take as --partition"),
        (["nodes=2", "time=01:00:00", "dry=1"], "dry=1 must be dry=true or dry=false"),
        (["nodes=2", "time=01:00:00", "account=a b"], "account=a b is nothing that sbatch could take as --account"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(given, sentence, run):
    with pytest.raises(LaunchError) as caught:
        slurm.main([*run, *given])
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["nodes=3"], "nodes=3 x gpus_per_node=2 do not suit the plan: with this configuration use nodes=1 or 2; "),
        (
            ["parallel.tensor=2", "model.vocabulary=258", "nodes=1", "gpus_per_node=1"],
            "with this configuration use nodes=2 or 4 or 8; parallel.tensor=2",
        ),
        (["nodes=2", "gpus_per_node=8"], "with this configuration use nodes=1 gpus_per_node=1 or 2 or 4; "),
        (
            ["nodes=3", "gpus_per_node=1", "parallel.pipeline=auto", "parallel.virtual=auto"],
            "nodes=3 x gpus_per_node=1 do not suit the plan: with this configuration use nodes=1 or 2 or 4 or 8; ",
        ),  # 8 as two stages of four
        (
            ["parallel.pipeline=auto", "parallel.memory=0.001"],
            "do not suit the plan: parallel.pipeline=auto: nothing ",
        ),
        (["plan=true"], "plan=true trains nothing"),
        (["resume=never"], "resume=never: the job starts itself again and must go on"),
        (["resume=nowhere"], "resume=nowhere is no checkpoint; use resume=auto"),
    ],
)
def test_more_nodes_than_the_plan_can_use_are_refused_with_numbers_that_work(overrides, sentence, run):
    with pytest.raises(LaunchError) as caught:
        slurm.main([*run, *JOB, *overrides])
    assert sentence in str(caught.value) and " or start " not in str(caught.value)  # numbers of processes


def test_a_run_without_a_token_budget_or_with_a_wrong_key_is_refused(run):
    with pytest.raises(ConfigError, match="phases.pretrain.tokens=0 must be greater than 0"):
        slurm.main([*run, *JOB, "phases.pretrain.tokens=0"])
    with pytest.raises(ConfigError, match="modle is no key of the configuration"):
        slurm.main([*run, *JOB, "+modle=2"])


def test_deepspeed_together_with_tensor_parallelism_is_refused(run):
    with pytest.raises(ConfigError, match="parallel.tensor=2: engine=deepspeed has data parallelism and ZeRO only"):
        slurm.main([*run, *JOB, "engine=deepspeed", "parallel.tensor=2"])
    with pytest.raises(ConfigError, match="deepspeed.zero=2 means nothing to engine=megatron"):
        slurm.main([*run, *JOB, "deepspeed.zero=2", "parallel.tensor=2"])


def test_a_sweep_is_not_taken_for_a_single_run(run):
    with pytest.raises(
        LaunchError, match=r"\+sweep=ratio is more than one run: python train.py -m … hydra/launcher=slurm"
    ):
        slurm.main([*run, *JOB, "+sweep=ratio"])


def test_missing_shards_are_refused(run, tmp_path):
    with pytest.raises(slurm.DataError, match=str(tmp_path / "nothing")):
        slurm.main([*run, *JOB, f"data.path={tmp_path}/nothing"])


def test_held_out_data_too_few_for_that_many_ranks_are_refused(run):
    validated = [*run, *JOB, "logging.validate_every=10", "phases.pretrain.global_batch=256"]
    slurm.main([*validated, "phases.pretrain.micro_batch=32", "phases.pretrain.tokens=65536", "dry=true"])
    with pytest.raises(slurm.DataError, match="evaluation on 8 ranks with phases.pretrain.micro_batch=32 needs 256; "):
        slurm.main([*validated, "phases.pretrain.micro_batch=32", "phases.pretrain.tokens=65536", "nodes=4"])


@pytest.fixture(scope="module")
def begun(corpus, tmp_path_factory) -> list[str]:
    """A run that has taken two steps."""
    folder = tmp_path_factory.mktemp("runs") / "begun"
    assert Ranks(corpus, folder, "max_steps=2").end()[0] == [0]
    return [*TINY, f"data.path={corpus}", f"run.dir={folder}"]


def contents(run: list[str]) -> dict[Path, bytes]:
    folder = Path(run[-1].removeprefix("run.dir="))
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CHANGES = {
    "model.hidden=64": "is of another architecture: model.hidden is 32 there and 64 here; choose another run.dir, or ",
    "attention=full": "is of another architecture: attention.ratio is 2 there and 0 here; choose another run.dir, or ",
    "run.seed=5": "saw other data (corpus, blend or run.seed differ); set data.allow_change=true",
    "phases.pretrain.sequence_length=128": "stands in the middle of phases.pretrain with sequence_length=64, this run ",
    "max_steps=2": "all 2 steps are done; give a larger max_steps, or another run.dir=FOLDER",
}


@pytest.mark.parametrize("change, sentence", CHANGES.items())
def test_a_run_that_cannot_go_on_from_what_is_in_its_folder_is_refused(change, sentence, begun, submitted):
    before = contents(begun)
    with pytest.raises(LaunchError) as caught:
        slurm.main([*begun, *JOB, "phases.pretrain.micro_batch=1", change])
    assert sentence in str(caught.value)
    assert contents(begun) == before and not submitted.exists()


def test_the_refusal_before_the_job_is_that_of_the_job(begun, corpus):
    with pytest.raises(LaunchError) as caught:
        slurm.main([*begun, *JOB, "phases.pretrain.micro_batch=1", "model.hidden=64"])
    codes, _, errors = Ranks(corpus, Path(begun[-1].removeprefix("run.dir=")), "model.hidden=64").end()
    assert codes == [2] and errors.splitlines()[-1] == f"error: {caught.value}"


def test_what_may_change_in_a_run_is_submitted(begun, submitted):
    before = contents(begun)
    free = ["nodes=1", "phases.pretrain.tokens=30720", "optim.clip=0.5", "logging.every=5", "parallel.pipeline=auto"]
    slurm.main([*begun, *JOB, *free, "model.init_std=0.01", "model.moe.z_loss=0.001"])
    assert submitted.exists()
    slurm_folder = Path(begun[-1].removeprefix("run.dir=")) / "slurm"
    assert {path: text for path, text in contents(begun).items() if slurm_folder not in path.parents} == before


def test_without_sbatch_the_refusal_says_where_to_go(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="sbatch is not on this machine.*dry=true"):
        slurm.main([*run, *JOB])
    assert not (tmp_path / "run").exists()


def test_a_mistake_on_the_command_line_ends_with_one_sentence(run):
    command = [sys.executable, "-m", "launch.slurm", *run, "nodes=1", "time=01:00:00", "attention=sparse"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=slurm.ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: attention=sparse does not exist; did you mean attention=hysparse" in done.stderr


def test_dry_shows_the_script_that_would_be_submitted_and_writes_nothing(run, submitted, capsys, tmp_path):
    arguments = [*run, *JOB, "partition=gpu", "account=project-1", "warning=120"]
    slurm.main([*arguments, "dry=true"])
    shown = capsys.readouterr().out
    assert not (tmp_path / "run").exists() and not submitted.exists()
    slurm.main(arguments)
    assert submitted.read_text() == shown == (tmp_path / "run" / "slurm" / "job.sh").read_text()
    assert (tmp_path / "run" / "config.yaml").exists()
    told = capsys.readouterr().out
    assert told.startswith("Job 7: tiny-hysparse on 2 nodes x 2 GPUs, 01:00:00 at a time\n")
    assert "15,360 tokens in 60 steps" in told and "scancel --signal=USR1 7" in told


def test_a_run_that_is_to_end_early_says_where(run, submitted, capsys):
    slurm.main([*run, *JOB, "max_steps=7"])
    assert "until     1,792 tokens in 7 steps" in capsys.readouterr().out


REFUSED = "echo 'sbatch: error: Batch job submission failed: {}' >&2; exit 1"  # Slurm's words, from slurm_errno.c
PARTITIONS = """
case "$*" in *"show partition"*)
    echo "PartitionName=long AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL"
    echo "PartitionName=gpu AllowGroups=ALL AllowAccounts=vision,speech AllowQos=ALL"
    echo "PartitionName=old AllowGroups=ALL DenyAccounts=speech AllowQos=ALL"
esac
"""


@pytest.mark.parametrize(
    "key, words",
    [
        ("account=nobody", "Invalid account or account/partition combination specified"),
        ("partition=nowhere", "Invalid partition name specified"),
        ("qos=silver", "Invalid qos specification"),
    ],
)
def test_what_slurm_rejects_is_said_with_what_there_is_instead(key, words, run, submitted, tmp_path):
    stand_in(submitted.parent, "sbatch", REFUSED.format(words))
    stand_in(submitted.parent, "scontrol", PARTITIONS)
    stand_in(submitted.parent, "sacctmgr", "echo speech; echo speech; echo students")
    with pytest.raises(LaunchError) as caught:
        slurm.main([*run, *JOB, key])
    assert str(caught.value) == (
        f"Slurm refused the job: {words} (asked for nodes=2 time=01:00:00 gpus_per_node=2 {key} memory=0); "
        "partitions are long, gpu (account=vision or speech), old; your accounts are speech, students"
    )
    assert not (tmp_path / "run").exists()


def test_a_rejected_job_leaves_the_run_that_is_in_its_folder_as_it_was(run, submitted, tmp_path):
    slurm.main([*run, *JOB])
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    stand_in(submitted.parent, "sbatch", REFUSED.format("Invalid partition name specified"))
    with pytest.raises(LaunchError, match="partition=nowhere"):
        slurm.main([*run, *JOB, "partition=nowhere", "optim.clip=0.5"])
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_folder_that_cannot_be_written_is_refused(run, submitted, tmp_path):
    (tmp_path / "run").write_text("a file in its place")
    with pytest.raises(LaunchError, match=f"run.dir={tmp_path}/run cannot be written .*; give another folder"):
        slurm.main([*run, *JOB])
    assert not submitted.exists()


def test_a_second_job_in_the_same_folder_waits_until_the_first_has_left_the_queue(run, submitted):
    queue = submitted.parent / "queue"
    queue.write_text("7 debug tiny R 0:01\n")
    stand_in(submitted.parent, "squeue", f'[ "$2" = --job=7 ] && cat {queue}')
    slurm.main([*run, *JOB])
    with pytest.raises(LaunchError, match="job 7 of run.dir=.* is queued or running.*scancel 7 first, or give another"):
        slurm.main([*run, *JOB])
    queue.write_text("")
    slurm.main([*run, *JOB])


def test_the_script_is_bash_and_hands_the_overrides_over_unchanged(run, capsys):
    name = 'run.name="it\'s $HOME"'
    slurm.main([*run, *JOB, name, "dry=true", "exclude=n[1-3]"])
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for line in (
        "--nodes=2",
        "--ntasks-per-node=2",
        "--gres=gpu:2",
        "--signal=USR1@300",
        "--exclude=n[1-3]",
        "--requeue",
        f"--chdir={Path.cwd()}",  # what relative paths of the overrides count from
    ):
        assert f"#SBATCH {line}\n" in script
    start = script.index('"$python" "$train" ')
    words = script[start : script.index("\nended $?")].replace('"$python" "$train"', 'python -c "$PRINT"')
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    shell = {**os.environ, "PRINT": show, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=True, env=shell)
    assert json.loads(done.stdout) == [*run, name]


FIT = "n1: ok, 2 GPUs\\nn2: ok, 2 GPUs\\n"


@pytest.fixture
def job(run, submitted):
    """Runs the script with stand-ins for Slurm: (restart, exit code of the ranks, health) -> (exit code, output)."""
    slurm.main([*run, *JOB, "exclude=n9", "run.max_restarts=1"])
    stand_in(submitted.parent, "srun")
    stand_in(submitted.parent, "scontrol")

    def start(restart: int, code: int, health: str = FIT) -> tuple[int, str]:
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
        job |= {"SLURM_RESTART_COUNT": str(restart), "CODE": str(code), "HEALTH": health}
        done = subprocess.run(["bash", submitted], capture_output=True, text=True, env=os.environ | job)
        assert not done.stderr
        return done.returncode, done.stdout

    return start


def test_the_job_is_queued_again_unless_it_finished_or_was_refused(job):
    for code, again in ((0, False), (2, False), (75, True), (137, True)):
        ended, output = job(0, code)
        assert ended == code and ("scontrol requeue 7" in output) == again
        assert "rank 0 at 10.0.0.1:20679" in output


def test_failures_without_a_newer_checkpoint_end_the_job(job, tmp_path):
    assert "scontrol requeue" in job(0, 1)[1]
    (tmp_path / "run" / "checkpoints" / "step-00000010").mkdir()
    assert "scontrol requeue" in job(1, 1)[1]  # there was progress
    ended, output = job(2, 1)
    assert ended == 1 and "scontrol requeue" not in output
    assert "2 starts from" in output and "step-00000010 failed, not queued again; to go on: sbatch" in output
    assert "scontrol requeue" in job(0, 1)[1]  # submitted again by a person


def test_bad_nodes_are_left_out_from_then_on_and_so_are_those_that_do_not_answer(job):
    assert "ExcNodeList=n1,n9" in job(0, 0, health="n1: bad, 1 of 2 GPUs answer\\nn2: ok, 2 GPUs\\n")[1]
    ended, output = job(1, 0, health="n1: ok, 2 GPUs\\nslurmstepd: error: no such file\\n")
    assert ended == 1 and "ExcNodeList=n1,n2,n9" in output and "no such file" in output
    ended, output = job(0, 0, health="n1: bad, 9 NVLinks are inactive\\nn2: bad, 9 NVLinks are inactive\\n")
    assert ended == 1 and "speaks against the check" in output and "ExcNodeList" not in output
    ended, output = job(0, 0, health="srun: error: cannot start\\n")
    assert ended == 1 and "ran on no node" in output and "ExcNodeList" not in output


@pytest.mark.parametrize(
    "answer, problem",
    [
        ('echo "0, 0"; echo "1, [N/A]"', None),
        ('echo "0, 0"', "1 of 2 GPUs answer"),
        ('echo "0, 0"; echo "1, 3"', "uncorrected memory errors on GPU 1"),
        ("echo Failed to initialize NVML; exit 9", "Failed to initialize NVML"),
        ("sleep 9", "nvidia-smi does not answer within 1 s"),
    ],
)
def test_the_health_check_says_what_is_wrong_with_a_node(answer, problem, tmp_path, monkeypatch):
    monkeypatch.setattr(health, "SECONDS", 1)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    stand_in(tmp_path, "nvidia-smi", f'[ "$1" = nvlink ] && exit\n{answer.replace("sleep", "exec sleep")}')
    assert health.problem(2) == problem


@pytest.mark.parametrize("vendor, kind, fit", [("0x10de", "0x030200", False), ("0x10de", "0x068000", True)])
def test_a_node_with_gpus_but_without_nvidia_smi_is_bad(vendor, kind, fit, tmp_path, monkeypatch):
    """A GPU whose driver is gone, and an NVSwitch, which alone is no reason to ask for one."""
    device = tmp_path / "0000:18:00.0"
    device.mkdir()
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    monkeypatch.setattr(health, "PCI", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (health.problem(2) is None) == fit
