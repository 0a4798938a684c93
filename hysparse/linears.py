"""Who computes the matrix products of a layer: Megatron's linear layers and our grouped experts, or Transformer Engine.

In FP8 the projections of attention, dense and shared feed-forward halves and the experts are Transformer Engine's, with
one recipe: current scaling of each tensor, E4M3 forward, E5M2 for gradients. It keeps no state between steps, so that
checkpoints are those of BF16. Attention itself, the router, norms, embedding and head stay as in BF16.
"""

import importlib.metadata
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from hysparse.choices import ExpertProducts, Precision
from hysparse.config import Config, ConfigError

FP8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}  # fields of Megatron's TransformerConfig
OLDEST_FP8 = (8, 9)  # compute capability


class Linears(NamedTuple):
    column: type = ColumnParallelLinear
    row: type = RowParallelLinear
    experts_by_engine: bool = False  # the grouped products are Transformer Engine's


MEGATRON = Linears()


def select_linears(config: Config) -> Linears:
    """What `precision=` and `experts=` ask for. Raises ConfigError where this machine lacks it."""
    fp8, by_engine = config.precision is Precision.fp8, config.experts is ExpertProducts.te
    asked = [f"precision={config.precision}"] * fp8 + [f"experts={config.experts}"] * by_engine
    if asked and (lacks := _machine_lacks(fp8)):
        raise ConfigError(f"{' and '.join(asked)} cannot run: {lacks}; or use precision=bf16 experts=auto")
    if not fp8:
        return Linears(experts_by_engine=by_engine)
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return Linears(TEColumnParallelLinear, TERowParallelLinear, experts_by_engine=True)


def _machine_lacks(fp8: bool) -> str | None:
    try:
        importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return "the package transformer-engine is not installed; pip install transformer-engine[pytorch]"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if fp8 and capability < OLDEST_FP8:
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {capability[0]}.{capability[1]}; FP8 needs 8.9 or newer"
    return None
