"""docs/cli.md and the commands' own parsers say the same: every subcommand and option, and no other."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedge import cli, errors

DOCUMENT = (Path(__file__).parents[1] / "docs" / "cli.md").read_text("utf-8")
COMMANDS = {"fedge-sim": "fedge_simulations", "fedge-server": "fedge_server", "fedge-client": "fedge_client"}
EVERYWHERE = ("--help", "--version")  # described once for all commands

Rows = dict[str, str]
"""From an argument, as its table writes it, to its default."""


def leaves(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The full name and the parser of every subcommand that does something."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield name, parser
    for group in groups:
        for word, inner in group.choices.items():
            yield from leaves(f"{name} {word}", inner)


@pytest.fixture
def parsers(monkeypatch: pytest.MonkeyPatch) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, as its main function builds it, and of each subcommand."""
    made: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser, _: object) -> int:
        made.append(parser)
        return 0

    monkeypatch.setattr(cli, "run", keep)
    monkeypatch.setenv("FEDGE_HOME", "$FEDGE_HOME")  # a default that is taken from there shows it
    for package in COMMANDS.values():
        importlib.import_module(f"{package}.cli").main([])
    tops = dict(zip(COMMANDS, made, strict=True))
    return tops | {name: parser for top in tops.items() for name, parser in leaves(*top)}


def sections(document: str) -> dict[str, str]:
    """The text under each heading that is a command or a subcommand."""
    parts = re.split(r"^#+ (.*)$", document, flags=re.MULTILINE)[1:]
    return {
        title.strip("` "): body
        for title, body in zip(parts[::2], parts[1::2], strict=True)
        if title.strip("` ").split()[0] in COMMANDS
    }


def documented(section: str) -> Rows:
    table = re.findall(r"^\| `([^`]+)` \| ([^|]*) \|", section, re.MULTILINE)
    assert len(table) == len(dict(table))
    return dict(table)


def written(action: argparse.Action) -> str:
    """An argument as its table writes it."""
    if not action.option_strings:
        return str(action.metavar or action.dest)
    choices = f"{{{','.join(action.choices)}}}" if action.choices else None
    value = action.metavar or choices or action.dest.upper()
    return action.option_strings[-1] + (f" {value}" if action.nargs != 0 else "")


def arguments(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    ours = [action for action in parser._actions if not set(action.option_strings) & set(EVERYWHERE)]
    return {written(action): action for action in ours}


@pytest.mark.slow
def test_every_subcommand_has_a_section_and_no_other(parsers: dict[str, argparse.ArgumentParser]) -> None:
    assert set(sections(DOCUMENT)) == set(parsers)


def test_every_section_lists_the_arguments_of_its_parser_and_no_other(
    parsers: dict[str, argparse.ArgumentParser],
) -> None:
    for name, section in sections(DOCUMENT).items():
        if name not in COMMANDS:
            assert set(documented(section)) == set(arguments(parsers[name])), name


def test_every_default_is_the_parsers(parsers: dict[str, argparse.ArgumentParser]) -> None:
    for name, section in sections(DOCUMENT).items():
        for text, default in documented(section).items():
            action = arguments(parsers[name])[text]
            if action.required:
                assert default == "required", (name, text)
            elif action.nargs == 0:
                assert default == "off", (name, text)
            elif action.default == []:
                assert default == "none", (name, text)
            elif action.default is not None:
                assert f"`{action.default}`" in default, (name, text)
            else:
                assert default not in ("required", "off", ""), (name, text)


def test_help_and_version_are_described_once() -> None:
    head = DOCUMENT.partition("\n## ")[0]
    assert all(option in head for option in EVERYWHERE)


def test_the_exit_codes_are_those_of_the_errors() -> None:
    codes = dict(re.findall(r"^\| (\d+) \| (\w+)", DOCUMENT, re.MULTILINE))
    assert set(codes) == {"0", "1", "2", "130"}
    assert (errors.FedgeError.exit_code, errors.UserError.exit_code) == (1, 2)


def test_no_output_is_left_to_be_filled_in() -> None:
    assert "@@" not in DOCUMENT
