"""Data that changes: how much of its examples a client holds at a time, and which."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedge.config import Scenario as Settings
from fedge.dataset import Indices
from fedge_simulations.scenario import draws


def held(settings: Settings, counts: npt.NDArray[np.int64], clock_s: float) -> npt.NDArray[np.int64]:
    """How many examples clients hold of all that they ever hold (K,); one at least where there is any."""
    share = _share(settings, clock_s)
    # A hair less: 0.1 * 30 is above 3 in floating point.
    some = np.ceil(share * counts - 1e-9).astype(np.int64)
    found: npt.NDArray[np.int64] = np.minimum(np.maximum(some, 1), counts)
    return found


def _share(settings: Settings, clock_s: float) -> float:
    if settings.data == "all":
        return 1.0
    if settings.data == "moving":
        return settings.data_share
    return settings.data_share + (1 - settings.data_share) * min(clock_s / settings.data_over_s, 1.0)


def part(
    settings: Settings,
    own: Indices,
    labels: npt.NDArray[np.int64],
    *,
    key: int,
    clock_s: float,
) -> Indices:
    """Which of its examples a client holds now.

    Growing: more and more of them, in an order that the key decides; what it holds it keeps. Moving: a
    window over them in the order of their classes, once round in `data_over_s`, from a place that the key
    decides.

    Args:
        settings: of the scenario.
        own: (N,) positions of all that it ever holds.
        labels: of the whole data set.
        key: of the client.
        clock_s: simulated seconds of the run.
    """
    if settings.data == "all" or len(own) == 0:
        return own
    count = int(held(settings, np.array([len(own)]), clock_s)[0])
    order = draws.bits(np.arange(len(own)), key)  # a random rank for each
    if settings.data == "growing":
        chosen = np.argsort(order, kind="stable")[:count]
    else:
        by_class = np.lexsort((order, labels[own]))
        begins = key * 2.0**-64 + clock_s / settings.data_over_s
        first = math.floor(math.fmod(begins, 1.0) * len(own))
        chosen = by_class[(first + np.arange(count)) % len(own)]
    found: Indices = own[np.sort(chosen)]
    return found
