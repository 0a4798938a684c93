"""`python train.py …` in tests without the six seconds in which Python imports torch and Megatron.

One process imports them, and each command is a fork of it that runs `train.py` as a script: with the arguments, the
environment and the signals that a new process would be given, and an end of its own as an interpreter. What is read
from the environment while torch is imported is the same for all.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAUNCHED = (  # what a launcher or the kernels' tests set
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_RESTART_COUNT",
    "TORCHELASTIC_RESTART_COUNT",
    "HYDRA_FULL_ERROR",
    "TRITON_INTERPRET",
)
SERVER = """
import gc, json, os, runpy, signal, sys
import hysparse.trainer, hydra.main, matplotlib.pyplot
gc.freeze()  # no child walks, and so copies, what is here already
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    arguments, environment, folder = json.loads(line)
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # this fork waits for the one that runs the command
    child = os.fork()
    if child == 0:
        for stream, path in enumerate(("/dev/null", f"{folder}/output", f"{folder}/errors")):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["train.py", *arguments]
        runpy.run_path("train.py", run_name="__main__")
        sys.exit()
    print(child, flush=True)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(f"{folder}/ends", "w") as file:
        file.write(str(code))
    os.rename(f"{folder}/ends", f"{folder}/ended")
    os._exit(0)
"""


def clean_environment() -> dict[str, str]:
    """One process on the CPU, started by nobody."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    """For ranks to find each other at: below those that the system itself hands out, to which another test may come."""
    while True:
        port = 10_000 + secrets.randbelow(10_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):  # nobody answers
                return port


@cache
def _server() -> subprocess.Popen:
    """It ends when its standard input is closed, so with this process."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, env=clean_environment(), **pipes)


class Fork:
    """`python train.py ARGUMENTS`, with what the tests use of `subprocess.Popen`."""

    def __init__(self, arguments: list[str], environment: dict[str, str] | None = None):
        self._folder = tempfile.TemporaryDirectory(prefix="fork")
        self.returncode: int | None = None
        server = _server()
        request = [list(map(str, arguments)), environment or clean_environment(), self._folder.name]
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        ended = Path(self._folder.name, "ended")
        if self.returncode is None and ended.exists():
            self.returncode = int(ended.read_text())
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("train.py", timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """What it wrote to stdout and stderr until it ended."""
        self.wait(timeout)
        return tuple(Path(self._folder.name, name).read_text() for name in ("output", "errors"))

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended, which nobody has written down yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
