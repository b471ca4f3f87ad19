"""How many clients are worth batching together, measured for the model on this machine.

What is measured differs a little from time to time, and recurrent layers round otherwise in larger stacks. So
that a resumed run equals one that was not interrupted, what was found is kept in the run's folder, with the
round from which on it holds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import nn

from fedge.config import Train
from fedge.files import write_atomically
from fedge.learning import draws
from fedge.learning.local import Job
from fedge.learning.messages import Instructions
from fedge.learning.threads import limited
from fedge_simulations.engine.stack import CPU, Layout, Stacked, Stepper, rows_of, train

PLAN: Final = "engine.json"  # in the run's folder
TRIES = 3  # of each size; the best counts, since nothing makes a step faster than it is
STEPS = 20  # of each try
ENOUGH = 1.03  # a larger stack must be faster by so much
BUDGET_S = 2.0  # for all of it


@dataclass(slots=True)
class Plan:
    """What was found for the models of a run."""

    path: Path | None
    found: dict[str, tuple[int, int]] = field(default_factory=dict)  # key: (at once, from round)

    @classmethod
    def of(cls, folder: Path | None) -> Plan:
        """What a run's folder holds; nothing where there is none, or what is there cannot be read."""
        if folder is None:
            return cls(None)
        path = folder / PLAN
        try:
            entries = json.loads(path.read_text("utf-8"))["at_once"]
            found = {str(key): (int(k), int(first)) for key, (k, first) in entries.items() if int(k) > 0}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            found = {}
        return cls(path, found)

    def at_once(self, instructions: Instructions, *, ever: bool = False) -> int:
        """How many for this model in this round, or in any; 0: nothing was measured."""
        k, first = self.found.get(_key(instructions), (0, 0))
        return k if ever or instructions.round >= first else 0

    def keep(self, instructions: Instructions, k: int) -> None:
        """It holds from the next round on."""
        self.found[_key(instructions)] = (k, instructions.round + 1)
        if self.path is not None:
            write_atomically(self.path, json.dumps({"at_once": self.found}, indent=1).encode())


def _key(instructions: Instructions) -> str:
    """The model and how it is trained, however often."""
    train = replace(instructions.train, epochs=1)
    same = replace(instructions, round=0, moments=None, void=None, train=train).to_config()
    return hashlib.sha256(json.dumps(dict(same), sort_keys=True).encode()).hexdigest()[:16]


def fastest(
    layout: Layout,
    settings: Train,
    stepper: Stepper,
    preprocess: nn.Module,
    job: Job,
    *,
    most: int,
    device: torch.device = CPU,
) -> int:
    """The number of clients with most steps a second, of the powers of two and `most`.

    Args:
        layout: of the model.
        settings: of its training.
        stepper: makes the steps.
        preprocess: raw input to the model's.
        job: gives the state, and the examples of a middling client.
        most: clients at most.
        device: where the stacks lie.
    """
    settings = replace(settings, epochs=1)
    start = layout.flat(job.state, torch.float32)
    few = job.examples.take(np.arange(min(len(job.examples), STEPS * settings.batch_size)))
    with torch.no_grad(), limited(1):
        x, y = preprocess(torch.from_numpy(np.ascontiguousarray(few.x))), torch.from_numpy(few.y)
        x, y = x.to(device), y.to(device)
        best, per_s, began = 1, 0.0, time.perf_counter()
        for k in _sizes(most):
            flat = rows_of(k, len(start), device)
            data = Stacked(
                x.repeat(k, *[1] * (x.dim() - 1)),
                y.repeat(k),
                torch.arange(k * len(y)),
                torch.full((k,), len(y)),
                draws.key(torch.arange(k, dtype=torch.int64)),
            )
            speed = k / min(_seconds(stepper, flat, start, data, settings) for _ in range(TRIES))
            if speed < per_s / 1.5:
                break
            best, per_s = (k, speed) if speed > ENOUGH * per_s else (best, per_s)
            if time.perf_counter() - began > BUDGET_S:
                break
    return best


def _seconds(
    stepper: Stepper, flat: torch.Tensor, start: torch.Tensor, data: Stacked, settings: Train
) -> float:
    """Processor seconds of this thread, which does it all: others at work on the machine do not count.

    Of a GPU, seconds until it is done.
    """
    clock = time.perf_counter if flat.is_cuda else time.thread_time
    flat.copy_(start)
    began = clock()
    train(stepper, flat, data, settings, 1)  # its losses are in main memory: a GPU has done it all
    return clock() - began


def _sizes(most: int) -> Iterator[int]:
    k = 1
    while k < most:
        yield k
        k *= 2
    yield most
