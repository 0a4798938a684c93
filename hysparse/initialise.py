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
            tensor.data.copy_(_initial(tensor, seed, std, layers))


def _initial(tensor: ShardedTensor, seed: int, std: float, layers: int) -> Tensor:
    name, place = tensor.key, tensor.global_offset[: tensor.prepend_axis_num]  # place: which expert
    if name.endswith("norm.weight"):
        return torch.ones(tensor.local_shape)
    if name.endswith(("_sink", "expert_bias")):
        return torch.zeros(tensor.local_shape)
    digest = hashlib.blake2b(f"{seed}/{name}/{place}".encode(), digest_size=7).digest()
    device = tensor.data.device
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
    shape, offset = tensor.global_shape[tensor.prepend_axis_num :], tensor.global_offset[tensor.prepend_axis_num :]
    if any(part in name for part in WRITES_TO_RESIDUAL):
        std = std / (2 * layers) ** 0.5
    whole = torch.randn(shape, generator=generator, device=device) * std
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, tensor.data.shape, strict=True))]
