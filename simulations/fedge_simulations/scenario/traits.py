"""What tells clients apart for a whole run, found for those who are asked about and forgotten again."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from fedge.config import Scenario as Settings
from fedge_simulations.scenario import draws
from fedge_simulations.scenario.draws import Floats, Nodes

_STREAM: Final = 0x7247  # tells these numbers from others of the same seed


class Of(IntEnum):
    """What a number is drawn for; a new one gets a new number, so that the others stay as they are."""

    SPEED = 1
    BANDWIDTH = 2
    LATENCY = 3
    WINDOW = 4
    CHARGE = 5
    LATE = 6
    JOINS = 7
    ATTACKER = 8
    ATTACK = 9
    STRAGGLES = 10
    DROPS = 11
    DROPS_AT = 12
    NOISE = 13
    DATA = 14
    SILENT = 15


class Traits:
    """Traits of clients by (seed, node id), in arrays (K,) as long as what is asked for."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings, self.seed = settings, seed

    def uniform(self, nodes: Nodes, purpose: Of, *words: int) -> Floats:
        """From 0 to below 1."""
        return draws.uniform(nodes, self.seed, _STREAM, purpose, *words)

    def key(self, purpose: Of, *words: int) -> int:
        """A key for a generator of its own."""
        return draws.key(self.seed, _STREAM, purpose, *words)

    def _spread(self, nodes: Nodes, sigma: float, purpose: Of) -> Floats:
        return draws.log_normal(nodes, sigma, self.seed, _STREAM, purpose)

    def slowness(self, nodes: Nodes) -> Floats:
        """Time that each takes for the work of which the median client's takes 1."""
        return self._spread(nodes, self.settings.speed_sigma, Of.SPEED)

    def bandwidth(self, nodes: Nodes) -> Floats:
        """Of the median's."""
        return self._spread(nodes, self.settings.bandwidth_sigma, Of.BANDWIDTH)

    def latency(self, nodes: Nodes) -> Floats:
        """Seconds, each way."""
        return self.settings.latency_s * self._spread(nodes, self.settings.latency_sigma, Of.LATENCY)

    def remaining(self, nodes: Nodes, clock_s: float) -> Floats:
        """Seconds for which each stays online from now; 0: it is offline; infinite: always online.

        A window that begins late in the day goes on after midnight.
        """
        settings = self.settings
        left = np.full(len(nodes), np.inf)
        if settings.online_share < 1:
            begins = self.uniform(nodes, Of.WINDOW) * settings.online_spread * settings.day_s
            left = settings.online_share * settings.day_s - np.mod(clock_s - begins, settings.day_s)
        there = self.joins(nodes) <= clock_s
        return np.where(there, np.maximum(left, 0.0), 0.0)

    def joins(self, nodes: Nodes) -> Floats:
        """When each joins, in simulated seconds of the run."""
        settings = self.settings
        if not settings.late_share:
            return np.zeros(len(nodes))
        late = self.uniform(nodes, Of.LATE) < settings.late_share
        at = settings.late_from_s + self.uniform(nodes, Of.JOINS) * settings.late_over_s
        return np.where(late, at, 0.0)

    def charge(self, nodes: Nodes) -> Floats:
        """Of each battery at the beginning, 0 to 1."""
        return self.uniform(nodes, Of.CHARGE)

    def silent(self, nodes: Nodes) -> npt.NDArray[np.bool_]:
        """Who never answers."""
        return self.uniform(nodes, Of.SILENT) < self.settings.silent

    def attacks(self, nodes: Nodes) -> npt.NDArray[np.str_]:
        """What each does to its update; empty: it is honest."""
        settings = self.settings
        if not settings.attackers:
            return np.full(len(nodes), "")
        kinds = np.array(settings.attacks)
        chosen = kinds[(self.uniform(nodes, Of.ATTACK) * len(kinds)).astype(np.int64)]
        return np.where(self.uniform(nodes, Of.ATTACKER) < settings.attackers, chosen, "")
