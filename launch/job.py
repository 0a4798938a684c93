"""The script of a Slurm job: one task a GPU, a health check before them, and queued again until the run is finished.

Only text is made here; `launch/slurm.py` decides what goes in. The script is meant to be read by who debugs the job.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from hysparse.config import RunConfig

# How a job begins, a sweep's member (slurm_array.py), too.
MEETING = r"""restart=${SLURM_RESTART_COUNT:-0}

# Where the ranks meet: the first node's address, and a port below the ephemeral ones, another one at every start.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR=$(scontrol --oneliner show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 97 + restart) % 12000))

# Each can be set otherwise before sbatch.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}  # INFO shows which network and interface NCCL has chosen
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}  # Megatron overlaps communication in that order
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun takes no other
export PYTHONUNBUFFERED=1 TQDM_MININTERVAL=${TQDM_MININTERVAL:-10}  # seconds between progress lines in a log
# NCCL finds InfiniBand by itself. Where nodes cannot reach each other, name the interface that `ip address` shows:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5  # only these adapters, where some serve storage
"""

# How it goes on, a sweep's member, too. Before it stand MEETING and run, attempts, logs, go_on, as in the script below.
AGAIN = r"""here=$run/slurm
say() { echo "$(date '+%F %T') job $SLURM_JOB_ID, start $((restart + 1)): $*"; }

queue_again() { # exit code if that fails, nodes to leave out
    trap '' TERM  # Slurm ends this script because of the next line; it has something left to do
    if scontrol requeue "$SLURM_JOB_ID"; then
        say "queued again"
    else
        say "not queued again (not allowed here, or asked not to with Requeue=0); to go on: $go_on"
        exit "$1"
    fi
    if [ -n "$2" ]; then
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$2"
    fi
    exit "$1"
}

failed() { # exit code; queued again unless that has not helped before
    newest=$(ls -d "$run"/checkpoints/step-???????? 2>/dev/null | tail -n 1)
    echo "${newest:-the beginning}" >> "$here/failures"
    if [ "$(tail -n "$attempts" "$here/failures" | grep -cxF "${newest:-the beginning}")" -ge "$attempts" ]; then
        say "$attempts starts from ${newest:-the beginning} failed, not queued again; to go on: $go_on"
        exit "$1"
    fi
    queue_again "$1" ""
}

ended() { # exit code of the ranks
    case $1 in
        0) say "finished" ;;
        2) say "refused, see $logs" ;;  # starting it again would not help
        75) say "saved and stopped"; queue_again 75 "" ;;
        *) say "a rank ended with code $1, see $logs"; failed "$1" ;;
    esac
    exit "$1"
}

mkdir -p "$here"
if [ "$restart" = 0 ]; then
    rm -f "$here/failures"
fi
"""

SCRIPT = r"""#!/bin/bash
@directives@

# Written by `python -m launch.slurm`. `sbatch @script@` submits it again; it goes on from the newest checkpoint.
set -u
run=@run@
python=@python@
train=@train@
attempts=@attempts@  # that may fail in a row without a newer checkpoint
logs=$run/slurm/rank-*.log
go_on=@go_on@
@meeting@
@again@
echo "$SLURM_JOB_ID" > "$here/job_id"
if [ "$restart" = 0 ]; then
    echo @exclude@ > "$here/bad_nodes"
fi
say "$SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST) x @tasks@ tasks, rank 0 at $MASTER_ADDR:$MASTER_PORT"
timeout 300 srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "$python" @health@ @gpus@ > "$here/health.log" 2>&1
bad=$(for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    grep -q "^$node: ok, " "$here/health.log" || echo "$node"
done)
if [ -n "$bad" ]; then
    grep -v ': ok, ' "$here/health.log"
    if ! grep -q ': ok, \|: bad, ' "$here/health.log"; then
        say "the check ran on no node, which says nothing about them"
        failed 1
    fi
    if [ "$SLURM_JOB_NUM_NODES" -gt 1 ] && ! grep -q ': ok, ' "$here/health.log"; then
        say "every node is called bad, which speaks against the check; none is left out"
        failed 1
    fi
    echo "$bad" >> "$here/bad_nodes"
    bad=$(grep . "$here/bad_nodes" | sort -u | paste -sd,)
    say "left out from now on: $bad"
    queue_again 1 "$bad"
fi

# Slurm's warning (--signal above) goes to every rank: all save the same step and end with 75. One that dies takes the
# others with it. One log a rank, which all starts of the job append to.
srun --kill-on-bad-exit=1 --output="$here/rank-%4t.log" --open-mode=append \
    "$python" "$train" @overrides@
ended $?
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a user asks Slurm for; texts go to sbatch as they are."""

    nodes: int
    time: str  # as sbatch takes it: HH:MM:SS or D-HH:MM:SS
    gpus_per_node: int = 8
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    exclude: str | None = None  # nodes
    cpus_per_task: int | None = None
    memory: str = "0"  # per node; 0 is all of it
    warning: int = 300  # seconds before the end at which the ranks save; Slurm may send it a minute earlier

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


def folder_of(run: RunConfig) -> Path:
    """Where the script and the logs lie."""
    return Path(run.dir).absolute() / "slurm"


def script(job: Job, run: RunConfig, root: Path, python: str, overrides: list[str]) -> str:
    """The text of job.sh in `run`'s folder, for the checkout at `root`."""
    folder = folder_of(run)
    path = shlex.quote(str(folder / "job.sh"))
    options = {
        "job-name": re.sub(r"[^\w.-]+", "-", run.name),
        "nodes": job.nodes,
        "ntasks-per-node": job.gpus_per_node,
        "gres": f"gpu:{job.gpus_per_node}",
        "cpus-per-task": job.cpus_per_task,
        "mem": job.memory,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "exclude": job.exclude,
        "signal": f"USR1@{job.warning}",
        "chdir": Path.cwd(),  # relative paths of the overrides count from here, wherever job.sh is submitted again
        "output": folder / "job.log",
        "open-mode": "append",
    }
    given = {key: str(value) for key, value in options.items() if value is not None}
    directives = [f"#SBATCH --{key}={shlex.quote(value) if ' ' in value else value}" for key, value in given.items()]
    values = {
        "meeting": MEETING,
        "again": AGAIN,
        "directives": "\n".join([*directives, "#SBATCH --requeue"]),
        "script": path,
        "run": shlex.quote(str(folder.parent)),
        "attempts": str(run.max_restarts + 1),
        "go_on": shlex.quote(f"sbatch {path}"),
        "exclude": shlex.quote(job.exclude or ""),
        "python": shlex.quote(python),
        "train": shlex.quote(str(root / "train.py")),
        "health": shlex.quote(str(root / "launch" / "health.py")),
        "gpus": str(job.gpus_per_node),
        "tasks": str(job.gpus_per_node),
        "overrides": shlex.join(overrides),
    }
    text = SCRIPT
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text
