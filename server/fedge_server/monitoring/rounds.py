"""Follow what workers commit: their rounds stand in the registry, so the hub reads them there and counts.

A worker needs no port of its own for this and may die at any moment: what it has committed is counted once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa

from fedge.errors import FedgeError
from fedge_server.monitoring.metrics import MAX_RUNS
from fedge_server.monitoring.signals import round_committed
from fedge_server.registry import schema
from fedge_server.registry.engine import reading
from fedge_server.rounds.record import RoundRecord

INTERVAL_S: Final = 5.0
UNDER_WAY: Final = ("queued", "running", "stopping")
_runs, _rounds = schema.runs, schema.rounds
_log = logging.getLogger("fedge.hub")


class Rounds:
    """Rounds that were committed since this process began, each once.

    Args:
        engine: of the registry.
        tell: is called for each of them, with the run's name.
    """

    def __init__(self, engine: sa.Engine, tell: Callable[[str, RoundRecord], None] = round_committed) -> None:
        self._engine, self._tell = engine, tell
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._marks: dict[str, int] = {}  # the last round that was seen, by run, of those that may go on
        self._over: dict[str, int] = {}  # likewise, of those that are over and may be resumed
        self.last: dict[str, tuple[RoundRecord, int]] = {}  # by run, newest last: with its planned rounds

    def look(self) -> None:
        """Read what is new, and tell.

        Raises:
            FedgeError: the database refuses it.
        """
        for run in self._candidates():
            name = str(run["id"])
            if name not in self._marks:
                self._marks[name] = self._begin(name, run["created"])
            for record in self._after(name, self._marks[name]):
                self._marks[name] = record.round
                self._tell(name, record)
                self.last.pop(name, None)
                self.last[name] = record, _planned(run["config"])
            if run["status"] not in UNDER_WAY:
                self._over[name] = self._marks.pop(name)
        while len(self.last) > MAX_RUNS:
            del self.last[next(iter(self.last))]

    async def follow(self, interval_s: float = INTERVAL_S) -> None:
        """Look again and again, in a thread; a database that is away is asked again."""
        while True:
            try:
                await asyncio.to_thread(self.look)
            except FedgeError as error:
                _log.error("rounds cannot be counted now: %s", error)
            await asyncio.sleep(interval_s)

    def _candidates(self) -> list[Any]:
        """Runs that may have new rounds: under way, or followed till now, or begun since this process did."""
        new = (_runs.c.created >= self._since) & _runs.c.id.not_in(self._over)
        where = _runs.c.status.in_(UNDER_WAY) | _runs.c.id.in_(self._marks) | new
        query = sa.select(_runs.c.id, _runs.c.status, _runs.c.created, _runs.c.config).where(where)
        with reading(self._engine) as connection:
            return list(connection.execute(query.order_by(_runs.c.created, _runs.c.id)).mappings())

    def _begin(self, run: str, created: str) -> int:
        """The round after which a run is followed: of one that is older than this process, from now on."""
        if run in self._over:  # it was resumed
            return self._over.pop(run)
        if created >= self._since:
            return 0
        with reading(self._engine) as connection:
            found = connection.scalar(sa.select(sa.func.max(_rounds.c.number)).where(_rounds.c.run_id == run))
        return int(found or 0)

    def _after(self, run: str, number: int) -> list[RoundRecord]:
        where = (_rounds.c.run_id == run) & (_rounds.c.number > number)
        query = sa.select(_rounds.c.record).where(where).order_by(_rounds.c.number)
        with reading(self._engine) as connection:
            return [RoundRecord.from_json(value) for value in connection.scalars(query)]


def _planned(config: Any) -> int:
    """0 where the configuration does not say."""
    found = config.get("rounds", {}).get("count", 0) if isinstance(config, dict) else 0
    return found if isinstance(found, int) else 0
