"""What noised releases cost together: a thin layer over dp-accounting, never below what it says.

dp-accounting (Google) composes sampled Gaussian mechanisms by privacy loss distributions (Doroshenko et al.
2022, rounded to the safe side) or by Renyi divergence (Mironov 2017, Wang et al. 2019).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

from fedge.config import AccountantName

Unit = Literal["client", "example"]
"""Whose presence is hidden: all data of one client, or one of its examples."""

# Above it a loss distribution takes seconds and says no more than "nothing is protected".
PLD_UP_TO: Final = 50.0


@dataclass(frozen=True, slots=True)
class Spend:
    """One release of noised values that came from clients' data."""

    unit: Unit
    sampling: float  # probability with which the unit took part, above 0; 1: no amplification is claimed
    noise_multiplier: float  # deviation of the noise in sensitivities, above 0
    steps: int = 1  # such releases in a row


def epsilon(spends: Iterable[Spend], delta: float, *, unit: Unit, accountant: AccountantName) -> float:
    """The epsilon that all these releases together have at this delta.

    What hides a whole client hides each of its examples too; what hides an example hides no client, so that
    a client's epsilon is infinite once there is such a release.

    Args:
        spends: all releases from the same population.
        delta: above 0, below 1.
        unit: whose epsilon.
        accountant: how it is computed.
    """
    counts: Counter[tuple[float, float]] = Counter()
    for spend in spends:
        if unit == "client" and spend.unit == "example":
            return math.inf
        counts[(spend.sampling, spend.noise_multiplier)] += spend.steps
    return _composed(tuple(sorted(counts.items())), delta, accountant)


@lru_cache(maxsize=4096)
def _composed(
    counts: tuple[tuple[tuple[float, float], int], ...], delta: float, accountant: AccountantName
) -> float:
    if not counts:
        return 0.0
    bound = _ask(counts, delta, "rdp")
    if accountant == "rdp" or bound > PLD_UP_TO:
        return bound
    return min(bound, _ask(counts, delta, "pld"))


def _ask(
    counts: tuple[tuple[tuple[float, float], int], ...], delta: float, accountant: AccountantName
) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    # It tells which of its many orders it leaves out, at each call; the bound holds with those that are left.
    logging.getLogger("absl").setLevel(logging.ERROR)
    found = PLDAccountant() if accountant == "pld" else RdpAccountant()
    for (sampling, noise_multiplier), steps in counts:
        event = GaussianDpEvent(noise_multiplier)
        found.compose(event if sampling == 1 else PoissonSampledDpEvent(sampling, event), steps)
    return float(found.get_epsilon(delta))
