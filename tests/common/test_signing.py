from __future__ import annotations

import base64
import json
from contextlib import suppress
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
)
from hypothesis import given
from hypothesis import strategies as st

from fedge import signing
from fedge.errors import FormatError, SignatureError, TrustError

PRIVATE, PUBLIC = signing.generate_key()
OTHER_PRIVATE, OTHER_PUBLIC = signing.generate_key()
PAYLOAD = b'{"version":1}'
ENVELOPE = signing.sign(PAYLOAD, PRIVATE)


def opened(**changes: Any) -> bytes:
    return json.dumps({**json.loads(ENVELOPE), **changes}).encode()


def test_what_is_signed_is_verified_and_comes_back_unchanged() -> None:
    assert signing.verify(ENVELOPE, [PUBLIC]) == PAYLOAD
    assert signing.verify(ENVELOPE, [OTHER_PUBLIC, PUBLIC]) == PAYLOAD
    assert signing.sign(PAYLOAD, PRIVATE) == ENVELOPE


def test_the_signature_is_that_of_the_dsse_specification() -> None:
    (signature,) = json.loads(ENVELOPE)["signatures"]
    signed = b"DSSEv1 34 application/vnd.fedge.release+json 13 " + PAYLOAD
    key: Any = load_pem_public_key(PUBLIC)
    key.verify(base64.b64decode(signature["sig"]), signed)  # raises if it differs
    assert signature["keyid"] == signing.key_id(PUBLIC)


def test_any_bytes_can_be_a_payload_for_they_are_not_parsed() -> None:
    assert signing.verify(signing.sign(b"\x00no json", PRIVATE), [PUBLIC]) == b"\x00no json"


@pytest.mark.parametrize("trusted", [[], [OTHER_PUBLIC]], ids=["no key", "another key"])
def test_a_signature_of_no_trusted_key_is_refused(trusted: list[bytes]) -> None:
    with pytest.raises(SignatureError, match="not signed by a trusted key"):
        signing.verify(ENVELOPE, trusted)


def test_another_key_under_the_trusted_key_id_is_refused() -> None:
    envelope = json.loads(signing.sign(PAYLOAD, OTHER_PRIVATE))
    envelope["signatures"][0]["keyid"] = signing.key_id(PUBLIC)
    with pytest.raises(SignatureError):
        signing.verify(json.dumps(envelope).encode(), [PUBLIC])


def test_a_changed_payload_is_refused() -> None:
    with pytest.raises(SignatureError):
        signing.verify(opened(payload=base64.b64encode(b'{"version":2}').decode()), [PUBLIC])


def test_a_signature_over_another_type_of_payload_is_refused() -> None:
    with pytest.raises(FormatError, match="'text/plain', not a release"):
        signing.verify(opened(payloadType="text/plain"), [PUBLIC])


HOSTILE = [
    b"", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000, b'"text"', b"12", b"9" * 5000,
    opened(payload=None), opened(payload="*"), opened(payload=5),
    opened(payloadType=None), opened(payloadType=[]),
    opened(signatures=None), opened(signatures={}), opened(signatures="abc"), opened(signatures=[None]),
    opened(signatures=[{"keyid": "a"}]), opened(signatures=[{"keyid": [], "sig": ""}]),
    opened(signatures=[{"keyid": 5, "sig": ""}]), opened(signatures=[{"keyid": "a", "sig": 5}]),
    opened(signatures=[{"keyid": "a", "sig": ""}] * 2), opened(signatures=[]),
    opened(signatures=[{"keyid": str(i), "sig": ""} for i in range(17)]),
    opened(signatures=[{"keyid": signing.key_id(PUBLIC), "sig": ""}]),
    opened(signatures=[{"keyid": signing.key_id(PUBLIC), "sig": "AAAA"}]),
]  # fmt: skip


@pytest.mark.parametrize("envelope", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_envelopes_are_refused_with_our_errors(envelope: bytes) -> None:
    with pytest.raises((FormatError, SignatureError)) as caught:
        signing.verify(envelope, [PUBLIC])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_envelope_over_its_maximum_is_not_read() -> None:
    assert signing.verify(ENVELOPE, [PUBLIC], max_bytes=len(ENVELOPE)) == PAYLOAD
    with pytest.raises(FormatError, match="over the"):
        signing.verify(ENVELOPE, [PUBLIC], max_bytes=len(ENVELOPE) - 1)


def test_every_truncation_is_refused() -> None:
    for length in range(len(ENVELOPE)):
        with pytest.raises(TrustError):
            signing.verify(ENVELOPE[:length], [PUBLIC])


@given(st.data())
def test_flipped_bits_never_change_what_is_accepted(data: st.DataObject) -> None:
    bad = bytearray(ENVELOPE)
    for _ in range(data.draw(st.integers(1, 3))):
        bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with suppress(FormatError, SignatureError):
        assert signing.verify(bytes(bad), [PUBLIC]) == PAYLOAD


P256 = generate_private_key(SECP256R1())
P256_PUBLIC = P256.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
P256_PRIVATE = P256.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    "pem", [b"", b"no key", PRIVATE, P256_PUBLIC, PUBLIC[:-40], PUBLIC * 100], ids=range(6)
)
def test_what_is_no_ed25519_public_key_is_not_trusted(pem: bytes) -> None:
    with pytest.raises(FormatError, match="public key"):
        signing.verify(ENVELOPE, [pem])


@pytest.mark.parametrize("pem", [b"", b"no key", PUBLIC, P256_PRIVATE, PRIVATE[:-40]], ids=range(5))
def test_what_is_no_ed25519_private_key_does_not_sign(pem: bytes) -> None:
    with pytest.raises(FormatError, match="signing key"):
        signing.sign(PAYLOAD, pem)


def test_the_public_key_follows_from_the_private_one() -> None:
    assert signing.public_of(PRIVATE) == PUBLIC
    assert signing.key_id(PUBLIC) != signing.key_id(OTHER_PUBLIC)
    assert signing.unverified_payload(ENVELOPE) == PAYLOAD
