"""What watches a hub: it follows rounds in any case, and answers Prometheus where the settings say so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from prometheus_client import ProcessCollector

from fedge.errors import FedgeError
from fedge_server.hub.home import Home
from fedge_server.hub.settings import Metrics
from fedge_server.monitoring.metrics import counted
from fedge_server.monitoring.rounds import Rounds
from fedge_server.monitoring.serving import Exporter
from fedge_server.monitoring.state import Seen, State
from fedge_server.registry.database import Registry

ANSWER_S: Final = 3.0  # that the loop may take to say what it holds


class Monitor:
    """Started and stopped with its hub, on its loop.

    Args:
        home: of the server.
        settings: where to listen.
        registry: of the home.
        seen: what the hub holds; called on the loop.
    """

    def __init__(self, home: Home, settings: Metrics, registry: Registry, seen: Callable[[], Seen]) -> None:
        self._home, self._settings, self._registry, self._seen = home, settings, registry, seen
        self._rounds = Rounds(registry.engine)
        self._exporter: Exporter | None = None
        self.port = 0  # 0: nobody is answered

    def start(self) -> asyncio.Task[None]:
        """Listen, and follow rounds in a task that the caller ends.

        Raises:
            FedgeError: the port is taken.
        """
        if (place := self._settings.place) is not None:
            loop, registry = asyncio.get_running_loop(), counted()
            ProcessCollector(registry=registry)
            registry.register(
                State(
                    lambda: self._ask(loop),
                    lambda: dict(self._rounds.last),
                    self._registry.engine,
                    self._home,
                )
            )
            self._exporter = Exporter(*place, registry)
            self.port = self._exporter.port
        return asyncio.create_task(self._rounds.follow())

    def stop(self) -> None:
        """Answer nobody any more, and tell of the last rounds; may wait, so call it in a thread."""
        if self._exporter is not None:
            self._exporter.stop()
            self._exporter = None
        with suppress(FedgeError):
            self._rounds.look()

    def _ask(self, loop: asyncio.AbstractEventLoop) -> tuple[Seen, float]:
        """From a thread."""

        async def look() -> Seen:
            return self._seen()

        began = time.monotonic()
        return asyncio.run_coroutine_threadsafe(look(), loop).result(ANSWER_S), time.monotonic() - began
