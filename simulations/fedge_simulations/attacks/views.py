"""What a server sees of an update under each protection, as arithmetic on the update.

An update here is the change that a client made or its gradient: named float arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedge.noise import derived_key
from fedge.secagg.encoding import EXTRAS, Encoding
from fedge.secagg.masks import add_mask

Array = npt.NDArray[np.floating]
Update = Mapping[str, Array]

RANGE = 4.0  # of the values that are encoded, as `privacy.secure_range` has it
COHORT = 100  # clients that the encoding leaves room for


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

    Encoded and masked by the code that clients run, with one key instead of many: the mask is uniform modulo
    2^32, so the sum is uniform too and independent of the update (one-time pad).
    """
    encoding = Encoding(RANGE, 1, COHORT)
    words = encoding.encode(np.concatenate([np.ravel(v) for v in update.values()]).astype(np.float64), 1, 0.0)
    add_mask(words, derived_key("masked view", seed))
    read = words[:-EXTRAS].view(np.int32) * encoding.step
    ends = np.cumsum([value.size for value in update.values()])[:-1]
    parts = np.split(read, ends)
    return {
        name: part.reshape(value.shape) for (name, value), part in zip(update.items(), parts, strict=True)
    }
