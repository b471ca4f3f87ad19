"""What a server sees of an update under each protection, as arithmetic on the update.

An update here is the change that a client made or its gradient: named float arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
Update = Mapping[str, Array]

MASK_BITS = 32
FRACTION_BITS = 16  # of the fixed-point numbers that are masked


def int8(update: Update) -> dict[str, Array]:
    """Each array as 8-bit whole numbers and one scale, read back: compression, which is no protection."""
    return {name: _int8(value) for name, value in update.items()}


def _int8(value: Array) -> Array:
    scale = float(np.abs(value).max(initial=0.0)) / 127
    return np.asarray(np.rint(value / scale) * scale) if scale > 0 else value


def noised(update: Update, *, clip: float, sigma: float, seed: int) -> dict[str, Array]:
    """Clipped and noised on the device, the Gaussian mechanism of local differential privacy.

    Args:
        update: the client's.
        clip: L2 norm over all arrays together that is cut to.
        sigma: deviation of the noise on each value, in clips.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    norm = float(np.sqrt(sum(float(np.square(value).sum()) for value in update.values())))
    factor = min(1.0, clip / norm) if norm > 0 else 1.0
    return {
        name: value * factor + rng.normal(0.0, sigma * clip, value.shape) for name, value in update.items()
    }


def summed(updates: Sequence[Update]) -> dict[str, Array]:
    """The mean of a cohort: all that secure aggregation reveals."""
    return {name: np.asarray(np.mean([update[name] for update in updates], axis=0)) for name in updates[0]}


def masked(update: Update, *, seed: int) -> dict[str, Array]:
    """One client's input to secure aggregation as the server receives it, read as signed fixed point.

    The mask is uniform modulo 2^32, so the sum is uniform too and independent of the update (one-time pad).
    """
    rng = np.random.default_rng(seed)
    return {name: _masked(value, rng) for name, value in update.items()}


def _masked(value: Array, rng: np.random.Generator) -> Array:
    fixed = np.rint(np.asarray(value, np.float64) * 2**FRACTION_BITS).astype(np.int64)
    mask = rng.integers(0, 2**MASK_BITS, value.shape, dtype=np.int64)
    wrapped = ((fixed + mask) % 2**MASK_BITS).astype(np.uint32).view(np.int32)
    return np.asarray(wrapped.astype(np.float64) / 2**FRACTION_BITS)
