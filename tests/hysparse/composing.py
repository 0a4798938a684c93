"""How tests of the configuration compose one, and what a user sees of a mistake in it."""

import copy
from functools import cache

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from hysparse.compose import CONF, register, resolve
from hysparse.config import Config
from hysparse.mistakes import mistakes_without_traceback

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")

ONE_PHASE = (  # numbers that the table of contradictions builds on, whatever conf/ says
    "+experiment=tiny",
    "~phases.long_context",
    "model.layers=7",
    "phases.pretrain.tokens=1000000",
    "phases.pretrain.sequence_length=256",
    "phases.pretrain.global_batch=16",
    "phases.pretrain.micro_batch=2",
    "phases.pretrain.warmup_tokens=0",
    "phases.pretrain.decay_tokens=0",
)


@cache
def composed(*overrides: str, with_hydra: bool = False) -> DictConfig:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=with_hydra)


def resolved(*overrides: str) -> Config:
    return resolve(composed(*overrides))


def one_phase(*overrides: str) -> Config:
    """ONE_PHASE with overrides: groups by composing, keys in the way Hydra applies them, in a tenth of the time."""
    groups = [word for word in overrides if word.split("=")[0] in ("model", "attention")]
    config = copy.deepcopy(composed(*ONE_PHASE, *groups))
    for override in OverridesParser.create().parse_overrides([word for word in overrides if word not in groups]):
        OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=override.is_add())
    return resolve(config)


def message(capsys, *overrides: str) -> str:
    """What a user sees of a mistake: one sentence and exit code 2."""
    with pytest.raises(SystemExit) as exit, mistakes_without_traceback():
        resolved(*overrides)
    assert exit.value.code == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith("error: ") and errors.count("\n") == 1
    return errors
