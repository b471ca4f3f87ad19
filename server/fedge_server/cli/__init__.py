"""`fedge-server`: look at runs and releases of a home folder, and make variants for further tiers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedge import cli
from fedge.errors import UserError
from fedge_server.cli import (
    audit,
    backup,
    compress,
    fleet,
    init,
    keys,
    pretrain,
    privacy,
    rollout,
    runs,
    serving,
)
from fedge_server.cli.runs import open_registry

if TYPE_CHECKING:
    from fedge.manifest import Release

_EXAMPLES = """\
  fedge-server run ls --home out/digits
  fedge-server compress --home out/digits --tiers tiers.toml
  fedge-server release show 1 --home out/digits"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 done, 1 the work failed, 2 the user's mistake."""
    parser = cli.parser(
        "fedge-server", "The cloud side: runs, variants and releases of a home folder.", _EXAMPLES
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    runs.add(commands)
    _group(commands, "release", "what devices can install", _release_ls, _release_show, "VERSION", int)
    for module in (rollout, audit, compress, init, fleet, keys, serving, privacy, pretrain, backup):
        module.add(commands)
    return cli.run(parser, argv)


def _group(
    commands: Any, name: str, about: str, ls: cli.Command, show: cli.Command, argument: str, kind: type
) -> None:
    group = commands.add_parser(name, help=f"{about}: ls, show", description=about)
    inner = group.add_subparsers(required=True, metavar="COMMAND")
    example = f"  fedge-server {name} ls --home out/digits"
    _common(cli.subcommand(inner, "ls", ls, summary=f"list: {about}", examples=example))
    example = f"  fedge-server {name} show {argument} --home out/digits --format json"
    one = cli.subcommand(inner, "show", show, summary=f"show one: {about}", examples=example)
    one.add_argument("which", metavar=argument, type=kind)
    _common(one)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--home", type=Path, metavar="DIR", help="home or run folder (default: FEDGE_HOME)")
    parser.add_argument("--format", choices=("text", "json"), default="text")


def _print(arguments: argparse.Namespace, value: Any, lines: Sequence[str]) -> int:
    text = json.dumps(value, indent=2) if arguments.format == "json" else "\n".join(lines)
    sys.stdout.write(text + "\n")
    return 0


def _releases(home: Path) -> list[Release]:
    from fedge_server.registry.publish import published
    from fedge_server.release import PUBLISHED

    return published(home / PUBLISHED)


def _release_ls(arguments: argparse.Namespace) -> int:
    opened, registry = open_registry(arguments.home)
    home = opened.root
    registry.close()
    releases = [release.to_json() for release in _releases(home)]
    lines = [
        f"{r['version']}  {r['task']}  {r['created']}  tiers: {', '.join(v['tier'] for v in r['variants'])}"
        for r in releases
    ]
    return _print(arguments, releases, lines or ["no releases"])


def _release_show(arguments: argparse.Namespace) -> int:
    opened, registry = open_registry(arguments.home)
    home = opened.root
    with registry:
        releases = {release.version: release for release in _releases(home)}
        if arguments.which not in releases:
            known = ", ".join(map(str, releases)) or "none"
            raise UserError(f"release {arguments.which}: there is none; releases: {known}")
        release = releases[arguments.which]
        lineage = release.lineage
        records = {r.round: r for r in registry.records(lineage.run)}
    record = records.get(lineage.round)
    origin = record.to_json() if record else None
    lines = [
        f"release {release.version} of task {release.task}, {release.created}",
        f"from global model {lineage.global_model[:16]} of run {lineage.run}, round {lineage.round}",
    ]
    first = records.get(0)
    if first is not None and first.origin:
        lines.append(f"that run {_began(first.origin)}")
    if record:
        lines.append(f"which aggregated {record.clients} updates, together {record.updates[:16]}")
    lines += [
        f"tier {v.tier}: {v.recipe}, {v.wire_bytes:,} bytes, accuracy {v.evidence.get('accuracy', 0):.4f}, "
        f"drop at most {100 * v.evidence.get('drop_upper', 1):.2f} points, evidence {v.evidence_sha256[:16]}"
        for v in release.variants
    ]
    began = dict(first.origin) if first is not None else {}
    return _print(arguments, release.to_json() | {"round": origin, "origin": began}, lines)


def _began(origin: Mapping[str, Any]) -> str:
    """By digest, which leads on to the release or the run that it was."""
    verb = "began with the weights of" if origin["how"] == "start" else "was taught at first by"
    return f"{verb} {origin['from']}, global model {str(origin['sha256'])[:16]}"
