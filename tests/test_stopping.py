"""Signals and the time limit end a run in order: all ranks save the same step, exit with 75, and go on from there."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.prepare import Preparation, prepare
from hysparse.ledger import latest_by_step, read_ledger

ROOT = Path(__file__).parent.parent
TINY = """
    +experiment=tiny ~phases.long_context model.layers=3 model.hidden=32 model.heads=2 model.kv_heads=2
    model.head_dim=16 model.moe.experts=4 model.moe.ffn=32 model.vocabulary=257 attention.block=16 attention.tokens=32
    attention.window=16 phases.pretrain.sequence_length=64 phases.pretrain.global_batch=4 phases.pretrain.micro_batch=2
    phases.pretrain.tokens=15360 phases.pretrain.warmup_tokens=0 phases.pretrain.decay_tokens=0
    logging.validate_every=0 logging.experts_every=0 logging.tensorboard=false
""".split()
STEPS = 60
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "TRITON_INTERPRET")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder, shards = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("corpus") / "shards"
    for part in range(4):
        lines = [
            f"def function_{n % 97}(x):\n    return x + {n * n % 1009}\n" for n in range(400 * part, 400 * part + 400)
        ]
        (folder / f"{part}.txt").write_text("".join(lines))
    prepare(Preparation(input=str(folder), output=str(shards), tokenizer="bytes"))
    return shards


class Ranks:
    """`train.py` on one or two processes, as a launcher would start them."""

    def __init__(self, corpus: Path, run: Path, *overrides: str, ranks: int = 1):
        self.run = run
        command = [sys.executable, "train.py", *TINY, f"data.path={corpus}", f"run.dir={run}", *overrides]
        clean = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
        clean |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            clean |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
        self.processes = [
            subprocess.Popen(command, env=clean | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes)
            for rank in range(ranks)
        ]

    def wait_for(self, step: int) -> "Ranks":
        while not any(r["kind"] == "step" and r["step"] >= step for r in records(self.run)):
            assert all(process.poll() is None for process in self.processes), self.processes[0].communicate()
            time.sleep(0.01)
        return self

    def end(self) -> tuple[list[int], str, str]:
        """Exit codes of all, and what the first rank wrote to stdout and stderr."""
        shown = [process.communicate(timeout=60) for process in self.processes]
        return [process.returncode for process in self.processes], *shown[0]


def records(run: Path) -> list[dict]:
    ledger = run / "ledger.jsonl"
    return read_ledger(ledger) if ledger.exists() else []


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in latest_by_step(records(run), "step")]


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
        assert "SIGINT again: stopped at once" in waiting.stderr.read()
    finally:
        hanging.kill()
        hanging.wait()


def test_a_time_limit_that_cannot_be_read_is_refused(corpus, tmp_path):
    codes, _, errors = Ranks(corpus, tmp_path, "run.time_limit=soon").end()
    assert codes == [2]
    assert errors.endswith("run.time_limit=soon is no length of time; write hours, such as 1.5, or H:MM:SS\n")
