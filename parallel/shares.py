"""Each rank's share of the distributed optimizer in a checkpoint: written and read by itself, nothing is gathered.

Of each weight on a rank the optimizer owns a range of its numbers, in their order in memory. In a checkpoint its states
have names and shapes of whole weights, as in Megatron's "fully reshardable" format, so that any layout can read them. A
range of a tensor is at most a few boxes of it: the rest of a row, whole rows, the beginning of one. Megatron itself
gathers the states of all weights on every rank before it writes, and reads them whole: 12 bytes of each in host memory.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

STATES = ("param", "exp_avg", "exp_avg_sq")  # Megatron's names in checkpoints; all FP32
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and size


def boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """The numbers from `start` to `stop` of a tensor of that shape, as boxes that follow each other in memory."""
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    inner = math.prod(shape[1:])
    while start < stop:
        row, column = divmod(start, inner)
        rows = 0 if column else (stop - start) // inner
        if rows:
            yield (row, *[0] * (len(shape) - 1)), (rows, *shape[1:])
            start += rows * inner
        else:
            end = min(stop - row * inner, inner)
            for offset, size in boxes(column, end, shape[1:]):
                yield (row, *offset), (1, *size)
            start = row * inner + end


def described(optimizer: DistributedOptimizer, model: dict, is_loading: bool) -> dict:
    """The share as sharded tensors, which `model`, the sharded state of all weights, says the places of."""
    places = {id(entry.data): entry for entry in nested_values(model) if hasattr(entry, "data")}
    found = {}
    for number, parameter in enumerate(optimizer.model_param_gbuf_map):
        own = optimizer._get_model_param_range_map(parameter)["param"]
        held = {} if is_loading else optimizer._get_main_param_and_optimizer_states(parameter)
        cuts = list(_cuts(places[id(parameter)], own.start, own.end))
        found[str(number)] = {
            name: {str(index): _part(cut, name, held.get(name)) for index, cut in enumerate(cuts)} for name in STATES
        }
    return found


def _cuts(
    place: ShardedTensor | ShardedTensorFactory, start: int, stop: int
) -> Iterator[tuple[ShardedTensor, Box, int]]:
    """Sharded tensor of the model, box in its local part, and where that begins in the share, one after the other.

    A weight that is described in parts must be so as views of it without gaps.
    """
    whole = place.data
    entries = nested_values(place.build()) if isinstance(place, ShardedTensorFactory) else [place]
    for entry in sorted(entries, key=lambda entry: entry.data.storage_offset()):
        is_view = entry.data.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert is_view and entry.data.is_contiguous(), entry
        before = entry.data.storage_offset() - whole.storage_offset()
        begin, end = max(start - before, 0), min(stop - before, entry.data.numel())
        done = before + begin - start
        for offset, size in boxes(begin, end, entry.local_shape) if begin < end else ():
            yield entry, (offset, size), done
            done += math.prod(size)


def _part(cut: tuple[ShardedTensor, Box, int], name: str, share: Tensor | None) -> ShardedTensor:
    entry, (offset, size), begin = cut
    before = entry.prepend_axis_num
    offset, size = (0,) * before + offset, (1,) * before + size
    *replica, _ = entry.replica_id  # the last is the data-parallel rank, and these share out what they have in common
    return ShardedTensor(
        f"optimizer.state.{name}.{entry.key}",
        None if share is None else share.detach()[begin : begin + math.prod(size)].view(size),
        torch.float32,
        size,
        entry.global_shape,
        tuple(first + more for first, more in zip(entry.global_offset, offset, strict=True)),
        None,  # no regular grid
        (*replica, 0),
    )


@torch.no_grad()
def take(optimizer: DistributedOptimizer, loaded: dict) -> None:
    """Give the optimizer its share, read into what `described` returned."""
    for number, parameter in enumerate(optimizer.model_param_gbuf_map):
        joined = {
            name: torch.cat([parts[str(index)].flatten() for index in range(len(parts))])
            for name, parts in loaded.pop(str(number)).items()
        }
        optimizer._set_main_param_and_optimizer_states(parameter, joined)
    if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
        optimizer.optimizer._sync_hdo_state_to_sub_optimizers()
