"""One process that takes the place of any rank of a world that does not exist, with tensors that have shapes only.

torch's fake process group answers every collective at once and moves nothing; on meta tensors nothing is allocated
either. So a laptop builds what rank 300 of 512 would hold. It serves dry runs; the process is of no other use after.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from parallel import cpu
from parallel.start import Sizes, make_groups, prepare_megatron, stop

META = torch.device("meta")


@contextmanager
def fake_rank(rank: int, ranks: int, sizes: Sizes) -> Iterator[torch.device]:
    """Process groups as `rank` of `ranks` has them, and the device to build on."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cpu.install(META)
    prepare_megatron()
    hook = sys.excepthook  # torch puts its own around it each time, which prints the rank before every line
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    sys.excepthook = hook
    try:
        make_groups(sizes)
        with META:  # also what is built without naming a device
            yield META
    finally:
        stop()
