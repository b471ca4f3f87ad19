"""Learn again while the hub is up: each learning goes on from where the database says it stands."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from fedge.errors import FedgeError
from fedge_server.continual.learnings import Learning, Learnings
from fedge_server.continual.state import Status
from fedge_server.continual.steps import World, look, publisher
from fedge_server.hub.home import Home
from fedge_server.registry.database import Registry

LOOK_S: Final = 5.0  # between looks, unless somebody says that something has changed
_AT_ONCE: Final = 8  # steps of one learning in one look: some are over at once
_log = logging.getLogger("fedge.hub")


class Learner:
    """Moves all learnings of a home.

    Args:
        home: of the server.
        registry: of everything.
        clock: Unix seconds.
    """

    def __init__(self, home: Home, registry: Registry, clock: Callable[[], float] = time.time) -> None:
        self._learnings = Learnings(registry.engine, clock)
        self._world = World(home, registry, publisher(home, registry), self._heard, clock)
        self._queued = False
        self._said: dict[str, str] = {}

    def advance(self) -> bool:
        """Let each learning go as far as it can now; returns whether a run was queued."""
        self._queued = False
        for learning in self._learnings.all():
            try:
                self._advance(learning)
            except FedgeError as error:  # one that cannot go on holds up no other, and says so once
                if self._said.get(learning.name) != str(error):
                    _log.error("learning %s: cannot go on: %s", learning.name, error)
                self._said[learning.name] = str(error)
            else:
                self._said.pop(learning.name, None)
        return self._queued

    def _advance(self, learning: Learning) -> None:
        for _ in range(_AT_ONCE):
            event = look(self._world, learning)
            if not self._learnings.changes(learning, event):
                return
            before, learning = learning.state.status, self._learnings.happened(learning.name, event)
            if learning.state.status is not before:
                _log.info("learning %s: %s", learning.name, describe(learning))

    def _heard(self) -> None:
        self._queued = True


def describe(learning: Learning) -> str:
    """Where it stands, in a few words."""
    state = learning.state
    if state.status is Status.WATCHING:
        return "watching" + (f" (cycle {state.cycle} is over)" if state.cycle else "")
    return f"cycle {state.cycle} is {state.status.value} ({state.cause}: {state.why})"


async def learn_always(
    home: Home,
    registry: Registry,
    tell: Callable[[], Awaitable[None]],
    changed: asyncio.Event,
    look_s: float = LOOK_S,
) -> None:
    """Look for ever.

    Args:
        home: of the server.
        registry: of everything.
        tell: called when a run was queued.
        changed: set: somebody has changed something; the next look is now.
        look_s: between looks, else.
    """
    learner = Learner(home, registry)
    while True:
        changed.clear()
        try:
            if await asyncio.to_thread(learner.advance):
                await tell()
        except Exception:  # noqa: BLE001 - a hub that cannot learn again still keeps its devices
            _log.exception("learning again: cannot be looked at")
        with suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), look_s)
