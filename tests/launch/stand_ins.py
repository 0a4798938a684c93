"""Stand-ins for Slurm's commands, in a folder that comes first in PATH: for tests of launch/ without Slurm."""

from pathlib import Path

COMMANDS = {
    # Keeps the script, calls it job 7, in submitit's way of asking or in ours
    "sbatch": """
        for script; do :; done
        cp "$script" {folder}/submitted.sh
        case "$1" in --parsable) echo "7;cluster" ;; *) echo "Submitted batch job 7" ;; esac
    """,
    "srun": """
        case "$*" in *health.py*) printf '%b' "$HEALTH" ;; *) exit $CODE ;; esac
    """,
    "scontrol": """
        case "$*" in
            "show hostnames"*) echo n1; echo n2 ;;
            *"show node"*) echo "NodeName=$4 NodeAddr=10.0.0.1 NodeHostName=$4" ;;
            *) echo "scontrol $*" ;;
        esac
    """,
}


def stand_in(folder: Path, name: str, body: str | None = None) -> None:
    """Write the command `name`; without a `body` it is the one above."""
    path = folder / name
    path.write_text("#!/bin/bash\n" + (body or COMMANDS[name].replace("{folder}", str(folder))))
    path.chmod(0o755)
