"""Remove what is not kept any more while the hub is up, so that its disk does not fill with old releases."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from fedge.errors import FedgeError
from fedge_server.hub.home import Home
from fedge_server.registry.database import Registry
from fedge_server.retention.pruning import prune
from fedge_server.retention.rule import Keep

INTERVAL_S: Final = 3600.0
_log = logging.getLogger("fedge.hub")


async def tidy_always(home: Home, registry: Registry, keep: Keep, *, interval_s: float = INTERVAL_S) -> None:
    """Prune again and again, in a thread; whatever goes wrong is logged, and the hub goes on.

    The first time comes after one interval: whoever has upgraded can still set what is kept.
    """
    while True:
        await asyncio.sleep(interval_s)
        try:
            done = await asyncio.to_thread(prune, home, registry, keep)
            for line in done.retired.lines():
                _log.info("no longer kept: %s", line)
            if done.files:
                _log.info("removed %d files that nothing needs, %d bytes", done.files, done.size)
        except FedgeError as error:
            _log.error("what is old cannot be removed: %s", error)
        except Exception:  # noqa: BLE001 - a hub that cannot tidy still keeps its devices
            _log.exception("what is old cannot be removed")
