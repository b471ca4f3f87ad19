"""`fedge-server audit`: who did what, when and why, and whether the trail still holds."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fedge import cli
from fedge.errors import UserError
from fedge_server.cli.place import add_home, show, table
from fedge_server.cli.runs import open_registry

if TYPE_CHECKING:
    from fedge_server.rollout.audit import Entry


def add(commands: Any) -> None:
    """Add the subcommands."""
    about = "the trail of who did what: verify, show"
    group = commands.add_parser("audit", help=about, description=about)
    inner = group.add_subparsers(required=True, metavar="COMMAND")
    made = cli.subcommand(
        inner,
        "verify",
        _verify,
        summary="recompute the chain of digests, and print its head: keep it elsewhere as an anchor",
        examples="  fedge-server audit verify\n  fedge-server audit verify --anchor 17:DIGEST --format json",
    )
    made.add_argument(
        "--anchor", metavar="NUMBER:DIGEST", help="an earlier head, which the trail must still hold"
    )
    add_home(made)
    made = cli.subcommand(
        inner,
        "show",
        _show,
        summary="print the newest entries, oldest first",
        examples="  fedge-server audit show --last 50\n  fedge-server audit show --subject micro-3",
    )
    made.add_argument("--last", type=int, default=20, metavar="N", help="so many")
    made.add_argument("--subject", metavar="ID", help="about this alone, such as a rollout")
    add_home(made)


def _verify(arguments: argparse.Namespace) -> int:
    from fedge_server.rollout.audit import Anchor, Audit

    anchor = Anchor.parse(arguments.anchor) if arguments.anchor else None
    _, registry = open_registry(arguments.home)
    with registry:
        found = Audit(registry.engine).verify(anchor)
    head = str(found.head) if found.head else None
    value = {"entries": found.entries, "head": head, "broken": found.broken, "why": found.why}
    if found.broken is None:
        lines = [f"{found.entries} entries hold"] + ([f"head {head}"] if head else [])
    else:
        lines = [f"BROKEN at entry {found.broken}: {found.why}", f"{found.entries} entries before it hold"]
    show(arguments, value, lines)
    return int(found.broken is not None)


def _show(arguments: argparse.Namespace) -> int:
    from fedge_server.rollout.audit import Audit

    if not 1 <= arguments.last <= 1_000_000:
        raise UserError(f"--last {arguments.last}: must be 1 to 1000000")
    _, registry = open_registry(arguments.home)
    with registry:
        entries = Audit(registry.engine).entries(arguments.subject, arguments.last)
    value = [asdict(entry) | {"at": _when(entry), "digest": entry.digest} for entry in entries]
    rows = [["number", "at", "who", "subject", "what", "why"]]
    rows += [[str(e.number), _when(e), e.who, e.subject, e.what, e.why] for e in entries]
    return show(arguments, value, table(rows) if entries else ["no entries"])


def _when(entry: Entry) -> str:
    from fedge_server.identity.admission import show_time

    return show_time(entry.at_ms / 1000)
