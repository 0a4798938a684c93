"""Which process this is, before any process group exists and without importing torch."""

import os


def world_size() -> int:
    """Processes of this run: from torchrun, else from Slurm's srun (not the batch script around it), else 1."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def automatic_restarts() -> int:
    """How often Slurm or torchrun has started this run again by itself; 0 when a person started it."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
