"""What the processes of the layout tests run: the small model under one layout after another, from the same weights."""

import os
from pathlib import Path

import torch

from hysparse.config import Config
from hysparse.plan import Plan, pipeline_stages
from parallel import checkpoint
from parallel.placement import megatron_layout
from parallel.start import Sizes, start, stop
from tests.models import ROPE_BASE, build_model, packed_batch, small_config

FOUR_BLOCKS = {"layers": 8, "ratio": 2}  # FSS FSS F F
ADAMW = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-10, "weight_decay": 0.1, "clip": 1.0}


def make_engine(config: Config):
    """The engine of this process under `config.parallel`, as the trainer builds it."""
    from megatron.core import parallel_state

    from hysparse.model import transformer_config
    from hysparse.trainer import forward
    from parallel.engines import AdamW
    from parallel.megatron_engine import MegatronEngine

    sizes = config.parallel
    device = start(Sizes(sizes.tensor, sizes.pipeline, sizes.virtual, sizes.expert, sizes.context))
    stages = pipeline_stages(config, Plan(config.model, config.attention))

    def build(transformer, pre, post, vp_stage):
        stage = (vp_stage or 0) * sizes.pipeline + parallel_state.get_pipeline_model_parallel_rank()
        return build_model(config, stages[stage], pre, post, transformer, vp_stage)

    return MegatronEngine(
        transformer_config(config, megatron_layout(stages), False), build, forward, AdamW(**ADAMW), device
    )


def train(engine, config: Config, steps: int) -> list[tuple[float, float]]:
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
        done = engine.step(batches, 1e-2, rope_base=ROPE_BASE)
        results.append((done.loss, done.gradient_norm))
    return results


def under_layouts(layouts: list[dict], folder: Path, steps: int) -> list:
    """For each layout: train from the initial weights; then load the checkpoint in `folder` and train on from there."""
    first_port, results = int(os.environ["MASTER_PORT"]), []
    for index, layout in enumerate(layouts):
        os.environ["MASTER_PORT"] = str(first_port + index)  # the old one may still be closing
        layout = dict(layout)
        micro = layout.pop("micro_batch", 1)
        config = small_config(**FOUR_BLOCKS, **layout)
        config.phases["only"].micro_batch = micro
        engine = make_engine(config)
        fresh = train(engine, config, steps)
        state = checkpoint.load(folder / "step-00000003", lambda engine=engine: engine.state(is_loading=True))
        engine.load_state(state)
        results.append((fresh, train(engine, config, steps)))
        stop()
    return results


def one_rank(folder: Path, steps: int) -> tuple:
    """The reference: trained from the initial weights, saved after three steps, trained on."""
    config = small_config(**FOUR_BLOCKS)
    engine = make_engine(config)
    fresh = train(engine, config, 3)
    torch.distributed.barrier()
    checkpoint.save(folder, 3, engine.state(), {})
    after = train(engine, config, steps)
    stop()
    return fresh, after
