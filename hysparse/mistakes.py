"""A mistake of the user ends in one sentence and exit code 2: what Hydra says put into words, and no traceback."""

import difflib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import takewhile
from typing import get_args

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from hysparse.config import Config, ConfigError
from parallel.ranks import local_rank, rank, world_size

PATIENCE = 15  # seconds that the other ranks leave the first one to speak and end
HEAD_START = 5  # seconds that the first one then leaves them to come as far: the slowest may still be importing


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
    except KeyboardInterrupt:
        if rank() == 0:
            print("\ninterrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(130)
    except errors as error:
        _fail(str(error), on_all_ranks=False)
    except Exception as error:
        if not _raised_while_composing(error):
            raise
        _fail(_explain(error))


def _fail(message: str, on_all_ranks: bool = True) -> None:
    """The first rank speaks for all. The others first leave it time to: launchers kill all as soon as one has ended,
    and a rank that is killed must not hide the exit code.

    Still alive after that, a rank has met something that the first one has not: a damaged shard, or with all ranks of
    its node another configuration.
    """
    if rank() != 0:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
        time.sleep(PATIENCE)
        if on_all_ranks and local_rank() != 0:
            sys.exit(2)
        message = f"rank {rank()}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    if rank() == 0 and world_size() > 1:
        time.sleep(HEAD_START)
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
    if several := re.match(r"Ambiguous value for argument '(.+)'$", first):
        return (
            f"{several[1]} are several values, which make a sweep: python train.py -m …; a list has brackets, "
            f"'{several[1].replace('=', '=[', 1)}]'"
        )
    if first.startswith("Config group override must be"):
        return f"{first}; write group=option, for example model=tiny"
    if full_key and "." not in full_key and "is not a subclass of PhaseConfig" in first:
        return unknown_key(f"phases.{full_key}")
    if full_key and re.search(r"Key '.+' (?:is )?not in", first):
        return file + unknown_key(full_key)
    if full_key and re.search("Missing mandatory value|is not Optional|does not support deletion", first):
        return f"{file}{full_key} has no value and needs one; give {full_key}=VALUE"
    if full_key and (float_value := re.match(r"Value '(\d+)\.0' of type 'float' could not be", first)):
        return f"{file}{full_key} must be a whole number; write {full_key}={int(float_value[1]):_}"
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
    if wrong == "submitit_slurm":
        return "hydra/launcher=slurm needs the package hydra-submitit-launcher: pip install -e '.[slurm]'"
    near = difflib.get_close_matches(wrong, options, n=1)
    meant = f"did you mean {group}={near[0]}? " if near else ""
    return f"{group}={wrong} does not exist; {meant}{group} is one of {', '.join(options)}"


def unknown_key(key: str) -> str:
    """The sentence about a dotted key that does not exist, with its nearest relatives."""
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
    meant = f"; did you mean {' or '.join(join(parent, n) for n in near)}?" if near else ""
    return f"{key} is no key of the configuration{meant}"


def dataclass_in(annotation: object) -> type | None:
    """The dataclass of `T`, `T | None` or `dict[str, T]`."""
    return next((t for t in (annotation, *get_args(annotation)) if is_dataclass(t)), None)


def _names_under(key: str) -> list[str]:
    """Keys below a dotted key; names of phases are free."""
    node: type | None = Config
    parts = key.split(".") if key else []
    for index, part in enumerate(parts):
        if parts[:index] == ["phases"]:
            continue
        node = dataclass_in({field.name: field.type for field in fields(node)}.get(part)) if node else None
    return [field.name for field in fields(node)] if node else []


def join(parent: str, name: str) -> str:
    """A dotted key."""
    return f"{parent}.{name}" if parent else name
