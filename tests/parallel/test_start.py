"""Processes that were started differently say so, instead of waiting for each other."""

import os

import torch

from parallel.ranks import rank
from parallel.start import Sizes, StartError, start, stop
from tests.conftest import run_processes

SAME = "start all ranks with the same arguments and files"
CASES = [  # the settings of both ranks, and what each says
    (
        [{"parallel.tensor": "1"}, {"parallel.tensor": "2"}],
        f"parallel.tensor is 1 on rank 0 and 2 on rank 1; {SAME}",
    ),
    ([{}, {"max_steps": "3"}], f"max_steps is None on rank 0 and 3 on rank 1; {SAME}"),
    ([{"a": "1", "b": "2"}, {"b": "2", "a": "1"}], "cpu"),
]


def start_with_each(cases: list[list[dict]]) -> list[str]:
    """The message of the error, or the name of the device."""
    first_port, shown = int(os.environ["MASTER_PORT"]), []
    for index, settings in enumerate(cases):
        os.environ["MASTER_PORT"] = str(first_port + index)  # the old one may still be closing
        try:
            shown.append(str(start(Sizes(), settings=settings[rank()])))
            stop()
        except StartError as error:
            shown.append(str(error))
            torch.distributed.destroy_process_group()
    return shown


def test_every_rank_names_the_setting_in_which_ranks_differ():
    settings, expected = zip(*CASES, strict=True)
    assert run_processes(start_with_each, 2, list(settings)) == [list(expected)] * 2
