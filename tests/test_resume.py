"""Killing a run at any moment and starting it again with the same command gives the run that was never killed."""

import signal
import time
from pathlib import Path

import pytest

from data.prepare import Preparation, prepare
from hysparse.ledger import latest_by_step, read_ledger
from tests.forks import Fork

SMALL = """
    model.layers=4 model.hidden=32 model.heads=2 model.head_dim=16 model.moe.experts=4 model.moe.ffn=32
    model.vocabulary=257 phases.pretrain.tokens=5120 phases.pretrain.sequence_length=64 phases.pretrain.global_batch=4
    phases.pretrain.micro_batch=2 phases.pretrain.warmup_tokens=512 phases.pretrain.decay_tokens=1024
    phases.long_context.tokens=5120 phases.long_context.sequence_length=128 phases.long_context.global_batch=2
    phases.long_context.micro_batch=1 phases.long_context.decay_tokens=1024 attention.tokens=32 attention.window=16
    checkpoint.every=4 logging.validate_every=10 logging.tensorboard=false data.validation_samples=4
""".split()
STEPS = 40  # 20 in each phase


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder, shards = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("corpus") / "shards"
    words = [f"def function_{n % 97}(x):\n    return x + {n * n % 1009}\n" for n in range(4000)]
    for part in range(10):
        (folder / f"{part}.txt").write_text("".join(words[part * 400 : (part + 1) * 400]))
    prepare(Preparation(input=str(folder), output=str(shards), tokenizer="bytes", validation=0.2))
    return shards


def start(corpus: Path, run: Path, *overrides: str) -> Fork:
    return Fork(["+experiment=tiny", *SMALL, f"data.path={corpus}", f"run.dir={run}", *overrides])


def finish(corpus: Path, run: Path, *overrides: str) -> tuple[list, list]:
    process = start(corpus, run, *overrides)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return losses(run)


def losses(run: Path) -> tuple[list, list]:
    """(step, loss, gradient norm, learning rate) of every step that counts, and (step, loss) of the validations."""
    records = read_ledger(run / "ledger.jsonl")
    steps = [(r["step"], r["loss"], r["gradient_norm"], r["learning_rate"]) for r in latest_by_step(records, "step")]
    return steps, [(r["step"], r["loss"]) for r in latest_by_step(records, "validation")]


def kill_after(step: int, corpus: Path, run: Path) -> None:
    """Start the run and send SIGKILL as soon as the ledger shows `step`."""
    process = start(corpus, run)
    ledger = run / "ledger.jsonl"
    while process.poll() is None:
        if ledger.exists() and any(r["kind"] == "step" and r["step"] >= step for r in read_ledger(ledger)[-3:]):
            process.kill()
            break
        time.sleep(0.005)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    return finish(corpus, tmp_path_factory.mktemp("runs") / "whole")


def test_killed_in_both_phases_a_run_repeats_the_uninterrupted_one_bit_for_bit(corpus, uninterrupted, tmp_path):
    run = tmp_path / "killed"
    kill_after(6, corpus, run)  # in phase one, two steps after the checkpoint of step 4
    kill_after(27, corpus, run)  # in phase two, resumed once already
    assert finish(corpus, run) == uninterrupted
    steps, validations = uninterrupted
    assert [step for step, *_ in steps] == list(range(1, STEPS + 1))
    assert [step for step, _ in validations] == [10, 20, 30, 40]
    starts = [r["step"] for r in read_ledger(run / "ledger.jsonl") if r["kind"] == "start"]
    assert len(starts) == 3 and starts[0] == 0 and 4 <= starts[1] < 27 and 20 <= starts[2] < STEPS
    assert (run / "curves.png").stat().st_size > 10_000


def test_stopping_with_max_steps_at_a_phase_change_and_going_on_changes_nothing(corpus, uninterrupted, tmp_path):
    finish(corpus, tmp_path / "stopped", "max_steps=20")
    assert finish(corpus, tmp_path / "stopped") == uninterrupted


def test_a_finished_run_started_again_trains_no_further(corpus, uninterrupted, tmp_path):
    finish(corpus, tmp_path / "done", "max_steps=2")
    before = losses(tmp_path / "done")
    assert finish(corpus, tmp_path / "done", "max_steps=2") == before
