"""Steps per second of local training with one thread, with all, and with as many as fedge chooses.

A step of a small network is shorter than waking a second thread. And a thread of OpenMP that waits for the
others spins: where another process wants the CPU too, it spins in the time that the one it waits for needs.
So fedge chooses the number of threads by the size of a step (`fedge.learning.threads.fitted`), and lets
waiting threads sleep (OMP_WAIT_POLICY=PASSIVE, `fedge.learning`). Modes:

    one       one thread
    all       all threads, waiting ones sleep
    fitted    as many as fedge chooses, waiting ones sleep: fedge as it is
    spinning  all threads, waiting ones spin: torch as it is

Every mode trains the same network on the same data by `fedge.learning.local.train`. The modes take turns, so
that what else the machine does hits all of them; figures are medians. "busy" means one process per CPU that
does nothing but count, started here and ended here. "others' cores" is what everybody else used meanwhile:
where it is above 0.1 in an idle row, the machine was not idle and that row is worth little.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch  # before fedge, which would set the waiting policy: here each worker has its own
from _harness import Options, OtherLoad, Row, machine, options, publish, usable_cpus
from torch import nn

from fedge.config import Train
from fedge.learning import local, models
from fedge.spec import Spec

DIGITS = Spec("image", (8, 8), "float32", tuple("0123456789"))
MNIST = Spec("image", (28, 28), "float32", tuple("0123456789"))
MODES = ("one", "all", "fitted", "spinning")

_BURN = "import time; end = time.monotonic() + 1800\nwhile time.monotonic() < end: pass"
_WORKER = "--worker"


@dataclass(frozen=True, slots=True)
class Case:
    """A network and how it is trained."""

    name: str
    spec: Spec
    build: Callable[[Spec], nn.Module]
    batch: int
    steps: int  # of one client: some hundredths of a second on one thread

    @property
    def work(self) -> int:
        """Parameters times examples of a step: what fedge decides by."""
        return self.batch * models.parameters(self.build(self.spec))

    def speed(self, mode: str, seconds: float) -> float:
        """Steps per second of clients that train one after the other in this mode, for so long."""
        torch.manual_seed(0)
        network = self.build(self.spec)
        side = self.spec.shape[0]
        x = torch.randn(self.batch * self.steps, 1, side, side)
        y = torch.randint(0, self.spec.classes, (len(x),))
        settings = Train(epochs=1, batch_size=self.batch, learning_rate=0.01)
        steps, started = 0, time.perf_counter()
        with _mode(mode):
            while (taken := time.perf_counter() - started) < seconds or steps == 0:
                steps += local.train(network, x, y, settings, seed=0).steps
        return steps / taken


CASES = (
    Case("digits mlp", DIGITS, models.mlp(200, 200), batch=16, steps=50),
    Case("mlp 784-200-200-10", MNIST, models.mlp(200, 200), batch=32, steps=20),
    Case("cnn (McMahan)", MNIST, models.cnn, batch=32, steps=2),
)


@contextmanager
def _mode(mode: str) -> Iterator[None]:
    """Local training with so many threads: 'fitted' is fedge's rule, the others switch it off."""
    if mode == "fitted":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1 if mode == "one" else before)
    try:
        with patch.object(local, "fitted", _leave_alone):
            yield
    finally:
        torch.set_num_threads(before)


def _leave_alone(_: nn.Module, __: int) -> AbstractContextManager[None]:
    return nullcontext()


def work() -> None:
    """Measure what stdin asks for, a line each; answer with the speed and the CPU seconds used so far."""
    for line in sys.stdin:
        case, mode, seconds = line.split()
        print(CASES[int(case)].speed(mode, float(seconds)), time.process_time(), flush=True)


class Worker:
    """A process that measures; OpenMP reads its waiting policy once, when torch is loaded."""

    def __init__(self, policy: str | None) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, _WORKER],
            env=environment if policy is None else {**environment, "OMP_WAIT_POLICY": policy},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.cpu_s = 0.0

    def speed(self, case: int, mode: str, seconds: float) -> float:
        """Steps per second."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{case} {mode} {seconds}\n")
        self._process.stdin.flush()
        speed, cpu_s = self._process.stdout.readline().split()
        self.cpu_s = float(cpu_s)
        return float(speed)

    def close(self) -> None:
        """End the process: it reads until its stdin is closed."""
        self._process.communicate()


class Workers:
    """A process for each waiting policy, of which only one works at a time."""

    def __init__(self) -> None:
        self._asleep, self._spinning = Worker("PASSIVE"), Worker(None)
        for case in range(len(CASES)):
            for mode in MODES:
                self.speed(case, mode, 0.0)  # first use of a network costs more

    def speed(self, case: int, mode: str, seconds: float) -> float:
        """Steps per second."""
        return (self._spinning if mode == "spinning" else self._asleep).speed(case, mode, seconds)

    def cpu_s(self) -> float:
        """CPU seconds that all of this has used."""
        return time.process_time() + self._asleep.cpu_s + self._spinning.cpu_s

    def close(self) -> None:
        """End both."""
        self._asleep.close()
        self._spinning.close()


@contextmanager
def _busy() -> Iterator[None]:
    """One process per CPU that burns it; ended by their ids, and by themselves after half an hour."""
    neighbours = [subprocess.Popen([sys.executable, "-c", _BURN]) for _ in range(usable_cpus())]
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
        for neighbour in neighbours:
            neighbour.wait()


def measure(workers: Workers, case: int, turns: int, seconds: float) -> dict[str, float]:
    """Median steps per second of each mode over `turns` measurements of `seconds` each, taken in turns."""
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(turns):
        for i in range(len(MODES)):
            mode = MODES[(turn + i) % len(MODES)]
            found[mode].append(workers.speed(case, mode, seconds))
    return {mode: statistics.median(values) for mode, values in found.items()}


def measure_all(turns: int, seconds: float) -> tuple[dict[str, float], list[Row]]:
    """Claims and rows: every case on the machine as it is, then with busy neighbours."""
    rows: list[Row] = []
    figures: dict[tuple[int, str], dict[str, float]] = {}
    with closing(Workers()) as workers:
        for neighbours, around in (("idle", nullcontext()), ("busy", _busy())):
            with around:
                for i, case in enumerate(CASES):
                    others = OtherLoad(workers.cpu_s)
                    found = figures[i, neighbours] = measure(workers, i, turns, seconds)
                    rows.append(_row(case, neighbours, others.cores(), found))
    digits, cnn = figures[0, "busy"], figures[2, "idle"]
    claims = {
        "digits_busy_fitted_over_all": digits["fitted"] / digits["all"],
        "digits_busy_fitted_over_spinning": digits["fitted"] / digits["spinning"],
        "cnn_idle_fitted_over_one": cnn["fitted"] / cnn["one"],
        "cnn_busy_fitted_over_spinning": figures[2, "busy"]["fitted"] / figures[2, "busy"]["spinning"],
    }
    return claims, rows


def _row(case: Case, neighbours: str, others: float, found: dict[str, float]) -> Row:
    return {
        "steps/s of": case.name,
        "neighbours": neighbours,
        "others' cores": round(others, 2),
        "batch": case.batch,
        "work": case.work,
        **found,
        "all/one": found["all"] / found["one"],
        "fitted/all": found["fitted"] / found["all"],
        "fitted/spinning": found["fitted"] / found["spinning"],
    }


def main(asked: Options) -> None:
    """Measure, print, write."""
    before = machine() | {"threads": torch.get_num_threads()}
    claims, rows = measure_all(turns=4 if asked.quick else 12, seconds=0.2 if asked.quick else 0.5)
    publish(asked, before, claims, rows)


if __name__ == "__main__":
    if sys.argv[1:] == [_WORKER]:
        work()
    else:
        main(options(__doc__ or ""))
