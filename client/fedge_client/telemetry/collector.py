"""Counts answers as they are given, in windows of time, and hands each closed window to who sends it.

An input is looked at for its features, counted, and let go: nothing of it is written or sent. Where a
budget is set, noise is added when a window closes, before it is written for sending.
"""

from __future__ import annotations

import resource
import secrets
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedge.spec import Spec
from fedge.telemetry.privacy import Below, Budget
from fedge.telemetry.reference import Reference
from fedge.telemetry.sketch import ROUTES, Sketch, answers_of, latency_bin
from fedge.telemetry.window import Window
from fedge_client.telemetry.closing import begins, close, lasts
from fedge_client.telemetry.outgoing import Outgoing
from fedge_client.telemetry.settings import Settings


@dataclass(frozen=True, slots=True)
class Answering:
    """What answers at the moment: windows are of one release."""

    version: int
    spec: Spec
    reference: Reference | None = None  # None: inputs are not counted

    @property
    def digest(self) -> str:
        """SHA-256 of the reference; empty: inputs are not counted."""
        return self.reference.digest if self.reference and self.reference.names else ""

    def nothing(self) -> Sketch:
        """Of no answer."""
        return Sketch.empty(len(self.reference.names) if self.reference else 0, self.spec.classes)

    def count(
        self,
        sketch: Sketch,
        x: npt.NDArray[Any],
        probabilities: npt.NDArray[Any],
        seconds: float,
        route: str = "local",
    ) -> None:
        """Add answers to a sketch of this release.

        Args:
            sketch: is changed.
            x: (N, *spec.shape) raw inputs; features are taken of them, and nothing else.
            probabilities: (N, classes); rows with numbers that are none count as errors.
            seconds: that each took.
            route: of `ROUTES`.
        """
        usable = np.isfinite(probabilities).all(1)
        if not usable.all():
            sketch.routes[ROUTES.index("error")] += int((~usable).sum())
            x, probabilities = x[usable], probabilities[usable]
        if not len(x):
            return
        answers, confidence = answers_of(probabilities)
        inputs = None if self.reference is None else self.reference.sketched(x, self.spec)
        sketch.routes[ROUTES.index(route)] += len(x)
        sketch.latency[latency_bin(seconds)] += len(x)
        sketch.answers[:] += answers
        sketch.confidence[:] += confidence
        if inputs is not None:
            sketch.inputs[:] += inputs


class Collector:
    """Counts in memory and on disk; safe to call from several threads.

    Args:
        folder: of the device's telemetry, which this process owns (`outgoing.owned`).
        answering: the installed release.
        settings: of the collection.
        now: Unix seconds.
        below: where the noise comes from; a device takes the default.
    """

    def __init__(
        self,
        folder: Path,
        answering: Answering,
        settings: Settings | None = None,
        *,
        now: Callable[[], float] = time.time,
        below: Below = secrets.randbelow,
    ) -> None:
        self._settings, self._now, self._below = settings or Settings(), now, below
        self._lock, self._outgoing = threading.Lock(), Outgoing(folder, self._settings.keep)
        self._answering, self._digest = answering, answering.digest
        self._cpu_s, self._memory_bytes, self._kept = cpu_s(), 0, now()
        self._slot, self._sketch = self._begin(), answering.nothing()
        self._take_up(self._outgoing.opened())

    def answered(
        self,
        x: npt.NDArray[Any],
        probabilities: npt.NDArray[Any],
        seconds: float,
        route: str = "local",
        *,
        version: int | None = None,
    ) -> None:
        """Count answers, as `Answering.count` does.

        Args:
            x: (N, *spec.shape) raw inputs.
            probabilities: (N, classes).
            seconds: that each took.
            route: of `ROUTES`.
            version: of the release that has answered; where another one does so by now they are not counted.
        """
        with self._lock:
            if version not in (None, self._answering.version):
                return
            self._turn()
            self._answering.count(self._sketch, x, probabilities, seconds, route)
            self._keep_at_times()

    def failed(self, count: int = 1) -> None:
        """Count requests that got no answer."""
        with self._lock:
            self._turn()
            self._sketch.routes[ROUTES.index("error")] += count
            self._keep_at_times()

    def installed(self, answering: Answering) -> None:
        """Another release answers from now on: the window under way is closed."""
        with self._lock:
            self._close(self._window())
            self._answering, self._digest = answering, answering.digest
            self._slot, self._sketch = self._begin(), answering.nothing()

    def tick(self) -> None:
        """Do what time asks for: close the window if it is over, and take up what others have counted."""
        with self._lock:
            self._turn()
            for part in self._outgoing.parts():
                self._add(part)
            self._outgoing.flush()
            self._keep_at_times()

    def due(self, most: int) -> list[tuple[int, bytes]]:
        """Closed windows to be sent, oldest first: slot, and the bytes that travel.

        Args:
            most: of them.
        """
        with self._lock:
            self._turn()
            found = ((slot, self._outgoing.read(slot)) for slot in self._outgoing.waiting()[:most])
            return [(slot, data) for slot, data in found if data is not None]

    def sent(self, slot: int) -> None:
        """The server has a window, or refuses it for good."""
        with self._lock:
            self._outgoing.drop(slot)

    def keep(self) -> None:
        """Write down what is counted so far: before the process ends."""
        with self._lock:
            self._outgoing.keep_open(self._window())
            self._kept = self._now()

    def forget(self) -> None:
        """Remove everything that was counted."""
        with self._lock:
            self._outgoing.forget()
            self._sketch = self._answering.nothing()

    @property
    def budget(self) -> Budget | None:
        """What was told so far, where there is noise."""
        return self._settings.budget(self._outgoing.noised)

    def _take_up(self, before: Window | None) -> None:
        """Go on with the window of the process before this one, or close it.

        One whose slot is closed already was told, and must not be told again with other noise.
        """
        if before is None or before.slot <= self._outgoing.last_slot:
            return
        if before.period_s == self._settings.period_s and self._is_same(before) and self._lasts(before.slot):
            self._slot, self._sketch = before.slot, before.sketch
            self._cpu_s -= before.cpu_s
            self._memory_bytes, self._outgoing.lost = before.memory_bytes, before.lost
        else:
            self._close(before)
            self._slot = self._begin()

    def _is_same(self, window: Window) -> bool:
        """Whether its counts add up with those of the window under way."""
        sizes = [(len(sketch.inputs), len(sketch.answers)) for sketch in (window.sketch, self._sketch)]
        versions = (window.version, window.reference) == (self._answering.version, self._digest)
        return versions and sizes[0] == sizes[1] and not window.epsilon

    def _add(self, part: Window) -> None:
        """What another process has counted; of another release it is lost."""
        if self._is_same(part):
            for own, more in zip(self._sketch.parts().values(), part.sketch.parts().values(), strict=True):
                own += more
            self._cpu_s -= part.cpu_s
            self._memory_bytes = max(self._memory_bytes, part.memory_bytes)

    def _keep_at_times(self) -> None:
        now = self._now()
        if not 0 <= now - self._kept < self._settings.keep_every_s:
            self._outgoing.keep_open(self._window())
            self._kept = now

    def _turn(self) -> None:
        """Close the window if its time is over."""
        if not self._lasts(self._slot):
            self._close(self._window())
            self._slot, self._sketch = self._begin(), self._answering.nothing()

    def _close(self, window: Window) -> None:
        if close(self._outgoing, window, self._settings, self._below):
            self._cpu_s, self._memory_bytes = cpu_s(), 0

    def _window(self) -> Window:
        return Window(
            slot=self._slot,
            period_s=self._settings.period_s,
            version=self._answering.version,
            sketch=self._sketch,
            reference=self._digest,
            cpu_s=max(cpu_s() - self._cpu_s, 0.0),
            memory_bytes=max(memory_bytes(), self._memory_bytes),
            lost=self._outgoing.lost,
        )

    def _begin(self) -> int:
        return begins(self._settings.period_s, self._now(), self._outgoing.last_slot)

    def _lasts(self, slot: int) -> bool:
        return lasts(slot, self._settings.period_s, self._now())


def cpu_s() -> float:
    """CPU seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def memory_bytes() -> int:
    """The most that this process has had so far."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes; bytes on macOS
    return largest if sys.platform == "darwin" else largest * 1024
