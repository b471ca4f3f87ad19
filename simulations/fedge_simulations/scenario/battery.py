"""Charges of batteries: what clients did in committed rounds decides them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedge.config import Scenario as Settings
from fedge_simulations.scenario.draws import Floats, Nodes


class Batteries:
    """Charges of clients, 0 to 1: they rise by the clock and fall by work.

    Only clients that have worked and are not full again are kept in memory.
    """

    def __init__(self, settings: Settings, at_first: Callable[[Nodes], Floats]) -> None:
        """Say how long a battery lasts and what charges are at the beginning.

        Args:
            settings: with a `battery_s`.
            at_first: charge of each of these clients at the beginning of the run.
        """
        assert settings.battery_s is not None  # noqa: S101 - the caller has looked
        self._lasts_s, self._recharge_s, self._least = (
            settings.battery_s,
            settings.recharge_s,
            settings.battery_min,
        )
        self._at_first = at_first
        self._after: dict[int, tuple[float, float]] = {}  # by node: charge after its last work, and when

    def charges(self, nodes: Nodes, clock_s: float) -> Floats:
        """(K,) now."""
        found = np.minimum(self._at_first(nodes) + clock_s / self._recharge_s, 1.0)
        if self._after:
            for place, node in enumerate(nodes.tolist()):
                if (known := self._after.get(node)) is not None:
                    found[place] = self._risen(*known, clock_s)
        return found

    def _risen(self, charge: float, since_s: float, clock_s: float) -> float:
        return min(charge + max(clock_s - since_s, 0.0) / self._recharge_s, 1.0)

    def enough(self, nodes: Nodes, clock_s: float) -> np.typing.NDArray[np.bool_]:
        """(K,) whether each has the charge to take part."""
        return self.charges(nodes, clock_s) >= self._least

    def lasts(self, nodes: Nodes, clock_s: float) -> Floats:
        """(K,) seconds of work until each is empty."""
        return self.charges(nodes, clock_s) * self._lasts_s

    def drain(
        self, node_ids: Sequence[int], work_s: Sequence[float], until_s: Sequence[float], clock_s: float
    ) -> None:
        """Take note of work.

        Args:
            node_ids: who worked.
            work_s: for how long.
            until_s: when each was done, in simulated seconds of the run.
            clock_s: when they began.
        """
        full = [n for n, known in self._after.items() if self._risen(*known, clock_s) >= 1]
        for node in full:
            del self._after[node]
        charges = self.charges(np.asarray(node_ids, np.int64), clock_s).tolist()
        for node, charge, work, until in zip(node_ids, charges, work_s, until_s, strict=True):
            self._after[node] = (max(charge - work / self._lasts_s, 0.0), until)

    def __len__(self) -> int:
        """How many clients are remembered."""
        return len(self._after)
