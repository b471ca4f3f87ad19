"""Nearest-neighbour mixing before a robust rule (Allouah et al. 2023, "Fixing by Mixing", AISTATS).

    y_i = mean of the n - f updates nearest to x_i, itself among them;  then the rule, over y_1 .. y_n

Where clients' data differ, rules that look for the crowd lose those who are merely different; mixing draws
honest updates together first, and with it median, trimmed mean and Krum reach the best order of error that is
possible. Flower's rules are as they were: the share f / n is their further option `mixing`, and 0 leaves the
stage out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import strategy as flower

from fedge_server.strategies.robust.rule import RobustRule
from fedge_server.strategies.robust.updates import Floats, Updates, median, squared_distances, trimmed_mean


def mixing_weights(gram: Floats, share: float) -> Floats:
    """(K, K) whose row i makes y_i of the updates: 1 / (n - f) for each of its n - f nearest.

    Args:
        gram: (K, K) of the updates.
        share: f / n, 0 or more and below 0.5; f is rounded up.
    """
    count = len(gram)
    kept = max(count - math.ceil(share * count - 1e-9), 1)
    nearest = np.argsort(squared_distances(gram), axis=1, kind="stable")[:, :kept]
    weights = np.zeros((count, count))
    np.put_along_axis(weights, nearest, 1 / kept, axis=1)
    return weights


class _Mixed(RobustRule):
    """A rule of Flower's that may have the stage before it."""

    mixing = 0.0

    def mix(self, share: float) -> None:
        """Set f / n."""
        if not 0 <= share < 0.5:
            raise ValueError(f"mixing {share} must be from 0 to below 0.5: the share of clients that attack")
        self.mixing = float(share)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's own where nothing is mixed."""
        if self.mixing:
            return super().aggregate_train(server_round, replies)
        self.origin = None
        return super(RobustRule, self).aggregate_train(server_round, replies)


class FedMedian(_Mixed, flower.FedMedian):
    """The coordinate-wise median (Yin et al. 2018)."""

    def __init__(self, mixing: float = 0.0, **kwargs: Any) -> None:
        """Take the share of attackers that mixing reckons with, and what Flower's own takes."""
        super().__init__(**kwargs)
        self.mix(mixing)

    def combined(self, updates: Updates) -> ArrayRecord:
        """The median of what was mixed."""
        weights = mixing_weights(updates.gram(), self.mixing)
        return updates.each(lambda changes: median(weights @ changes))


class FedTrimmedAvg(_Mixed, flower.FedTrimmedAvg):
    """The coordinate-wise mean without a share `beta` at either end (Yin et al. 2018)."""

    def __init__(self, beta: float = 0.2, mixing: float = 0.0, **kwargs: Any) -> None:
        """Take the shares, and what Flower's own takes."""
        super().__init__(beta=beta, **kwargs)
        self.mix(mixing)

    def combined(self, updates: Updates) -> ArrayRecord:
        """The trimmed mean of what was mixed."""
        weights = mixing_weights(updates.gram(), self.mixing)
        cut = int(self.beta * len(updates))
        return updates.each(lambda changes: trimmed_mean(weights @ changes, cut))


class MultiKrum(_Mixed, flower.MultiKrum):
    """The mean of the updates in the densest places (Blanchard et al. 2017)."""

    def __init__(
        self, num_malicious_nodes: int = 0, num_nodes_to_select: int = 1, mixing: float = 0.0, **kwargs: Any
    ) -> None:
        """Take the numbers and the share, and what Flower's own takes."""
        super().__init__(
            num_malicious_nodes=num_malicious_nodes, num_nodes_to_select=num_nodes_to_select, **kwargs
        )
        self.mix(mixing)

    def combined(self, updates: Updates) -> ArrayRecord:
        """The plain mean of those that are selected of what was mixed."""
        return _krum(updates, self.mixing, self.num_malicious_nodes, self.num_nodes_to_select)


class Krum(_Mixed, flower.Krum):
    """The update in the densest place (Blanchard et al. 2017)."""

    def __init__(self, num_malicious_nodes: int = 0, mixing: float = 0.0, **kwargs: Any) -> None:
        """Take the number and the share, and what Flower's own takes."""
        super().__init__(num_malicious_nodes=num_malicious_nodes, **kwargs)
        self.mix(mixing)

    def combined(self, updates: Updates) -> ArrayRecord:
        """The one that is selected of what was mixed."""
        return _krum(updates, self.mixing, self.num_malicious_nodes, 1)


def _krum(updates: Updates, share: float, malicious: int, select: int) -> ArrayRecord:
    """Krum needs distances alone, and those of what was mixed are in the same Gram matrix."""
    gram = updates.gram()
    weights = mixing_weights(gram, share)
    chosen = krum_order(weights @ gram @ weights.T, malicious)[:select]
    return updates.combined(weights[chosen].mean(axis=0))


def krum_order(gram: Floats, malicious: int) -> list[int]:
    """Vectors by the sum of squared distances to their n - f - 2 nearest others, smallest first.

    Args:
        gram: (K, K) of the vectors.
        malicious: f, of them.
    """
    others = max(len(gram) - malicious - 2, 1)
    scores = np.sort(squared_distances(gram), axis=1)[:, 1 : others + 1].sum(axis=1)
    found: list[int] = np.argsort(scores, kind="stable").tolist()
    return found
