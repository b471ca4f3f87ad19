"""Sign the repository's timestamp and snapshot again while the hub is up: else devices refuse it one day."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from fedge.errors import FedgeError
from fedge_server.hub.home import Home
from fedge_server.release.place import ONLINE, ReleasePlace

INTERVAL_S: Final = 600.0  # a timestamp of two days is due after twelve hours
LIMIT_S: Final = 120.0  # for one look; a disk that hangs is waited for in its thread, and said

_log = logging.getLogger("fedge.hub")


async def keep_repository(home: Home, *, interval_s: float = INTERVAL_S) -> None:
    """Look again and again, in a thread; whatever goes wrong is logged, and the hub goes on."""
    while True:
        look = asyncio.ensure_future(asyncio.to_thread(refresh, home))
        try:
            done, _ = await asyncio.wait({look}, timeout=LIMIT_S)
            while not done:
                _log.error(
                    "repository %s: not signed again within %d s; is its disk away?", home.root, LIMIT_S
                )
                done, _ = await asyncio.wait({look}, timeout=LIMIT_S)
            if look.result():
                _log.info("signed snapshot and timestamp of the repository again")
        except FedgeError as error:
            _log.error("repository: cannot be signed again: %s", error)
        except Exception:  # noqa: BLE001 - a hub without a repository still keeps its devices
            _log.exception("repository: cannot be signed again")
        await asyncio.sleep(interval_s)


def refresh(home: Home) -> bool:
    """Sign what is due, if the repository and both online keys are here; returns whether anything was."""
    place = ReleasePlace.of(home.root)
    if not place.repository.is_there:
        return False
    keys = place.online()
    return len(keys) == len(ONLINE) and place.repository.refresh(keys)
