"""When too many devices are bad: Wald's likelihood ratio, stopped only upwards, so that one may look always.

A. Wald, "Sequential Tests of Statistical Hypotheses", Annals of Mathematical Statistics 16 (1945). Of n
devices that were judged, b are bad. With a tolerated share p and an unacceptable share q > p,

    R(n, b) = (q / p)^b * ((1 - q) / (1 - p))^(n - b).

While the true share is at most p, R is a supermartingale that begins with 1, so that by J. Ville, "Etude
critique de la notion de collectif" (1939) the chance that it *ever* reaches 1/a is at most a: after any
number of devices, however often one looks. `halts` is that; `chance_of_halt` is the exact probability, by
dynamic programming.

A device is one witness: it is good or bad, whatever it sends, and once bad it stays so. That keeps the bound:
what is known to be bad at a look is no more than what will be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from fedge.errors import UserError

KINDS: Final = ("install", "health", "confidence", "latency")
LIMITED: Final = {"confidence": "max_drop", "latency": "max_ms"}  # kinds for which a device sends a number


@dataclass(frozen=True, slots=True)
class Criterion:
    """One thing that a release must not do on too many devices."""

    kind: str  # of KINDS
    tolerated: float  # share of devices, in (0, 1): a release that is this bad is let through
    unacceptable: float  # share of devices, above `tolerated`: one that is this bad shall be found
    at_least: int = 1  # devices that it needs before it may judge
    limit: float | None = None  # confidence: largest drop in (0, 1]; latency: milliseconds; else None

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        where = f"criterion {self.kind}"
        if self.kind not in KINDS:
            raise UserError(f"criterion {self.kind!r}: there is none; criteria: {', '.join(KINDS)}")
        if not 0 < self.tolerated < self.unacceptable < 1:
            raise UserError(
                f"{where}: tolerated = {self.tolerated:g}, unacceptable = {self.unacceptable:g}: "
                "must be above 0, below 1, and the first below the second"
            )
        if self.at_least < 1:
            raise UserError(f"{where}: at_least = {self.at_least}: must be 1 or more")
        if (self.kind in LIMITED) != (self.limit is not None):
            needs = f"needs {LIMITED[self.kind]}" if self.kind in LIMITED else "takes no limit"
            raise UserError(f"{where}: {needs}")
        if self.limit is not None and not (0 < self.limit < math.inf):
            raise UserError(f"{where}: {LIMITED[self.kind]} = {self.limit:g}: must be above 0")

    def is_bad(self, value: float, before: float | None = None) -> bool | None:
        """Whether a device's number is bad; None when it cannot be known.

        Args:
            value: mean confidence of its answers, or milliseconds.
            before: the same device's confidence under an earlier release, None where it sent none.
        """
        if self.limit is None:
            raise ValueError(f"criterion {self.kind}: takes no number")
        if self.kind == "latency":
            return value > self.limit
        return None if before is None else before - value > self.limit


@dataclass(frozen=True, slots=True)
class Tally:
    """How many devices were judged by one criterion, and how many of them are bad."""

    judged: int = 0
    bad: int = 0

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        if not 0 <= self.bad <= self.judged:
            raise ValueError(f"tally: {self.bad} bad of {self.judged}")

    def __sub__(self, before: Tally) -> Tally:
        judged = max(self.judged - before.judged, 0)
        return Tally(judged, min(max(self.bad - before.bad, 0), judged))


def log_ratio(criterion: Criterion, tally: Tally) -> float:
    """The natural logarithm of R: how much better "unacceptable" explains the tally than "tolerated"."""
    p, q = criterion.tolerated, criterion.unacceptable
    good = tally.judged - tally.bad
    return tally.bad * math.log(q / p) + good * math.log((1 - q) / (1 - p))


def halts(criterion: Criterion, tally: Tally, false_halts: float) -> bool:
    """Whether the tally convicts; wrongly with at most `false_halts` in all looks together."""
    return tally.judged >= criterion.at_least and _convicts(criterion, tally, false_halts)


def devices_to_halt(criterion: Criterion, false_halts: float) -> int:
    """How many devices it takes when every one is bad."""
    steps = -math.log(false_halts) / math.log(criterion.unacceptable / criterion.tolerated)
    return max(math.ceil(steps - 1e-12), criterion.at_least)


def chance_of_halt(criterion: Criterion, false_halts: float, rate: float, devices: int) -> float:
    """The exact probability of a halt within so many devices, looked at after each.

    Args:
        criterion: with its shares.
        false_halts: of this criterion alone.
        rate: true share of bad devices, in [0, 1].
        devices: that report, one after the other.
    """
    going = {0: 1.0}  # probability by number of bad devices, of not having halted so far
    halted = 0.0
    for judged in range(1, devices + 1):
        after: dict[int, float] = {}
        for bad, probability in going.items():
            after[bad] = after.get(bad, 0.0) + probability * (1 - rate)
            after[bad + 1] = after.get(bad + 1, 0.0) + probability * rate
        going = {}
        for bad, probability in after.items():
            if halts(criterion, Tally(judged, bad), false_halts):
                halted += probability
            else:
                going[bad] = probability
    return halted


def _convicts(criterion: Criterion, tally: Tally, false_halts: float) -> bool:
    return log_ratio(criterion, tally) >= -math.log(false_halts) - 1e-12
