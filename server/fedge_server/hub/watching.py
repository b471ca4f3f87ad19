"""Who waits for the ends of which messages; on the hub's event loop."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Watch:
    """Somebody who waits for the ends of some messages."""

    waiting: set[str]
    ended: list[str] = field(default_factory=list)
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, message_id: str) -> None:
        """A message was answered or closed."""
        if message_id in self.waiting:
            self.waiting.discard(message_id)
            self.ended.append(message_id)
            self.woken.set()

    async def take(self) -> list[str]:
        """The messages that ended since the last call, after waiting for one; empty: there are no more."""
        while self.waiting and not self.ended:
            self.woken.clear()
            await self.woken.wait()
        ended, self.ended = self.ended, []
        return ended


class Watches:
    """All who wait, by the messages that they wait for."""

    def __init__(self) -> None:
        self._of: dict[str, list[Watch]] = {}

    def add(self, message_ids: set[str]) -> Watch:
        """Somebody waits for these from now on."""
        watch = Watch(message_ids)
        for message_id in message_ids:
            self._of.setdefault(message_id, []).append(watch)
        return watch

    def remove(self, watch: Watch) -> None:
        """Somebody waits for nothing any more."""
        for message_id in watch.waiting:
            self._of[message_id].remove(watch)
            if not self._of[message_id]:
                del self._of[message_id]
        watch.waiting.clear()

    def end(self, message_id: str) -> None:
        """Tell who waits for a message that it was answered or closed."""
        for watch in self._of.pop(message_id, ()):
            watch.end(message_id)
