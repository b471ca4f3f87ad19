"""Keys that two clients agree on, the masks that grow from them, and sealed boxes for shares."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedge.errors import FormatError

KEY_BYTES: Final = 32
TAG_BYTES: Final = 16
_PIECE: Final = 2**16  # values of a mask that are made at a time: they stay in the cache

Words = npt.NDArray[np.uint32]
"""Numbers modulo 2^32."""


@dataclass(frozen=True, slots=True)
class Session:
    """One attempt at one round of one run: what keys, boxes and signatures are bound to."""

    run: str
    round: int
    nonce: bytes  # 16 bytes, drawn by the server for this attempt

    @property
    def bound(self) -> bytes:
        """Bytes that differ for any two sessions."""
        run = self.run.encode()
        return struct.pack(">I", len(run)) + run + struct.pack(">q", self.round) + self.nonce


def stream_of(root: bytes, purpose: str) -> Callable[[int], bytes]:
    """Random bytes from a root key, by ChaCha20's key stream (RFC 8439); each purpose has its own."""
    return _stream(_derived(root, b"", purpose.encode()))


def public_key(private: bytes) -> bytes:
    """The X25519 public key of 32 private bytes."""
    return _key_of(private).public_key().public_bytes_raw()


def pairwise_key(private: bytes, other: bytes, session: Session) -> bytes:
    """The key of the mask between two clients, the same for both (X25519, RFC 7748; HKDF, RFC 5869).

    Raises:
        FormatError: the other's key is none, or one of those that lead to a shared secret of zeros.
    """
    return _derived(_agreed(private, other), session.bound, b"mask")


def seal(private: bytes, other: bytes, session: Session, sender: int, receiver: int, content: bytes) -> bytes:
    """Content for one receiver, who learns that it comes from this sender, session and direction.

    The nonce is fixed: each key serves one box, since both keys are fresh in each session.
    """
    key = _box_key(private, other, session, sender, receiver)
    return ChaCha20Poly1305(key).encrypt(bytes(12), content, None)


def unseal(private: bytes, other: bytes, session: Session, sender: int, receiver: int, box: bytes) -> bytes:
    """The content of a box.

    Raises:
        FormatError: it was changed, or made for another receiver, by another sender, or in another session.
    """
    key = _box_key(private, other, session, sender, receiver)
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), box, None)
    except InvalidTag:
        raise FormatError(
            f"shares of client {sender}: changed on the way, or not made for this client and round"
        ) from None


def add_mask(total: Words, key: bytes, *, negative: bool = False) -> None:
    """Add to (or take from) numbers modulo 2^32 the mask that grows from a key."""
    stream, change = _stream(key), np.subtract if negative else np.add
    zeros = bytes(4 * min(_PIECE, len(total)))
    for start in range(0, len(total), _PIECE):
        part = total[start : start + _PIECE]
        change(part, np.frombuffer(stream(4 * len(part), zeros), "<u4"), out=part)


def self_key(seed: bytes, session: Session) -> bytes:
    """The key of a client's own mask, from the seed of which its neighbours hold shares."""
    return _derived(seed, session.bound, b"self mask")


def sign_of(sender: int, other: int) -> bool:
    """Whether the sender takes the mask it has with another client away, where that one adds it."""
    return sender > other


def _stream(key: bytes) -> Callable[..., bytes]:
    encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def draw(count: int, zeros: bytes = b"") -> bytes:
        return encryptor.update(zeros[:count] if len(zeros) >= count else bytes(count))

    return draw


def _box_key(private: bytes, other: bytes, session: Session, sender: int, receiver: int) -> bytes:
    way = b"box" + struct.pack(">QQ", sender, receiver)
    return _derived(_agreed(private, other), session.bound, way)


@lru_cache(maxsize=4)  # a client uses its two keys with each neighbour; to load one costs as much as to agree
def _key_of(private: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(private)


def _agreed(private: bytes, other: bytes) -> bytes:
    try:
        key = X25519PublicKey.from_public_bytes(other)
        return _key_of(private).exchange(key)
    except ValueError as error:  # a wrong length, or a point of small order
        raise FormatError("secure aggregation: a public key is none of X25519") from error


def _derived(secret: bytes, salt: bytes, purpose: bytes) -> bytes:
    info = b"fedge.v1.secagg." + purpose
    return HKDF(SHA256(), KEY_BYTES, salt, info).derive(secret)
