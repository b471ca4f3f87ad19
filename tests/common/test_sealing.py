"""Sealed files open only whole, unchanged, with their key and as what they are; keys for one device alone."""

from __future__ import annotations

import hashlib
import hmac
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
from cryptography.hazmat.bindings._rust import openssl
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge import sealing
from fedge.errors import FormatError, SealError, TrustError
from fedge.sealing import (
    CHUNK_BYTES,
    HEADER_BYTES,
    KEY_BYTES,
    TAG_BYTES,
    WRAPPED_BYTES,
    Place,
    key_id,
    new_key,
    opened,
    seal,
    sealed_bytes,
    unseal,
    unwrap,
    wrap,
)

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
PLACE = Place("micro", 7)
DEVICE = "ab" * 32
SLOT = CHUNK_BYTES + TAG_BYTES  # of a whole chunk when sealed
LENGTHS = [0, 1, 100, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 5]


def data_of(length: int) -> bytes:
    return hashlib.shake_128(b"data").digest(length)


def by_hand(data: bytes, key: bytes, label: bytes, salt: bytes) -> bytes:
    """The format once more, from its description alone: HKDF written out, chunks counted by hand."""
    name = hashlib.sha256(b"fedge.v1.sealing.name" + key).digest()
    info = b"fedge.v1.sealing/fedgesl\x01/" + label
    extracted = hmac.digest(salt, key, "sha256")
    first = hmac.digest(extracted, info + b"\x01", "sha256")
    second = hmac.digest(extracted, first + info + b"\x02", "sha256")
    cipher, prefix = ChaCha20Poly1305(first), second[:7]
    parts = [data[i : i + 65536] for i in range(0, len(data), 65536)] or [b""]
    sealed = b"fedgesl\x01" + name + salt
    for number, part in enumerate(parts):
        last = b"\x01" if number == len(parts) - 1 else b"\x00"
        sealed += cipher.encrypt(prefix + number.to_bytes(4, "big") + last, part, None)
    return sealed


@pytest.mark.parametrize("length", LENGTHS)
def test_what_was_sealed_opens_as_it_was_and_its_length_is_foretold(length: int) -> None:
    sealed = seal(data_of(length), KEY, PLACE)
    assert unseal(sealed, KEY, PLACE) == data_of(length)
    assert len(sealed) == sealed_bytes(length)
    assert seal(data_of(length), KEY, PLACE) != sealed  # another salt


@pytest.mark.parametrize("length", LENGTHS)
def test_the_format_is_the_one_that_is_described(length: int) -> None:
    written = by_hand(data_of(length), KEY, b"micro/7/model", b"s" * 16)
    assert unseal(written, KEY, PLACE) == data_of(length)
    assert b"".join(sealing._sealing([data_of(length)], KEY, PLACE, b"s" * 16)) == written


def test_a_file_of_the_first_format_opens_for_ever() -> None:
    written = bytes.fromhex(
        "6665646765736c01"
        "fe43f6ec939d71ea80c7ba3df0336aa60b6689d20b4b85bd67383fef3461f440"
        "73737373737373737373737373737373"
        "f4a7d4f32abb6c96b80b3ba28992054b4f650173a93b81"
    )
    assert unseal(written, KEY, PLACE) == b"a model"


@given(st.integers(72, 400_000))
def test_what_fits_into_a_budget_is_the_most_that_does(budget: int) -> None:
    most = sealing.room_within(budget)
    assert sealed_bytes(most) <= budget < sealed_bytes(most + 1)
    assert [sealing.room_within(few) for few in (0, 55, 71)] == [0, 0, 0]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 3 * CHUNK_BYTES),
    st.lists(st.integers(1, 2 * CHUNK_BYTES), min_size=1, max_size=4),
)
def test_it_does_not_matter_in_which_pieces_it_comes(length: int, cuts: list[int]) -> None:
    def pieces(data: bytes) -> Iterator[bytes]:
        start, turn = 0, 0
        while start < len(data):
            yield data[start : start + cuts[turn % len(cuts)]]
            start, turn = start + cuts[turn % len(cuts)], turn + 1

    data = data_of(length)
    sealed = b"".join(sealing.sealing(pieces(data), KEY, PLACE))
    assert b"".join(opened(pieces(sealed), KEY, PLACE)) == data


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200) | st.binary(max_size=300).map(lambda tail: seal(b"", KEY, PLACE)[:60] + tail))
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(TrustError):
        unseal(data, KEY, PLACE)


SEALED = seal(data_of(2 * CHUNK_BYTES + 50), KEY, PLACE)
CHUNKS = [SEALED[HEADER_BYTES : HEADER_BYTES + SLOT], SEALED[HEADER_BYTES + SLOT : HEADER_BYTES + 2 * SLOT]]
HEAD, TAIL = SEALED[:HEADER_BYTES], SEALED[HEADER_BYTES + 2 * SLOT :]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_no_byte_can_be_changed(place: int, flip: int) -> None:
    changed = bytearray(SEALED)
    changed[place] ^= flip
    with pytest.raises(TrustError):
        unseal(bytes(changed), KEY, PLACE)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, len(SEALED) - 1))
def test_no_part_of_it_is_the_whole(length: int) -> None:
    with pytest.raises(TrustError):
        unseal(SEALED[:length], KEY, PLACE)


@pytest.mark.parametrize(
    ("what", "made"),
    [
        ("the last chunk is gone", HEAD + b"".join(CHUNKS)),
        ("the first is gone", HEAD + CHUNKS[1] + TAIL),
        ("one in between is gone", HEAD + CHUNKS[0] + TAIL),
        ("two change places", HEAD + CHUNKS[1] + CHUNKS[0] + TAIL),
        ("one comes twice", HEAD + CHUNKS[0] + CHUNKS[0] + CHUNKS[1] + TAIL),
        ("the last comes twice", HEAD + b"".join(CHUNKS) + TAIL + TAIL),
        ("something comes after the last", SEALED + b"x"),
        ("a whole file comes after it", SEALED + SEALED),
        (
            "chunks of another file",
            HEAD + CHUNKS[0] + seal(data_of(3 * CHUNK_BYTES), KEY, PLACE)[HEADER_BYTES + SLOT :],
        ),
    ],
)
def test_chunks_cannot_be_left_out_added_or_moved(what: str, made: bytes) -> None:
    with pytest.raises(SealError, match="does not open at chunk"):
        unseal(made, KEY, PLACE)


def test_an_empty_chunk_cannot_be_hung_on_even_with_the_key() -> None:
    cipher, prefix = sealing._cipher(KEY, HEAD[40:], PLACE)
    whole = cipher.encrypt(sealing._nonce(prefix, 0, False), b"x" * CHUNK_BYTES, None)
    empty = cipher.encrypt(sealing._nonce(prefix, 1, True), b"", None)
    with pytest.raises(SealError, match="empty chunk"):
        unseal(HEAD + whole + empty, KEY, PLACE)


@pytest.mark.parametrize("place", [Place("nano", 7), Place("micro", 8), Place("micro", 7, "delta-6")])
def test_it_opens_only_as_what_it_was_sealed(place: Place) -> None:
    with pytest.raises(SealError, match="does not open at chunk 0"):
        unseal(SEALED, KEY, place)


def test_another_key_is_found_out_before_anything_is_decrypted() -> None:
    with pytest.raises(SealError, match="another content key"):
        unseal(SEALED, OTHER, PLACE)
    with pytest.raises(SealError, match="does not open at chunk 0"):  # who rewrites the name changes nothing
        unseal(SEALED[:8] + bytes.fromhex(key_id(OTHER)) + SEALED[40:], OTHER, PLACE)


def test_nothing_is_given_out_that_is_not_authentic() -> None:
    changed = bytearray(SEALED)
    changed[HEADER_BYTES + SLOT + 3] ^= 1
    pieces = opened([bytes(changed)], KEY, PLACE)
    assert next(pieces) == data_of(CHUNK_BYTES)
    with pytest.raises(SealError, match="at chunk 1"):
        next(pieces)


def test_memory_does_not_grow_with_the_file() -> None:
    piece = b"x" * 4096
    chunks = sealing.sealing((piece for _ in range(2000)), KEY, PLACE)  # 8 MB
    tracemalloc.start()
    try:
        total = sum(len(part) for part in opened(chunks, KEY, PLACE))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 2000 * 4096
    assert peak < 12 * SLOT


def test_a_newer_format_says_so() -> None:
    with pytest.raises(FormatError, match=r"of format 2; this fedge reads 1: update it"):
        unseal(SEALED[:7] + b"\x02" + SEALED[8:], KEY, PLACE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Place("Micro", 1),
        lambda: Place("micro/1", 1),
        lambda: Place("micro", 0),
        lambda: Place("micro", True),
        lambda: Place("micro", 1, "a/b"),
        lambda: seal(b"", b"short", PLACE),
        lambda: wrap(KEY, b"p" * 31, tier="micro", version=7, device_id=DEVICE),
        lambda: wrap(KEY, bytes(32), tier="micro", version=7, device_id=DEVICE),  # of low order
        lambda: wrap(KEY[1:], b"p" * 32, tier="micro", version=7, device_id=DEVICE),
        lambda: wrap(KEY, b"p" * 32, tier="micro", version=7, device_id="ab"),
    ],
)
def test_nonsense_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(FormatError):
        make()


PRIVATE = X25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = PRIVATE.public_key().public_bytes_raw()
WRAPPED = wrap(KEY, PUBLIC, tier="micro", version=7, device_id=DEVICE)


def test_a_device_unwraps_its_key() -> None:
    assert len(WRAPPED) == WRAPPED_BYTES == 80
    assert unwrap(WRAPPED, PRIVATE, tier="micro", version=7, device_id=DEVICE, expected=key_id(KEY)) == KEY
    assert wrap(KEY, PUBLIC, tier="micro", version=7, device_id=DEVICE) != WRAPPED
    assert len({new_key() for _ in range(4)}) == 4
    assert len(new_key()) == KEY_BYTES


@pytest.mark.parametrize(
    ("tier", "version", "device"), [("nano", 7, DEVICE), ("micro", 8, DEVICE), ("micro", 7, "cd" * 32)]
)
def test_a_key_is_for_one_device_tier_and_version(tier: str, version: int, device: str) -> None:
    with pytest.raises(SealError, match="not wrapped for this device"):
        unwrap(WRAPPED, PRIVATE, tier=tier, version=version, device_id=device, expected=key_id(KEY))
    stranger = X25519PrivateKey.generate()
    with pytest.raises(SealError, match="not wrapped for this device"):
        unwrap(WRAPPED, stranger, tier="micro", version=7, device_id=DEVICE, expected=key_id(KEY))


def test_a_key_other_than_the_signed_one_is_refused() -> None:
    with pytest.raises(SealError, match="not the one that was signed"):
        unwrap(WRAPPED, PRIVATE, tier="micro", version=7, device_id=DEVICE, expected=key_id(OTHER))


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=100) | st.binary(min_size=80, max_size=80))
def test_no_other_bytes_are_a_wrapped_key(wrapped: bytes) -> None:
    with pytest.raises(SealError):
        unwrap(wrapped, PRIVATE, tier="micro", version=7, device_id=DEVICE, expected=key_id(KEY))


def test_the_suite_gives_what_rfc_9180_says() -> None:
    """Appendix A.2.1: base mode, X25519, HKDF-SHA256, ChaCha20-Poly1305, first encryption."""
    private = X25519PrivateKey.from_private_bytes(
        bytes.fromhex("8057991eef8f1f1af18f4a9491d16a1ce333f695d4db8e38da75975c4478e0fb")
    )
    enc = bytes.fromhex("1afa08d3dec047a643885163f1180476fa7ddb54c6a8029ea33f95796bf2ac4a")
    sealed = bytes.fromhex(
        "1c5250d8034ec2b784ba2cfd69dbdb8af406cfe3ff938e131f0def8c8b60b4db21993c62ce81883d2dd1b51a28"
    )
    found = openssl.hpke._decrypt_with_aad(
        sealing._SUITE, enc + sealed, private, b"Ode on a Grecian Urn", b"Count-0"
    )
    assert found == b"Beauty is truth, truth beauty"
