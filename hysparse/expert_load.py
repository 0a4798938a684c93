"""How evenly the experts of each layer are used: counted on the devices, read at an interval (drawn by `plot.py`).

Routers add up their rows without anyone looking (`ffn.Router.load`). `measure` fetches and clears the counts of the
whole model; it is the only place that waits for them.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor

from hysparse.ffn import Router


class Load(NamedTuple):
    """Of all layers with experts, over all ranks, since the last call; on the CPU."""

    rows: Tensor  # [layers, experts] int64: how often each expert was chosen
    dropped: Tensor  # [layers] int64: rows among them that found no room
    bias: Tensor  # [layers, experts], of the experts


@torch.no_grad()
def measure(chunks: Iterable[torch.nn.Module], layers: range, experts: int) -> Load:
    """All ranks must call it. `chunks` are the model chunks of this one, `layers` those of the model with experts."""
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]
    device = torch.cuda.current_device()
    counted = torch.zeros(len(layers), experts + 1, dtype=torch.int64, device=device)  # and the dropped ones
    bias = torch.zeros(len(layers), experts, device=device)
    for router in routers:
        layer = layers.index(router.layer_number - 1)
        counted[layer, :experts], counted[layer, experts] = router.load, router.dropped
        if router.expert_bias is not None:
            bias[layer] = router.expert_bias
        router.load.zero_()
        router.dropped.zero_()
    # ranks that see other tokens of the same layers, then stages with other layers
    ranks_of_stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(counted, group=ranks_of_stage)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        for numbers in (counted, bias):
            torch.distributed.all_reduce(numbers, group=parallel_state.get_pipeline_model_parallel_group())
    counted = counted.cpu()
    return Load(counted[:, :experts], counted[:, experts], bias.cpu())


def summary(load: Load) -> dict[str, list]:
    """For each layer: busiest expert over the mean, idle experts, evenness (entropy over that of equal load), share of
    the rows that were dropped, spread of the bias (largest minus smallest); and the load itself in percent of the mean.
    """
    rows, bias = load.rows, load.bias
    total = rows.sum(1).clamp(min=1)
    mean = rows.double().mean(1, keepdim=True).clamp(min=1e-9)
    share = rows / total.unsqueeze(1)
    entropy = -torch.special.xlogy(share, share).sum(1) / math.log(max(rows.shape[1], 2))
    return {
        "max_over_mean": [round(value, 3) for value in (rows.amax(1) / mean[:, 0]).tolist()],
        "idle": (rows == 0).float().mean(1).tolist(),
        "evenness": [round(value, 4) for value in entropy.tolist()],
        "dropped": [round(value, 6) for value in (load.dropped / total).tolist()],
        "bias_spread": [round(value, 6) for value in (bias.amax(1) - bias.amin(1)).tolist()],
        "load": (100 * rows / mean).round().int().tolist(),
    }
