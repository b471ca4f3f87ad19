"""Drop what is older than is kept, while the hub is up."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from fedge.errors import FedgeError
from fedge_server.telemetry.store import Telemetry

INTERVAL_S: Final = 3600.0
_log = logging.getLogger("fedge.hub")


async def prune_always(telemetry: Telemetry, *, interval_s: float = INTERVAL_S) -> None:
    """Prune again and again, in a thread; whatever goes wrong is logged, and the hub goes on."""
    while True:
        try:
            if count := await asyncio.to_thread(telemetry.prune):
                _log.info("telemetry: dropped %d windows that are older than is kept", count)
        except FedgeError as error:
            _log.error("telemetry: cannot be pruned: %s", error)
        except Exception:  # noqa: BLE001 - a hub that cannot prune still keeps its devices
            _log.exception("telemetry: cannot be pruned")
        await asyncio.sleep(interval_s)
