"""`python -m fedge_simulations.sweep_worker`: runs what its standard input names, one after the other.

One line of JSON in for each run, lines of JSON out: its rounds, and how it ended. It ends when standard input
does, in the middle of a run if need be: what is committed stays, and the next sweep goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from fedge.errors import FedgeError


def main() -> int:
    """Work until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cores", default="", help="keep to these, such as 0,1")
    cores = parser.parse_args().cores
    if cores:
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    # What a task of the user's prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()
    while True:
        _answer(answers, _work(jobs.get(), answers))


def _read(jobs: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        jobs.put(json.loads(line))
    os._exit(0)  # the sweep is over, or gone


def _work(job: dict[str, Any], answers: IO[str]) -> dict[str, Any]:
    """One run; everything that it says goes into its log."""
    log = Path(job["log"])
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        return {"ended": "done", "complete": _simulate(job, answers)}
    except FedgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return {"ended": "failed", "reason": str(error)}
    except Exception as error:  # noqa: BLE001 - a fault in one run must not end the others
        traceback.print_exc()
        return {"ended": "failed", "reason": f"{type(error).__name__}: {error}; see {log}"}
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _simulate(job: dict[str, Any], answers: IO[str]) -> bool:
    from fedge.config import Config
    from fedge_server.rounds.record import RoundRecord
    from fedge_simulations.live import Lines
    from fedge_simulations.runs import committed
    from fedge_simulations.simulate import run
    from fedge_simulations.tensorboard import exporting

    config, out = Config.from_mapping(job["config"]), Path(job["out"])
    lines = Lines(config, 0 if job["overwrite"] else committed(out, config))
    with ExitStack() as stack:
        events = job["tensorboard"]
        export = stack.enter_context(exporting(Path(events), config)) if events else None

        def observe(record: RoundRecord) -> None:
            lines.observe(record)
            if export is not None:
                export(record)
            _answer(answers, {"round": record.round, "clients": record.clients, "seconds": record.seconds})

        return run(config, out, overwrite=job["overwrite"], say=lines.say, observe=observe).complete


def _answer(answers: IO[str], value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    sys.exit(main())
