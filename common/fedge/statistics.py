"""Moments of raw inputs that add up over clients, so that nobody has to pool data to standardise it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedge.errors import FormatError
from fedge.spec import Spec

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Moments:
    """Counts and sums per channel (image, signal) or column (table); missing values are left out.

    Two clients' moments added are the moments of their data together (Chan, Golub, LeVeque 1979, in
    the plain form: sums are float64).
    """

    count: Vector  # (C,) number of values that are present
    total: Vector  # (C,) sum of values
    squares: Vector  # (C,) sum of squared values

    @classmethod
    def of(cls, x: npt.NDArray[np.generic], spec: Spec) -> Moments:
        """Moments of x, (N, *spec.shape); images are summed over their pixels, signals over time.

        Raises:
            FormatError: x is text, which has none.
        """
        if not spec.numeric:
            raise FormatError("moments: text has none; set model.standardise = false")
        values = x.reshape(-1, spec.channels).T.astype(np.float64, order="C")  # (C, N * pixels)
        present = ~np.isnan(values)
        values[~present] = 0.0
        # Along contiguous memory numpy adds pairwise: row after row, 100,000 equal values got a spread.
        return cls(present.sum(1).astype(np.float64), values.sum(1), np.square(values).sum(1))

    @classmethod
    def sum(cls, parts: Iterable[Moments]) -> Moments:
        """The moments of all parts' data together.

        Raises:
            FormatError: there is no part, or the parts are not of one width.
        """
        parts = list(parts)
        if not parts or len({part.count.shape for part in parts}) != 1:
            raise FormatError("moments: nothing to add, or parts of different widths")
        return cls(
            np.stack([part.count for part in parts], axis=1).sum(1),  # (C, K) to (C,)
            np.stack([part.total for part in parts], axis=1).sum(1),
            np.stack([part.squares for part in parts], axis=1).sum(1),
        )

    @property
    def mean(self) -> Vector:
        """(C,) mean of the values present; 0 where none is."""
        return np.divide(self.total, self.count, out=np.zeros_like(self.total), where=self.count > 0)

    @property
    def std(self) -> Vector:
        """(C,) population standard deviation; 1 where it is 0 or nothing is present."""
        safe = np.maximum(self.count, 1.0)
        variance = np.maximum(self.squares / safe - np.square(self.mean), 0.0)
        # A constant column leaves rounding noise of some eps * mean^2: treat it as constant.
        constant = variance <= 1e-13 * np.maximum(np.square(self.mean), 1e-29)
        return np.where(constant, 1.0, np.sqrt(variance))
