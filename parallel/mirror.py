"""A world of which one rank exists and holds real tensors: all others answer as if they held the same as it does.

Beside `fake.py`, whose tensors have shapes only, it is for measuring the memory of one rank of a large world on one
device: what arrives has the right size and sane values, although not the right ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


class _Done:
    """A request that has been answered."""

    def wait(self, timeout=None) -> bool:
        return True


def install() -> None:
    """Before Megatron is imported, which keeps some of these functions under names of its own."""

    def all_gather(output: Tensor, mine: Tensor, group=None, async_op: bool = False):
        for piece in output.view(-1, *mine.shape) if output.dim() == mine.dim() else output:
            piece.copy_(mine)
        return _Done() if async_op else None

    def reduce_scatter(output: Tensor, mine: Tensor, op=None, group=None, async_op: bool = False):
        output.copy_(mine.view(-1, *output.shape)[dist.get_rank(group)])
        return _Done() if async_op else None

    def all_to_all(output: Tensor, input: Tensor, output_split_sizes=None, input_split_sizes=None, group=None):
        output.zero_()
        for start in range(0, len(output), max(len(input), 1)):
            piece = output[start : start + len(input)]
            piece.copy_(input[: len(piece)])

    dist.all_gather_into_tensor, dist.reduce_scatter_tensor, dist.all_to_all_single = (
        all_gather,
        reduce_scatter,
        all_to_all,
    )


def _answer_neighbours() -> None:
    """What pipeline stages send arrives nowhere; what they receive is drawn."""
    from megatron.core.pipeline_parallel import p2p_communication

    def exchanged(**tensors) -> dict[str, _Done]:
        pairs = {name.removeprefix("tensor_"): x for name, x in tensors.items() if torch.is_tensor(x)}
        for name, tensor in pairs.items():
            if name.startswith("recv"):
                tensor.data.normal_()
        return dict.fromkeys(pairs, _Done())

    p2p_communication._p2p_ops = exchanged
    p2p_communication._batched_p2p_ops = lambda **tensors: list(exchanged(**tensors).values())


@contextmanager
def mirrored_rank(rank: int, ranks: int, make_groups) -> Iterator[torch.device]:
    """Process groups, made by `make_groups`, as `rank` of `ranks` has them; `install` was called before."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from parallel.start import prepare_megatron, stop

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        from parallel import cpu

        cpu.install()
    prepare_megatron()
    _answer_neighbours()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        make_groups()
        yield device
    finally:
        stop()
