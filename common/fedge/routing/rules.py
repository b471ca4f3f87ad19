"""How much an answer is to be doubted, and which of a batch are worth a question to the cloud.

A device that answers only when it is sure enough is a classifier with a reject option (Chow 1970, On Optimum
Recognition Error and Reject Tradeoff): what it rejects goes to the larger model. Every measure here is one
number per answer, from 0 (sure) to 1, made of the probabilities alone.

Shapes: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedge.errors import FormatError

Float64 = npt.NDArray[np.float64]
Rows = npt.NDArray[Any]  # probabilities (B, C)
Doubt = Callable[[Rows], Float64]
"""Probabilities (B, C) to one number per row (B,), 0 sure to 1 not at all."""


def confidence(rows: Rows) -> Float64:
    """One minus the largest probability: what Chow's rule rejects by (Chow 1970)."""
    return _unit(1.0 - rows.max(1).astype(np.float64))


def margin(rows: Rows) -> Float64:
    """One minus the distance between the two largest probabilities (Scheffer, Decomain and Wrobel 2001)."""
    best = np.partition(rows.astype(np.float64), -2, axis=1)[:, -2:]  # (B, 2), ascending
    return _unit(1.0 - (best[:, 1] - best[:, 0]))


def entropy(rows: Rows) -> Float64:
    """Shannon's entropy over its largest value, ln C (as BranchyNet has it; Teerapittayanon et al. 2016)."""
    p = rows.astype(np.float64)
    terms = np.where(p > 0, -p * np.log(np.where(p > 0, p, 1.0)), 0.0)
    return _unit(terms.sum(1) / np.log(rows.shape[1]))


def _unit(doubts: Float64) -> Float64:
    """Rounding may lead a little out of the range."""
    clipped: Float64 = np.clip(doubts, 0.0, 1.0)
    return clipped


DOUBTS: Final[Mapping[str, Doubt]] = {"confidence": confidence, "margin": margin, "entropy": entropy}


@dataclass(frozen=True, slots=True)
class Rule:
    """Ask the cloud when the doubt is above a threshold."""

    doubt: str = "confidence"  # of DOUBTS
    threshold: float = 0.5  # below 0: always; 1: never

    def __post_init__(self) -> None:
        """Refuse nonsense on construction.

        Raises:
            FormatError: an unknown measure, or a threshold that is above 1 or no number.
        """
        if self.doubt not in DOUBTS:
            raise FormatError(f"rule: doubt {self.doubt!r} is unknown; it must be one of {', '.join(DOUBTS)}")
        if not -1.0 <= self.threshold <= 1.0:
            raise FormatError(
                f"rule: threshold {self.threshold} must lie between -1 (always ask) and 1 (never)"
            )

    def doubts(self, rows: Rows) -> Float64:
        """How much each answer is to be doubted (B,)."""
        return DOUBTS[self.doubt](rows)


DEVICE_ONLY: Final = Rule(threshold=1.0)
CLOUD_ONLY: Final = Rule(threshold=-1.0)


def chosen(doubts: Float64, threshold: float, most: int) -> npt.NDArray[np.intp]:
    """Positions of what is to be sent, rising: above the threshold, and of these the most doubtful `most`."""
    above = np.flatnonzero(doubts > threshold)
    if len(above) > most:
        above = above[np.argsort(-doubts[above], kind="stable")[:most]]
    return np.sort(above)
