"""How evenly the experts of each layer are used: counted on the devices, read at an interval (drawn by `plot.py`).

Routers add up their rows without anyone looking (`ffn.Router.load`). `measure` fetches and clears the counts of the
whole model; it is the only place that waits for them. Nothing is ever dropped: every expert takes all of its rows.
"""

import math
from collections.abc import Iterable

import torch
from megatron.core import parallel_state
from torch import Tensor

from hysparse.ffn import Router


@torch.no_grad()
def measure(chunks: Iterable[torch.nn.Module], layers: int, experts: int) -> tuple[Tensor, Tensor]:
    """Rows of every expert since the last call, over all ranks, and the expert biases: [layers, experts], on the CPU.

    All ranks must call it. `chunks` are the model chunks of this one.
    """
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]
    device = torch.cuda.current_device()
    load = torch.zeros(layers, experts, dtype=torch.int64, device=device)
    bias = torch.zeros(layers, experts, device=device)
    for router in routers:
        load[router.layer_number - 1] = router.load
        if router.expert_bias is not None:
            bias[router.layer_number - 1] = router.expert_bias
        router.load.zero_()
    # ranks that see other tokens of the same layers, then stages with other layers
    torch.distributed.all_reduce(load, group=parallel_state.get_tensor_and_data_parallel_group(True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        for numbers in (load, bias):
            torch.distributed.all_reduce(numbers, group=parallel_state.get_pipeline_model_parallel_group())
    return load.cpu(), bias.cpu()


def summary(load: Tensor, bias: Tensor) -> dict[str, list]:
    """For each layer: busiest expert over the mean, idle experts, evenness (entropy over that of equal load), spread of
    the bias (largest minus smallest); and the load itself in percent of the mean.
    """
    mean = load.double().mean(1, keepdim=True).clamp(min=1e-9)
    share = load / load.sum(1, keepdim=True).clamp(min=1)
    entropy = -torch.special.xlogy(share, share).sum(1) / math.log(max(load.shape[1], 2))
    return {
        "max_over_mean": [round(value, 3) for value in (load.amax(1) / mean[:, 0]).tolist()],
        "idle": (load == 0).float().mean(1).tolist(),
        "evenness": [round(value, 4) for value in entropy.tolist()],
        "bias_spread": [round(value, 6) for value in (bias.amax(1) - bias.amin(1)).tolist()],
        "load": (100 * load / mean).round().int().tolist(),
    }
