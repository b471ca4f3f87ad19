"""Devices that wait for news: a bounded number, woken by tier, and not all at one moment."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection
from typing import Final

MAX_WAITING: Final = 8192  # one keeps a few kB
PER_DEVICE: Final = 2  # the one of a connection that broke may still be there
ANSWERS_PER_S: Final = 400  # that woken devices are spread over


class Waiting:
    """Those who wait, by tier.

    News are counted: who has seen count n and then waits for n + 1 misses none that came in between.
    """

    def __init__(self, most: int = MAX_WAITING) -> None:
        self._most = most
        self._news: Counter[str] = Counter()
        self._who: dict[asyncio.Future[bool], tuple[str, str]] = {}  # to tier and device
        self._of: Counter[str] = Counter()
        self._woken = 0  # by the latest news

    def __len__(self) -> int:
        return len(self._who)

    def news(self, tier: str) -> int:
        """How often there were news for a tier."""
        return self._news[tier]

    def has_room(self, device: str) -> bool:
        """Whether one more call of a device may wait."""
        return len(self._who) < self._most and self._of[device] < PER_DEVICE

    async def wait(self, tier: str, device: str, seen: int, seconds: float) -> bool:
        """Wait until there are news after the count that was seen; False: there were none for so long."""
        if self._news[tier] != seen:
            return True
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._who[waiter] = (tier, device)
        self._of[device] += 1
        try:
            await asyncio.wait([waiter], timeout=seconds)
            return waiter.done()
        finally:
            del self._who[waiter]
            self._of[device] -= 1
            if not self._of[device]:
                del self._of[device]

    def end_of(self, devices: Collection[str]) -> None:
        """Calls of these devices look again whether they may be here at all."""
        for waiter, (_, device) in self._who.items():
            if not waiter.done() and device in devices:
                waiter.set_result(True)

    def devices(self) -> set[str]:
        """Who waits."""
        return {device for _, device in self._who.values()}

    def wake(self, tiers: Collection[str]) -> None:
        """There are news for these tiers."""
        self._news.update(tiers)
        self._woken = sum(tier in tiers for tier, _ in self._who.values())
        for waiter, (tier, _) in self._who.items():
            if not waiter.done() and tier in tiers:
                waiter.set_result(True)

    def spread_s(self) -> float:
        """Seconds over which those whom the latest news have woken should look what they are."""
        return self._woken / ANSWERS_PER_S
