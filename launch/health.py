"""Whether this node's GPUs are fit to train; one line that `launch/job.py`'s script reads. Standard library only.

    python launch/health.py GPUS        n1: ok, 8 GPUs        or        n1: bad, 7 of 8 GPUs answer

The script runs it once on every node before the first step: a bad node is left out when the job is queued again.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

SECONDS = 60  # a driver that hangs is a bad node
PCI = Path("/sys/bus/pci/devices")
QUERY = ["--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]


def problem(gpus: int) -> str | None:
    """What is wrong with this node, None if it is fit. With neither GPUs nor nvidia-smi there is nothing to ask."""
    if shutil.which("nvidia-smi") is None:
        return "it has NVIDIA GPUs but no nvidia-smi; is the driver installed?" if _has_gpus() else None
    try:
        answer = _ask(*QUERY)
        links = _ask("nvlink", "--status") if gpus > 1 else ""
    except subprocess.TimeoutExpired:
        return f"nvidia-smi does not answer within {SECONDS} s"
    except subprocess.CalledProcessError as error:
        return " ".join((error.stdout + error.stderr).split()) or f"nvidia-smi ends with code {error.returncode}"
    found = [line.split(", ") for line in answer.splitlines() if line.strip()]
    if len(found) < gpus:
        return f"{len(found)} of {gpus} GPUs answer"
    if broken := [index for index, errors in found if errors.isdigit() and int(errors)]:  # "[N/A]" where ECC is off
        return f"uncorrected memory errors on GPU {', '.join(broken)}"
    if inactive := links.count("inactive"):
        return f"{inactive} NVLinks are inactive"
    return None


def _has_gpus() -> bool:
    """Whether there are NVIDIA GPUs on the PCI bus, with or without a driver: vendor 10de, class 03, displays."""
    devices = [tuple((device / name).read_text() for name in ("vendor", "class")) for device in PCI.glob("*")]
    return any(vendor.startswith("0x10de") and kind.startswith("0x03") for vendor, kind in devices)


def _ask(*question: str) -> str:
    limits = {"capture_output": True, "text": True, "timeout": SECONDS, "check": True}
    return subprocess.run(["nvidia-smi", *question], **limits).stdout


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    found = problem(wanted)
    what = f"{wanted} GPUs" if shutil.which("nvidia-smi") else "no nvidia-smi, not asked for GPUs"
    print(f"{node}: bad, {found}" if found else f"{node}: ok, {what}", flush=True)
