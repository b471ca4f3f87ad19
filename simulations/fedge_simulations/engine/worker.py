"""`python -m fedge_simulations.engine.worker FOLDER ENGINE`: trains clients for the process that started it.

What is to be done comes through standard input, and it ends when that does.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import IO

import numpy as np
import torch

from fedge.config import Simulation
from fedge.dataset import Examples
from fedge.learning.local import Job
from fedge_simulations.engine import Engine, frames
from fedge_simulations.engine.workers import X, Y


def main() -> None:
    """Work until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its pipes
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a task of the user's prints must not come between the answers
    logging.getLogger("fedge").setLevel(logging.ERROR)  # the parent has said what there is to say
    torch.set_num_threads(1)
    x, y = (np.load(folder / name, mmap_mode="c", allow_pickle=False) for name in (X, Y))
    engine = Engine(Simulation(workers=1), Examples(x, y))
    job: Job | None = None
    while True:
        try:
            kind, arrays, text = frames.read(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if kind == "job":
                job = frames.job_of(arrays, text["config"], engine.data)
                engine.prove(job)
                frames.write(answers, "ready")
            elif job is not None:
                _do(engine, job, arrays, text, answers)
        except BrokenPipeError:
            return
        except Exception as error:  # noqa: BLE001 - the parent does it itself and sees what happens
            frames.write(answers, "refused", reason=f"{type(error).__name__}: {error}"[:500])


def _do(engine: Engine, job: Job, arrays: frames.Arrays, text: dict[str, str], answers: IO[bytes]) -> None:
    part = frames.part_of(arrays, int(text["lanes"]), int(text["longest"]))
    sums = engine.sums(job, part, int(text["at_once"]))
    frames.write(answers, "done", frames.of_sums(sums))


if __name__ == "__main__":
    main()
