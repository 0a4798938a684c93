"""Ending a run early, but in order: at the same step on all ranks, so that they can save a checkpoint together.

SIGUSR1 is Slurm's warning before a job's time is over, SIGTERM a preemption, SIGINT a person; a time limit is the same
without a scheduler. What follows from the request is decided by the trainer.
"""

import os
import signal
import sys
import threading
import time

import torch

GO_ON = 75  # exit code: stopped early with a checkpoint; the same command goes on
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
TIME_LIMIT = 1  # as a request beside the numbers of the signals, all of which are larger
assert TIME_LIMIT not in SIGNALS
ONE_REQUEST = 1.0  # seconds; Ctrl-C reaches a rank from the terminal and again through torchrun


class Stopping:
    """Requests to stop, received from its creation to `close()`. A second signal ends the process at once.

    Python runs signal handlers between two of its own instructions, which a rank that hangs in a collective never
    reaches. So the interpreter's C handler writes each signal's number into a pipe, and a thread reads it.
    """

    def __init__(self, time_limit: float | None = None):
        self._deadline = time.monotonic() + time_limit if time_limit is not None else None
        self._signal = 0
        self._open = True
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._before = [signal.signal(number, lambda *_: None) for number in SIGNALS]
        self._wakeup_before = signal.set_wakeup_fd(writing)
        os.register_at_fork(after_in_child=self._in_child)
        threading.Thread(target=self._receive, args=(reading,), name="stopping", daemon=True).start()

    def agreed(self, device: torch.device) -> str | None:
        """Why the run should stop, if any rank was asked to; all ranks call this after the same step."""
        wanted = self._signal
        if not wanted and self._deadline is not None and time.monotonic() >= self._deadline:
            wanted = TIME_LIMIT
        request = torch.tensor(wanted, device=device)
        torch.distributed.all_reduce(request, torch.distributed.ReduceOp.MAX)
        wanted = int(request)
        if not wanted:
            return None
        return "the time limit" if wanted == TIME_LIMIT else signal.Signals(wanted).name

    def close(self, ignore: bool = False) -> None:
        """Give signals back to who had them; with `ignore`, none may change the exit code from now on. Done once."""
        if not self._open:
            return
        self._open = False
        signal.set_wakeup_fd(self._wakeup_before)
        for number, before in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, signal.SIG_IGN if ignore else before)

    def _receive(self, pipe: int) -> None:
        first = None
        while True:
            for number in os.read(pipe, 64):
                if number not in SIGNALS or not self._open:
                    continue
                if first is None:
                    first, self._signal = time.monotonic(), number
                elif time.monotonic() - first > ONE_REQUEST:
                    print(f"\n{signal.Signals(number).name} again: stopped at once", file=sys.stderr, flush=True)
                    os._exit(128 + number)

    def _in_child(self) -> None:
        """Processes that write a checkpoint get the signals of the whole group, and should finish their files."""
        if self._open:
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
