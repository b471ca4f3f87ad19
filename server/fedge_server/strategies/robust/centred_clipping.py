"""Centred clipping (Karimireddy et al. 2021, "Learning from History", ICML) that remembers nothing.

    v <- v + 1/K sum_k (x_k - v) min(1, tau / |x_k - v|),   a few times

There v begins where the last round's ended, with momentum on the clients; so whoever once gets a value into
it that is not a number has spoilt all rounds to come. Here it begins at the coordinate-wise median of this
round, and tau is, unless it is set, the median distance from there: neither is anybody's to move far.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from fedge_server.strategies.robust.rule import RobustRule
from fedge_server.strategies.robust.updates import Floats, Updates, distances_to, median


class CentredClipping(RobustRule):
    """The mean of changes that are clipped around a robust centre."""

    def __init__(self, radius: float = 0.0, iterations: int = 3, **kwargs: Any) -> None:
        """Set how far an update may draw, and how often.

        Args:
            radius: tau, L2 norm; 0: the median distance of the round's updates from their median.
            iterations: 1 or more.
            kwargs: FedAvg's own.

        Raises:
            ValueError: a value is out of range.
        """
        super().__init__(**kwargs)
        if not radius >= 0 or iterations < 1:
            raise ValueError(f"radius {radius} must be 0 or more, iterations {iterations} 1 or more")
        self.radius, self.iterations = float(radius), int(iterations)

    def combined(self, updates: Updates) -> ArrayRecord:
        """The centre after the last step."""
        weights = clipped_weights(updates.gram(_with_median), self.radius, self.iterations)
        return updates.each(lambda changes: np.asarray(weights @ _with_median(changes)))


def clipped_weights(gram: Floats, radius: float, iterations: int) -> Floats:
    """(K + 1,) weights with which the updates and their median give v.

    Args:
        gram: (K + 1, K + 1) of the updates and, last, their median.
        radius: tau; 0: the median distance from the median.
        iterations: steps.
    """
    count = len(gram) - 1
    weights = np.zeros(count + 1)
    weights[-1] = 1.0
    reach = radius or float(np.median(distances_to(gram, weights)[:-1]))
    for _ in range(iterations):
        distances = distances_to(gram, weights)[:-1]
        share = np.where(distances > reach, reach / np.maximum(distances, reach or 1.0), 1.0) / count
        weights *= 1 - share.sum()
        weights[:-1] += share
    return weights


def _with_median(changes: Floats) -> Floats:
    return np.vstack([changes, median(changes)])
