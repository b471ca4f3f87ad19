"""`fedge-server privacy`: what the data of a home's devices has been spent on."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from fedge import cli
from fedge.errors import UserError
from fedge_server.cli.place import add_home, show, table
from fedge_server.cli.runs import open_registry

if TYPE_CHECKING:
    from fedge_server.registry.database import Registry


def add(commands: Any) -> None:
    """Add the subcommand."""
    made = cli.subcommand(
        commands,
        "privacy",
        _privacy,
        summary="what the rounds of all runs have spent, by ledger",
        examples="  fedge-server privacy\n  fedge-server privacy --home out/digits --delta 1e-6",
    )
    made.add_argument("--delta", type=float, default=1e-5, help="at which epsilon is stated")
    made.add_argument("--accountant", choices=("pld", "rdp"), default="pld", help="how it is computed")
    add_home(made)


def _privacy(arguments: argparse.Namespace) -> int:
    from fedge_server.registry.ledger import Ledger

    if not 0 < arguments.delta < 1:
        raise UserError(f"--delta {arguments.delta:g}: must be above 0 and below 1")
    _, registry = open_registry(arguments.home)
    with registry:
        ledgers = [Ledger(registry.engine, name) for name in Ledger.names(registry.engine)]
        found = [_spent(ledger, arguments) for ledger in ledgers]
        bare = _unprotected(registry)
    rows = [["ledger", "rounds", "epsilon of a client", "of an example", "runs"]]
    rows += [
        [
            each["ledger"],
            str(each["rounds"]),
            _number(each["epsilon_client"]),
            _number(each["epsilon_example"]),
            ", ".join(each["runs"]),
        ]
        for each in found
    ]
    lines = [*table(rows), f"at delta {arguments.delta:g}"] if found else ["nothing has been spent"]
    if bare:
        lines.append(f"covered by no epsilon, since they ran without a mechanism: {', '.join(bare)}")
    value = {"delta": arguments.delta, "ledgers": found, "without_mechanism": bare}
    return show(arguments, value, lines)


def _spent(ledger: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    from fedge_server.privacy.accounting import epsilon

    entries = ledger.entries()
    spends = [entry.spend for entry in entries]
    client, example = (
        epsilon(spends, arguments.delta, unit=unit, accountant=arguments.accountant)
        for unit in ("client", "example")
    )
    return {
        "ledger": ledger.name,
        "rounds": len(entries),
        "epsilon_client": client if math.isfinite(client) else None,  # JSON knows no infinity
        "epsilon_example": example if math.isfinite(example) else None,
        "runs": list(dict.fromkeys(entry.run_id for entry in entries)),
    }


def _unprotected(registry: Registry) -> list[str]:
    """Runs with a round behind them that was not noised."""
    return [
        run["id"]
        for run in registry.runs()
        if run["config"].get("privacy", {}).get("mechanism", "none") == "none"
        and len(registry.records(run["id"])) > 1
    ]


def _number(epsilon: float | None) -> str:
    return "no bound" if epsilon is None else f"{epsilon:.3f}"
