"""Values out of a parsed TOML table, each checked, with an error that names the key."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fedge.errors import ConfigError

T = TypeVar("T")


def known(where: str, table: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Refuse a key that is none of these.

    Raises:
        ConfigError: there is one; like each of these functions, of a value that is not possible.
    """
    for key in table:
        if key not in keys:
            close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(keys)}"
            raise ConfigError(f"unknown key {(where + '.' + key).lstrip('.')!r}: {hint}")


def section(where: str, value: Any) -> Mapping[str, Any]:
    """A table itself."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where} = {value!r}: must be a table, [{where}]")
    return value


def text(where: str, table: Mapping[str, Any], key: str, default: T) -> str | T:
    """Text that is not empty."""
    if key not in table:
        return default
    value = table[key]
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"{where}.{key} = {value!r}: must be text")
    return value


def yes(name: str, table: Mapping[str, Any], default: bool) -> bool:
    """True or false; `name` is `table.key`, here and below."""
    value = table.get(_key(name), default)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} = {value!r}: must be true or false")
    return value


def whole(name: str, table: Mapping[str, Any], default: int, least: int, most: int) -> int:
    """A whole number within bounds."""
    value = table.get(_key(name), default)
    return int(_between(name, value, least, most, lambda given: type(given) is int))


def number(name: str, table: Mapping[str, Any], default: T, least: float, most: float) -> float | T:
    """A number within bounds."""
    if _key(name) not in table:
        return default
    value = table[_key(name)]
    return float(_between(name, value, least, most, lambda given: type(given) in (int, float)))


def seconds(name: str, table: Mapping[str, Any], default: T) -> float | T:
    """A number from 0 to a billion, of seconds or of anything else."""
    return number(name, table, default, 0, 10**9)


def _key(name: str) -> str:
    return name.rpartition(".")[2]


def _between(name: str, value: Any, least: float, most: float, of_type: Callable[[Any], bool]) -> Any:
    if not of_type(value) or not least <= value <= most:  # NaN neither
        raise ConfigError(f"{name} = {value!r}: must be a number from {least} to {most}")
    return value
