"""Clipping, and Gaussian noise from a cipher's key stream on a grid: the arithmetic of every privacy promise.

Floating-point noise betrays what it was added to: sums of different values leave different last bits
(Mironov 2012, On Significance of the Least Significant Bits for Differential Privacy). Here every clipped
value is cut to a whole number of grid steps, which never lengthens it, and the noise is rounded to one. For
whole x, x + round(g) = round(x + g): what comes out is the rounding of the continuous Gaussian mechanism, and
rounding takes no privacy away. The steps are powers of two and their numbers below 2^53, so all sums are
exact and do not depend on their order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

KEY_BYTES: Final = 32
SLACK: Final = 2.0**-26  # by which clipping stays below its bound: more than a computed norm can be wrong
_FINE: Final = 20  # binary digits of a deviation that the grid keeps
_FINEST: Final = 30  # binary digits of the clipping norm that it keeps at most: 2^22 clients add up exactly
_PIECE: Final = 2**18  # values drawn together

Whole = npt.NDArray[np.float64]
"""Whole numbers of grid steps; float64 holds them exactly below 2^53."""


def step_of(clip_norm: float, sigma: float) -> float:
    """The grid step for values clipped to a norm and noise of a deviation: a power of two.

    Args:
        clip_norm: above 0.
        sigma: above 0.
    """
    fine = math.frexp(sigma)[1] - 1 - _FINE
    return math.ldexp(1.0, max(fine, math.frexp(clip_norm)[1] - 1 - _FINEST))


def clip_factor(norm: float, clip_norm: float) -> float:
    """What a vector of this norm is multiplied with, so that it is no longer than the clipping norm."""
    bound = clip_norm * (1 - SLACK)
    return 1.0 if norm <= bound else bound / norm


def on_grid(values: npt.NDArray[Any], factor: float, step: float) -> Whole:
    """Values times a factor in whole steps, cut towards 0: none becomes larger."""
    return np.trunc(values.astype(np.float64) * (factor / step))


def noise_on_grid(key: bytes, name: str, count: int, sigma: float, step: float) -> Whole:
    """Gaussian noise of a deviation, rounded to whole steps; the same for the same key and name.

    Args:
        key: secret, 32 bytes; used for one release alone.
        name: what it is added to; each name has a stream of its own.
        count: of values.
        sigma: deviation, in the unit of `step`.
        step: of the grid.
    """
    found = gaussian(key, name, count)
    found *= sigma / step
    return np.rint(found, out=found)


def gaussian(key: bytes, name: str, count: int) -> npt.NDArray[np.float64]:
    """Standard normal values from a key stream by Box and Muller (1958).

    53 random bits each reach out to 8.57 deviations; beyond lies a probability of 1e-17.
    """
    found = np.empty(count + count % 2)
    draw = _uniforms(key, name)
    for start in range(0, len(found), _PIECE):
        part = found[start : start + _PIECE]
        drawn = draw(len(part))
        radius, angle = np.sqrt(-2 * np.log(1 - drawn[0::2])), drawn[1::2] * (2 * math.pi)
        part[0::2], part[1::2] = radius * np.cos(angle), radius * np.sin(angle)
    return found[:count]


def uniform(key: bytes, name: str, count: int) -> npt.NDArray[np.float64]:
    """Values from 0 to below 1 from a key stream, with 53 random bits each."""
    return _uniforms(key, name)(count)


def _uniforms(key: bytes, name: str) -> Callable[[int], npt.NDArray[np.float64]]:
    """Draws from ChaCha20's key stream (RFC 8439), going on where the last call stopped."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
    nonce = b"\0\0\0\0" + hashlib.sha256(name.encode()).digest()[:12]  # 4 bytes count blocks of 64 bytes
    stream = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()

    def draw(count: int) -> npt.NDArray[np.float64]:
        bits = np.frombuffer(stream.update(bytes(8 * count)), "<u8") >> np.uint64(11)
        return bits.astype(np.float64) * 2.0**-53

    return draw


def derived_key(*parts: object) -> bytes:
    """A key that these parts decide: for simulations, which must be repeatable and protect nobody."""
    return hashlib.sha256("\0".join(["fedge noise", *map(str, parts)]).encode()).digest()


def share_sigma(sigma: float, least: int) -> float:
    """The deviation of one client's share, when noise is added up by clients instead of by a server.

    The sum has at least `sigma` as long as the shares of `least` honest clients are in it; the more there
    are, the more noise it holds. So `least` is the worst case: the threshold under which nothing is opened,
    less the clients that may work with the server and subtract their own shares.

    Args:
        sigma: wanted of the sum.
        least: from 1.
    """
    if least < 1:
        raise ValueError(f"least = {least}: somebody must add noise")
    return sigma / math.sqrt(least)
