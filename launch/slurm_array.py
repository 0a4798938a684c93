"""The members of a sweep as one array of Slurm jobs, through submitit; `conf/hydra/launcher/slurm.yaml` has the keys.

Submitted and left alone, as by `launch/slurm.py`: nothing waits for the jobs. Each member's job becomes `train.py` on
every rank, and is queued again when its time is over or a rank failed.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

from hysparse.compose import CONF
from launch.errors import LaunchError
from launch.job import MEETING, folder_of
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
# 0: finished; 2: refused; 75: saved and stopped. After anything else, such as a rank that was killed, the job goes on
# from the newest checkpoint; run.max_restarts ends what gets no further, with 2, and the 20 what dies before it counts.
AFTERWARDS = """code=$?
case $code in
    0 | 2) ;;
    75) scontrol requeue "$SLURM_JOB_ID" ;;
    *) [ "$restart" -lt 20 ] && scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit $code"""


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
    ours = {
        "setup": [*(params.get("setup") or []), f'export PYTHONPATH="{ROOT}:${{PYTHONPATH:-}}"', *MEETING.splitlines()],
        "teardown": AFTERWARDS.splitlines(),
        "srun_args": ["--kill-on-bad-exit=1", "--open-mode=append"],
        "additional_parameters": extra,
    }
    given = {key: value for key, value in params.items() if value is not None and key not in UNUSED} | ours
    executor = submitit.AutoExecutor(folder=params["submitit_folder"], cluster="slurm")
    executor.update_parameters(
        **{key if key in OF_ALL_CLUSTERS else f"slurm_{key}": value for key, value in given.items()}
    )
    try:
        with redirect_stderr(StringIO()):  # it prints sbatch's words, too
            jobs = executor.map_array(become, [member.overrides for member in members])
    except submitit.core.utils.FailedJobError as error:
        asked = ("nodes", "gpus_per_node", "timeout_min", "partition", "account", "qos", "exclude")
        raise LaunchError(refusal({key: params.get(key) for key in asked}, str(error))) from error
    return [job.job_id for job in jobs]
