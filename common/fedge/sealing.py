"""Sealed models: STREAM (Hoang, Reyhanitabar, Rogaway and Vizar 2015) and HPKE (RFC 9180).

A model is sealed once for its tier, with a content key of its own; the key is wrapped for each device.
Layout:

    8    "fedgesl", and the number of this format, 1
    32   names the content key, and commits to it
    16   salt
    ...  chunks: 65,536 bytes and a tag of 16; the last one holds less, or as much

Each chunk is ChaCha20-Poly1305 under a key and a nonce prefix of 7 bytes, both by HKDF-SHA256 from content
key, salt, and what is sealed for whom; after the prefix the nonce has the chunk's number and whether it is
the last. So no chunk can be left out, put in, moved, or taken from elsewhere, and none is given out before it
is authenticated. A device opens as it reads: it holds two chunks.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedge.errors import FormatError, SealError
from fedge.manifest import MAX_VERSION, TIER_NAME

FORMAT: Final = 1
DELTA: Final = "delta"  # what is sealed, where it is the way from another version
CHUNK_BYTES: Final = 64 * 1024  # of plaintext
TAG_BYTES: Final = 16
KEY_BYTES: Final = 32
WRAPPED_BYTES: Final = 32 + KEY_BYTES + TAG_BYTES  # an ephemeral public key, and the content key encrypted
HEADER_BYTES: Final = 8 + 32 + 16

_MAGIC: Final = b"fedgesl" + bytes([FORMAT])
_STREAM: Final = b"fedge.v1.sealing"  # what a derived value is for: it serves nothing else
_WRAP: Final = b"fedge.v1.sealing.wrap"
_NAME: Final = b"fedge.v1.sealing.name"
_SUITE: Final = Suite(
    KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305
)  # of boards without AES, the fastest
_PREFIX_BYTES: Final = 7
_MAX_CHUNKS: Final = 2**32
_KIND: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
_DEVICE: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Place:
    """What is sealed: opened as anything else, it does not open."""

    tier: str
    version: int  # of the release
    kind: str = "model"  # or another file of the release that is sealed with the same content key

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        if not isinstance(self.tier, str) or not TIER_NAME.fullmatch(self.tier):
            raise FormatError(f"sealing: {repr(self.tier)[:60]} is no tier")
        if type(self.version) is not int or not 1 <= self.version <= MAX_VERSION:
            raise FormatError(f"sealing: version {repr(self.version)[:40]} must be 1 to {MAX_VERSION}")
        if not isinstance(self.kind, str) or not _KIND.fullmatch(self.kind):
            raise FormatError(f"sealing: {repr(self.kind)[:60]} is no kind of file")

    @property
    def label(self) -> bytes:
        """The one spelling of it; no part can hold the stroke between them."""
        return f"{self.tier}/{self.version}/{self.kind}".encode("ascii")


def new_key() -> bytes:
    """A content key, for one release of one tier."""
    return os.urandom(KEY_BYTES)


def key_id(key: bytes) -> str:
    """64 hexadecimal digits that name a content key, commit to it, and tell nothing of it.

    Raises:
        FormatError: no content key.
    """
    if len(key) != KEY_BYTES:
        raise FormatError(f"content key: {len(key)} bytes, must be {KEY_BYTES}")
    return hashlib.sha256(_NAME + key).hexdigest()


def sealed_bytes(length: int) -> int:
    """How many bytes the sealed form of so many has."""
    return HEADER_BYTES + length + TAG_BYTES * max(1, -(-length // CHUNK_BYTES))


def room_within(sealed: int) -> int:
    """The most bytes whose sealed form has no more than so many; 0 where not even none has."""
    whole, rest = divmod(max(0, sealed - HEADER_BYTES), CHUNK_BYTES + TAG_BYTES)
    return whole * CHUNK_BYTES + max(0, rest - TAG_BYTES)


def seal(data: bytes, key: bytes, place: Place) -> bytes:
    """The sealed form of a file; two of the same file differ.

    Raises:
        FormatError: no content key.
    """
    return b"".join(sealing([data], key, place))


def sealing(chunks: Iterable[bytes], key: bytes, place: Place) -> Iterator[bytes]:
    """The sealed form of a file that comes, and goes, in pieces of any length.

    Raises:
        FormatError: no content key.
    """
    yield from _sealing(chunks, key, place, os.urandom(16))


def unseal(data: bytes, key: bytes, place: Place) -> bytes:
    """Undo `seal`.

    Raises:
        FormatError: nothing that was sealed, or in another format.
        SealError: with another key, for another place, or changed since.
    """
    whole = io.BytesIO()  # which holds it once, where joining pieces would twice
    for piece in opened([data], key, place):
        whole.write(piece)
    return whole.getvalue()


def opened(chunks: Iterable[bytes], key: bytes, place: Place) -> Iterator[bytes]:
    """Undo `sealing`; what has been given out is authentic, but is the whole only once this ends by itself.

    Raises:
        FormatError: nothing that was sealed, or in another format.
        SealError: with another key, for another place, or changed since; also when the end is cut off.
    """
    source = iter(chunks)
    header, rest = _header(source)
    if header[8:40].hex() != key_id(key):
        raise SealError(f"{_what(place)}: is sealed with another content key than this device was given")
    cipher, prefix = _cipher(key, header[40:], place)
    for number, (block, last) in enumerate(_blocks(_chain(rest, source), CHUNK_BYTES + TAG_BYTES)):
        try:
            plain = cipher.decrypt(_nonce(prefix, number, last), block, None)
        except InvalidTag as error:
            raise SealError(
                f"{_what(place)}: does not open at chunk {number}; it was changed, or cut off"
            ) from error
        if number and not plain:  # else there are two spellings of one file
            raise SealError(f"{_what(place)}: ends with an empty chunk; it was not sealed by fedge")
        yield plain


def wrap(key: bytes, device_public: bytes, *, tier: str, version: int, device_id: str) -> bytes:
    """A content key that one device alone can unwrap, for one version of one tier.

    Args:
        key: the content key.
        device_public: 32 bytes, the device's X25519 key.
        tier: that the content is for.
        version: of the release.
        device_id: 64 hexadecimal digits.

    Raises:
        FormatError: no content key, or no key that can be sealed to.
    """
    key_id(key)
    try:
        public = X25519PublicKey.from_public_bytes(device_public)
        return _SUITE.encrypt(key, public, info=_wrap_info(tier, version, device_id))
    except ValueError as error:  # also of a point of low order, with which everybody could unwrap
        raise FormatError(
            f"device {device_id[:16]}: its sealing key is none; enrol the device again"
        ) from error


def unwrap(
    wrapped: bytes,
    device_private: X25519PrivateKey,
    *,
    tier: str,
    version: int,
    device_id: str,
    expected: str,
) -> bytes:
    """Undo `wrap`.

    Args:
        wrapped: from the server, or from a stick.
        device_private: of this device.
        tier: of this device.
        version: of the release.
        device_id: of this device.
        expected: the name of the content key that signed metadata states.

    Raises:
        SealError: it is for another device, tier or version, or changed; or the key is not the one expected.
    """
    if len(wrapped) != WRAPPED_BYTES:
        raise SealError(f"content key: {len(wrapped)} bytes wrapped, must be {WRAPPED_BYTES}")
    try:
        key = _SUITE.decrypt(wrapped, device_private, info=_wrap_info(tier, version, device_id))
    except (InvalidTag, ValueError) as error:
        raise SealError(
            f"content key of {tier} {version}: is not wrapped for this device; "
            "if the device's keys were replaced, enrol it again"
        ) from error
    if not hmac.compare_digest(key_id(key), expected):
        raise SealError(
            f"content key of {tier} {version}: is not the one that was signed; ask who runs the server"
        )
    return key


def _sealing(chunks: Iterable[bytes], key: bytes, place: Place, salt: bytes) -> Iterator[bytes]:
    yield _MAGIC + bytes.fromhex(key_id(key)) + salt
    cipher, prefix = _cipher(key, salt, place)
    for number, (block, last) in enumerate(_blocks(chunks, CHUNK_BYTES)):
        yield cipher.encrypt(_nonce(prefix, number, last), block, None)


def _cipher(key: bytes, salt: bytes, place: Place) -> tuple[ChaCha20Poly1305, bytes]:
    """Of one sealed file: its key and the beginning of its nonces."""
    derive = HKDF(SHA256(), KEY_BYTES + _PREFIX_BYTES, salt, _STREAM + b"/" + _MAGIC + b"/" + place.label)
    derived = derive.derive(key)
    return ChaCha20Poly1305(derived[:KEY_BYTES]), derived[KEY_BYTES:]


def _nonce(prefix: bytes, number: int, last: bool) -> bytes:
    if number >= _MAX_CHUNKS:
        raise FormatError(f"sealing: over {_MAX_CHUNKS} chunks")
    return prefix + number.to_bytes(4, "big") + bytes([last])


def _header(source: Iterator[bytes]) -> tuple[bytes, bytes]:
    """The header, and what came behind it in the same piece."""
    held = b""
    while len(held) < HEADER_BYTES:
        piece = next(source, None)
        if piece is None:
            raise FormatError(f"sealed file: ends after {len(held)} bytes of its header")
        held += piece
    if held[:7] != _MAGIC[:7]:
        raise FormatError("sealed file: it is none")
    if held[7] != FORMAT:
        raise FormatError(f"sealed file: of format {held[7]}; this fedge reads {FORMAT}: update it")
    return held[:HEADER_BYTES], held[HEADER_BYTES:]


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _blocks(pieces: Iterable[bytes], size: int) -> Iterator[tuple[bytes, bool]]:
    """Blocks of `size` bytes, and whether each is the last, which alone may be shorter; at least one."""
    held = bytearray()
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), size):
            held += view[start : start + size]
            if len(held) > size:  # by less than a block, so one can go, and it is not the last
                yield bytes(held[:size]), False
                del held[:size]
    yield bytes(held), True


def _wrap_info(tier: str, version: int, device_id: str) -> bytes:
    if not _DEVICE.fullmatch(device_id):
        raise FormatError(f"device {device_id[:60]!r}: must be 64 hexadecimal digits")
    return _WRAP + b"/" + Place(tier, version, "key").label + b"/" + device_id.encode("ascii")


def _what(place: Place) -> str:
    return f"{place.kind} of {place.tier} {place.version}"
