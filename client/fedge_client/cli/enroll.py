"""`fedge-client enroll`: make this machine a device of a server."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from fedge import cli
from fedge.errors import FormatError, UserError
from fedge_client.cli.agent import add_home


def add(commands: Any) -> None:
    """Add the subcommand."""
    made = cli.subcommand(
        commands,
        "enroll",
        _enroll,
        summary="Make this machine a device of a server. After a kill, the same command goes on.",
        examples="  fedge-client enroll fedge1:fedge.example.org:9444:...\n"
        "  fedge-client enroll - --home /var/lib/fedge < join.txt",
    )
    made.add_argument(
        "join",
        metavar="JOIN",
        help="what fedge-server token create printed; - reads it from standard input, unseen by other users",
    )
    add_home(made)
    made.add_argument("--format", choices=("text", "json"), default="text", help="default: text")


def _enroll(arguments: argparse.Namespace) -> int:
    from fedge.identity import MAX_JOIN_LENGTH, JoinString
    from fedge_client.agent.enrolment import enrol
    from fedge_client.agent.identity import is_enrolled

    text = sys.stdin.readline(MAX_JOIN_LENGTH + 2) if arguments.join == "-" else arguments.join
    try:
        join = JoinString.parse(text)
    except FormatError as error:
        raise UserError(str(error)) from error
    before = is_enrolled(arguments.home)
    hub = enrol(arguments.home, join).hub
    if arguments.format == "json":
        sys.stdout.write(json.dumps({**asdict(hub), "new": not before}, indent=2) + "\n")
        return 0
    done = "enrolled again" if before else "enrolled"
    sys.stdout.write(f"{done}: device {hub.device_id[:16]}, tier {hub.tier}, server {hub.link_address}\n")
    return 0
