"""The privacy ledger: one row for each draw of noise, written before the noise is drawn.

A row says that its round's result may have been seen. A server that dies after it has spent the round,
whether or not the round was ever committed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from fedge_server.privacy.accounting import Spend
from fedge_server.registry import schema
from fedge_server.registry.engine import reading, writing

_rows = schema.privacy

Check = Callable[[Sequence[Spend]], None]
"""Raises BudgetError when all these together would be too much."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A row: which round of which run spent what, and by which draw of noise."""

    run_id: str
    round: int  # from 1
    noise: str  # tells this draw of noise from every other
    mechanism: str
    spend: Spend


class Ledger:
    """What the data of one population of devices has been spent on, in all runs that name it."""

    def __init__(self, engine: sa.Engine, name: str) -> None:
        self._engine, self.name = engine, name

    @classmethod
    def names(cls, engine: sa.Engine) -> list[str]:
        """The ledgers that hold something."""
        with reading(engine) as connection:
            return list(connection.scalars(sa.select(_rows.c.ledger).distinct().order_by(_rows.c.ledger)))

    def entries(self) -> list[Entry]:
        """All rows, oldest first."""
        with reading(self._engine) as connection:
            return self._read(connection)

    def spend(self, entry: Entry, check: Check) -> None:
        """Write a row down, once for the same draw of noise.

        The check, which may take seconds, runs outside the transaction; when another run has spent meanwhile
        it runs again.

        Raises:
            BudgetError: the check says so; nothing is written.
        """
        while True:
            found = self.entries()
            if entry in found:
                return
            check([*(each.spend for each in found), entry.spend])
            with writing(self._engine) as connection:
                if self._read(connection) != found:
                    continue
                connection.execute(_rows.insert().values(ledger=self.name, spent=_now(), **_flat(entry)))
                return

    def _read(self, connection: sa.Connection) -> list[Entry]:
        query = sa.select(_rows).where(_rows.c.ledger == self.name).order_by(_rows.c.id)
        return [
            Entry(
                row["run_id"],
                row["round"],
                row["noise"],
                row["mechanism"],
                Spend(row["unit"], row["sampling"], row["noise_multiplier"], row["steps"]),
            )
            for row in connection.execute(query).mappings()
        ]


def _flat(entry: Entry) -> dict[str, object]:
    spend = entry.spend
    return {
        "run_id": entry.run_id,
        "round": entry.round,
        "noise": entry.noise,
        "mechanism": entry.mechanism,
        "unit": spend.unit,
        "sampling": spend.sampling,
        "noise_multiplier": spend.noise_multiplier,
        "steps": spend.steps,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
