"""How near a reconstruction comes to its victim."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def correlation(reconstruction: Array, victim: Array) -> float:
    """Pearson's correlation of two examples' values, -1..1; 0 where either is constant or not finite.

    It is blind to brightness and contrast, as an eye is: a reconstruction up to scale counts in full.
    """
    a, b = (np.asarray(part, np.float64).ravel() for part in (reconstruction, victim))
    if not np.isfinite(a).all():
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length > 0 else 0.0


def psnr(reconstruction: Array, victim: Array, peak: float) -> float:
    """Peak signal-to-noise ratio in dB, at most 100: 10 log10(peak^2 / mean squared error).

    Args:
        reconstruction: brought into 0..peak first, as whoever shows an image would.
        victim: values 0..peak.
        peak: the largest value that there can be.
    """
    shown = np.clip(np.nan_to_num(np.asarray(reconstruction, np.float64)), 0.0, peak)
    error = float(np.square(shown - victim).mean())
    return min(100.0, 10 * float(np.log10(peak**2 / error))) if error > 0 else 100.0
