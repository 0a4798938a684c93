"""A whole run under engine=deepspeed is the one that Megatron would have made: stops, damage, records"""

import signal
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.parallel.test_checkpoint import flip_a_byte
from tests.small_run import Ranks, losses, records, small_corpus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="the package deepspeed is not installed"),
]
STEPS = 30
RUN = (f"phases.pretrain.tokens={STEPS * 256}", "checkpoint.every=10", "checkpoint.keep=0")
ZERO = ("engine=deepspeed", "deepspeed.zero=3", *RUN)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    codes, _, errors = Ranks(corpus, run, *ZERO, "logging.validate_every=15", ranks=2).end()
    assert codes == [0, 0], errors
    return run


def test_stopped_by_a_signal_and_with_a_damaged_checkpoint_it_goes_on_bit_for_bit(corpus, undisturbed, tmp_path):
    running = Ranks(corpus, tmp_path, *ZERO, ranks=2).wait_for(12)
    running.processes[1].send_signal(signal.SIGUSR1)
    assert running.end()[0] == [75, 75]
    stopped_at = records(tmp_path)[-1]["step"]
    newest = tmp_path / "checkpoints" / f"step-{stopped_at:08d}"
    assert 12 <= stopped_at < STEPS and stopped_at != 20
    flip_a_byte(newest)
    codes, _, errors = Ranks(corpus, tmp_path, *ZERO, ranks=2).end()
    assert codes == [0, 0] and f"{newest} is damaged and passed over" in errors
    assert losses(tmp_path) == losses(undisturbed)
    starts = [r["step"] for r in records(tmp_path) if r["kind"] == "start"]
    assert starts == [0, 20 if stopped_at > 20 else 10]


def test_megatron_goes_on_from_its_checkpoint_on_another_number_of_ranks_and_it_from_megatrons(
    corpus, undisturbed, tmp_path
):
    begun = undisturbed / "checkpoints" / "step-00000010"
    codes, _, errors = Ranks(corpus, tmp_path, *RUN, f"resume={begun}", "max_steps=15").end()
    assert codes == [0], errors
    codes, _, errors = Ranks(corpus, tmp_path, *RUN, "engine=deepspeed", "max_steps=20", ranks=2).end()
    assert codes == [0, 0], errors
    expected = dict(losses(undisturbed))
    for step, loss in losses(tmp_path):  # FP32 sums in another order
        assert loss == pytest.approx(expected[step], rel=1e-4), step
    assert [step for step, _ in losses(tmp_path)] == list(range(11, 21))


def test_the_ledger_has_the_same_records_and_metrics_as_under_megatron(corpus, undisturbed, tmp_path):
    codes, _, errors = Ranks(corpus, tmp_path, *RUN, "max_steps=1", "logging.validate_every=15", ranks=2).end()
    assert codes == [0, 0], errors
    kinds = {record["kind"]: record.keys() for record in records(tmp_path)}
    assert {record["kind"]: record.keys() for record in records(undisturbed)} == kinds
    assert "validation" in kinds
