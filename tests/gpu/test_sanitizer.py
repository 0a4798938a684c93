"""NVIDIA's compute-sanitizer finds no access out of bounds and no race in shared memory."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        not os.path.exists(SANITIZER), reason="needs compute-sanitizer, which comes with CUDA's toolkit"
    ),
]


def sanitized(tool: str) -> subprocess.CompletedProcess:
    """memcheck sees every allocation by itself, since PyTorch does not cut them out of larger ones here."""
    done = subprocess.run(
        [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "tests.gpu.small_run"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert "done" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
    return done


def test_no_kernel_reads_or_writes_out_of_bounds():
    done = sanitized("memcheck")
    assert done.returncode == 0, done.stdout[-4000:]


def test_no_kernel_races_in_shared_memory():
    """But where a kernel starts specialised warps, whose code stands in *_warps.py.

    Triton tells those warps what to do through shared memory, behind a barrier of its own that racecheck does not know.
    """
    done = sanitized("racecheck")
    places = set(re.findall(r"access at \S+ in (\S+):\d+", done.stdout))
    assert places <= {"scored_hopper.py", "causal_hopper.py", "grouped_hopper.py"}, done.stdout[-4000:]
    assert done.returncode == 0 or places, done.stdout[-4000:]
