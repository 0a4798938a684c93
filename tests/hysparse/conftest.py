"""Shared by the tests of the configuration, which is checked for as many processes as a launcher's variables say."""

import pytest

from tests.hysparse.composing import LAUNCHER_VARIABLES


@pytest.fixture
def one_process(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
