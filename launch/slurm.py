"""Submit a run to Slurm: `python -m launch.slurm +experiment=NAME nodes=N time=HH:MM:SS [keys below] [overrides]`.

The configuration, the layout on that many GPUs and the corpora are checked here, before anything is queued. The script
comes from `launch/job.py`; the job starts itself again until the token budget is spent.
"""

import difflib
import getpass
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from data import DataError
from hysparse.checks import check
from hysparse.compose import CONF, provenance, refuse_unknown, register
from hysparse.config import Config, ConfigError, RanksError, seconds
from hysparse.layouts import with_chosen_pipeline
from hysparse.mistakes import mistakes_without_traceback
from hysparse.schedule import Progress, steps
from launch.errors import LaunchError
from launch.job import Job, folder_of, script
from launch.traces import written
from parallel.terminal import quiet_third_parties, show_own_messages

ROOT = CONF.parent

HELP = """Submit a run to Slurm, which starts it again until it is finished.

  python -m launch.slurm +experiment=NAME nodes=64 time=24:00:00 [keys of the job] [overrides of train.py]

Keys of the job
  nodes=N time=HH:MM:SS     needed; time is the limit of one job, the run may need several
  gpus_per_node=8           one task each
  partition= account= qos=  as your cluster wants them
  exclude=NODES             leave these out
  cpus_per_task=N           cores of a rank: its share of the node's, such as 12; Slurm gives 1
  memory=0                  per node; 0 is all of it
  warning=300               seconds before the end at which the ranks save
  dry=true                  show the script, submit nothing

Everything else goes to train.py; python train.py --help lists it."""


def main(arguments: list[str]) -> None:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    job, dry, overrides = read(arguments)
    config = check_run(composed(overrides), job)
    text = script(job, config.run, ROOT, sys.executable, overrides)
    if dry:
        print(text, end="")
        return
    submit(config, job, text)


def read(arguments: list[str]) -> tuple[Job, bool, list[str]]:
    """The job's keys, `dry`, and what is left for train.py. Raises LaunchError."""
    types = {field.name: field.type for field in fields(Job)}
    sections = {field.name for field in fields(Config)}
    given, dry, overrides = {}, False, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == "dry":
            if value.lower() not in ("true", "false"):
                raise LaunchError(f"{argument} must be dry=true or dry=false")
            dry = value.lower() == "true"
        elif key not in types or not equals:
            if near := [] if key in sections else difflib.get_close_matches(key.lower(), types, n=1, cutoff=0.8):
                raise LaunchError(f"{argument} is no key of the job; did you mean {near[0]}={value or 'VALUE'}?")
            overrides.append(argument)
        elif types[key] in (int, int | None):
            if not re.fullmatch(r"\d+", value) or int(value) < 1:
                raise LaunchError(f"{argument} must be a whole number of at least 1")
            given[key] = int(value)
        elif not re.fullmatch(r"[\w.,:\[\]-]+", value):
            raise LaunchError(f"{argument} is nothing that sbatch could take as --{key}; leave it out, or name one")
        else:
            given[key] = value
    for key, example in (("nodes", "nodes=2"), ("time", "time=24:00:00")):
        if key not in given:
            raise LaunchError(
                f"{key} is missing: give it, such as {example}; python -m launch.slurm --help lists the keys"
            )
    job = Job(**given)
    length = seconds(job.time)
    if length is None or ":" not in job.time:  # Slurm would read minutes
        raise LaunchError(f"time={job.time} is no limit: write HH:MM:SS or D-HH:MM:SS, such as time=24:00:00")
    if length <= job.warning + 60:
        raise LaunchError(
            f"time={job.time} leaves nothing to train in: ranks save warning={job.warning} s before the end, Slurm may "
            "warn them a minute earlier; use a longer time, or a smaller warning if checkpoints are written faster"
        )
    return job, dry, overrides


def composed(overrides: list[str]) -> Config:
    """What `train.py` would make of them, typed and with its sources known to `provenance`."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        everything: DictConfig = compose("config", overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(everything)
    if everything.hydra.sweeper.params:
        raise LaunchError(
            f"+sweep={everything.hydra.runtime.choices.sweep} is more than one run: python train.py -m … "
            "hydra/launcher=slurm submits its members"
        )
    with open_dict(everything):
        del everything["hydra"]
    refuse_unknown(everything, Config, "")
    return OmegaConf.to_object(everything)


def check_run(config: Config, job: Job) -> Config:
    """Refuse what the job would refuse after it waited in the queue: ConfigError, DataError or LaunchError.

    Returns the configuration with numbers in place of auto, as the job will choose them.
    """
    if config.plan:
        raise LaunchError("plan=true trains nothing; python train.py … plan=true shows the plan without Slurm")
    if config.dry_run is not None:
        raise LaunchError("dry_run=N needs no Slurm: python train.py … dry_run=N; dry=true shows the job's script")
    if config.resume == "never":
        raise LaunchError("resume=never: the job starts itself again and must go on; give a new run.dir=FOLDER instead")
    try:
        laid_out = with_chosen_pipeline(config, job.ranks)
        check(laid_out, job.ranks)
    except RanksError as error:
        raise LaunchError(_about_nodes(config, job, error.problem)) from error
    # These bring torch, which the mistakes above do not need.
    from hysparse.run_data import RunData
    from hysparse.run_folder import starting_point
    from parallel.checkpoint import CheckpointError

    data = RunData(laid_out)
    data.validation_sizes(job.ranks)
    try:
        progress = starting_point(laid_out, data.fingerprint)
    except CheckpointError as error:
        raise LaunchError(str(error)) from error
    if next(steps(list(config.phases.values()), progress, config.max_steps), None) is None:
        more = "a larger max_steps" if progress.phase < len(config.phases) else "a further phase"
        raise LaunchError(
            f"nothing is left to train in run.dir={config.run.dir}, all {progress.step:,} steps are done; give {more}, "
            "or another run.dir=FOLDER"
        )
    return laid_out


def _about_nodes(config: Config, job: Job, problem: str) -> str:
    """The layout's own complaint, after the numbers of nodes that would do."""
    fitting = [n for n in range(1, max(2 * job.nodes, 64) + 1) if _fits(config, n * job.gpus_per_node)]
    near = sorted(sorted(fitting, key=lambda n: abs(n - job.nodes))[:4])
    advice = f"nodes={' or '.join(map(str, near))}"
    if not near:  # a node has more GPUs than it can use
        near = [gpus for gpus in range(1, job.gpus_per_node) if _fits(config, gpus)]
        advice = f"nodes=1 gpus_per_node={' or '.join(map(str, near))}"
    return (
        f"nodes={job.nodes} x gpus_per_node={job.gpus_per_node} do not suit the plan: "
        + (f"with this configuration use {advice}; " if near else "")
        + problem
    )


def _fits(config: Config, ranks: int) -> bool:
    try:
        check(with_chosen_pipeline(config, ranks), ranks)
    except ConfigError:
        return False
    return True


def submit(config: Config, job: Job, text: str) -> None:
    """Write the run's folder, queue the script, and say how to follow it."""
    from hysparse.run_folder import RunFolder

    need_sbatch("look with dry=true")
    folder = folder_of(config.run)
    if other := job_of(folder):
        raise LaunchError(
            f"job {other} of run.dir={config.run.dir} is queued or running, and two would overwrite each other; "
            f"scancel {other} first, or give another run.dir=FOLDER"
        )
    path = folder / "job.sh"
    with written(path, text, f"run.dir={config.run.dir}"):
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
        if done.returncode:
            asked = {key: value for key, value in asdict(job).items() if key != "warning"}
            raise LaunchError(refusal(asked, done.stderr))
    number = done.stdout.split(";")[0].strip()
    (folder / "job_id").write_text(number + "\n")
    RunFolder(config, provenance(config))  # leaves config.yaml; the job will write the same
    phases = list(config.phases.values())
    *_, last = steps(phases, Progress(), config.max_steps)
    end = last.after(phases[last.phase])
    print(f"Job {number}: {config.run.name} on {job.nodes} nodes x {job.gpus_per_node} GPUs, {job.time} at a time")
    print(f"  until     {end.tokens:,} tokens in {end.step:,} steps")
    print(f"  script    {path}")
    print(f"  queue     squeue --job {number}")
    print(f"  follow    tail -F {folder}/job.log {folder}/rank-0000.log")
    print(f"  stop      scontrol update JobId={number} Requeue=0 && scancel --signal=USR1 {number}    (saves first)")
    print(f"  go on     sbatch {path}")


def need_sbatch(instead: str) -> None:
    if shutil.which("sbatch") is None:
        raise LaunchError(f"sbatch is not on this machine: run this on a login node of the cluster, or {instead}")


def job_of(folder: Path) -> str | None:
    """The job that this run has in Slurm's queue already."""
    try:
        number = (folder / "job_id").read_text().strip()
    except OSError:
        return None
    listed = subprocess.run(["squeue", "--noheader", f"--job={number}"], capture_output=True, text=True)
    return number if listed.stdout.strip() else None


def refusal(asked: dict[str, object], words: str) -> str:
    """sbatch's own words in one sentence, the keys that they may be about, and what there is to choose from."""
    said = [
        line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in words.splitlines() if line.strip()
    ]
    reasons = [line.removeprefix("Batch job submission failed: ") for line in said]
    keys = " ".join(f"{key}={value}" for key, value in asked.items() if value is not None)
    return (
        f"Slurm refused the job: {'; '.join(dict.fromkeys(reasons)) or 'it gave no reason'} (asked for {keys}); "
        f"{_choices()}"
    )


def _choices() -> str:
    """The partitions and accounts that a user may name, as far as Slurm tells."""
    show = ["scontrol", "--oneliner", "show", "partition"]
    partitions = [
        name if accounts in ("", "ALL") else f"{name} (account={accounts.replace(',', ' or ')})"
        for name, accounts in re.findall(r"PartitionName=(\S+)(?:.*? AllowAccounts=(\S+))?", _answer(*show))
    ]
    mine = ["show", "associations", f"user={getpass.getuser()}", "format=account"]
    accounts = sorted(set(_answer("sacctmgr", "--noheader", "--parsable2", *mine).split()))
    where = f"partitions are {', '.join(partitions)}" if partitions else "sinfo lists partitions"
    who = f"your accounts are {', '.join(accounts)}" if accounts else "sacctmgr show associations lists your accounts"
    return f"{where}; {who}"


def _answer(*command: str) -> str:
    """What a command of Slurm's prints, "" if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    quiet_third_parties()
    show_own_messages()
    with mistakes_without_traceback(LaunchError, DataError, ConfigError):
        main(sys.argv[1:])
