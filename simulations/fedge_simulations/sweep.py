"""The runs of a sweep: the product of lists of values, each run with a name that says its values."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Final, get_args, get_origin, get_type_hints

from fedge.config import Config
from fedge.errors import ConfigError
from fedge.files import sha256
from fedge_simulations.runs import run_id_of

MAX_RUNS: Final = 10_000
_MAX_NAME: Final = 160  # bytes of a folder's name
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._+-]")


@dataclass(frozen=True, slots=True)
class Axis:
    """A key and the values that it takes in turn."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Planned:
    """One run of a sweep."""

    name: str  # of its folder: the swept keys with their values
    settings: Mapping[str, Any]  # the swept keys with their values
    config: Config


def plan(path: Path, assignments: Sequence[str]) -> list[Planned]:
    """The runs of a sweep, every configuration checked.

    Args:
        path: the configuration that all share.
        assignments: `KEY=VALUE` holds for all; `KEY=[A, B]` is swept over. A key whose value is itself a list
            takes a list of lists.

    Raises:
        ConfigError: a configuration is wrong, a list is ambiguous, or nothing is swept over.
    """
    axes, fixed = read_axes(assignments)
    if not axes:
        raise ConfigError("nothing to sweep over: give a list, such as --set 'seed=[0,1,2]'")
    count = _count(axes)
    if count > MAX_RUNS:
        raise ConfigError(f"these lists make {count:,} runs; a sweep has at most {MAX_RUNS:,}")
    planned = []
    for values in itertools.product(*(axis.values for axis in axes)):
        settings = {axis.key: value for axis, value in zip(axes, values, strict=True)}
        overrides = [*fixed, *(f"{key}={_toml(value)}" for key, value in settings.items())]
        planned.append(Planned(name_of(settings), settings, Config.load(path, overrides)))
    _check_distinct(planned)
    return _named_apart(planned)


def read_axes(assignments: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """The lists to sweep over, and the assignments that hold for all runs, as they were given."""
    axes, fixed, seen = [], [], set()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if key in seen:
            raise ConfigError(f"--set {assignment!r}: {key} is set twice")
        seen.add(key)
        value = _read(key, text.strip()) if equals else None
        if isinstance(value, list):
            axes.append(Axis(key, _values(key, value)))
        else:
            fixed.append(assignment)
    return axes, fixed


def name_of(settings: Mapping[str, Any]) -> str:
    """A folder's name: the same for the same values, and safe in a shell."""
    name = ",".join(f"{_safe(key)}={_written(value)}" for key, value in settings.items())
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 9]}-{_digest(settings)}"


def _count(axes: Sequence[Axis]) -> int:
    count = 1
    for axis in axes:
        count *= len(axis.values)
    return count


def _read(key: str, text: str) -> Any:
    """A value as TOML; a list of bare words too, since a shell takes quotes away; else text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if not text.startswith("["):
            return text
    if not text.endswith("]") or any(mark in text[1:-1] for mark in "[]\"'{}"):
        raise ConfigError(f"--set {key}={text}: not a list as TOML writes it; put the whole in single quotes")
    return [_word(word.strip()) for word in text[1:-1].split(",")]


def _word(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _values(key: str, values: list[Any]) -> tuple[Any, ...]:
    if not values:
        raise ConfigError(f"--set {key}=[]: an empty list has nothing to sweep over")
    if takes_list(key) and not all(isinstance(value, list) for value in values):
        text = _toml(values)
        raise ConfigError(
            f"--set {key}={text}: a value of {key} is itself a list, so give a list of such lists: "
            f"[{text}] for this one value, [{text}, [...]] for two"
        )
    doubled = [value for i, value in enumerate(values) if value in values[:i]]
    if doubled:
        raise ConfigError(f"--set {key}={_toml(values)}: {_toml(doubled[0])} stands there twice")
    return tuple(values)


def takes_list(key: str) -> bool:
    """Whether the value of a configuration's key is a list."""
    kind: Any = Config
    for part in key.split("."):
        kind = get_type_hints(kind).get(part) if isinstance(kind, type) and is_dataclass(kind) else None
    return any(get_origin(option) is tuple for option in (kind, *get_args(kind)))


def _toml(value: Any) -> str:
    """A value as TOML reads it: for numbers, texts, booleans and lists that is JSON."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _written(value: Any) -> str:
    """A value inside a folder's name; where more than a colon is lost, a digest tells it from others."""
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    text = {"True": "true", "False": "false", "": "none"}.get(text, text)
    safe = _safe(text)
    return safe if safe == text.replace(":", "-") else f"{safe}-{_digest(value)}"


def _safe(text: str) -> str:
    return _UNSAFE.sub("-", text)


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True, default=str).encode())[:8]


def _check_distinct(planned: Sequence[Planned]) -> None:
    seen: dict[str, Planned] = {}
    for run in planned:
        other = seen.setdefault(run_id_of(run.config), run)
        if other is not run:
            raise ConfigError(f"{other.name} and {run.name} are the same configuration; leave one out")


def _named_apart(planned: list[Planned]) -> list[Planned]:
    """Digests for runs whose names would be the same, also where a file system does not tell a from A."""
    often = Counter(run.name.lower() for run in planned)
    return [
        run
        if often[run.name.lower()] == 1
        else Planned(f"{run.name}-{_digest(run.settings)}", run.settings, run.config)
        for run in planned
    ]
