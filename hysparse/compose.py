"""From Hydra's composition to a checked `Config`, and where each of its values came from."""

import difflib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from itertools import takewhile
from pathlib import Path
from typing import get_args, get_origin

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hysparse.checks import check
from hysparse.config import Config, ConfigError
from parallel.ranks import rank, world_size

CONF = Path(__file__).parent.parent / "conf"

PATIENCE = 10  # seconds

HELP = """Train HySparse and its baselines, on a laptop or on a cluster.

  python train.py +experiment=NAME [key=value ...]
  torchrun --nproc-per-node 8 train.py +experiment=NAME parallel.tensor=2

Experiments
{experiments}

Groups, each chosen with group=option
{groups}

Often used
  plan=true             print layers, parameters, FLOPs and KV cache, and stop
  max_steps=20          stop early, schedule unchanged
  resume=auto|never|PATH
  data.path=FOLDER      written by: python -m data.prepare input=TEXT output=FOLDER
  run.dir=FOLDER        where everything is written
  kernels=auto|triton|reference
  parallel.tensor=N parallel.pipeline=N parallel.virtual=N parallel.expert=N
  --cfg job --resolve   print the whole configuration

Every key is explained in hysparse/config.py.
"""


def register() -> None:
    """Give Hydra the types, the help text and silent loggers; before `hydra.main` is called."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    experiments = "\n".join(
        f"  {path.stem:<30}{_headline(path)}" for path in sorted((CONF / "experiment").glob("*.yaml"))
    )
    groups = "\n".join(
        f"  {folder.name:<12}{', '.join(path.stem for path in sorted(folder.glob('*.yaml')))}"
        for folder in sorted(CONF.iterdir())
        if folder.is_dir() and folder.name != "experiment"
    )
    text = HELP.format(experiments=experiments, groups=groups)
    store.store(
        group="hydra/help", name="hysparse", node={"app_name": "train", "header": "", "footer": "", "template": text}
    )


def resolve(composed: DictConfig) -> Config:
    """The typed, checked configuration. Raises ConfigError."""
    _refuse_unknown(composed, Config, "")
    config = OmegaConf.to_object(composed)
    check(config, None if config.plan else world_size())
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


@contextmanager
def mistakes_without_traceback(*errors: type[Exception]) -> Iterator[None]:
    """End with exit code 2 and one clear message on a mistake in the configuration, or one of `errors`."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let Hydra's errors reach us
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        _fail(_explain(error))
    except ConfigError as error:
        _fail(str(error))
    except errors as error:
        _fail(str(error), on_all_ranks=False)
    except Exception as error:
        if not _raised_while_composing(error):
            raise
        _fail(_explain(error))


def _fail(message: str, on_all_ranks: bool = True) -> None:
    """The first rank speaks for all. The others first leave it time to: launchers kill all as soon as one has ended.

    Still alive after that, a rank has met something that the first one has not, such as a damaged shard.
    """
    if rank() != 0:
        time.sleep(PATIENCE)
        if on_all_ranks:
            sys.exit(2)
        message = f"rank {rank()}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def _raised_while_composing(error: Exception) -> bool:
    """Whether it is out of Hydra, OmegaConf or the YAML parser, which let some mistakes through as ValueErrors."""
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return innermost.f_globals.get("__name__", "").split(".")[0] in ("hydra", "omegaconf", "yaml")


def _explain(error: Exception) -> str:
    """Hydra's message in a sentence; an unknown key gets its nearest relatives."""
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    while error.__cause__ is not None:
        error = error.__cause__
    message = str(error).strip()
    options = r"In '[^']+': Could not find '(.+)'\s+Available options in '(.+)':\n((?:\t.*\n?)+)"
    if missing := re.match(options, message):
        return _no_option(missing[2], missing[1].removeprefix(f"{missing[2]}/"), missing[3].split())
    place = re.match(r"In '([^']+)': \w+ raised while composing config:\n", message)
    file, message = (f"{place[1]}.yaml: ", message[place.end() :]) if place else ("", message)
    first, *rest = [line.strip() for line in message.splitlines() if line.strip()] or [type(error).__name__]
    full_key = next((line.split(":", 1)[1].strip() for line in rest if line.startswith("full_key:")), None)
    if first == "Unexpected type for root: NoneType" or full_key == "model.moe" and "'NoneType'" in first:
        return (
            "model.moe is null in this model, and the command line cannot add it; choose an MoE model, such as "
            "model=tiny, or write a file conf/model/NAME.yaml with a section moe"
        )
    if first.startswith("Config group override must be"):
        return f"{first}; write group=option, for example model=tiny"
    if full_key and "." not in full_key and "is not a subclass of PhaseConfig" in first:
        return _unknown(f"phases.{full_key}")
    if full_key and re.search(r"Key '.+' (?:is )?not in", first):
        return file + _unknown(full_key)
    if full_key:
        return f"{file}{full_key}: {first}"
    return file + " ".join([first, *takewhile(lambda line: not line.startswith("Config search path"), rest)])


def _unreadable(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override} is no override; write key=value"
    quoted = f"'{key}=\"{value}\"'"
    return (
        f"{override} cannot be read; a value with special characters needs quotes inside those of the shell: {quoted}"
    )


def _no_option(group: str, wrong: str, options: list[str]) -> str:
    near = difflib.get_close_matches(wrong, options, n=1)
    meant = f"did you mean {group}={near[0]}? " if near else ""
    return f"{group}={wrong} does not exist; {meant}{group} is one of {', '.join(options)}"


def _unknown(key: str) -> str:
    parent, _, wrong = key.rpartition(".")
    if parent == "phases":
        return (
            f"{key} does not exist, and the command line cannot add a phase; choose phases=NAME, or write it into a "
            "file conf/phases/NAME.yaml"
        )
    if key.startswith("data.blend."):
        return f"{key} is a new entry, which takes a plus: +data.blend={{FOLDER: WEIGHT, FOLDER: WEIGHT}}"
    names = _names_under(parent)
    near = difflib.get_close_matches(wrong, names, n=3, cutoff=0.4) or names
    return f"{key} is no key of the configuration; did you mean {' or '.join(_join(parent, n) for n in near)}?"


def _refuse_unknown(node: DictConfig, schema: type, prefix: str) -> None:
    """Hydra lets +key=value add any key; one that nothing would read is a mistake."""
    types = {field.name: _dataclass_in(field.type) for field in fields(schema)}
    for name in node:
        if name not in types:
            raise ConfigError(_unknown(_join(prefix, name)))
        inner, value = types[name], node[name]
        if inner is None or value is None:
            continue
        if get_origin(next(f.type for f in fields(schema) if f.name == name)) is dict:
            for item in value:
                _refuse_unknown(value[item], inner, _join(_join(prefix, name), item))
        else:
            _refuse_unknown(value, inner, _join(prefix, name))


def _dataclass_in(annotation: object) -> type | None:
    """The dataclass of `T`, `T | None` or `dict[str, T]`."""
    return next((t for t in (annotation, *get_args(annotation)) if is_dataclass(t)), None)


def _names_under(key: str) -> list[str]:
    """Keys below a dotted key; names of phases are free."""
    node: type | None = Config
    parts = key.split(".") if key else []
    for index, part in enumerate(parts):
        if parts[:index] == ["phases"]:
            continue
        node = _dataclass_in({field.name: field.type for field in fields(node)}.get(part)) if node else None
    return [field.name for field in fields(node)] if node else []


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


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
        key = _join(prefix, name)
        yield key
        if isinstance(value, dict):
            yield from _flatten(value, key)


def _different(config: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of every leaf that is not at its default."""
    for field in fields(config):
        key, value = _join(prefix, field.name), getattr(config, field.name)
        if is_dataclass(value):
            yield from _different(value, key)
        elif isinstance(value, dict) and any(map(is_dataclass, value.values())):
            for name, item in value.items():
                yield from _different(item, _join(key, name))
        elif value != _default(field.default, field.default_factory):
            yield key, value


def _default(value: object, factory: Callable | object) -> object:
    return factory() if value is MISSING and factory is not MISSING else value
