"""`fedge-client enroll` and `run`: the resident agent."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fedge import cli, logs


def add(commands: Any) -> None:
    """Add the subcommands."""
    made = cli.subcommand(
        commands,
        "run",
        _run,
        summary="Be this device's agent: stay connected to the server and train when asked.",
        examples="  fedge-client run\n  fedge-client run --home /var/lib/fedge --once",
    )
    add_home(made)
    logs.add_option(made)
    made.add_argument("--once", action="store_true", help="do what waits on the server, then end")


def add_home(parser: argparse.ArgumentParser) -> None:
    """Add `--home`."""
    default = Path(os.environ.get("FEDGE_HOME") or Path.home() / ".fedge")
    parser.add_argument(
        "--home", type=Path, default=default, help="the device's folder (default: $FEDGE_HOME, else ~/.fedge)"
    )


def _run(arguments: argparse.Namespace) -> int:
    from fedge_client.agent.running import run

    return run(arguments.home, once=arguments.once, log_format=arguments.log_format)
