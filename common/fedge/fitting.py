"""Whether an array is what a model takes: shape, dtype and values, held to the spec."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedge.errors import DataError
from fedge.spec import Spec

Array = npt.NDArray[Any]
_BYTES: Final = np.dtype(np.uint8)


def fit(x: Array, spec: Spec) -> Array:
    """Give x as a batch (B, *spec.shape) of the spec's dtype; one example gets a batch of its own.

    Raises:
        DataError: another shape, no numbers, or values that the dtype or the model cannot take.
    """
    if x.dtype == _BYTES and spec.dtype == "uint8" and spec.kind != "text" and x.shape[1:] == spec.shape:
        return x  # a byte cannot be out of range
    batch = x[np.newaxis] if x.shape == spec.shape else x  # (B, *spec.shape)
    if batch.shape[1:] != spec.shape or batch.ndim == 0:
        raise DataError(f"has shape {x.shape}; this model takes {spec.shape}, or a batch (B, *{spec.shape})")
    if batch.dtype.kind not in "uifb":
        raise DataError(f"holds {x.dtype} values; it must hold numbers")
    return _whole(batch, spec) if spec.dtype == "uint8" else _real(batch, spec)


def _whole(batch: Array, spec: Spec) -> Array:
    if batch.dtype.kind == "f":
        raise DataError(f"holds {batch.dtype} values; this model takes whole numbers 0 .. 255")
    highest = spec.classes - 1 if spec.kind == "text" else 255
    if batch.size and (batch.min() < 0 or batch.max() > highest):
        raise DataError(f"holds values {batch.min()} .. {batch.max()}; this model takes 0 .. {highest}")
    return batch.astype(np.uint8, copy=False)


def _real(batch: Array, spec: Spec) -> Array:
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, and is refused
        batch = batch.astype(np.float32, copy=False)
    finite = np.isfinite(batch)
    if not finite.all() and not (finite | (np.isnan(batch) & spec.allows_missing)).all():
        raise DataError("holds infinite values, or NaN in an image; it must hold finite numbers")
    return batch
