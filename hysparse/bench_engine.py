"""What the benchmarks of whole training steps share: a configuration and random batches."""

from collections.abc import Sequence

import torch
from hydra import compose, initialize_config_dir
from megatron.core import parallel_state
from omegaconf import OmegaConf

from hysparse.checks import check
from hysparse.compose import CONF, refuse_unknown, register
from hysparse.config import Config, PhaseConfig
from parallel.engines import MicroBatch


def configuration(arguments: Sequence[str], ranks: int) -> Config:
    """As `train.py` would read its arguments on so many ranks. Raises ConfigError."""
    register()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        composed = compose("config", list(arguments))
    refuse_unknown(composed, Config, "")
    config = OmegaConf.to_object(composed)
    check(config, ranks)
    return config


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
