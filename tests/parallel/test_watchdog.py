"""A rank that dies, stops or lags behind is named by those that wait for it, with where it was last seen."""

import re
import signal
import time
from pathlib import Path

import pytest
import torch

from parallel.watchdog import LOST, Watchdog
from tests.small_run import Ranks, small_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.slow
@pytest.mark.parametrize("sent, lost", [("SIGKILL", 0), ("SIGSTOP", 0), ("SIGSTOP", 1)])
def test_the_other_rank_names_the_one_that_is_gone_and_ends(sent, lost, corpus, tmp_path):
    """Over gloo a death is noticed at once by who talks to the dead, a stop only by waiting. Rank 0 keeps the store."""
    running = Ranks(corpus, tmp_path, "run.timeout=0.1", ranks=2).wait_for(5)
    gone, other = running.processes[lost], running.processes[1 - lost]
    gone.send_signal(getattr(signal, sent))
    try:
        _, errors = other.communicate(timeout=60)
    finally:
        gone.kill()
        gone.wait()
    assert other.returncode in ((1, LOST) if sent == "SIGKILL" else (LOST,)), errors
    place = r"(start|data|forward-backward|optimizer|checkpoint) of step \d+"
    assert re.search(rf"rank {1 - lost}, in {place}, waits for others:\n  rank {lost} is dead or stopped", errors), (
        errors
    )
    assert re.search(rf"last seen in {place}", errors)


@pytest.fixture
def two_ranks(monkeypatch) -> list[Watchdog]:
    """Two of them in this process, on one store, which they do not end."""
    monkeypatch.setattr("os._exit", lambda code: None)
    store = torch.distributed.HashStore()
    ranks = [Watchdog(store, rank, 2, timeout=2) for rank in range(2)]
    yield ranks
    for watchdog in ranks:
        watchdog.close()


def keep_busy(watchdog: Watchdog, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        watchdog.enter("data")
        time.sleep(0.02)


def test_a_rank_that_works_on_is_left_alone_and_one_that_lags_behind_is_named(two_ranks, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    waiting, late = two_ranks
    for step in (6, 7):  # the first one of a process has more time
        late.enter("data", step)
        waiting.enter("optimizer", step)
    keep_busy(late, 6)
    waiting.close()
    assert ended and set(ended) == {LOST}
    shown = capsys.readouterr().err
    assert "rank 0, in optimizer of step 7, waits for others:\n  rank 1 is still in data of step 7\n" in shown
    assert "rank 1, in" not in shown


def test_ranks_in_the_same_place_say_that_they_wait_for_each_other(two_ranks):
    for watchdog in two_ranks:
        watchdog.enter("checkpoint", 3)
    time.sleep(1)
    for watchdog in two_ranks:
        assert watchdog.report() is None


def test_a_long_checkpoint_ends_nothing_while_all_live(two_ranks, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    for watchdog in two_ranks:
        watchdog.enter("checkpoint", 3)
    time.sleep(9)  # timeouts of 2 s, and the first step's of 6
    assert not ended
    two_ranks[1].close()  # as dead as a thread in this process can be
    time.sleep(7)  # silent for all of the time between two looks, 2.4 s each
    assert LOST in ended
    shown = capsys.readouterr().err
    assert (
        "rank 0, in checkpoint of step 3, waits for others:\n  rank 1 is dead or stopped; last seen in checkpoint of"
        in shown
    )


def test_only_the_first_step_of_a_process_may_take_three_times_as_long(two_ranks, monkeypatch):
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    two_ranks[1].close()
    first = two_ranks[0]
    first.enter("data", 41)
    time.sleep(4.5)
    assert not ended
    first.enter("data", 42)
    time.sleep(6)  # 2 s of waiting, 1 s of looking twice, 2 s for others to speak
    assert ended
