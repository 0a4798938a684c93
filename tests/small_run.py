"""A run of 60 steps that takes seconds, as real processes: for tests of how runs end, restart and are launched."""

import time
from pathlib import Path

from data.prepare import Preparation, prepare
from hysparse.ledger import latest_by_step, read_ledger
from tests.forks import Fork, clean_environment, free_port

TINY = """
    +experiment=tiny ~phases.long_context model.layers=3 model.hidden=32 model.heads=2 model.kv_heads=2
    model.head_dim=16 model.moe.experts=4 model.moe.ffn=32 model.vocabulary=257 attention.block=16 attention.tokens=32
    attention.window=16 phases.pretrain.sequence_length=64 phases.pretrain.global_batch=4 phases.pretrain.micro_batch=2
    phases.pretrain.tokens=15360 phases.pretrain.warmup_tokens=0 phases.pretrain.decay_tokens=0
    logging.validate_every=0 logging.experts_every=0 logging.tensorboard=false
""".split()
STEPS = 60


def small_corpus(folder: Path) -> Path:
    """A few shards of bytes in `folder`."""
    text, shards = folder / "text", folder / "shards"
    text.mkdir()
    for part in range(4):
        lines = [
            f"def function_{n % 97}(x):\n    return x + {n * n % 1009}\n" for n in range(400 * part, 400 * part + 400)
        ]
        (text / f"{part}.txt").write_text("".join(lines))
    prepare(Preparation(input=str(text), output=str(shards), tokenizer="bytes"))
    return shards


class Ranks:
    """`train.py` on one or two processes, as a launcher would start them."""

    def __init__(self, corpus: Path, run: Path, *overrides: str, ranks: int = 1):
        self.run = run
        arguments = [*TINY, f"data.path={corpus}", f"run.dir={run}", *overrides]
        environment = clean_environment() | {"WORLD_SIZE": str(ranks)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = [
            Fork(arguments, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)
        ]

    def wait_for(self, step: int) -> "Ranks":
        while not any(r["kind"] == "step" and r["step"] >= step for r in records(self.run)):
            assert all(process.poll() is None for process in self.processes), self.processes[0].communicate()
            time.sleep(0.01)
        return self

    def end(self) -> tuple[list[int], str, str]:
        """Exit codes of all, and what the first rank wrote to stdout and stderr."""
        shown = [process.communicate() for process in self.processes]
        return [process.returncode for process in self.processes], *shown[0]


def records(run: Path) -> list[dict]:
    ledger = run / "ledger.jsonl"
    return read_ledger(ledger) if ledger.exists() else []


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in latest_by_step(records(run), "step")]
