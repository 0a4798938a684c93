"""A rank that waits too long for others says which of them are behind, where they were last seen, and ends.

Every rank has a thread that tells a store, once a second, in which phase of which step its rank is. torch has two
relatives: `monitored_barrier` names missing ranks, but over gloo only and as one more barrier; NCCL's flight recorder
writes down collectives, not what a rank did instead of taking part.
"""

import os
import sys
import threading
import time
from typing import NamedTuple

import torch.distributed as dist

from parallel.ranks import rank, world_size

PHASES = ("start", "data", "forward-backward", "optimizer", "evaluation", "checkpoint")  # in the order of a step
LOST = 70  # exit code: ended because of other ranks
NAMED = 8  # ranks in a message at most


class Seen(NamedTuple):
    """What a rank last told about itself."""

    step: int
    phase: str
    beats: int  # counted by its thread: standing still, the process is dead or stopped

    @property
    def place(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase)

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step}"


class Watchdog:
    """Ends this process `timeout` seconds after the last `enter`. `store` outlives all ranks but its host, rank 0."""

    def __init__(self, store: dist.Store, timeout: float, interval: float = 1.0):
        self.store, self.timeout, self.interval = store, timeout, min(interval, timeout / 4)
        self.seen = Seen(0, "start", 0)
        self.since, self.closed, self.first = time.monotonic(), threading.Event(), None
        self.publish()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """This rank now begins `phase`, or goes on with it; of the same step unless told otherwise."""
        self.since = time.monotonic()
        self.seen = self.seen._replace(phase=phase, step=self.seen.step if step is None else step)

    def close(self) -> None:
        """From now on no other rank is needed."""
        self.closed.set()

    def report(self) -> str | None:
        """What the ranks are doing that keep this one waiting; None if all are well and no further behind."""
        try:
            before = [self._ask(other) for other in range(world_size())]
            time.sleep(2.5 * self.interval)
            after = [self._ask(other) for other in range(world_size())]
        except (RuntimeError, dist.DistStoreError):
            after = [self.first or Seen(0, "start", 0)]
            before = after  # the store died with its host
        silent = [number for number, seen in enumerate(after) if seen == before[number] and number != rank()]
        behind = [n for n, seen in enumerate(after) if seen.place < self.seen.place and n not in silent and n != rank()]
        lines = [f"  rank {n} is dead or stopped; last seen in {after[n]}" for n in silent[:NAMED]]
        lines += [f"  rank {n} is still in {after[n]}" for n in behind[: NAMED - len(lines)]]
        if hidden := len(silent) + len(behind) - len(lines):
            lines.append(f"  and {hidden} more ranks")
        if not lines:
            return None
        return "\n".join([f"rank {rank()}, in {self.seen}, waits for others:", *lines])

    def publish(self) -> None:
        self.seen = self.seen._replace(beats=self.seen.beats + 1)
        self.store.set(str(rank()), f"{self.seen.step} {self.seen.phase} {self.seen.beats}")
        self.first = self._ask(0)

    def _ask(self, other: int) -> Seen:
        step, phase, beats = self.store.get(str(other)).decode().split()
        return Seen(int(step), phase, int(beats))

    def _watch(self) -> None:
        lost = 0
        while not self.closed.wait(self.interval):
            try:
                self.publish()
                lost = 0
            except (RuntimeError, dist.DistStoreError):
                lost += 1  # perhaps only because rank 0 has ended, as this rank is about to
            waited = time.monotonic() - self.since
            if waited > self.timeout or lost > 3:
                everyone = f"rank {rank()}, in {self.seen}, and all others are in the same place and wait for each other"
                text = f"error: after {waited:.0f} s {self.report() or everyone}"
                if not self.closed.is_set():
                    print(text, file=sys.stderr, flush=True)
                    os._exit(LOST)


def connect(timeout: float) -> Watchdog | None:
    """The watchdog of this process, once process groups exist; a single rank needs none."""
    if world_size() == 1:
        return None
    own = dist.distributed_c10d._get_default_store().clone()  # one of its own: the thread must not wait for others' calls
    return Watchdog(dist.PrefixStore("watchdog", own), timeout)
