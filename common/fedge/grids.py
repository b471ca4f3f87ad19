"""Float32 tensors whose values are code * scale: small integer codes, and a float16 scale for each channel.

Shapes: a tensor is looked at as (O, C, I), one scale for each of C channels along one axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Final

import numpy as np
import numpy.typing as npt

MAX_LEVELS: Final = 127  # the largest code
_LEAST_CHANNEL = 4  # values that share a scale, from which it pays


def views(shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """As (O, C, I) with one scale for all, then with one for each place along an axis."""
    yield 1, 1, prod(shape)
    for axis, size in enumerate(shape):
        if 1 < size <= prod(shape) // _LEAST_CHANNEL:
            yield prod(shape[:axis]), size, prod(shape[axis + 1 :])


def grid(values: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float16]] | None:
    """Codes (O, C, I) and scales (C,) whose products these values are; None where there are none.

    In each channel the scale is the largest |value| over the smallest k up to `MAX_LEVELS` that makes it a
    float16 and every value a multiple of it.
    """
    top = np.abs(values).max(axis=(0, 2)).astype(np.float64)  # (C,)
    if not np.isfinite(top).all():
        return None
    ratios = top / np.arange(1, MAX_LEVELS + 1)[:, None]  # (k, C)
    with np.errstate(over="ignore"):
        halves = ratios.astype(np.float16)
    exact = (halves == ratios) & ((halves > 0) | (top == 0))
    if not exact.any(axis=0).all():
        return None
    scales = np.zeros(len(top), np.float16)
    codes = np.zeros(values.shape, np.int16)
    open_ = top > 0  # channels without a scale so far
    for k in range(MAX_LEVELS):
        (chosen,) = np.nonzero(open_ & exact[k])
        if len(chosen) == 0:
            continue
        trial = values[:, chosen].astype(np.float64) / halves[k, chosen, None].astype(np.float64)
        whole = trial == np.rint(trial)
        good = whole.all(axis=(0, 2))
        codes[:, chosen[good]] = trial[:, good].astype(np.int16)
        scales[chosen[good]] = halves[k, chosen[good]]
        open_[chosen[good]] = False
    return None if open_.any() else (codes, scales)
