"""What has changed, at one look: a test that turns signs of devices, and holds for all features together.

Of each device there are two windows, before and after. If nothing has changed, either might have come
first, for each device by itself: the sign of its differences is a coin's (R. A. Fisher, "The Design of
Experiments", 1935, chapter 3). The statistic of a feature is the squared length of the differences' mean
over their spread; its p is the share of sign patterns in which the *largest* statistic of all features is
as large (Westfall and Young, "Resampling-Based Multiple Testing", 1993, maxT). So the chance that any
unchanged feature is named is at most the level, whatever the features' dependence, however unlike devices
are, and however dependent answers of one device are. The unit is the device: with n of them no p is below
2^(1 - n).

For one look: repeated looks are what `watch` is for.

Legend: D devices, R features, W width of a difference, M sign patterns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

PATTERNS: Final = 1999  # of signs that are drawn, where there are more
_EXACT: Final = 11  # devices up to which all patterns are looked at


@dataclass(frozen=True, slots=True)
class Changes:
    """What a test found."""

    p: tuple[float, ...]  # of each feature, for all of them together
    devices: int

    @property
    def least(self) -> float:
        """The p of "nothing has changed"."""
        return min(self.p, default=1.0)

    def named(self, level: float) -> tuple[int, ...]:
        """Features that have changed, strongest first; one in all of them is wrong with this probability."""
        found = [i for i, p in enumerate(self.p) if p <= level]
        return tuple(sorted(found, key=lambda i: self.p[i]))


def paired(differences: Floats, seed: int = 0) -> Changes:
    """Test devices' differences between two windows.

    Args:
        differences: (D, R, W), after less before.
        seed: of the patterns that are drawn.
    """
    devices, rows, _ = differences.shape
    if devices < 2 or rows == 0:
        return Changes((1.0,) * rows, devices)
    spread = np.sqrt(np.square(differences).sum((0, 2), keepdims=True))  # (1, R, 1): no sign changes it
    scaled = differences / np.where(spread > 0, spread, 1.0)
    signs = _signs(devices, seed)  # (M, D), the first is the one that was seen
    means = np.tensordot(signs, scaled, axes=(1, 0))  # (M, R, W)
    statistics = np.square(means).sum(2)  # (M, R)
    largest = statistics.max(1)  # (M,)
    p = (largest[:, None] >= statistics[0] - 1e-12).mean(0)  # (R,)
    return Changes(tuple(map(float, p)), devices)


def _signs(devices: int, seed: int) -> Floats:
    if devices <= _EXACT:
        codes = np.arange(2**devices)[:, None] >> np.arange(devices) & 1  # (2^D, D)
        return (1.0 - 2.0 * codes).astype(np.float64)
    drawn = np.random.default_rng(seed).integers(0, 2, (PATTERNS, devices)) * 2.0 - 1.0
    return np.concatenate([np.ones((1, devices)), drawn])
