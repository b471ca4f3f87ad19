"""Going through a sweep: several processes at once, none of which can take the others with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from fedge.errors import UserError
from fedge.files import sole_holder, write_atomically
from fedge_simulations.processes import environment
from fedge_simulations.runs import SUMMARY, read, run_id_of
from fedge_simulations.sweep import Planned

PLAN: Final = "sweep.json"  # what the sweep in a folder is
LOGS: Final = "logs"  # what each run said
_LOCK: Final = "sweep.lock"

Ended = Literal["done", "skipped", "failed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one run of a sweep ended."""

    run: Planned
    ended: Ended  # skipped: it was finished before
    reason: str = ""  # why it failed, or what it lacks

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "name": self.run.name,
            "settings": dict(self.run.settings),
            "ended": self.ended,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Heard:
    """What is told while a sweep goes on; called from several threads, one call at a time."""

    began: Callable[[Planned], None] = lambda _: None
    round: Callable[[Planned, Mapping[str, Any]], None] = lambda *_: None
    ended: Callable[[Outcome], None] = lambda _: None


@dataclass(frozen=True, slots=True)
class Manner:
    """How to go through a sweep."""

    parallel: int = 1  # processes
    overwrite: bool = False  # do finished runs again
    tensorboard: Path | None = None  # folder for events, one inside for each run


def sweep(planned: Sequence[Planned], out: Path, manner: Manner, heard: Heard) -> list[Outcome]:
    """Do the runs of a sweep that are not finished; one that fails does not stop the others.

    Args:
        planned: the runs; their folders lie in `out`, by name.
        out: new, empty, or of an earlier call: its finished runs are left, its interrupted ones go on.
        manner: how.
        heard: hears what happens.

    Returns:
        One outcome per run, in the order of `planned`.

    Raises:
        UserError: the folder holds something else, or another sweep works in it.
    """
    _check_folder(out)
    (out / LOGS).mkdir(parents=True, exist_ok=True)
    with _alone(out):
        _write_plan(out, planned)
        outcomes = {}
        waiting: deque[Planned] = deque()
        for run in planned:
            before = None if manner.overwrite else _before(out / run.name, run)
            if before is None:
                waiting.append(run)
                continue
            outcomes[run.name] = before
            heard.ended(before)
        crew = _Crew(out, manner, heard, waiting, outcomes)
        crew.work()
    return [outcomes[run.name] for run in planned]


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is no folder; choose another --out")
    if out.exists() and any(out.iterdir()) and not (out / PLAN).exists():
        raise UserError(f"{out}: is not empty and holds no sweep; choose another --out")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    lock = sole_holder(out / _LOCK)
    try:
        lock.__enter__()
    except BlockingIOError as error:
        raise UserError(f"{out}: another sweep works in it; wait for it, or choose another --out") from error
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _write_plan(out: Path, planned: Sequence[Planned]) -> None:
    """Note the runs, beside those of earlier calls."""
    path = out / PLAN
    known = json.loads(path.read_text("utf-8"))["runs"] if path.exists() else {}
    runs = known | {run.name: dict(run.settings) for run in planned}
    write_atomically(path, json.dumps({"runs": runs}, indent=2, default=str).encode())


def _before(folder: Path, run: Planned) -> Outcome | None:
    """How an earlier call ended this run; None: it is still to be done."""
    if not (folder / SUMMARY).exists():
        return None
    if run_id_of(run.config) not in {past.run_id for past in read(folder, run.name)}:
        reason = (
            f"{folder} holds a finished run of another configuration; choose another --out, or --overwrite"
        )
        return Outcome(run, "failed", reason)
    return Outcome(run, "skipped", _lacks(folder))


def _lacks(folder: Path) -> str:
    """What a finished run did not achieve; empty: nothing."""
    summary = json.loads((folder / SUMMARY).read_text("utf-8"))
    without = [v["tier"] for v in summary.get("variants", []) if v["gate"] != "passed"]
    other = [d["id"] for d in summary.get("devices", []) if not d["same_as_gate"]]
    return "; ".join(
        [f"tier {tier} got no variant" for tier in without]
        + [f"device {name} answers otherwise" for name in other]
    )


@dataclass(slots=True)
class _Crew:
    """Threads that each look after one worker process."""

    out: Path
    manner: Manner
    heard: Heard
    waiting: deque[Planned]
    outcomes: dict[str, Outcome]
    lock: threading.Lock = field(default_factory=threading.Lock)
    workers: dict[int, _Worker] = field(default_factory=dict)
    stopped: bool = False
    fault: BaseException | None = None

    def work(self) -> None:
        """Go on until nothing waits."""
        size = min(self.manner.parallel, len(self.waiting))
        threads = [threading.Thread(target=self._look_after, args=(i, size)) for i in range(size)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            with self.lock:
                self.stopped = True
                workers = list(self.workers.values())
            for worker in workers:  # none is left but after Ctrl-C or a fault of ours
                worker.kill()
            for thread in threads:
                thread.join()
        if self.fault is not None:
            raise self.fault

    def _look_after(self, number: int, size: int) -> None:
        try:
            while (run := self._next(number, size)) is not None:
                self._do(number, run)
        except BaseException as error:  # noqa: BLE001 - raised again by `work`
            with self.lock:
                self.fault, self.stopped = self.fault or error, True
        finally:
            with self.lock:
                worker = self.workers.pop(number, None)
            if worker is not None:
                worker.end()

    def _next(self, number: int, size: int) -> Planned | None:
        """The next run, with a worker that lives."""
        with self.lock:
            if self.stopped or not self.waiting:
                return None
            worker = self.workers.get(number)
            if worker is None or not worker.lives:
                self.workers[number] = _Worker(_cores(number, size))
            run = self.waiting.popleft()
            self.heard.began(run)
            return run

    def _do(self, number: int, run: Planned) -> None:
        log = self.out / LOGS / f"{run.name}.log"
        events = self.manner.tensorboard
        job = {
            "config": run.config.to_mapping(),
            "out": str(self.out / run.name),
            "log": str(log),
            "overwrite": self.manner.overwrite,
            "tensorboard": str(events / run.name) if events is not None else None,
        }
        answer: Mapping[str, Any] = {}
        for answer in self.workers[number].do(job):
            if "round" in answer:
                with self.lock:
                    self.heard.round(run, answer)
        with self.lock:
            if self.stopped:
                return
            outcome = self._outcome(run, answer, self.workers[number], log)
            self.outcomes[run.name] = outcome
            self.heard.ended(outcome)

    def _outcome(self, run: Planned, answer: Mapping[str, Any], worker: _Worker, log: Path) -> Outcome:
        if answer.get("ended") == "done":
            return Outcome(run, "done", "" if answer["complete"] else _lacks(self.out / run.name))
        if answer.get("ended") == "failed":
            return Outcome(run, "failed", answer["reason"])
        return Outcome(run, "failed", f"its process ended {worker.how()}; see {log}")


class _Worker:
    """A process that does one run after the other."""

    def __init__(self, cores: Sequence[int]) -> None:
        threads = {"OMP_NUM_THREADS": str(len(cores))} if cores else {}
        given = ["--cores", ",".join(map(str, cores))] if cores else []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedge_simulations.sweep_worker", *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            process_group=0,  # Ctrl-C is the sweep's to answer
            env=threads | environment() if "OMP_NUM_THREADS" in os.environ else environment() | threads,
        )

    @property
    def lives(self) -> bool:
        """Whether the process can take another run."""
        return self._process.poll() is None

    def do(self, job: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Give it a run and iterate over its answers; without an end among them the process has died."""
        assert self._process.stdin is not None  # noqa: S101 - both are pipes
        assert self._process.stdout is not None  # noqa: S101
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return
        for line in self._process.stdout:
            answer: dict[str, Any] = json.loads(line)
            yield answer
            if "ended" in answer:
                return
        self._process.wait()

    def how(self) -> str:
        """How the process ended."""
        code = self._process.wait()
        return f"by signal {-code}" if code < 0 else f"with code {code}"

    def kill(self) -> None:
        """End it in the middle of its run, with the processes that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """End it when it has nothing to do."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _cores(number: int, size: int) -> list[int]:
    """The cores of worker `number` of `size`: their own where there are enough; empty: whichever."""
    if size == 1:
        return []
    cores = sorted(os.sched_getaffinity(0))
    return cores[number::size] or [cores[number % len(cores)]]
