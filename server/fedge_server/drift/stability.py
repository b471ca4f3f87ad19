"""The population stability index, which people know, for show: it has no rate of false alarms.

B. Yurdakul, J. Naranjo, "Statistical properties of the population stability index" (Journal of Risk Model
Validation, 2020): sum of (p - q) log(p / q) over the bins, a symmetric Kullback-Leibler divergence. The
custom to act above 0.2 ignores how many answers there were: with few it is passed by chance alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def index(window: Floats, baseline: Floats) -> Floats:
    """Of histograms (F, B) each, (F,); half an answer is added to each bin."""
    p, q = (_shares(counts) for counts in (window, baseline))
    found: Floats = ((p - q) * np.log(p / q)).sum(-1)
    return found


def _shares(counts: Floats) -> Floats:
    padded = np.maximum(counts, 0) + 0.5
    found: Floats = padded / padded.sum(-1, keepdims=True)
    return found
