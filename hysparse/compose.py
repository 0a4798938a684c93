"""From Hydra's composition to a checked `Config`, and where each of its values came from."""

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import get_origin

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from hysparse.checks import check
from hysparse.config import Config, ConfigError
from hysparse.layouts import with_chosen_pipeline
from hysparse.mistakes import dataclass_in, join, unknown_key
from parallel.ranks import world_size

CONF = Path(__file__).parent.parent / "conf"

HELP = """Train HySparse and its baselines, on a laptop or on a cluster.

  python train.py +experiment=NAME [key=value ...]
  torchrun --nproc-per-node 8 train.py +experiment=NAME parallel.tensor=2
  python -m launch.slurm +experiment=NAME nodes=8 time=24:00:00
  python train.py -m +experiment=NAME attention=full,hysparse run.seed=1,2

Experiments
{experiments}

Sweeps, +sweep=NAME beside an experiment
{sweeps}

Groups, each chosen with group=option
{groups}

Often used
  plan=true             print layers, parameters, FLOPs and KV cache, and stop
  dry_run=512           build what ranks of 512 would hold, without a GPU, check it, and stop
  max_steps=20          stop early, schedule unchanged
  resume=auto|never|PATH
  run.time_limit=2.5    hours, or H:MM:SS; then save and exit with code 75, as on SIGUSR1, SIGTERM and SIGINT
  data.path=FOLDER      written by: python -m data.prepare input=TEXT output=FOLDER
  run.dir=FOLDER        where everything is written
  kernels=auto|triton|reference
  parallel.tensor=N parallel.pipeline=auto|N parallel.virtual=auto|N parallel.expert=N parallel.context=N
  engine=deepspeed deepspeed.zero=1|2|3
  --cfg job --resolve   print the whole configuration

Every key is explained in hysparse/config.py, the words it may hold in hysparse/choices.py.
"""


def register() -> None:
    """Give Hydra the types, the help text and silent loggers; before `hydra.main` is called."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    experiments, sweeps = (
        "\n".join(f"  {path.stem:<30}{_headline(path)}" for path in sorted((CONF / group).glob("*.yaml")))
        for group in ("experiment", "sweep")
    )
    groups = "\n".join(
        f"  {folder.name:<12}{', '.join(path.stem for path in sorted(folder.glob('*.yaml')))}"
        for folder in sorted(CONF.iterdir())
        if folder.is_dir() and folder.name not in ("experiment", "sweep", "hydra")
    )
    text = HELP.format(experiments=experiments, sweeps=sweeps, groups=groups)
    store.store(
        group="hydra/help", name="hysparse", node={"app_name": "train", "header": "", "footer": "", "template": text}
    )


def resolve(composed: DictConfig) -> Config:
    """The typed, checked configuration, with numbers in place of auto. Raises ConfigError."""
    refuse_unknown(composed, Config, "")
    config = OmegaConf.to_object(composed)
    ranks = config.dry_run if config.dry_run is not None else None if config.plan else world_size()
    config = with_chosen_pipeline(config, ranks)
    check(config, ranks)
    return config


def provenance(config: Config) -> dict[str, dict]:
    """The values that differ from the defaults, by where they came from.

    {"command line": {"max_steps": 20}, "experiment=tiny": {...}, "model=tiny": {...}}, each key once.
    """
    hydra = HydraConfig.get()
    choices = {group: choice for group, choice in hydra.runtime.choices.items() if not group.startswith("hydra/")}
    command_line = {override.lstrip("+~").split("=")[0] for override in hydra.overrides.task} - choices.keys()
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    sources = {f"{group}={choice}": _keys(folders, group, choice) for group, choice in choices.items() if choice}
    experiment = next((name for name in sources if name.startswith("experiment=")), None)
    found: dict[str, dict] = {}
    for key, value in _different(config):
        if any(f"{typed}.".startswith(f"{key}.") or f"{key}.".startswith(f"{typed}.") for typed in command_line):
            source = "command line"
        elif experiment and key in sources[experiment]:
            source = experiment
        else:
            source = next((name for name, keys in sources.items() if key in keys), "conf/config.yaml")
        found.setdefault(source, {})[key] = value
    order = ["command line", *([experiment] if experiment else []), *sources, "conf/config.yaml"]
    return {source: found[source] for source in order if source in found}


def refuse_unknown(node: DictConfig, schema: type, prefix: str) -> None:
    """Hydra lets +key=value add any key; one that nothing would read is a mistake."""
    types = {field.name: dataclass_in(field.type) for field in fields(schema)}
    for name in node:
        if name not in types:
            raise ConfigError(unknown_key(join(prefix, name)))
        inner, value = types[name], node[name]
        if inner is None or value is None:
            continue
        if get_origin(next(f.type for f in fields(schema) if f.name == name)) is dict:
            for item in value:
                refuse_unknown(value[item], inner, join(join(prefix, name), item))
        else:
            refuse_unknown(value, inner, join(prefix, name))


def _headline(path: Path) -> str:
    """The first comment of a YAML file that is no directive."""
    lines = (line.lstrip("# ").strip() for line in path.read_text().splitlines() if line.startswith("#"))
    return next((line for line in lines if not line.startswith("@")), "")


def _keys(folders: list[Path], group: str, choice: str) -> set[str]:
    """Dotted keys that an option sets, in the whole configuration; its parents in the defaults list included."""
    path = next((path for folder in folders if (path := folder / group / f"{choice}.yaml").is_file()), None)
    if path is None:
        return set()
    text = path.read_text()
    body = yaml.safe_load(text) or {}
    package = "" if "@package _global_" in text else group
    keys = set(_flatten({name: value for name, value in body.items() if name != "defaults"}, package))
    for entry in body.get("defaults", []):
        if isinstance(entry, str):
            keys |= _keys(folders, group, entry)
    return keys


def _flatten(node: dict, prefix: str) -> Iterator[str]:
    for name, value in node.items():
        key = join(prefix, name)
        yield key
        if isinstance(value, dict):
            yield from _flatten(value, key)


def _different(config: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of every leaf that is not at its default."""
    for field in fields(config):
        key, value = join(prefix, field.name), getattr(config, field.name)
        if is_dataclass(value):
            yield from _different(value, key)
        elif isinstance(value, dict) and any(map(is_dataclass, value.values())):
            for name, item in value.items():
                yield from _different(item, join(key, name))
        elif value != _default(field.default, field.default_factory):
            yield key, value


def _default(value: object, factory: Callable | object) -> object:
    return factory() if value is MISSING and factory is not MISSING else value
