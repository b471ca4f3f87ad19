"""Attackers who send what they have agreed on, from nothing but what each of them has honestly learned.

The papers give attackers the honest clients' updates, or let them estimate those from their own, as here; so
the fewer they are, the worse they know the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

import numpy as np

from fedge.learning.state import NamedArrays

COLLUDING: Final = ("ipm", "alie", "mimic")


def colludes(attack: str) -> bool:
    """Whether those who make this attack agree on what they send."""
    return attack.partition(":")[0] in COLLUDING


def agreed(answers: Sequence[NamedArrays], state: NamedArrays, attack: str, asked: int) -> NamedArrays:
    """What all of them send; arrays of whole numbers are those of the first.

    Args:
        answers: what each has honestly learned, in a fixed order; one at least.
        state: what they started from; a name that is not in it counts from zero.
        attack: ipm:EPSILON sends -EPSILON times the mean change, against which the true mean has a negative
            inner product (Xie et al. 2020); alie or alie:Z the mean less Z deviations, value by value (Baruch
            et al. 2019); mimic what the first has learned, which then counts many times (Karimireddy et
            al. 2022).
        asked: clients of the round, attackers among them.
    """
    kind, _, value = attack.partition(":")
    found: NamedArrays = {}
    for name, first in answers[0].items():
        if kind == "mimic" or not np.issubdtype(first.dtype, np.floating):
            found[name] = first.copy()
            continue
        all_of_them = np.stack([answer[name] for answer in answers]).astype(np.float64)
        mean = all_of_them.mean(axis=0)
        if kind == "alie":
            z = float(value) if value else most_deviations(asked, len(answers))
            sent = mean - z * all_of_them.std(axis=0)
        else:
            start = np.asarray(state.get(name, np.zeros_like(first)), np.float64)
            sent = start - float(value) * (mean - start)
        found[name] = sent.astype(first.dtype)
    return found


def most_deviations(asked: int, attackers: int) -> float:
    """As many deviations from the mean as enough honest clients exceed to look odder (Baruch et al. 2019).

    With s = floor(n / 2 + 1) - m supporters the attackers are a majority: z is the quantile of a normal
    distribution at (n - m - s) / (n - m), and 0 where that is below one half.
    """
    honest = asked - attackers
    supporters = max(asked // 2 + 1 - attackers, 0)
    share = (honest - supporters) / honest if honest > 0 else 0.5
    return statistics.NormalDist().inv_cdf(min(max(share, 0.5), 1 - 1e-9))
