"""A rank that waits too long for others says which of them are behind, where they were last seen, and ends.

Every rank has a thread that tells a store, once a second, in which phase of which step its rank is. torch has two
relatives: `monitored_barrier` names missing ranks, but over gloo only and as one more barrier; NCCL's flight recorder
writes down collectives, not what a rank did instead of taking part.
"""

import contextlib
import os
import sys
import threading
import time
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

PHASES = ("start", "data", "forward-backward", "optimizer", "evaluation", "checkpoint")  # in the order of a step
UNLIMITED = ("start", "checkpoint")  # as long as all live: reading and writing a terabyte takes what it takes
FIRST = 3  # times the timeout for a process's first step, in which pipeline stages compile kernels one after the other
LOST = 70  # exit code: ended because of other ranks
NAMED = 8  # ranks in a message at most
GRACE = 10.0  # seconds in which others speak: launchers end all as soon as one has ended, which then looks dead


class Seen(NamedTuple):
    """What a rank last told about itself."""

    step: int
    phase: str
    beats: int  # counted by its thread: standing still, the process is dead or stopped

    @property
    def order(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase)

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step}"


class Watchdog:
    """Ends this process `timeout` seconds after the last `enter`, or when the store is lost, which rank 0 keeps.

    In phases that are UNLIMITED it ends only if the thread of another rank has been silent for `timeout` seconds.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, timeout: float):
        self.store, self.rank, self.ranks, self.timeout = store, rank, ranks, timeout
        self.interval = min(1.0, timeout / 5)  # seconds
        self._place, self._since, self._beats = (0, PHASES[0]), time.monotonic(), 0
        self._steps = 0  # begun by this process
        self._first = Seen(0, PHASES[0], 0)  # what is known of rank 0, of which nobody knows more once it is gone
        self._failures, self._closed = 0, threading.Event()
        for loop in (self._tell, self._watch):
            threading.Thread(target=loop, name="watchdog", daemon=True).start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """This rank begins `phase`, or goes on with it; of the same step unless told otherwise."""
        self._steps += step is not None
        self._place, self._since = (self._place[0] if step is None else step, phase), time.monotonic()

    def close(self) -> None:
        """From now on no other rank is needed."""
        self._closed.set()

    def report(self) -> str | None:
        """Which ranks keep this one waiting, and where they were last seen; None if all are well and none is behind."""
        own = Seen(*self._place, 0)
        before = self._ask_all()
        time.sleep(2.5 * self.interval)
        after = self._ask_all()
        return self._compare(own, before if len(before) == len(after) else after, after)

    def _compare(self, own: Seen, before: list[Seen], after: list[Seen]) -> str | None:
        lines = []
        for other, seen in enumerate(after):
            if other == self.rank:
                continue
            if seen.beats == before[other].beats:
                lines.append(f"  rank {other} is dead or stopped; last seen in {seen}")
            elif own.phase not in UNLIMITED and seen.order < own.order:
                lines.append(f"  rank {other} is still in {seen}")
        if not lines:
            return None
        more = [f"  and {len(lines) - NAMED} more"] if len(lines) > NAMED else []
        return "\n".join([f"rank {self.rank}, in {own}, waits for others:", *lines[:NAMED], *more])

    def _ask(self, other: int) -> Seen:
        if not self.store.check([str(other)]):
            return Seen(0, PHASES[0], 0)
        step, phase, beats = self.store.get(str(other)).decode().split()
        return Seen(int(step), phase, int(beats))

    def _ask_all(self) -> list[Seen]:
        """What all ranks told, or what is known of rank 0 if its store does not answer."""
        found: list[Seen] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                found.extend([self._ask(other) for other in range(self.ranks)])

        asking = threading.Thread(target=ask, daemon=True)  # a stopped host lets it wait for ever
        asking.start()
        asking.join(5 * self.interval)
        return found or [self._first]

    def _tell(self) -> None:
        while not self._closed.wait(self.interval):
            self._beats += 1
            try:
                self.store.set(str(self.rank), "{} {} {}".format(*self._place, self._beats))
                self._first, self._failures = self._ask(0), 0
            except RuntimeError:
                self._failures += 1

    def _watch(self) -> None:
        looked, before = time.monotonic(), []  # at all ranks
        while not self._closed.wait(self.interval):
            own, now, text = Seen(*self._place, 0), time.monotonic(), None
            waited = now - self._since
            limit = self.timeout * (FIRST if self._steps < 2 else 1)
            # After that many failures rank 0 did not just end a little earlier than this rank.
            if self._failures > 5 or (own.phase not in UNLIMITED and waited > limit):
                text = self.report() or f"rank {self.rank} is still in {own}, and no other rank is behind it"
            elif own.phase in UNLIMITED and now - looked > self.timeout:
                after = self._ask_all()
                if len(before) == len(after):  # else rank 0's host was too busy for an answer
                    text = self._compare(own, before, after)
                looked, before = now, after
            if text and not self._closed.is_set():
                print(f"error: after {waited:.0f} s {text}", file=sys.stderr, flush=True)
                if not self._closed.wait(min(GRACE, self.timeout)):  # the run may end meanwhile
                    os._exit(LOST)


def connect(timeout: float) -> Watchdog | None:
    """The watchdog of this process, whose process groups exist; a single rank needs none.

    From then on it decides how long ranks wait, and torch, which knows no phases, gives up only after a day.
    """
    if dist.get_world_size() == 1:
        return None
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(days=1), group)
    store = dist.distributed_c10d._get_default_store().clone()  # calls on one connection wait for each other
    return Watchdog(dist.PrefixStore("watchdog", store), dist.get_rank(), dist.get_world_size(), timeout)
