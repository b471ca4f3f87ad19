"""Installations over the service, each in a process of its own that dies where it is told.

    python mortal.py HOME   for each line [VERSION, PLACE, NUMBER] of standard input, writes a line

PLACE `before`: SIGKILL at that step before the version is committed, at the latest where the commit would
come next. `after`: at that step after the commit, at the latest when all is done. `time`: after so many
seconds, wherever it is then. `never`: not at all. A step is a chunk that arrives, or a call that changes the
file system or makes a change durable; the commit is the rename that makes `current` name the version.
The answer: {"killed": bool, "steps": {"before": n, "after": n}}, no steps where it was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import fedge_client.agent.installation as installation
from fedge_client.agent.identity import Identity
from fedge_client.delivery import Delivery
from fedge_client.device import Device

_CALLS = (
    *((os, name) for name in ("fsync", "mkdir", "unlink", "fdopen", "chmod")),
    (tempfile, "mkstemp"),
)


def die() -> NoReturn:
    """As a power cut does it: nothing is flushed, nothing is tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed")


class Counted:
    """An installation whose steps are counted, and which dies at one of them."""

    def __init__(self, version: int, place: str, number: float) -> None:
        self._version, self._place, self._number = version, place, number
        self._now, self.steps = "before", {"before": 0, "after": 0}

    def install(self, home: Path) -> None:
        """Do it as the agent does."""
        for module, name in _CALLS:
            setattr(module, name, self._counting(getattr(module, name)))
        os.replace = self._replacing(os.replace)  # type: ignore[assignment]  # pathlib calls it too
        with Delivery(lambda: Identity.open(home)) as service:

            def fetch(name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
                for chunk in service.fetch(name, maximum, offset):
                    self._step()
                    yield chunk

            done = installation.bring(Device.open(home), fetch, self._version)
        if done.fault:
            sys.stderr.write(f"{done.fault}\n")
        if self._place == "after":
            die()

    def _step(self) -> None:
        if self._place == self._now and self.steps[self._now] == self._number:
            die()
        self.steps[self._now] += 1

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self._step()
            return call(*arguments, **options)

        return counted

    def _replacing(self, call: Callable[..., None]) -> Callable[..., None]:
        def replaced(source: Any, target: Any, **options: Any) -> None:
            self._step()
            commits = self._now == "before" and Path(target).name == "current" and self._names(source)
            if commits and self._place == "before":
                die()
            call(source, target, **options)
            if commits:
                self._now = "after"

        return replaced

    def _names(self, state: Any) -> bool:
        current = json.loads(Path(state).read_bytes())["current"]
        return current is not None and current["version"] == self._version


def main(home: Path) -> None:
    """Fork for each line: everything is loaded, and no connection was made."""
    for line in sys.stdin:
        version, place, number = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                counted = Counted(version, place, number)
                counted.install(home)
                os.write(writing, json.dumps(counted.steps).encode())
            except BaseException as error:  # noqa: BLE001 - said, and the process ends here
                sys.stderr.write(f"{error!r}\n")
            finally:
                sys.stderr.flush()
                os._exit(0)
        os.close(writing)
        if place == "time":
            time.sleep(number)
            os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
        print(json.dumps({"killed": killed, "steps": json.loads(said or b"{}")}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
