"""What the commands over a server's home share: finding it, opening its registry, printing."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedge.errors import UserError
from fedge_server.hub.home import Home

if TYPE_CHECKING:  # --help shall not wait for a database's library
    from fedge_server.hub.settings import Settings
    from fedge_server.registry.devices import Devices


@dataclass(frozen=True, slots=True)
class Place:
    """A server's home, opened."""

    home: Home
    settings: Settings
    devices: Devices


def add_home(parser: argparse.ArgumentParser) -> None:
    """Add --home and --format."""
    parser.add_argument("--home", type=Path, metavar="DIR", help="the server's home (default: FEDGE_HOME)")
    parser.add_argument("--format", choices=("text", "json"), default="text")


def tier_name(text: str) -> str:
    """The type of an argument that names a tier; argparse says what is wrong with it."""
    from fedge.delivery import check_tier
    from fedge.errors import FormatError

    try:
        return check_tier(text)
    except FormatError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[Place]:
    """The home that a command line means.

    Raises:
        UserError: it is no server's home.
        FedgeError: its database cannot be opened.
    """
    from fedge_server.hub.settings import Settings
    from fedge_server.registry.database import Registry

    home = Home.chosen(arguments.home)
    if not home.settings.exists():
        raise UserError(f"{home.root}: no server's home; make one with: fedge-server init --home {home.root}")
    settings = Settings.load(home.settings)
    with Registry.open(home.root, settings.database_url) as registry:
        yield Place(home, settings, registry.devices)


def show(arguments: argparse.Namespace, value: Any, lines: Sequence[str]) -> int:
    """Print JSON or lines, whichever was asked for; returns 0."""
    text = json.dumps(value, indent=2) if arguments.format == "json" else "\n".join(lines)
    sys.stdout.write(text + "\n")
    return 0


def who() -> str:
    """Who gives the command, for the audit trail."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        return "unknown user"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines whose columns stand under each other; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
