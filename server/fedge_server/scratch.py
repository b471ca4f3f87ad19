"""Memory for what lives between two steps over a block of values: fresh pages for each would cost as much."""

from __future__ import annotations

import threading
from typing import Any, Final

import numpy as np
import numpy.typing as npt

BLOCK: Final = 2**16  # values that are worked on together: they and what comes of them stay in the cache


class _Kept(threading.local):
    """Of each thread its own."""

    def __init__(self) -> None:
        self.arrays: dict[np.dtype[Any], npt.NDArray[Any]] = {}


_KEPT = _Kept()


def scratch_of(dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """BLOCK values of this thread, to be used at once: whoever asks next gets the same."""
    found = _KEPT.arrays.get(dtype)
    if found is None:
        found = _KEPT.arrays[dtype] = np.empty(BLOCK, dtype)
    return found
