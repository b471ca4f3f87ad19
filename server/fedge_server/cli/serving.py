"""`fedge-server up` and `preflight`: the hub, and whether it could be up."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from fedge import cli, logs
from fedge_server.cli.place import add_home, show


def add(commands: Any) -> None:
    """Add the subcommands."""
    up = cli.subcommand(
        commands,
        "up",
        _up,
        summary="run the hub: devices connect to it, runs are started by it",
        examples="  fedge-server up --home /var/lib/fedge",
    )
    up.add_argument("--home", type=_path, metavar="DIR", help="the server's home (default: FEDGE_HOME)")
    logs.add_option(up)
    preflight = cli.subcommand(
        commands,
        "preflight",
        _preflight,
        summary="check settings, certificates, keys, database, disk, ports and names",
        examples="  fedge-server preflight --home /var/lib/fedge",
    )
    add_home(preflight)


def _path(text: str) -> Any:
    from pathlib import Path

    return Path(text)


def _up(arguments: argparse.Namespace) -> int:
    from fedge_server.hub.home import Home
    from fedge_server.hub.server import serve
    from fedge_server.hub.settings import Settings

    home = Home.chosen(arguments.home)
    settings = Settings.load(home.settings)
    logs.start(arguments.log_format, text=logging.Formatter(logs.SERVER))
    logging.getLogger("alembic").setLevel(logging.WARNING)
    serve(home, settings, log_format=arguments.log_format)
    return 0


def _preflight(arguments: argparse.Namespace) -> int:
    from fedge_server.hub.home import Home
    from fedge_server.hub.preflight import check

    findings = check(Home.chosen(arguments.home))
    lines = [f"{'ok ' if found.good else 'BAD'}  {found.what}: {found.detail}" for found in findings]
    value = [{"what": found.what, "good": found.good, "detail": found.detail} for found in findings]
    show(arguments, value, lines)
    return 0 if all(found.good for found in findings) else 1
