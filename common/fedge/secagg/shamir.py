"""Shamir's secret sharing (1979) of 32-byte secrets over the integers modulo a prime.

`cryptography` has none; the one that Flower uses (pycryptodome's, over GF(2^128) in Python) takes hundreds of
times as long for the hundred neighbours of a client.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Final

PRIME: Final = 2**256 - 189  # the largest below 2^256, so that a share has 32 bytes as well
SECRET_BYTES: Final = 32
MAX_SHARES: Final = 2**16

Draw = Callable[[int], bytes]
"""So many random bytes, others at each call."""


def share(secret: bytes, threshold: int, count: int, draw: Draw) -> list[bytes]:
    """Shares for the places 1 to `count`, any `threshold` of which give the secret and fewer say nothing.

    Args:
        secret: 32 bytes, as a number below PRIME; see `below_prime`.
        threshold: from 1 to count.
        count: of shares, at most 65,536.
        draw: source of the polynomial's coefficients.

    Raises:
        ValueError: an argument is out of its range.
    """
    first = int.from_bytes(secret)
    if len(secret) != SECRET_BYTES or first >= PRIME:
        raise ValueError("a secret must be 32 bytes, as a number below 2^256 - 189")
    if not 1 <= threshold <= count <= MAX_SHARES:
        raise ValueError(
            f"threshold {threshold} of {count} shares: must be 1 to count, count <= {MAX_SHARES}"
        )
    polynomial = [first, *(int.from_bytes(below_prime(draw)) for _ in range(threshold - 1))]
    return [_at(polynomial, place).to_bytes(SECRET_BYTES) for place in range(1, count + 1)]


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from its shares by place; the first `threshold` of them are used.

    Raises:
        ValueError: there are too few, or one is not a share at all. A share that is wrong cannot be seen
            here: whoever combines compares the secret with what its owner has committed to.
    """
    chosen = sorted(shares)[:threshold]
    if len(chosen) < threshold:
        raise ValueError(f"{len(chosen)} shares: {threshold} are needed")
    total = 0
    for place in chosen:
        value = int.from_bytes(shares[place])
        if len(shares[place]) != SECRET_BYTES or value >= PRIME or not 1 <= place <= MAX_SHARES:
            raise ValueError(f"share {place}: must be 32 bytes, as a number below 2^256 - 189")
        above, below = 1, 1
        for other in chosen:
            if other != place:
                above = above * other % PRIME
                below = below * (other - place) % PRIME
        total += value * above * pow(below, -1, PRIME)
    return (total % PRIME).to_bytes(SECRET_BYTES)


def below_prime(draw: Draw) -> bytes:
    """A uniform number below PRIME, as 32 bytes."""
    while int.from_bytes(found := draw(SECRET_BYTES)) >= PRIME:
        pass
    return found


def commitment(value: bytes) -> bytes:
    """What binds its owner to a secret of 256 random bits, or to a share of one, and hides it."""
    return hashlib.sha256(b"fedge.v1.secagg.commitment\0" + value).digest()


def _at(polynomial: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value
