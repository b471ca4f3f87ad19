"""The whole configuration: read, checked in full, and what is wrong said in one line."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from fedge.config.compressing import PRESETS, Compress, Tier
from fedge.config.sections import (
    Clients,
    Communication,
    Evaluate,
    Model,
    Privacy,
    Rounds,
    Scenario,
    Simulation,
    StrategyConfig,
    Train,
    Validate,
)
from fedge.config.values import STRICT, Count, TierName
from fedge.errors import ConfigError


@dataclass(frozen=True, slots=True, config=STRICT)
class Config:
    """A whole run. Build it with `load`, `from_mapping` or keyword arguments; it is checked either way."""

    task: str = "digits"  # digits, images, tables, signals, characters, or package.module:TASK
    data: str | None = None  # file or folder; digits needs none
    data_label: str = "y"  # tables: the column that holds the label
    data_client: str | None = None  # tables: the column that holds the natural client
    data_size: tuple[Count, Count] | None = None  # image folders: resize to (height, width)
    seed: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = 0
    model: Model = Model()
    clients: Clients = Clients()
    rounds: Rounds = Rounds()
    validate: Validate = Validate()
    train: Train = Train()
    strategy: StrategyConfig = StrategyConfig()
    privacy: Privacy = Privacy()
    communication: Communication = Communication()
    simulation: Simulation = Simulation()
    scenario: Scenario = Scenario()
    evaluate: Evaluate = Evaluate()
    compress: Compress = Compress()
    tiers: Mapping[TierName, Tier] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Config:
        """Check a nested mapping, as a TOML file gives it.

        Raises:
            ConfigError: an unknown key or an unusable value; the line names it and the nearest valid one.
        """
        nested = dict(values)
        strategy = nested.get("strategy")
        if isinstance(strategy, Mapping):
            options = {key: value for key, value in strategy.items() if key != "name"}
            name = {"name": strategy["name"]} if "name" in strategy else {}
            nested["strategy"] = {**name, "options": options}
        if isinstance(tiers := nested.get("tiers"), Mapping):
            nested["tiers"] = {name: _with_preset(tier) for name, tier in tiers.items()}
        try:
            return _ADAPTER.validate_python(nested)
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from error

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Config:
        """Read a TOML file and apply `key=value` overrides; paths in it are relative to its folder.

        Raises:
            ConfigError: the file is absent or no TOML, or a key or value is wrong.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ConfigError(f"configuration {path}: cannot be read ({error.strerror})") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"configuration {path}: not valid TOML ({error})") from error
        if isinstance(values.get("data"), str):
            values["data"] = str((path.parent / values["data"]).resolve())
        model = values.get("model")
        for key in ("start", "distil_from"):
            if (
                isinstance(model, dict)
                and isinstance(at := model.get(key), str)
                and not at.startswith("release:")
            ):
                model[key] = str((path.parent / at).resolve())
        scenario = values.get("scenario")
        if isinstance(scenario, dict) and isinstance(scenario.get("replay"), str):
            scenario["replay"] = str((path.parent / scenario["replay"]).resolve())
        try:
            return cls.from_mapping(override(values, overrides))
        except ConfigError as error:
            raise ConfigError(f"configuration {path}: {error}") from error

    def to_mapping(self) -> dict[str, Any]:
        """The nested plain form: `Config.from_mapping(config.to_mapping()) == config`."""
        plain: dict[str, Any] = _ADAPTER.dump_python(self, mode="json", exclude_none=True)
        strategy = plain.pop("strategy")
        return {**plain, "strategy": {"name": strategy["name"], **strategy["options"]}}

    def section_json(self, name: str) -> str:
        """One section as JSON, to travel in a message."""
        section = getattr(self, name)
        return TypeAdapter(type(section)).dump_json(section).decode()


_ADAPTER = TypeAdapter(Config)


def parse_train(text: str) -> Train:
    """Read a `[train]` section that came in a message.

    Raises:
        ConfigError: it is malformed or out of range.
    """
    try:
        return TypeAdapter(Train).validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"train settings in the message: {_one_line(error)}") from error


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=value` assignments; a value is read as TOML, else taken as a string.

    Raises:
        ConfigError: an assignment has no '=' or goes through a key that is not a table.
    """
    result = _copy(values)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {assignment!r}: write it as key=value, such as --set rounds.count=5")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        table = result
        *path, last = key.strip().split(".")
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {assignment!r}: {part!r} is a value, not a table")
        table[last] = value
    return result


def _with_preset(tier: Any) -> Any:
    """The tier's table with the keys that its preset gives and it does not."""
    preset = tier.get("preset") if isinstance(tier, Mapping) else None
    return {**PRESETS[preset], **tier} if isinstance(preset, str) and preset in PRESETS else tier


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def suggestion(name: str, valid: Sequence[str]) -> str:
    """'did you mean ...?' for a misspelt name, or the list of the valid ones."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(sorted(valid))}"


def _one_line(error: ValidationError) -> str:
    """The first thing that is wrong, in one line, with a count of the others."""
    lines = list(dict.fromkeys(_describe(detail) for detail in error.errors()))
    return lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")


def _describe(detail: ErrorDetails) -> str:
    kind, value = detail["type"], detail["input"]
    path = [str(part) for part in detail["loc"] if part != "[key]"]
    if path[:2] == ["strategy", "options"]:  # nested here, but not in the file
        key = _printable(".".join(["strategy", *path[2:3]]))
        return f"{key} = {value!r}: must be a number, a text, true or false"
    if kind == "missing":  # of a pair: the input is the whole of it
        path = path[:-1]
    key = _printable(".".join(path)) or "configuration"
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key '{key}': {suggestion(path[-1], _keys_at(path[:-1]))}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        return f"{key} = {value!r}: {suggestion(str(value), choices)}"
    message = _PLAINLY.get(kind) or detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{key} = {value!r}: {message}"


def _printable(key: str) -> str:
    """A key may hold line breaks; a message is one line."""
    return key if key.isprintable() else repr(key)[1:-1]


_PLAINLY = {  # what pydantic says in terms of Python
    "dataclass_type": "must be a table",
    "dict_type": "must be a table",
    "tuple_type": "must be a list",
    "missing": "must be a list of two",
    "too_long": "must be a list of two",
    "invalid_key": "a key must be text",
    "string_pattern_mismatch": "must be lower-case letters, digits, '-' and '_', and start with a letter",
}


def _keys_at(path: Sequence[str]) -> list[str]:
    section: Any = Config
    for part in path:
        section = Tier if section == "tiers" else _type_of(section, part)
    return ["NAME"] if section == "tiers" else list(section.__dataclass_fields__)


def _type_of(section: Any, name: str) -> Any:
    if name == "tiers":
        return "tiers"
    return type(section.__dataclass_fields__[name].default)
