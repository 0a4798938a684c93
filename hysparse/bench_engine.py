"""What the benchmarks of whole training steps share: a configuration, the engine that trains it, and random batches."""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from hydra import compose, initialize_config_dir
from megatron.core import parallel_state
from omegaconf import OmegaConf

from hysparse.checks import check
from hysparse.compose import CONF, refuse_unknown, register
from hysparse.config import Config, PhaseConfig
from hysparse.initialise import initialise
from hysparse.model import build_chunk, transformer_config
from hysparse.plan import Plan, pipeline_stages
from hysparse.trainer import computes_in_bf16, forward, select_operators
from parallel.engines import AdamW, MicroBatch
from parallel.megatron_engine import MegatronEngine
from parallel.placement import megatron_layout


def configuration(arguments: Sequence[str], ranks: int) -> Config:
    """As `train.py` would read its arguments on so many ranks. Raises ConfigError."""
    register()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        composed = compose("config", list(arguments))
    refuse_unknown(composed, Config, "")
    config = OmegaConf.to_object(composed)
    check(config, ranks)
    return config


def make_engine(config: Config, device: torch.device) -> MegatronEngine:
    """The engine of this process, as the trainer builds it. Process groups exist."""
    stages, operators = pipeline_stages(config, Plan(config.model, config.attention)), select_operators(config)

    def build(transformer, pre_process: bool, post_process: bool, vp_stage: int | None):
        chunk = build_chunk(config, transformer, stages, operators, pre_process, post_process, vp_stage)
        initialise(chunk.sharded_state_dict(), config.run.seed, config.model.init_std, config.model.layers)
        return chunk

    transformer = transformer_config(config, megatron_layout(stages), computes_in_bf16(config))
    return MegatronEngine(transformer, build, forward, AdamW(**asdict(config.optim)), device, config.parallel.overlap)


def random_batches(config: Config, phase: PhaseConfig, device: torch.device) -> list[MicroBatch]:
    """This rank's micro-batches of a step: random tokens, each sequence one document."""
    B, S, vocabulary = phase.micro_batch, phase.sequence_length, config.model.vocabulary
    count = phase.global_batch // (B * parallel_state.get_data_parallel_world_size())
    generator = torch.Generator(device).manual_seed(parallel_state.get_data_parallel_rank())
    batches = []
    for _ in range(count):
        tokens = torch.randint(vocabulary, (B, S + 1), generator=generator, device=device)
        start = torch.zeros(B, S, dtype=torch.int32, device=device)
        mask = torch.ones(B, S, device=device)
        batches.append({"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "document_start": start, "loss_mask": mask})
    return batches
