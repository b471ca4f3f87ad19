"""Random numbers that (seed, purpose, client) decide: no list of clients, no order of asking.

SplitMix64 (Steele, Lea, Flood 2014), as in `fedge.learning.draws`: numpy here, for whole cohorts at once.
Words are whole numbers from 0; K is the number of clients asked about.
"""

from __future__ import annotations

from math import tau
from typing import Final

import numpy as np
import numpy.typing as npt

from fedge.learning.draws import plain_key

Floats = npt.NDArray[np.float64]
Nodes = npt.NDArray[np.int64]

_MASK: Final = 2**64 - 1
_GAMMA: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB


def key(*words: int) -> int:
    """A stream's key, from whole numbers in their order; from 0 to below 2^64."""
    return plain_key(*words) & _MASK


def bits(nodes: Nodes, *words: int) -> npt.NDArray[np.uint64]:
    """(K,) 64 random bits for each of these clients (K,)."""
    z = np.atleast_1d(nodes).astype(np.uint64) + np.uint64(1)
    z *= np.uint64(_GAMMA)  # arrays wrap around at 64 bits
    z += np.uint64(key(*words))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
    return z ^ (z >> np.uint64(31))


def uniform(nodes: Nodes, *words: int) -> Floats:
    """(K,) from 0 to below 1."""
    return (bits(nodes, *words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def log_normal(nodes: Nodes, sigma: float, *words: int) -> Floats:
    """(K,) with median 1 and this sigma of their logarithms (Box and Muller 1958)."""
    if not sigma:
        return np.ones(len(nodes))
    radius = np.sqrt(-2 * np.log1p(-uniform(nodes, *words, 1)))
    found: Floats = np.exp(sigma * radius * np.cos(tau * uniform(nodes, *words, 2)))
    return found
