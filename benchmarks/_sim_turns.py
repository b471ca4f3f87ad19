"""Starts contestants as processes, gives them turns, counts CPU seconds and memory of all that they start."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from _superlink import memory_mb

HERE = Path(__file__).resolve().parent
PACKAGES = [HERE.parent / name for name in ("common", "server", "client", "simulations")]  # of this checkout
MARK = "FEDGE_BENCHMARK"  # in the environment of all processes of a contestant
STOP_S = 20.0


class Absent(Exception):  # noqa: N818 - a state, not a mistake
    """A contestant's libraries cannot be had."""


def environment(name: str, requirement: str, cache: Path) -> Path:
    """The python of an environment with this package in it, made if it is not there yet.

    It sees what this environment has (torch above all, which is never installed a second time).

    Raises:
        Absent: the package cannot be installed; why.
    """
    folder = cache / name
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "host.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    held = folder / "held.txt"
    versions = "import torch, numpy; print('torch==%s\\nnumpy==%s' % (torch.__version__, numpy.__version__))"
    held.write_text(subprocess.check_output([sys.executable, "-c", versions], text=True))
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--constraint", held, requirement],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise Absent(f"{requirement}: {done.stdout.strip().splitlines()[-1]}")
    (folder / "ready").touch()
    return python


@dataclass(frozen=True, slots=True)
class Turn:
    """What a contestant did in one turn."""

    clients: float
    examples: float
    cpu_s: float  # of all its processes
    wall_s: float
    loss: float | None  # of the global model afterwards; asked for in the first turn only
    steps: float

    @property
    def per_cpu_s(self) -> float:
        """Clients per CPU second."""
        return self.clients / self.cpu_s

    @property
    def per_s(self) -> float:
        """Clients per second of wall time."""
        return self.clients / self.wall_s

    @property
    def examples_per_cpu_s(self) -> float:
        """Examples per CPU second."""
        return self.examples / self.cpu_s


@dataclass(slots=True)
class Contestant:
    """A process that makes rounds, with whatever it starts."""

    name: str
    mark: str
    popen: subprocess.Popen[str]
    log: Path
    start_s: float = 0.0  # from its start until it was ready
    resting_mb: float = 0.0  # when it was ready: libraries and data set
    first_s: float = 0.0  # from its start until its first round was done
    turns: list[Turn] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        name: str,
        command: Sequence[str | Path],
        folder: Path,
        *,
        cores: int = 1,
        settings: Mapping[str, str] | None = None,
    ) -> Contestant:
        """Start it on so many cores, one thread in each process, and wait until it is ready."""
        mark, log = uuid.uuid4().hex, folder / f"{name.replace(' ', '-')}.log"
        variables = {
            **os.environ,
            MARK: mark,
            "PYTHONPATH": os.pathsep.join(map(str, (HERE, *PACKAGES))),
            "OMP_NUM_THREADS": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            **(settings or {}),
        }
        chosen = sorted(os.sched_getaffinity(0))[-cores:]
        started = time.perf_counter()
        popen = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            cwd=folder,
            env=variables,
            preexec_fn=lambda: os.sched_setaffinity(0, chosen),
        )
        found = cls(name, mark, popen, log)
        found._answer()
        found.start_s = time.perf_counter() - started
        found.resting_mb = memory_mb(found.processes())
        return found

    def processes(self) -> list[int]:
        """Ids of all its processes."""
        mark, found = f"{MARK}={self.mark}".encode(), []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def turn(self, seconds: float) -> Turn:
        """Rounds for at least so long; one at least."""
        before, begun = self._cpu_s(), time.perf_counter()
        answer = self._ask(seconds)
        self.first_s = self.first_s or self.start_s + time.perf_counter() - begun
        return Turn(
            answer["clients"],
            answer["examples"],
            self._cpu_s() - before,
            answer["seconds"],
            answer.get("loss"),
            answer["steps"],
        )

    def peak_mb(self, seconds: float) -> float:
        """The highest memory of all its processes in a turn; what they share is counted once."""
        highest, over = 0.0, threading.Event()

        def watch() -> None:
            nonlocal highest
            while not over.wait(0.02):
                highest = max(highest, memory_mb(self.processes()))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            self._ask(seconds)
        finally:
            over.set()
            watcher.join()
        return max(highest, memory_mb(self.processes()))

    def _ask(self, seconds: float) -> dict[str, float]:
        assert self.popen.stdin is not None
        with suppress(BrokenPipeError):
            self.popen.stdin.write(f"go {seconds}\n")
            self.popen.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        stream: IO[str] | None = self.popen.stdout
        assert stream is not None
        if not (line := stream.readline()):
            self.popen.wait()
            raise RuntimeError(f"{self.name} ended:\n{self.log.read_text()[-3000:]}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def _cpu_s(self) -> float:
        """CPU seconds of all its processes and of those that have ended (Linux: proc_pid_stat(5))."""
        ticks = 0
        for pid in self.processes():
            with suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))  # user and system time, its own and its dead children's
        return ticks / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Let it end, and end what is left of it, by its ids."""
        assert self.popen.stdin is not None
        with suppress(OSError):
            self.popen.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(STOP_S)
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.popen.wait()


@contextmanager
def started(*making: Contestant) -> Iterator[Sequence[Contestant]]:
    """Contestants that end when this is left."""
    with ExitStack() as stack:
        for contestant in making:
            stack.callback(contestant.close)
        yield making


def take_turns(contestants: Sequence[Contestant], count: int, seconds: float) -> None:
    """So many turns of each, in a new order each time, after one that does not count."""
    for contestant in contestants:
        contestant.turn(0.0)
    for number in range(count):
        for i in range(len(contestants)):
            contestant = contestants[(number + i) % len(contestants)]
            contestant.turns.append(contestant.turn(seconds))


def ratio(fast: Contestant, slow: Contestant, of: str = "per_cpu_s") -> float:
    """How many times as fast: the median over turns, each compared with its neighbour."""
    pairs = zip(fast.turns, slow.turns, strict=True)
    return statistics.median(getattr(a, of) / getattr(b, of) for a, b in pairs)


def median(contestant: Contestant, of: str) -> float:
    """Of a contestant's turns."""
    return statistics.median(getattr(turn, of) for turn in contestant.turns)
