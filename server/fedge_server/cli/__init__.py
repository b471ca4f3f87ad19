"""`fedge-server`: look at runs and releases of a home folder, and make variants for further tiers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache

from fedge import cli
from fedge_server.cli import (
    audit,
    backup,
    compress,
    fleet,
    init,
    keys,
    learn,
    pretrain,
    privacy,
    release,
    rollout,
    runs,
    serving,
    signer,
    telemetry,
)

_EXAMPLES = """\
  fedge-server run ls --home out/digits
  fedge-server compress --home out/digits --tiers tiers.toml
  fedge-server release show 1 --home out/digits"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 done, 1 the work failed, 2 the user's mistake."""
    return cli.run(_parser(), argv)


@cache
def _parser() -> argparse.ArgumentParser:
    """All subcommands; made once in a process, whoever calls `main` how often."""
    parser = cli.parser(
        "fedge-server", "The cloud side: runs, variants and releases of a home folder.", _EXAMPLES
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    runs.add(commands)
    for module in (
        release,
        signer,
        rollout,
        learn,
        telemetry,
        audit,
        compress,
        init,
        fleet,
        keys,
        serving,
        privacy,
        pretrain,
        backup,
    ):
        module.add(commands)
    return parser
