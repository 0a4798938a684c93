"""Tests that share one GPU: `pytest tests/gpu -n 8`."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def memory_goes_back_to_the_gpu() -> Iterator[None]:
    """PyTorch keeps what a test has freed for the next one of its process; the other processes need it as well."""
    yield
    torch.cuda.empty_cache()
