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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedge.errors import UserError
from fedge.spec import Spec
from fedge.telemetry.privacy import Below, Budget, noised
from fedge.telemetry.reference import Reference
from fedge.telemetry.sketch import ROUTES, Sketch, answers_of, latency_bin
from fedge.telemetry.window import PERIODS_S, Window
from fedge_client.telemetry.outgoing import Outgoing

_SET_BACK: Final = 2  # periods by which a clock may fall behind before it is believed


@dataclass(frozen=True, slots=True)
class Settings:
    """What is collected, and how often.

    Raises:
        UserError: a number is out of range.
    """

    period_s: int = 3600
    keep_every_s: float = 60.0  # a kill loses no more than this of the window under way
    epsilon: float | None = None  # for one answer in a window; None: no noise
    most_epsilon: float | None = None  # over all windows; None: no limit

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        if not PERIODS_S[0] <= self.period_s <= PERIODS_S[1]:
            raise UserError(
                f"telemetry: period_s = {self.period_s}: must be {PERIODS_S[0]} to {PERIODS_S[1]}"
            )
        if not self.keep_every_s >= 0:
            raise UserError(f"telemetry: keep_every_s = {self.keep_every_s:g}: must be 0 or more")
        if self.epsilon is not None:
            Budget(self.epsilon, self.most_epsilon)
        elif self.most_epsilon is not None:
            raise UserError("telemetry: most_epsilon needs epsilon, the part of each window")

    def budget(self, windows: int) -> Budget | None:
        """What may be told after so many windows; None: there is no noise."""
        return None if self.epsilon is None else Budget(self.epsilon, self.most_epsilon, windows)


@dataclass(frozen=True, slots=True)
class Answering:
    """What answers at the moment: windows are of one release."""

    version: int
    spec: Spec
    reference: Reference | None = None  # None: inputs are not counted


class Collector:
    """Counts in memory and on disk; safe to call from several threads.

    Args:
        folder: of the device's telemetry.
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
        self._lock, self._outgoing = threading.Lock(), Outgoing(folder)
        self._answering, self._digest = answering, _digest(answering)
        self._cpu_s, self._kept = _cpu_s(), now()
        self._slot, self._sketch = self._begin(), self._nothing()
        self._take_up(self._outgoing.opened())

    def answered(
        self, x: npt.NDArray[Any], probabilities: npt.NDArray[Any], seconds: float, route: str = "local"
    ) -> None:
        """Count answers.

        Args:
            x: (N, *spec.shape) raw inputs; features are taken of them, and nothing else.
            probabilities: (N, classes); rows with numbers that are none count as errors.
            seconds: that each took.
            route: of `ROUTES`.
        """
        answering = self._answering
        usable = np.isfinite(probabilities).all(1)
        if not usable.all():
            self.failed(int((~usable).sum()))
            x, probabilities = x[usable], probabilities[usable]
        if not len(x):
            return
        answers, confidence = answers_of(probabilities)
        reference = answering.reference
        inputs = None if reference is None else reference.sketched(x, answering.spec)
        with self._lock:
            self._turn()
            if self._answering is not answering:
                return  # another release has been installed meanwhile: its windows are another model's
            sketch = self._sketch
            sketch.routes[ROUTES.index(route)] += len(x)
            sketch.latency[latency_bin(seconds)] += len(x)
            sketch.answers[:] += answers
            sketch.confidence[:] += confidence
            if inputs is not None:
                sketch.inputs[:] += inputs
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
            self._answering, self._digest = answering, _digest(answering)
            self._slot, self._sketch = self._begin(), self._nothing()

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
            self._sketch = self._nothing()

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
        same = (before.version, before.reference) == (self._answering.version, self._digest)
        if same and before.period_s == self._settings.period_s and self._lasts(before.slot):
            self._slot, self._sketch = before.slot, before.sketch
        else:
            self._close(before)
            self._slot = self._begin()

    def _keep_at_times(self) -> None:
        now = self._now()
        if not 0 <= now - self._kept < self._settings.keep_every_s:
            self._outgoing.keep_open(self._window())
            self._kept = now

    def _turn(self) -> None:
        """Close the window if its time is over."""
        if not self._lasts(self._slot):
            self._close(self._window())
            self._slot, self._sketch = self._begin(), self._nothing()

    def _close(self, window: Window) -> None:
        """Keep it for sending; a window without a request tells nothing, and one over budget must not."""
        budget = self.budget
        if not window.sketch.routes.any():
            self._outgoing.forget_open()
            return
        if budget is not None:
            if not budget.allows:
                self._outgoing.forget_open()
                return
            sketch = noised(window.sketch, budget.epsilon, self._below)
            window = replace(window, sketch=sketch, epsilon=budget.epsilon)
        self._outgoing.lost = 0
        self._outgoing.close(window)
        self._cpu_s = _cpu_s()

    def _window(self) -> Window:
        return Window(
            slot=self._slot,
            period_s=self._settings.period_s,
            version=self._answering.version,
            sketch=self._sketch,
            reference=self._digest,
            cpu_s=max(_cpu_s() - self._cpu_s, 0.0),
            memory_bytes=_memory_bytes(),
            lost=self._outgoing.lost,
        )

    def _begin(self) -> int:
        """The slot of a window that begins now: above all before, unless the clock was far ahead."""
        by_clock, last = max(int(self._now() // self._settings.period_s), 0), self._outgoing.last_slot
        return by_clock if by_clock < last - _SET_BACK else max(by_clock, last + 1)

    def _lasts(self, slot: int) -> bool:
        """Whether a window's time is not over; one that closed early lets the next begin early too."""
        by_clock = max(int(self._now() // self._settings.period_s), 0)
        return by_clock <= slot <= by_clock + _SET_BACK + 1

    def _nothing(self) -> Sketch:
        reference = self._answering.reference
        return Sketch.empty(len(reference.names) if reference else 0, self._answering.spec.classes)


def _digest(answering: Answering) -> str:
    return answering.reference.digest if answering.reference and answering.reference.names else ""


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _memory_bytes() -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes; bytes on macOS
    return largest if sys.platform == "darwin" else largest * 1024
