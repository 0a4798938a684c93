"""The members of a sweep as one array of Slurm jobs, through submitit; `conf/hydra/launcher/slurm.yaml` has the keys.

Submitted and left alone, as by `launch/slurm.py`: nothing waits for the jobs. Each member's job becomes `train.py` on
every rank, and is queued again when its time is over or a rank failed.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from hysparse.compose import CONF
from launch.errors import LaunchError
from launch.job import AGAIN, MEETING, folder_of
from launch.slurm import job_of, need_sbatch, refusal
from launch.sweep import Member

ROOT = CONF.parent
OF_ALL_CLUSTERS = {  # submitit's own names; those of Slurm get a prefix
    "name",
    "nodes",
    "tasks_per_node",
    "gpus_per_node",
    "cpus_per_task",
    "mem_gb",
    "timeout_min",
    "stderr_to_stdout",
}
UNUSED = {"submitit_folder", "max_num_timeout"}  # the folder has a way of its own, and so has going on


def submit_members(members: Sequence[Member], params: dict[str, Any]) -> int:
    """Submit those that are not in Slurm's queue, and say how to follow them. Returns 0; raises LaunchError."""
    need_sbatch("use hydra/launcher=local")
    queued = {member.name: job for member in members if (job := job_of(folder_of(member.config.run)))}
    for name, job in queued.items():
        print(f"  {name} is queued or running as job {job}")
    new = [member for member in members if member.name not in queued]
    if not new:
        return 0
    jobs = _submitted(new, params)
    for member, job in zip(new, jobs, strict=True):
        folder = folder_of(member.config.run)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job_id").write_text(job + "\n")
    number, size = jobs[0].split("_")[0], f"{params['nodes']} nodes x {params['tasks_per_node']} tasks"
    print(f"Job {number}: {len(new)} members, each on {size}, {params['timeout_min']} minutes at a time")
    for member, job in zip(new, jobs, strict=True):
        print(f"  {job:<12}{member.name}")
    print(f"  queue       squeue --job {number}")
    print(f"  logs        {str(params['submitit_folder']).replace('%j', number)}*/")
    print(
        f"  stop        scancel --state=PENDING {number}; scontrol update JobId={number} Requeue=0; "
        f"scancel --signal=USR1 {number}    (saves first)"
    )
    print("  go on       the same command again")
    return 0


def become(arguments: list[str]) -> None:
    """What a task of such a job calls: it turns into `train.py`, so that signals and exit codes are its own."""
    os.execv(sys.executable, [sys.executable, str(ROOT / "train.py"), "hydra.mode=RUN", *arguments])


def _submitted(members: Sequence[Member], params: dict[str, Any]) -> list[str]:
    """The numbers of their jobs, one array where there are several."""
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # read while submitit is imported; what train.py answers
    import submitit

    extra = dict(params.get("additional_parameters") or {}) | {"requeue": True}
    setup = [f'export PYTHONPATH="{ROOT}:${{PYTHONPATH:-}}"', *MEETING.splitlines(), *_which_of(members, params)]
    ours = {
        "setup": [*(params.get("setup") or []), *setup, *AGAIN.splitlines()],
        "teardown": ["ended $?"],
        "srun_args": ["--kill-on-bad-exit=1", "--open-mode=append"],
        "additional_parameters": extra,
    }
    given = {key: value for key, value in params.items() if value is not None and key not in UNUSED} | ours
    executor = submitit.AutoExecutor(folder=params["submitit_folder"], cluster="slurm")
    executor.update_parameters(
        **{key if key in OF_ALL_CLUSTERS else f"slurm_{key}": value for key, value in given.items()}
    )
    folder = submitit.core.utils.JobPaths.get_first_id_independent_folder(params["submitit_folder"])
    before = set(folder.glob("*"))
    try:
        with redirect_stderr(StringIO()):  # it prints sbatch's words, too
            jobs = executor.map_array(become, [member.overrides for member in members])
    except submitit.core.utils.FailedJobError as error:
        for path in {path for path in folder.glob("*") if path.is_file()} - before:
            path.unlink()
        with suppress(OSError):  # earlier jobs have their logs there
            folder.rmdir()
        asked = ("nodes", "gpus_per_node", "timeout_min", "partition", "account", "qos", "exclude", "mem_gb")
        raise LaunchError(refusal({f"hydra.launcher.{key}": params.get(key) for key in asked}, str(error))) from error
    return [job.job_id for job in jobs]


def _which_of(members: Sequence[Member], params: dict[str, Any]) -> list[str]:
    """What AGAIN needs to know of the member that an array's task is; one member alone is no array."""
    runs = shlex.join(str(Path(member.config.run.dir).absolute()) for member in members)
    attempts = " ".join(str(member.config.run.max_restarts + 1) for member in members)
    logs = str(Path(params["submitit_folder"]).absolute()).replace("%j", "$job") + "/*.log"
    return [
        "member=${SLURM_ARRAY_TASK_ID:-0}",
        f"all_runs=({runs})",
        "run=${all_runs[$member]}",
        f"all_attempts=({attempts})",
        "attempts=${all_attempts[$member]}  # that may fail in a row without a newer checkpoint",
        "job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
        f'logs="{logs}"',
        'go_on="the same command again"',
    ]
