"""Tensor bytes that travel for each run: counted at once, written down now and then."""

from __future__ import annotations

import asyncio
import logging

from fedge_server.monitoring.metrics import LINK_DOWN, LINK_UP
from fedge_server.registry.queue import Queue

_log = logging.getLogger("fedge.hub")


class Meter:
    """Counts bytes by run, and adds them to the database's own count."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._new: dict[str, list[int]] = {}  # since they were last saved: down, up

    def count(self, run_id: str, *, down: int = 0, up: int = 0) -> None:
        """So many bytes have travelled."""
        new = self._new.setdefault(run_id, [0, 0])
        new[0] += down
        new[1] += up
        LINK_DOWN.inc(down)
        LINK_UP.inc(up)

    async def save(self) -> None:
        """Write down what has travelled; what the database refuses now is written the next time."""
        new, self._new = self._new, {}
        for run_id, (down, up) in new.items():
            try:
                await asyncio.to_thread(self._queue.traffic, run_id, down, up)
            except Exception as error:  # noqa: BLE001 - a figure must not hold up answers
                _log.error("run %s: its traffic cannot be kept now: %s", run_id, error)
                kept = self._new.setdefault(run_id, [0, 0])
                kept[0], kept[1] = kept[0] + down, kept[1] + up
