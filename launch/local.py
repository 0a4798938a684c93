"""The members of a sweep as processes of this machine: one after another, or side by side with GPUs of their own."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from hysparse.compose import CONF
from hysparse.config import AUTO
from launch.errors import LaunchError
from launch.sweep import Member, progress, target
from parallel.stopping import GO_ON, SIGNALS

TRAIN = CONF.parent / "train.py"
LOG = "train.log"  # in the member's folder; all its starts append
PATIENCE = 20  # seconds that the other ranks have to end by themselves after one has died
POLL = 0.2  # seconds
KILLED_BY_CTRL_C = 130  # exit code while a run composes its configuration
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")


class Running:
    """One member at work: `ranks` processes that see the GPUs `devices` ("" is none) and hold the file `lock`."""

    def __init__(self, member: Member, ranks: int, devices: str, threads: int, lock: int):
        self.member, self.devices, self.died = member, devices, None
        self.began = time.monotonic()
        member.folder.mkdir(parents=True, exist_ok=True)
        clean = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER}
        clean |= {"CUDA_VISIBLE_DEVICES": devices, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        clean |= {"WORLD_SIZE": str(ranks), "PYTHONUNBUFFERED": "1"}
        clean["TQDM_MININTERVAL"] = os.environ.get("TQDM_MININTERVAL", "10")  # seconds between progress lines in a log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            clean |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        command = [sys.executable, str(TRAIN), "hydra.mode=RUN", *member.overrides]
        with (member.folder / LOG).open("ab") as log:
            self.processes = [  # in sessions of their own: a signal from the terminal reaches them once, through us
                subprocess.Popen(
                    command,
                    env=clean | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=[lock],
                )
                for rank in range(ranks)
            ]

    def send(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)

    def ended(self) -> int | None:
        """The exit code once all ranks have left, the first one that is not 0; None while one works."""
        codes = [process.poll() for process in self.processes]
        bad = [code for code in codes if code]
        if None not in codes:
            return bad[0] if bad else 0
        if bad and self.died is None:
            self.died = time.monotonic()
        elif bad and time.monotonic() - self.died > PATIENCE:  # they wait for one that is gone
            self.send(signal.SIGKILL)
        return None

    def outcome(self, code: int) -> str:
        now, seconds = progress(self.member.folder), time.monotonic() - self.began
        if code == 0:
            return f"finished, {now.step:,} steps in {seconds:,.0f} s"
        if code == GO_ON:
            return f"saved and stopped at step {now.step:,} of {target(self.member.config):,}"
        log = self.member.folder / LOG
        complaints = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
        return f"failed with code {code}, see {log}" + (f"; {complaints[-1]}" if complaints and code == 2 else "")


def run_members(members: Sequence[Member], folder: Path, ranks: int, side_by_side: int | str) -> int:
    """Run all; one that fails does not stop the others. Returns 0, 75 if a signal stopped them, 1 if one failed.

    SIGUSR1, SIGTERM and SIGINT are handed on to the members at work, and no other is started after that.
    """
    places = _places(ranks, side_by_side)
    threads = max(1, (os.cpu_count() or 1) // (len(places) * ranks))
    waiting, running, codes, sent = list(members), [], {}, 0
    with _only_one(folder) as lock, _signals() as received:
        while running or (waiting and not received):
            while waiting and places and not received:
                running.append(Running(waiting.pop(0), ranks, places.pop(0), threads, lock))
            time.sleep(POLL)
            for number in received[sent:]:
                for work in running:
                    work.send(number)
            sent = len(received)
            for work in [work for work in running if work.ended() is not None]:
                code = work.ended()
                if received and (code == KILLED_BY_CTRL_C or -code in received):
                    code = GO_ON  # the signal came before the run could answer it
                running.remove(work)
                places.append(work.devices)
                codes[work.member.name] = code
                print(f"[{len(codes)}/{len(members)}] {work.member.name}: {work.outcome(code)}", flush=True)
    return _concluded(codes, stopped=bool(received))


def _concluded(codes: dict[str, int], stopped: bool) -> int:
    failed = [name for name, code in codes.items() if code not in (0, GO_ON)]
    if failed:
        print(f"{len(failed)} failed; the same command takes them up again: {', '.join(failed)}")
    if stopped or GO_ON in codes.values():
        print(f"Stopped; the same command goes on, exit code {GO_ON} says so to scripts")
        return GO_ON
    return 1 if failed else 0


def _places(ranks: int, side_by_side: int | str) -> list[str]:
    """The GPUs of each place for a member, as CUDA_VISIBLE_DEVICES takes them; "" where there are none."""
    if side_by_side != AUTO and (type(side_by_side) is not int or side_by_side < 1):
        raise LaunchError(f"hydra.launcher.side_by_side={side_by_side} must be a whole number of at least 1, or auto")
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [] if given == "" else list(map(str, range(torch.cuda.device_count())))
    if not devices:
        return [""] * (1 if side_by_side == AUTO else side_by_side)
    number = max(1, len(devices) // ranks) if side_by_side == AUTO else side_by_side
    if number * ranks > len(devices):
        raise LaunchError(
            f"hydra.launcher.side_by_side={side_by_side} x hydra.launcher.ranks={ranks} need more than the "
            f"{len(devices)} GPUs of this machine; use smaller numbers, or hydra/launcher=slurm"
        )
    return [",".join(devices[place * ranks : (place + 1) * ranks]) for place in range(number)]


@contextmanager
def _only_one(folder: Path) -> Iterator[int]:
    """Two such processes in one folder would start the same members. The lock's file belongs to the members, too:

    should this process be killed, none of them is started again before all have ended.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LaunchError(f"the sweep in {folder} is at work already; wait for it, or stop it first") from error
        yield lock.fileno()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The numbers of the signals that came, in place of what they would do."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
