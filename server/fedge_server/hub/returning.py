"""Take devices back from halted rollouts while the hub is up, as soon as what they need can be signed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from fedge_server.delivery import Shelf
from fedge_server.hub.home import Home
from fedge_server.registry.database import Registry

LOOK_S: Final = 2.0  # between looks
AWAY_S: Final = 60.0  # at most, where a signer is away or refuses: it is asked less and less often
_log = logging.getLogger("fedge.hub")


async def take_back_always(
    home: Home, registry: Registry, shelf: Shelf, tell: Callable[[], Awaitable[None]], look_s: float = LOOK_S
) -> None:
    """Look for ever.

    Args:
        home: of the server.
        registry: of rollouts and releases.
        shelf: what is published, as the hub sees it.
        tell: called when something new was published.
        look_s: between looks.
    """
    pause, said = look_s, ""
    while True:
        await asyncio.sleep(pause)
        try:
            done, why = await asyncio.to_thread(_take_back, home, registry, shelf)
            if done:
                await tell()
        except Exception:  # noqa: BLE001 - a hub that cannot publish still keeps its devices
            _log.exception("halted rollouts: cannot be looked at")
            done, why = [], "failed"
        for what in done:
            _log.info("%s", what)
        if why and why != said:
            _log.warning("%s", why)
        pause, said = (min(2 * pause, AWAY_S) if why else look_s), why


def _take_back(home: Home, registry: Registry, shelf: Shelf) -> tuple[list[str], str]:
    """What was done, and why something could not be; loads what publishes when there is something to do."""
    from fedge_server.release.place import ReleasePlace
    from fedge_server.release.returning import take_back

    def mark(tier: str) -> tuple[int, int]:
        view = shelf.refresh()
        return (view.floor(tier), view.newest(tier)) if tier in view.tiers else (0, 0)

    steps = take_back(ReleasePlace.of(home.root), registry, mark)
    return [step.what for step in steps if step.is_done], "; ".join(
        step.what for step in steps if not step.is_done
    )
