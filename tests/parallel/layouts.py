"""What the processes of the layout tests run: the small model under one layout after another, from the same weights.

`LAYOUTS` is the table of layouts; all tests of it hold for a line that is added.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hysparse.choices import Recompute
from hysparse.config import Config
from hysparse.plan import Plan, pipeline_stages
from parallel import checkpoint
from parallel.placement import megatron_layout
from parallel.start import start, stop
from tests.models import ROPE_BASE, build_model, packed_batch, small_config

FOUR_BLOCKS = {"layers": 8, "ratio": 2}  # FSS FSS F F; two KV heads, four query heads, four experts
ADAMW = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-10, "weight_decay": 0.1, "clip": 1.0}
FULL = {"recompute": Recompute.full}

# What differs from one rank, by number of ranks: keys of `parallel` and micro_batch.
LAYOUTS = {
    2: {
        "data 2, two sequences a micro-batch": {"micro_batch": 2},
        "data 2, nothing overlapped, half of the optimizer in host memory": {
            "micro_batch": 2,
            "overlap": False,
            "offload_optimizer": 0.5,
            **FULL,
        },
        "tensor 2": {"tensor": 2, **FULL},
        "tensor 2, nothing recomputed": {"tensor": 2},
        "pipeline 2": {"pipeline": 2, **FULL},
        "pipeline 2, placed by hand, nothing recomputed": {"pipeline": 2, "layout": [3, 1]},
        "pipeline 2 x virtual 2": {"pipeline": 2, "virtual": 2, **FULL},
        "pipeline 2 x virtual 2, a layer of each chunk recomputed in full": {
            "pipeline": 2,
            "virtual": 2,
            "recompute_layers": 1,
            **FULL,
        },
        "expert 2": {"expert": 2, **FULL},
        "context 2": {"context": 2, **FULL},
    },
    4: {
        "tensor 4, two ranks a KV head": {"tensor": 4, **FULL},
        "tensor 2 x pipeline 2": {"tensor": 2, "pipeline": 2, **FULL},
        "pipeline 2 x expert 2": {"pipeline": 2, "expert": 2, **FULL},
        "tensor 2 x expert 2": {"tensor": 2, "expert": 2, **FULL},
        "pipeline 2 x virtual 2 x tensor 2 x expert 2, recomputed selectively": {
            "pipeline": 2,
            "virtual": 2,
            "tensor": 2,
            "expert": 2,
            "recompute": Recompute.selective,
        },
        "context 4": {"context": 4, **FULL},
        "context 2 x tensor 2": {"context": 2, "tensor": 2, **FULL},
        "pipeline 2 x virtual 2 x context 2": {"pipeline": 2, "virtual": 2, "context": 2, **FULL},
        "context 2 x expert 2 x pipeline 2": {
            "context": 2,
            "expert": 2,
            "pipeline": 2,
            "offload_optimizer": 1.0,
            **FULL,
        },
    },
}


def config_of(layout: dict) -> Config:
    layout = dict(layout)
    micro = layout.pop("micro_batch", 1)
    config = small_config(**FOUR_BLOCKS, **layout)
    config.phases["only"].micro_batch = micro
    config.attention.window = 9  # with 4 context-parallel ranks a chunk has 8 tokens, as many as it reaches back
    return config


def make_engine(config: Config):
    """The engine of this process under `config.parallel`, as the trainer builds it."""
    from megatron.core import parallel_state

    from hysparse.model import group_sizes, transformer_config
    from hysparse.trainer import forward
    from parallel.engines import AdamW
    from parallel.megatron_engine import MegatronEngine

    sizes = config.parallel
    device = start(group_sizes(config))
    stages = pipeline_stages(config, Plan(config.model, config.attention))

    def build(transformer, pre, post, vp_stage):
        stage = (vp_stage or 0) * sizes.pipeline + parallel_state.get_pipeline_model_parallel_rank()
        return build_model(config, stages[stage], pre, post, transformer, vp_stage)

    transformer = transformer_config(config, megatron_layout(stages), False)
    return MegatronEngine(transformer, build, forward, AdamW(**ADAMW), device, sizes.overlap, sizes.offload_optimizer)


def train(engine, config: Config, steps: int, learning_rate: float = 1e-2) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step on four packed sequences, one a micro-batch times the data-parallel share."""
    from megatron.core import parallel_state

    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    micro = config.phases["only"].micro_batch
    results = []
    for step in range(steps):
        rows = packed_batch(config, rows=4, seed=step)
        mine = {name: tensor.chunk(ranks)[rank] for name, tensor in rows.items()}
        batches = [
            {name: tensor[start : start + micro] for name, tensor in mine.items()}
            for start in range(0, 4 // ranks, micro)
        ]
        done = engine.step(batches, learning_rate, rope_base=ROPE_BASE)
        results.append((done.loss, done.gradient_norm))
    return results


def capture_gradients(engine) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    """A dict that the engine's next step fills: the gradient of every shard of a weight on this rank.

    By the weight's name in the whole model and the shard's offset in it; read before clipping and before the update.
    """
    gradients, update = {}, engine.optimizer.step

    def step():
        gradients.update(_gradients(engine))
        engine.optimizer.step = update
        return update()

    engine.optimizer.step = step
    return gradients


def _gradients(engine) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    owned = {}  # the distributed optimizer reduces only the part of a gradient that belongs to this rank
    for optimizer in engine.optimizer.chained_optimizers:
        for parameter in optimizer.model_param_gbuf_map:
            owned[id(parameter)] = optimizer._get_model_param_range_map(parameter)["param"]
    whole = {}
    for parameter in (parameter for module in engine.modules for parameter in module.parameters()):
        gradient = torch.zeros_like(parameter.main_grad)
        if part := owned.get(id(parameter)):
            gradient.view(-1)[part.start : part.end] = parameter.main_grad.view(-1)[part.start : part.end]
        shared = getattr(parameter, "allreduce", True)
        torch.distributed.all_reduce(
            gradient,
            group=parallel_state.get_data_parallel_group(with_context_parallel=True)
            if shared
            else parallel_state.get_expert_data_parallel_group(),
        )
        whole[id(parameter)] = gradient
    found, group = {}, parallel_state.get_data_parallel_group(with_context_parallel=True)
    for module in engine.modules:
        described = module.sharded_state_dict(metadata={"dp_cp_group": group})
        state = {
            name: replace(tensor, data=whole[id(tensor.data)])
            for name, tensor in described.items()
            if id(tensor.data) in whole
        }
        assert len(state) == len(list(module.parameters()))
        apply_factories(state)
        found |= {(shard.key, shard.global_offset): shard.data for shard in nested_values(state)}
    return found


class Trained(NamedTuple):
    """What one rank has to tell of a layout."""

    fresh: list[tuple[float, float]]  # losses and norms from the initial weights
    gradients: dict  # of the first step, as `capture_gradients` says
    load: np.ndarray  # [layers, experts]: rows of each expert in these steps, over all ranks
    saved: Path  # checkpoint of these steps
    resumed: list[tuple[float, float]]  # losses and norms from a checkpoint


def ring(layouts: dict[str, dict], source: Path, folder: Path, steps: int, learning_rate: float) -> dict[str, Trained]:
    """Each layout from the initial weights, which it then saves; then from the checkpoint that the last one saved.

    The first reads `source`.
    """
    from hysparse.expert_load import measure

    first_port, results = int(os.environ["MASTER_PORT"]), {}
    for index, (name, layout) in enumerate(layouts.items()):
        os.environ["MASTER_PORT"] = str(first_port + index)  # the old one may still be closing
        config = config_of(layout)
        engine = make_engine(config)
        gradients = capture_gradients(engine)
        fresh = train(engine, config, steps, learning_rate)
        load = measure(engine.modules, range(config.model.layers), config.model.moe.experts).rows.numpy()
        saved = checkpoint.save(folder / f"layout{index}", steps, engine.state(), {})
        engine.load_state(checkpoint.load(source, lambda engine=engine: engine.state(is_loading=True)))
        arrays = {shard: gradient.numpy() for shard, gradient in gradients.items()}  # tensors die with their process
        results[name] = Trained(fresh, arrays, load, saved, train(engine, config, steps, learning_rate))
        source = saved
        torch.distributed.barrier()
        stop()
    return results


def one_rank(folder: Path, steps: int) -> tuple:
    """Trained from the initial weights, saved after three steps, trained on."""
    config = small_config(**FOUR_BLOCKS)
    engine = make_engine(config)
    fresh = train(engine, config, 3)
    torch.distributed.barrier()
    checkpoint.save(folder, 3, engine.state(), {})
    after = train(engine, config, steps)
    stop()
    return fresh, after
