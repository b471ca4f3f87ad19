"""What a teacher and a variant got right, class by class: all that a gate decides from, and no example.

An example is a *loss* where only the teacher is right, a *win* where only the variant is. Whoever holds the
examples counts; counts of many holders are added up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

Whole = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Truths = npt.NDArray[np.bool_]
NAMES: Final = ("n", "both", "losses", "wins")


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """Numbers of examples of each class, (C,) int64 each.

    Raises:
        ValueError: they are not of one length, negative, or more than there are examples.
    """

    n: Whole
    both: Whole  # teacher and variant are right
    losses: Whole
    wins: Whole

    def __post_init__(self) -> None:
        """Refuse what nobody can count."""
        for name in NAMES:
            values: Whole = getattr(self, name)
            if values.dtype != np.int64 or values.ndim != 1 or values.shape != self.n.shape:
                raise ValueError(f"{name} is {values.dtype} {values.shape}, not int64 {self.n.shape}")
            if (values < 0).any() or (values > self.n).any():
                raise ValueError(f"{name} counts fewer than no example, or more than there are")
        if (self.both + self.losses + self.wins > self.n).any():
            raise ValueError("an example was counted twice")

    @classmethod
    def of(cls, right: Truths, teacher_right: Truths, y: Whole, classes: int) -> Self:
        """Count.

        Args:
            right: (N,) whether the variant is.
            teacher_right: (N,) whether the teacher is.
            y: (N,) true classes.
            classes: C.
        """

        def each(chosen: Truths) -> Whole:
            return np.bincount(y[chosen], minlength=classes).astype(np.int64)

        everything = np.ones(len(y), dtype=bool)
        both, losses, wins = right & teacher_right, ~right & teacher_right, right & ~teacher_right
        return cls(each(everything), each(both), each(losses), each(wins))

    @classmethod
    def sum(cls, parts: Iterable[Self], classes: int) -> Self:
        """Those of several holders together; none at all are 0."""
        nothing = np.zeros(classes, np.int64)
        added = {name: nothing.copy() for name in NAMES}
        for part in parts:
            for name in NAMES:
                added[name] += getattr(part, name)
        return cls(**added)

    @property
    def examples(self) -> int:
        """N."""
        return int(self.n.sum())

    @property
    def accuracy(self) -> float:
        """Of the variant; 0 without examples."""
        return int((self.both + self.wins).sum()) / max(self.examples, 1)

    @property
    def teacher_accuracy(self) -> float:
        """Of the teacher; 0 without examples."""
        return int((self.both + self.losses).sum()) / max(self.examples, 1)


def rightly(probabilities: Float32, y: Whole) -> Truths:
    """(N,) whether the answer, of (N, C), is the true class; an answer with a NaN is not."""
    finite = np.isfinite(probabilities).all(axis=1)
    correct: Truths = finite & (probabilities.argmax(axis=1) == y)
    return correct
