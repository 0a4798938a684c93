"""NVIDIA's compute-sanitizer finds no access out of bounds and no race in shared memory."""

import os
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


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    """memcheck sees every allocation by itself, since PyTorch does not cut them out of larger ones here."""
    done = subprocess.run(
        [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "tests.gpu.small_run"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0 and "done" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
