"""docs/configuration.md holds every key and default of the code, and nothing else."""

from __future__ import annotations

import inspect
import re
import tomllib
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from fedge import config
from fedge.config import Config, StrategyConfig, Tier
from fedge_server.strategies import NAMES, options_of

TEXT = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text("utf-8")
REQUIRED = object()


def sections() -> dict[str, str]:
    """Text of each section by the table's name; '' for the top level."""
    parts = re.split(r"^## (.*)$", TEXT, flags=re.MULTILINE)[1:]
    return {
        ("" if title == "Top level" else title.strip("`[]")): body
        for title, body in zip(parts[::2], parts[1::2], strict=True)
    }


def rows(section: str, first: str) -> list[list[str]]:
    """Cells of the table whose head starts with `first`."""
    table = next(part for part in section.split("\n\n") if part.strip().startswith(f"| {first} |"))
    return [
        [cell.strip() for cell in line.strip("| ").split(" |")] for line in table.strip().splitlines()[2:]
    ]


def value(cell: str) -> Any:
    """A default as the document writes it."""
    if cell == "required":
        return REQUIRED
    plain = cell.strip("`")
    return None if plain == "none" else tomllib.loads(f"x = {plain}")["x"]


def documented(name: str) -> dict[str, Any]:
    return {key.strip("`"): value(default) for key, _, default, _ in rows(sections()[name], "key")}


def plain(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default


def keys_of(section: Any) -> dict[str, Any]:
    """Keys and defaults of one table in the code."""
    return {
        field.name: plain(field.default)
        for field in fields(section)
        if field.default is not MISSING and not is_dataclass(field.default)
    }


CODE = {
    "": Config,
    "model": config.Model,
    "clients": config.Clients,
    "rounds": config.Rounds,
    "validate": config.Validate,
    "train": config.Train,
    "strategy": StrategyConfig,
    "privacy": config.Privacy,
    "communication": config.Communication,
    "simulation": config.Simulation,
    "scenario": config.Scenario,
    "evaluate": config.Evaluate,
    "compress": config.Compress,
    "compress.distil": config.Distil,
    "compress.prune": config.Prune,
    "compress.grid": config.Grid,
    "compress.gate": config.Gate,
    "compress.routing": config.Calibration,
    "compress.clients": config.OnClients,
    "tiers.NAME": Tier,
}


def test_every_table_of_the_code_has_its_section_and_no_other_has() -> None:
    assert list(sections()) == list(CODE)
    nested = [f.name for f in fields(Config) if is_dataclass(f.default) or f.name == "tiers"]
    assert {name.partition(".")[0] for name in CODE} - {""} == set(nested)
    assert {f"compress.{f.name}" for f in fields(config.Compress) if is_dataclass(f.default)} == {
        n for n in CODE if n.startswith("compress.")
    }


@pytest.mark.parametrize("name", CODE)
def test_the_keys_and_defaults_of_a_section_are_those_of_the_code(name: str) -> None:
    assert documented(name) == keys_of(CODE[name])
    for key, default in documented(name).items():
        assert type(default) is type(keys_of(CODE[name])[key]), key


ATTACKS = (
    *("sign_flip", "scale", "noise", "nan", "label_flip", "free_rider"),
    *("ipm", "alie", "mimic", "backdoor"),
)


def strategy_rows() -> list[tuple[str, str, str]]:
    return [
        (name.strip("`"), option.strip("`"), default)
        for name, option, default, _ in rows(sections()["strategy"], "strategy")
    ]


def test_every_strategy_stands_in_the_document_with_its_options_and_defaults() -> None:
    assert {name for name, _, _ in strategy_rows()} == set(NAMES)
    for name in NAMES:
        options = {
            key: REQUIRED if parameter.default is inspect.Parameter.empty else parameter.default
            for key, parameter in options_of(name).items()
            if "Callable" not in str(parameter.annotation)  # no value of TOML is one
        }
        found = {key: default for own, key, default in strategy_rows() if own == name and key}
        if name == "qfedavg":  # required by Flower, set from the configuration by us
            assert (options.pop("client_learning_rate"), found.pop("client_learning_rate")) == (
                REQUIRED,
                "`train.learning_rate`",
            )
        assert {key: value(default) for key, default in found.items()} == options, name


@pytest.mark.parametrize(
    ("section", "head", "names"),
    [
        ("train", "loss", typing.get_args(config.LossName)),
        ("train", "augmentation", ("flip", "shift", "noise", "mask")),
        ("scenario", "attack", ATTACKS),
        ("clients", "partition", ("iid", "dirichlet", "shards", "natural", "draw")),
    ],
)
def test_named_choices_have_a_row_each(section: str, head: str, names: tuple[str, ...]) -> None:
    assert [row[0].strip("`").partition(":")[0] for row in rows(sections()[section], head)] == list(names)


@pytest.mark.parametrize(
    ("section", "key", "names"),
    [
        ("train", "optimizer", config.OptimizerName),
        ("train", "loss", config.LossName),
        ("privacy", "accountant", config.AccountantName),
        ("model", "filter", config.FilterName),
    ],
)
def test_choices_stand_in_the_column_of_ranges(section: str, key: str, names: Any) -> None:
    cell = next(row[1] for row in rows(sections()[section], "key") if row[0] == f"`{key}`")
    assert re.findall(r"`(\w+)`", cell) == list(typing.get_args(names))


def test_every_metric_is_explained() -> None:
    assert all(f"`{name}`" in sections()["evaluate"] for name in typing.get_args(config.MetricName))
