"""`fedge-server backup` and `fedge-server restore`: a home in one file, and back."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedge import cli
from fedge_server.cli.place import add_home, show
from fedge_server.hub.home import Home


def add(commands: Any) -> None:
    """Add the subcommands."""
    made = cli.subcommand(
        commands,
        "backup",
        _backup,
        summary="write a home and its database to one file, also while the hub is up",
        examples="  fedge-server backup /mnt/other-disk/fedge-2026-01-31.tar.gz --home /var/lib/fedge",
    )
    made.add_argument("file", metavar="FILE", type=Path, help="a new file: a gzipped tar, mode 0600")
    add_home(made)
    made = cli.subcommand(
        commands,
        "restore",
        _restore,
        summary="make a home from a backup",
        examples="  fedge-server restore fedge-2026-01-31.tar.gz --home /var/lib/fedge\n"
        "  fedge-server restore fedge.tar.gz --home here --database postgresql+psycopg://fedge@db/new",
    )
    made.add_argument("file", metavar="FILE", type=Path, help="what fedge-server backup wrote")
    made.add_argument(
        "--database", metavar="URL", help="an empty PostgreSQL database (default: the one in the settings)"
    )
    add_home(made)


def _backup(arguments: argparse.Namespace) -> int:
    from fedge_server.backup import backup
    from fedge_server.hub.settings import Settings

    home = Home.chosen(arguments.home)
    url = Settings.load(home.settings).database_url if home.settings.exists() else None
    saved = backup(home.root, url, arguments.file)
    lines = [f"{arguments.file}: {saved.files} files, {saved.size:,} bytes; it holds the keys: keep it safe"]
    return show(arguments, asdict(saved) | {"file": str(arguments.file)}, lines)


def _restore(arguments: argparse.Namespace) -> int:
    from fedge_server.restore import restore

    home = Home.chosen(arguments.home)
    restored = restore(arguments.file, home.root, arguments.database)
    moment = datetime.fromtimestamp(restored.created, UTC).isoformat(timespec="seconds")
    lines = [f"{home.root}: {restored.files} files as they were at {moment}, by fedge {restored.fedge}"]
    return show(arguments, asdict(restored) | {"home": str(home.root)}, lines)
