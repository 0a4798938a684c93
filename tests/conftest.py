"""Shared by all tests: one-process Megatron for the session, real process groups on request."""

import os
import traceback
from collections.abc import Callable
from unittest import mock

import pytest
import torch

from parallel.terminal import quiet_third_parties
from tests.forks import free_port

quiet_third_parties()
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined: they then run on CPU tensors
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # another worker has the other cores


@pytest.fixture(scope="session")
def megatron() -> torch.device:
    """Process groups of one rank, made once; on a machine without a GPU with the CPU stand-in."""
    from parallel.start import Sizes, start

    return start(Sizes())


def run_processes(function: Callable, processes: int, *arguments) -> list:
    """What `function(*arguments)` returned on each of several processes that torchrun's variables describe.

    They are forks of a process that has imported torch and Megatron and done nothing else, which takes 5 seconds once.
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "hysparse.trainer"])
    queue = context.SimpleQueue()
    port = free_port()
    workers = [
        context.Process(target=_worker, args=(queue, function, rank, processes, port, arguments))
        for rank in range(processes)
    ]
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # before the first one imports torch
        for worker in workers:
            worker.start()
    results = dict(queue.get() for _ in workers)
    for worker in workers:
        worker.join()
    failures = [result for result in results.values() if isinstance(result, str) and result.startswith("Traceback")]
    assert not failures, "\n".join(failures)
    return [results[rank] for rank in range(processes)]


def _worker(queue, function: Callable, rank: int, processes: int, port: int, arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    quiet_third_parties()
    try:
        result = function(*arguments)
    except BaseException:
        result = traceback.format_exc()
    queue.put((rank, result))
