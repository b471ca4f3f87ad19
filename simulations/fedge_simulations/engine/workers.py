"""Worker processes of the engine: one a core, each with its own view of the one data set.

The parent works too. Workers start in the background and take parts once they have proved the model for
themselves; one that ends before its time gives its part back. What they do changes no result (`lanes`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from fedge.config import Simulation
from fedge.dataset import Examples
from fedge.learning.local import Job
from fedge_simulations.engine import frames
from fedge_simulations.engine.lanes import LANES, Part, Sums
from fedge_simulations.processes import environment

Say = Callable[[str], None]
Do = Callable[[Part], Sums]

PAYS_S = 20.0  # of work ahead from which a second process, whose start costs about 4, is started unasked
X, Y = "x.npy", "y.npy"
# One core each. And memory that a stack has used is kept for the next one: handing it back after each costs a
# worker a quarter of its speed with tiny models.
_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(128 * 1024**2),
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2),
}


class Workers:
    """Does the parts of a round, by as many processes as there are cores for."""

    def __init__(self, settings: Simulation, data: Examples, say: Say) -> None:
        """Start nothing yet."""
        self._settings, self._data, self._say = settings, data, say
        cores = len(os.sched_getaffinity(0))
        self._wanted = min(settings.workers or cores, LANES)
        self.hired: list[_Hired] = []
        self._started = self._wanted == 1
        self._changed = threading.Condition()
        self._end: Callable[[], object] = lambda: None

    def close(self) -> None:
        """End the others; none is started again."""
        self._started = True
        self._end()
        self.hired = []

    @property
    def processes(self) -> int:
        """That are at work now, this one included."""
        return 1 + sum(hired.ready for hired in self.hired)

    def consider(self, job: Job, ahead_s: float) -> None:
        """Start the others where the configuration names them, or where so much work lies ahead.

        Args:
            job: gives the model that they prove first.
            ahead_s: seconds that this process would take alone for what is known to come.
        """
        if self._started or (not self._settings.workers and ahead_s < PAYS_S):
            return
        self._started = True
        folder = tempfile.TemporaryDirectory(prefix="fedge-workers-")
        try:
            # One file that all of them map: the data are in memory once more, however many they are.
            np.save(Path(folder.name) / X, self._data.x, allow_pickle=False)
            np.save(Path(folder.name) / Y, self._data.y, allow_pickle=False)
            self.hired = [_Hired(Path(folder.name), self._settings) for _ in range(self._wanted - 1)]
        except (OSError, ValueError) as error:
            folder.cleanup()
            self._say(f"no worker processes: the data cannot be shared with them ({error})")
            return
        self._end = weakref.finalize(self, _end, list(self.hired), folder)
        for hired in self.hired:
            threading.Thread(target=hired.prepare, args=(job, self._tell), daemon=True).start()

    def run(
        self, job: Job, parts: Sequence[Part], do: Do, at_once: int, take: Callable[[Sums], None]
    ) -> None:
        """Do all parts and hand over their sums in the order of the parts.

        Args:
            job: what they have in common.
            parts: of a round.
            do: does a part in this process.
            at_once: clients that a worker shall batch together.
            take: hears of each sum.
        """
        crew = [hired for hired in self.hired if hired.ready]
        if not crew or len(parts) == 1:
            for part in parts:
                take(do(part))
            return
        turn = _Turn(parts, self._changed)
        threads = [
            threading.Thread(target=hired.work, args=(job, turn, at_once, self._tell), daemon=True)
            for hired in crew
        ]
        for thread in threads:
            thread.start()
        while (found := turn.next_of_parent(take)) is not None:
            turn.finish(found, do(parts[found]))
        for thread in threads:
            thread.join()

    def _tell(self, hired: _Hired, reason: str) -> None:
        with self._changed:
            hired.ready = False
            told, hired.told = hired.told, True
        if not told:
            self._say(f"a worker process is done without: {reason}")


class _Turn:
    """The parts of one round: which are open, which are done."""

    def __init__(self, parts: Sequence[Part], changed: threading.Condition) -> None:
        self.parts, self._changed = parts, changed
        self._open = deque(range(len(parts)))
        self._done: dict[int, Sums] = {}
        self._handed = 0  # so many have been handed over

    def next(self) -> int | None:
        """A part that nobody does; None: there is none now."""
        with self._changed:
            return self._open.popleft() if self._open else None

    def finish(self, number: int, sums: Sums) -> None:
        """It is done."""
        with self._changed:
            self._done[number] = sums
            self._changed.notify_all()

    def give_back(self, number: int) -> None:
        """Whoever had it is gone."""
        with self._changed:
            self._open.appendleft(number)
            self._changed.notify_all()

    def next_of_parent(self, take: Callable[[Sums], None]) -> int | None:
        """Hand over what is done, in order; then a part to do, or None once all are done."""
        while True:
            with self._changed:
                while self._handed not in self._done and not self._open and self._handed < len(self.parts):
                    self._changed.wait()
                ready = []
                while self._handed in self._done:
                    ready.append(self._done.pop(self._handed))
                    self._handed += 1
                number = self._open.popleft() if self._open else None
            for sums in ready:
                take(sums)
            if number is not None or self._handed == len(self.parts):
                return number


class _Hired:
    """One worker process, seen from the parent."""

    def __init__(self, folder: Path, settings: Simulation) -> None:
        """Start it; it loads torch by itself while the parent goes on.

        Raises:
            OSError: it cannot be started.
        """
        self.ready = self.told = False
        self._known: Job | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedge_simulations.engine.worker", str(folder), settings.engine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment(), **_SETTINGS},
        )

    @property
    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self.process.stdin is not None  # noqa: S101 - both are pipes
        assert self.process.stdout is not None  # noqa: S101
        return self.process.stdin, self.process.stdout

    def prepare(self, job: Job, tell: Callable[[_Hired, str], None]) -> None:
        """Let it prove the model; then it is ready."""
        try:
            self._say_job(job)
            self._answer("ready")
        except Exception as error:  # noqa: BLE001 - whatever a process of its own says or leaves unsaid
            tell(self, self._why(error))
            return
        self.ready = True

    def work(self, job: Job, turn: _Turn, at_once: int, tell: Callable[[_Hired, str], None]) -> None:
        """Do parts until none is open."""
        while (number := turn.next()) is not None:
            try:
                if self._known is not job:
                    self._say_job(job)
                    self._answer("ready")
                part = turn.parts[number]
                arrays = frames.of_part(part)
                told = {"lanes": part.lanes, "longest": part.longest, "at_once": at_once}
                frames.write(self._pipes[0], "part", arrays, **{k: str(v) for k, v in told.items()})
                sums = frames.sums_of(self._answer("done"))
            except Exception as error:  # noqa: BLE001 - as above; the parent waits for every part
                turn.give_back(number)
                tell(self, self._why(error))
                return
            turn.finish(number, sums)

    def _say_job(self, job: Job) -> None:
        arrays, config = frames.of_job(job)
        frames.write(self._pipes[0], "job", arrays, config=config)
        self._known = job

    def _answer(self, wanted: str) -> frames.Arrays:
        kind, arrays, text = frames.read(self._pipes[1])
        if kind != wanted:
            raise _RefusedError(text.get("reason", kind))
        return arrays

    def _why(self, error: Exception) -> str:
        if isinstance(error, _RefusedError):
            return str(error)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        return f"it ended with {self.process.poll()} ({type(error).__name__}: {error})"


class _RefusedError(Exception):
    """A worker says that it cannot."""


def _end(hired: Sequence[_Hired], folder: tempfile.TemporaryDirectory[str]) -> None:
    """Workers hold nothing that could be lost, and may still be loading torch."""
    for each in hired:
        each.told = True  # that it ends is no news
        each.process.kill()
        each.process.wait()
        for pipe in (each.process.stdin, each.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
    folder.cleanup()
