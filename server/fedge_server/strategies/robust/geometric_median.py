"""The geometric median of the updates, by smoothed Weiszfeld steps (Pillutla et al. 2022, RFA, IEEE TSP).

    v = argmin_v sum_k |v - x_k|;   b_k = 1 / max(nu, |v - x_k|),   v <- sum_k b_k x_k / sum_k b_k

v is always a sum of the updates with weights, so its distances are in their Gram matrix and a step costs K^2,
whatever the model's size: it goes on until it stands still, where the paper stops after three. Unlike there
all clients weigh the same: numbers of examples are what clients say, and one that says a billion would be a
majority of its own.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord

from fedge_server.strategies.robust.rule import RobustRule
from fedge_server.strategies.robust.updates import Floats, Updates, distances_to

STEPS: Final = 1000  # an attacker at distance 10^18 loses a constant factor of its weight with each
STILL: Final = 1e-9  # a step that is no longer is the last, in the median norm of the changes
_SMALLEST: Final = 1e-150  # instead of a division by 0 where half of all have not moved


class GeometricMedian(RobustRule):
    """RFA with equal weights."""

    def __init__(self, smoothing: float = 1e-6, **kwargs: Any) -> None:
        """Set how near an update may come before it draws no harder.

        Args:
            smoothing: nu, in the median norm of the updates' changes; above 0.
            kwargs: FedAvg's own.

        Raises:
            ValueError: it is out of range.
        """
        super().__init__(**kwargs)
        if not smoothing > 0:
            raise ValueError(f"smoothing {smoothing} must be above 0")
        self.smoothing = float(smoothing)

    def combined(self, updates: Updates) -> ArrayRecord:
        """The sum with the last step's weights."""
        return updates.combined(weiszfeld(updates.gram(), self.smoothing))


def weiszfeld(gram: Floats, smoothing: float) -> Floats:
    """(K,) weights with which the updates' sum is their geometric median.

    Args:
        gram: (K, K) of the updates.
        smoothing: in the median norm.
    """
    norm = float(np.median(np.sqrt(np.diagonal(gram))))
    least = max(smoothing * norm, _SMALLEST)
    weights = np.full(len(gram), 1 / len(gram))
    for _ in range(STEPS):
        drawn = 1 / np.maximum(distances_to(gram, weights), least)
        before, weights = weights, drawn / drawn.sum()
        step = weights - before
        if step @ gram @ step <= (STILL * norm) ** 2:
            break
    return weights
