"""Initial weights that do not depend on the layout: the same seed gives the same model on any number of ranks.

Every tensor is drawn whole from a generator keyed by the seed and the tensor's name in the whole model, and each rank
keeps its slice. Name and slice come from the description that also writes checkpoints.
"""

import hashlib

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, apply_factories
from torch import Tensor

WRITES_TO_RESIDUAL = ("linear_out", "linear_fc2")


@torch.no_grad()
def initialise(state: ShardedStateDict, seed: int, std: float, layers: int) -> None:
    """Fill the tensors that `state`, a sharded state dict of the model, points to.

    Norms 1, sinks 0, matrices normal with `std`; those that write to the residual stream with std / sqrt(2 layers),
    which keeps its variance independent of depth (GPT-2).
    """
    apply_factories(state)  # a SwiGLU projection is two tensors, gate and up
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor) and tensor.data is not None and tensor.data.is_floating_point():
            _fill(tensor, seed, std, layers)


def _fill(tensor: ShardedTensor, seed: int, std: float, layers: int) -> None:
    name, data, shape, offset = tensor.key, tensor.data, tensor.global_shape, tensor.global_offset
    if any(part in name for part in WRITES_TO_RESIDUAL):
        std = std / (2 * layers) ** 0.5
    if name.endswith("norm.weight"):
        data.fill_(1)
    elif name.endswith(("_sink", "expert_bias")):
        data.zero_()
    elif ".experts." in name:  # each on its own
        for index, expert in enumerate(data.view(-1, *data.shape[1 - len(shape) :])):  # or one expert alone
            _draw(expert, f"{seed}/{name}/{(offset[0] + index,)}", shape[1:], offset[1:], std)
    else:
        _draw(data, f"{seed}/{name}/()", shape, offset, std)


def _draw(target: Tensor, key: str, shape: tuple[int, ...], offset: tuple[int, ...], std: float) -> None:
    """Fill `target`, the part at `offset` of a normal tensor of `shape` that is drawn from `key`."""
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    generator = torch.Generator(target.device).manual_seed(int.from_bytes(digest, "little"))
    whole = torch.randn(shape, generator=generator, device=target.device) * std
    target.copy_(whole[tuple(slice(start, start + size) for start, size in zip(offset, target.shape, strict=True))])
