"""Tell the server what this device has counted of its answers: closed windows, each until the server has it.

Those who answer are other processes (`fedge-client serve`, `infer`); this one sends what lies closed on the
disk, and closes what none of them counts in any more. Nothing of it disturbs training or delivery: what fails
is tried again after a random time that doubles.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

import grpc

from fedge.errors import FedgeError
from fedge_client.agent.connection import backoff, said
from fedge_client.agent.settings import TelemetrySettings
from fedge_client.agent.work import Linked
from fedge_client.telemetry.closing import Left
from fedge_client.telemetry.outgoing import FOLDER
from fedge_client.telemetry.sending import send
from fedge_client.telemetry.settings import Settings

SPREAD: Final = 1 / 6  # of a period, in which the windows of a fleet arrive
MOST_S: Final = 600.0  # between two looks, and two attempts

log = logging.getLogger("fedge.agent")


class Teller:
    """Sends windows for as long as the agent runs.

    Args:
        home: of the device.
        settings: `[telemetry]` of its `agent.toml`.
        linked: the connection of the moment.
        changed: is told, in a few words, what became of it.
    """

    def __init__(
        self, home: Path, settings: TelemetrySettings, *, linked: Linked, changed: Callable[[str], None]
    ) -> None:
        self._folder, self._collecting = home / FOLDER, settings.collecting()
        self._linked, self._changed = linked, changed
        self._rng = random.Random()  # noqa: S311 - spreads devices over time, protects nothing
        self.is_busy = self._collecting is not None  # until it has tried once

    async def run(self) -> None:
        """Tell, for ever."""
        if self._collecting is None:
            self._changed("off")
            left = Left(self._folder, Settings())
            await asyncio.to_thread(left.forget)  # what was counted before must not be told later
            await asyncio.Event().wait()
            return
        left, attempt = Left(self._folder, self._collecting), 0
        usual = min(2 * SPREAD * self._collecting.period_s, MOST_S)  # the mean wait is half of it
        while True:
            link = await self._linked.get()
            try:
                await send(left, link.tell)
                attempt, delay = 0, self._rng.uniform(0.0, usual)
                self._changed("sent")
            except (FedgeError, OSError, grpc.RpcError) as error:
                attempt += 1
                delay = self._pause(error, attempt)
            except Exception:  # telemetry must not end the agent
                attempt += 1
                log.exception("telemetry")
                delay = self._pause(FedgeError("an internal fault"), attempt)
            self.is_busy = False
            await asyncio.sleep(delay)

    def _pause(self, error: Exception, attempt: int) -> float:
        """Seconds until the next attempt after this error."""
        if isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.UNIMPLEMENTED:
            self._changed("the server takes none")
            return self._rng.uniform(MOST_S / 2, MOST_S)
        words = said(error) if isinstance(error, grpc.RpcError) else str(error)
        delay = backoff(attempt, MOST_S, self._rng)
        self._changed(f"tries again: {words}"[:300])
        log.info("telemetry: %s; next attempt in %.1f s", words, delay)
        return delay
