"""When the time of a window is over, and what is kept of it for sending then: pure rules, and one writer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from fedge.telemetry.privacy import Below, noised
from fedge.telemetry.window import Window
from fedge_client.telemetry.outgoing import Closed, Outgoing, owned
from fedge_client.telemetry.settings import Settings

_SET_BACK: Final = 2  # periods by which a clock may fall behind before it is believed


def begins(period_s: int, now: float, last: int) -> int:
    """The slot of a window that begins now: above all before, unless the clock was far ahead.

    Args:
        period_s: of windows.
        now: Unix seconds.
        last: the last slot that was closed.
    """
    by_clock = max(int(now // period_s), 0)
    return by_clock if by_clock < last - _SET_BACK else max(by_clock, last + 1)


def lasts(slot: int, period_s: int, now: float) -> bool:
    """Whether a window's time is not over; one that closed early lets the next begin early too."""
    by_clock = max(int(now // period_s), 0)
    return by_clock <= slot <= by_clock + _SET_BACK + 1


def close(outgoing: Outgoing, window: Window, settings: Settings, below: Below) -> bool:
    """Keep a window for sending, with its noise; whether it is one that tells something.

    A window without a request tells nothing, and one over budget must not.
    """
    budget = settings.budget(outgoing.noised)
    if not window.sketch.routes.any() or (budget is not None and not budget.allows):
        outgoing.forget_open()
        return False
    if budget is not None:
        sketch = noised(window.sketch, budget.epsilon, below)
        window = replace(window, sketch=sketch, epsilon=budget.epsilon)
    outgoing.lost = 0
    outgoing.close(window)
    return True


class Left:
    """Closed windows of a device for its agent, which closes what nobody counts in any more.

    Args:
        folder: of the device's telemetry; another process may own it.
        settings: of the collection.
        now: Unix seconds.
        below: where the noise comes from; a device takes the default.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        *,
        now: Callable[[], float] = time.time,
        below: Below = secrets.randbelow,
    ) -> None:
        self._folder, self._settings, self._now, self._below = folder, settings, now, below
        self._closed = Closed(folder)

    def due(self, most: int) -> list[tuple[int, bytes]]:
        """Closed windows to be sent, oldest first: slot, and the bytes that travel."""
        self._close_over()
        found = ((slot, self._closed.read(slot)) for slot in self._closed.waiting()[:most])
        return [(slot, data) for slot, data in found if data is not None]

    def sent(self, slot: int) -> None:
        """The server has a window, or refuses it for good."""
        self._closed.drop(slot)

    def forget(self) -> None:
        """Remove what was counted, as far as no other process counts; what was spent stays known."""
        if self._folder.exists():
            with suppress(OSError), owned(self._folder):
                Outgoing(self._folder).forget()

    def _close_over(self) -> None:
        """Close the open window if its time is over and no process owns it: what counted has ended."""
        if not self._folder.exists():
            return
        with suppress(OSError), owned(self._folder):
            outgoing = Outgoing(self._folder, self._settings.keep)
            window = outgoing.opened()
            if window is None:
                return
            if window.slot <= outgoing.last_slot:
                outgoing.forget_open()  # told already; again it would be told with other noise
            elif not lasts(window.slot, window.period_s, self._now()):
                close(outgoing, window, self._settings, self._below)
