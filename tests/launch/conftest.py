"""What tests of launches and sweeps start from."""

from pathlib import Path

import pytest

from tests.small_run import TINY, small_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def small(corpus, tmp_path) -> list[str]:
    return [*TINY, f"data.path={corpus}", f"hydra.sweep.dir={tmp_path}/sweep"]
