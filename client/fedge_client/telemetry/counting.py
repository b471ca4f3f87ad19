"""What a service, or one command, has answered on its way to the device's windows.

`serve` owns the folder of windows for as long as it is up, and takes up what `infer` has counted meanwhile.
Whoever cannot own it, or keep anything, loses counts and no answer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np

from fedge.telemetry.window import Window
from fedge_client.device import Device
from fedge_client.runtime import Runtime
from fedge_client.serving.answered import Answered, Array, route_of
from fedge_client.telemetry.collector import Answering, Collector, cpu_s, memory_bytes
from fedge_client.telemetry.outgoing import FOLDER, leave, owned
from fedge_client.telemetry.settings import Settings

TICK_S: Final = 1.0  # between two looks whether a window is over
_PATIENCE_S: Final = 2.0  # for the agent or a command, which own the folder for an instant
_log = logging.getLogger("fedge.telemetry")


class Counting:
    """Counts what becomes of a service's requests: its `Counter`.

    Args:
        home: of the device.
        settings: of the collection.
    """

    def __init__(self, home: Path, settings: Settings) -> None:
        self._home, self._folder, self._settings = home, home / FOLDER, settings
        self._held = ExitStack()
        self._collector: Collector | None = None
        self._runtime: Runtime | None = None
        self._lock = threading.Lock()  # of tick and close
        self._failures = 0
        self._said = False  # that answers are not counted

    def answered(self, found: Answered) -> None:
        """Count the answers of a request; where another release answers by now they are not counted."""
        if (collector := self._collector) is not None:
            for x, rows, route in _by_route(found):
                collector.answered(x, rows, _each_s(found), route, version=found.version)

    def failed(self) -> None:
        """Count a request that got no answer."""
        self._failures += 1  # in the event loop, which must not wait for a disk

    def tick(self, runtime: Runtime | None) -> None:
        """Do what time asks for; takes up to two seconds.

        Args:
            runtime: that answers from now on; None: none yet.
        """
        with self._lock:
            self._use(runtime)
            if self._collector is not None:
                failures, self._failures = self._failures, 0
                if failures:
                    self._collector.failed(failures)
                self._collector.tick()

    def close(self) -> None:
        """Write down what is counted, and let others own the folder."""
        self.tick(None)
        with self._lock:
            if self._collector is not None:
                self._collector.keep()
            self._collector = None
            self._held.close()

    def _use(self, runtime: Runtime | None) -> None:
        if runtime is None or runtime is self._runtime:
            return
        answering = answering_of(self._home, runtime)
        if self._collector is not None:
            self._collector.installed(answering)
        elif self._own():
            self._collector = Collector(self._folder, answering, self._settings)
        self._runtime = runtime if self._collector is not None else None  # else tried again

    def _own(self) -> bool:
        try:
            self._held.enter_context(owned(self._folder, patience_s=_PATIENCE_S))
        except OSError as error:
            if not self._said:
                _log.warning("answers are not counted yet: %s", error.strerror or error)
            self._said = True
            return False
        return True


def count_once(home: Path, settings: Settings, runtime: Runtime, found: Answered) -> None:
    """Count the answers of one command; beside a service that is up they are left for it to take up.

    Args:
        home: of the device.
        settings: of the collection.
        runtime: that has answered.
        found: its answers.
    """
    folder, answering = home / FOLDER, answering_of(home, runtime)
    try:
        with owned(folder):
            collector = Collector(folder, answering, settings)
            for x, rows, route in _by_route(found):
                collector.answered(x, rows, _each_s(found), route)
            collector.tick()
            collector.keep()
    except BlockingIOError:
        _leave(folder, settings, answering, found)
    except OSError:
        return  # a disk that refuses a lock takes no counts either


def _leave(folder: Path, settings: Settings, answering: Answering, found: Answered) -> None:
    sketch = answering.nothing()
    for x, rows, route in _by_route(found):
        answering.count(sketch, x, rows, _each_s(found), route)
    part = Window(
        slot=0,  # of the window that takes it up
        period_s=settings.period_s,
        version=answering.version,
        sketch=sketch,
        reference=answering.digest,
        cpu_s=cpu_s(),
        memory_bytes=memory_bytes(),
    )
    try:
        leave(folder, part)
    except OSError as error:
        _log.info("answers are not counted: %s", error)


def answering_of(home: Path, runtime: Runtime) -> Answering:
    """What is counted of an installed release."""
    reference = Device.open(home).reference(runtime.installed)
    return Answering(runtime.release.version, runtime.spec, reference)


def _by_route(found: Answered) -> Iterator[tuple[Array, Array, str]]:
    """Inputs (N, *spec.shape), the device's own probabilities (N, classes) and the route, for each route.

    Whoever has answered: a release's reference is made of what its variant says, and drift is seen in that.
    """
    rows = np.array([list(each.probabilities.values()) for each in found.own], np.float32)
    routes = [route_of(*each) for each in zip(found.route, found.why, strict=True)]
    for route in dict.fromkeys(routes):
        those = np.array([each == route for each in routes])
        yield found.x[those], rows[those], route


def _each_s(found: Answered) -> float:
    return found.seconds / len(found.own)
