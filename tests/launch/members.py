"""The members of a sweep as the command line makes them, in this process."""

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from hysparse.compose import CONF, register
from launch import sweep


def composed(*arguments: str):
    """The configuration of the sweep itself, what composes its members, and all that it was given."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().hydra.config_loader
        config = loader.load_configuration("config", list(arguments), RunMode.MULTIRUN, validate_sweep_overrides=False)
    params = [f"{key}={values}" for key, values in config.hydra.sweeper.params.items()]
    overrides = OverridesParser.create(loader).parse_overrides([*params, *config.hydra.overrides.task])
    return config, loader, overrides


def members(*arguments: str) -> list[sweep.Member]:
    return list(sweep.members_of(*composed(*arguments)))
