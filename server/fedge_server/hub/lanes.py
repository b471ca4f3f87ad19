"""So many transfers at full speed; one that has become slow makes room and goes on in small pieces.

A place bounds what is in memory for transfers, however many devices ask at once. Without the second rule
a few stalled devices would keep all places, and everybody else waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final

from fedge.wire import CHUNK_BYTES

SLOW_S: Final = 5.0  # of one chunk: slower than that gives up its place
SLOW_CHUNK_BYTES: Final = 16 * 1024


@dataclass(slots=True)
class Place:
    """One transfer's place."""

    _release: Callable[[], None]
    fast: bool = True

    @property
    def chunk_bytes(self) -> int:
        """How much to move at once."""
        return CHUNK_BYTES if self.fast else SLOW_CHUNK_BYTES

    @contextmanager
    def chunk(self) -> Iterator[None]:
        """Around the moving of one chunk; when that takes too long, the place is given up meanwhile."""
        timer = asyncio.get_running_loop().call_later(SLOW_S, self.leave)
        try:
            yield
        finally:
            timer.cancel()

    def leave(self) -> None:
        """Make room; a second time is no error."""
        if self.fast:
            self.fast = False
            self._release()


class Lanes:
    """A bounded number of places."""

    def __init__(self, places: int) -> None:
        self._free = asyncio.Semaphore(places)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[Place]:
        """Wait for a place and give it back."""
        await self._free.acquire()
        place = Place(self._free.release)
        try:
            yield place
        finally:
            place.leave()
