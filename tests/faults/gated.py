"""A task whose training waits until a test lets it go on; `Gate` is the test's side of it.

Copied into a federation's folder as the module `gated_task`, so that server and devices find it there. Only
a training process waits: where a model is prepared for training, it leaves a mark and looks for its pass.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from fedge.learning import models
from fedge.learning.preprocess import build
from fedge.tasks.digits import TASK as DIGITS

FOLDER = Path(__file__).resolve().parent / "gate"
_LONGEST_S = 120.0  # a test that has gone must not leave processes behind
_calls = itertools.count()


def _wait() -> None:
    mark = FOLDER / f"{os.getpid()}-{next(_calls)}"
    mark.touch()
    end = time.monotonic() + _LONGEST_S
    try:
        while not (FOLDER / "open").exists() and not mark.with_suffix(".pass").exists():
            if time.monotonic() > end:
                raise TimeoutError("the test never let this training go on")
            time.sleep(0.01)
    finally:
        mark.unlink()


def _preprocess(*arguments):  # type: ignore[no-untyped-def]  # as the task's own
    if "fedge_client.agent.training" in sys.orig_argv:
        _wait()
    return build(*arguments)


TASK = replace(
    DIGITS,
    name="gated",
    models={"logistic": models.logistic, "wide": models.mlp(1000, 1000)},
    default_model="logistic",
    preprocess=_preprocess,
)
