"""Signals and the time limit end a run in order: all ranks save the same step, exit with 75, and go on from there."""

import signal
import time
from pathlib import Path

import pytest

from tests.small_run import STEPS, Ranks, losses, records, small_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> dict[int, list]:
    """Losses by number of ranks."""
    found = {}
    for ranks in (1, 2):
        run = tmp_path_factory.mktemp("runs") / str(ranks)
        codes, _, errors = Ranks(corpus, run, ranks=ranks).end()
        assert codes == [0] * ranks, errors
        found[ranks] = losses(run)
    assert [step for step, _ in found[1]] == list(range(1, STEPS + 1))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name, ranks, asked", [("SIGUSR1", 2, [1]), ("SIGTERM", 1, [0])])
def test_a_signal_to_any_rank_stops_all_at_one_step_and_the_same_command_goes_on(
    name, ranks, asked, corpus, undisturbed, tmp_path
):
    running = Ranks(corpus, tmp_path, ranks=ranks).wait_for(5)
    for rank in asked:
        running.processes[rank].send_signal(getattr(signal, name))
    codes, output, _ = running.end()
    assert codes == [75] * ranks
    stopped_at = records(tmp_path)[-1]["step"]
    assert 5 <= stopped_at < STEPS and records(tmp_path)[-1]["stopped"] == name
    assert f"Stopped by {name} after {stopped_at} steps" in output
    assert (tmp_path / "checkpoints" / f"step-{stopped_at:08d}").is_dir()
    assert Ranks(corpus, tmp_path, ranks=ranks).end()[0] == [0] * ranks
    assert losses(tmp_path) == undisturbed[ranks]
    assert [r["step"] for r in records(tmp_path) if r["kind"] == "start"] == [0, stopped_at]


def test_a_time_limit_stops_like_a_signal(corpus, tmp_path):
    codes, output, _ = Ranks(corpus, tmp_path, "run.time_limit=0:00:01").end()
    assert codes == [75] and "Stopped by the time limit after" in output
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert saved.name == f"step-{records(tmp_path)[-1]['step']:08d}"


def test_a_second_signal_ends_a_rank_that_waits_for_another_at_once(corpus, tmp_path):
    running = Ranks(corpus, tmp_path, ranks=2).wait_for(3)
    waiting, hanging = running.processes
    hanging.send_signal(signal.SIGSTOP)
    try:
        waiting.send_signal(signal.SIGINT)
        time.sleep(1.3)
        assert waiting.poll() is None  # in a collective, with no chance to run Python
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(timeout=5) == 128 + signal.SIGINT
        assert "SIGINT again: stopped at once" in waiting.communicate()[1]
    finally:
        hanging.kill()
        hanging.wait()


def test_a_time_limit_that_cannot_be_read_is_refused(corpus, tmp_path):
    codes, _, errors = Ranks(corpus, tmp_path, "run.time_limit=soon").end()
    assert codes == [2]
    assert errors.endswith("run.time_limit=soon is no length of time; write hours, such as 1.5, or H:MM:SS\n")
