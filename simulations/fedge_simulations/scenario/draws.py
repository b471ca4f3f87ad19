"""Random numbers that (seed, purpose, client) decide: no list of clients, no order of asking.

The streams of `fedge.learning.draws`, as numpy's arrays and with the 53 bits of its floats. Words are whole
numbers from 0; K is the number of clients asked about.
"""

from __future__ import annotations

from math import tau
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from fedge.learning import draws

Floats = npt.NDArray[np.float64]
Nodes = npt.NDArray[np.int64]

_MASK: Final = 2**64 - 1


def key(*words: int) -> int:
    """A stream's key, from whole numbers in their order; from 0 to below 2^64."""
    return draws.plain_key(*words) & _MASK


def bits(nodes: Nodes, *words: int) -> npt.NDArray[np.uint64]:
    """(K,) 64 random bits for each of these clients (K,)."""
    index = torch.from_numpy(np.atleast_1d(nodes).astype(np.int64))
    found: npt.NDArray[np.int64] = draws.numbered(torch.tensor(draws.plain_key(*words)), index).numpy()
    return found.view(np.uint64)


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
