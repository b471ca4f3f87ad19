"""The trial of a model before it is committed: it loads, and answers as it did where it was made.

Processors round int8 differently, so an answer may differ where two labels were close, and probabilities by a
little; what differs more is not the model that passed the gate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedge.errors import HealthError
from fedge.golden import Golden
from fedge.inference import CompactModel
from fedge.spec import Spec
from fedge_client.updater.streams import Seconds

Check = Callable[[bytes], None]
"""Try an artefact's installed bytes; raise HealthError, or another TrustError, when they are not fit."""

MARGIN: Final = 0.1  # between the two likeliest labels: above it the answer must be the same
TOLERANCE: Final = 0.05  # of each probability
_ROUNDS: Final = 3  # of the golden inputs, where the first ones are too slow: the device may be busy


def anything(_: bytes) -> None:
    """The check that passes everything: for artefacts that are no models."""


def model_check(spec: Spec, golden: Golden | None = None, *, seconds: Seconds = time.perf_counter) -> Check:
    """The trial of an ONNX variant.

    Args:
        spec: what goes in and comes out.
        golden: what it answered where it was made; None: it must only load and answer zeros.
        seconds: the clock of the latency budget.
    """

    def check(data: bytes) -> None:
        model = CompactModel(data, spec)
        labels, probabilities = model.run(spec.zeros(1))
        if not np.isfinite(probabilities).all() or labels[0] not in spec.labels:
            raise HealthError(
                f"variant: answers {labels[0][:40]!r} with {probabilities[0, :4].tolist()} to zeros; "
                "it is not installed"
            )
        if golden is None:
            return
        best = math.inf
        for _ in range(_ROUNDS):
            rows, latency = _answers(model, golden, seconds)
            compare(golden, rows)
            best = min(best, latency)
            if best <= golden.latency_s:
                return
        raise HealthError(
            f"variant: takes {best * 1000:.1f} ms for an answer, over the budget of "
            f"{golden.latency_s * 1000:.1f} ms; it is not installed, publish a smaller one for this tier"
        )

    return check


def _answers(model: CompactModel, golden: Golden, seconds: Seconds) -> tuple[npt.NDArray[np.float32], float]:
    """Probabilities (N, classes), one example at a time as the device answers, and the median of seconds."""
    rows, taken = [], []
    for i in range(len(golden.x)):
        start = seconds()
        rows.append(model.run(golden.x[i : i + 1])[1][0])
        taken.append(seconds() - start)
    return np.stack(rows), float(np.median(taken))


def compare(golden: Golden, probabilities: npt.NDArray[Any]) -> None:
    """Hold answers (N, classes) to the golden ones.

    Raises:
        HealthError: another label where the golden margin is over .1, or a probability off by over .05.
    """
    if probabilities.shape != golden.probabilities.shape:
        raise HealthError(
            f"variant: answers {probabilities.shape}, not {golden.probabilities.shape}; it is not installed"
        )
    off = np.abs(probabilities - golden.probabilities).max(axis=1)  # (N,); NaN is off
    order = np.sort(golden.probabilities, axis=1)
    clear = order[:, -1] - order[:, -2] > MARGIN  # (N,)
    other = probabilities.argmax(axis=1) != golden.probabilities.argmax(axis=1)
    for i in np.flatnonzero((clear & other) | ~(off <= TOLERANCE)):
        raise HealthError(
            f"variant: golden input {i} gives {probabilities[i, :4].tolist()}, "
            f"not {golden.probabilities[i, :4].tolist()}; it is not installed"
        )
