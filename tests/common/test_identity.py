from __future__ import annotations

import hashlib
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from fedge import identity
from fedge.errors import FormatError, SignatureError
from fedge.identity import JoinString

KEY = ec.generate_private_key(ec.SECP256R1())
PUBLIC = KEY.public_key()
PIN = identity.pin_of(PUBLIC)
SECRET = "s3cr3t-_" * 4
GOOD = f"fedge1:fedge.example.org:9444:0123456789abcdef.{SECRET}:{PIN}"


def test_a_device_is_named_by_the_sha256_of_its_public_key() -> None:
    der = PUBLIC.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert identity.device_id_of(PUBLIC) == hashlib.sha256(der).hexdigest()


def test_a_node_id_is_the_first_63_bits_that_a_database_can_hold() -> None:
    assert identity.node_id_of("0" * 15 + "1" + "f" * 48) == 1
    assert identity.node_id_of("f" * 64) == 2**63 - 1
    assert identity.node_id_of("8" + "0" * 63) == 0


def test_a_join_string_is_read_as_it_was_written() -> None:
    join = JoinString.parse(f"  {GOOD}\n")
    assert str(join) == GOOD
    assert (join.host, join.port, join.address) == ("fedge.example.org", 9444, "fedge.example.org:9444")
    assert join.token == f"0123456789abcdef.{SECRET}"
    assert join.ca_key == PUBLIC


@pytest.mark.parametrize("host", ["::1", "2001:db8::7", "192.0.2.1", "localhost", "a-b.c"])
def test_every_kind_of_host_survives(host: str) -> None:
    join = JoinString(host, 1, "0" * 16, SECRET, PIN)
    assert JoinString.parse(str(join)) == join
    assert identity.split_address(join.address) == (host, 1)


def test_the_secret_is_not_shown() -> None:
    assert SECRET not in repr(JoinString.parse(GOOD))


BAD = {
    "": "must begin with fedge1:",
    "hello": "must begin with fedge1:",
    "fedge": "must begin with fedge1:",
    GOOD.replace("fedge1", "fedge2"): "is of version 2, and this fedge reads 1",
    "fedge1:": "a part is missing",
    "fedge1:host:1:token": "a part is missing",
    GOOD.replace(":9444:", "::"): "a part is missing",
    GOOD.replace("9444", "0"): "'0' is no port",
    GOOD.replace("9444", "65536"): "'65536' is no port",
    GOOD.replace("9444", "x"): "'x' is no port",
    GOOD.replace("fedge.example.org", "::1"): "'::1' is no host; an IPv6 address stands in brackets",
    GOOD.replace("fedge.example.org", "a/b"): "'a/b' is no host",
    GOOD.replace("fedge.example.org", "a b"): "'a b' is no host",
    GOOD.replace("abcdef", "abcde"): "its token is cut off or changed",
    GOOD.replace("abcdef.", "abcdef"): "its token is cut off or changed",
    GOOD.replace(SECRET, "short"): "its token is cut off or changed",
    GOOD.replace(SECRET, SECRET + "!"): "its token is cut off or changed",
    GOOD[:-1]: "the pin, has 43 characters of 44",
    GOOD[:-44] + "A" * 44: "its pin is no key",
    GOOD + "A" * 600: "at most 512 are possible",
}


@pytest.mark.parametrize(("text", "said"), BAD.items(), ids=range(len(BAD)))
def test_a_wrong_join_string_is_refused_with_the_part_that_is_wrong(text: str, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        JoinString.parse(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)


@given(st.text(max_size=600) | st.text("fedge1:[]0a._-", max_size=80).map(lambda tail: "fedge1:" + tail))
def test_any_text_is_read_or_refused_with_our_error(text: str) -> None:
    with suppress(FormatError):
        assert JoinString.parse(str(JoinString.parse(text))) == JoinString.parse(text)


@given(st.integers(0, len(GOOD) - 1), st.characters(codec="ascii"))
def test_a_changed_character_never_gives_the_same_pin_and_token(position: int, other: str) -> None:
    changed = GOOD[:position] + other + GOOD[position + 1 :]
    with suppress(FormatError):
        assert (str(JoinString.parse(changed)) == GOOD) == (changed == GOOD)


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":1", "host:x", "host:0", "host:70000", "::1:5", "a b:1"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="must be HOST:PORT"):
        identity.split_address(text)


def test_a_renewal_is_signed_for_its_request_and_time() -> None:
    signature = identity.sign_renewal(KEY, b"csr", 1.5)
    identity.verify_renewal(PUBLIC, b"csr", 1.5, signature)
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    for key, csr, moment, bad in (
        (other, b"csr", 1.5, signature),
        (PUBLIC, b"cst", 1.5, signature),
        (PUBLIC, b"csr", 1.6, signature),
        (PUBLIC, b"csr", 1.5, b""),
        (PUBLIC, b"csr", 1.5, signature[:-1]),
    ):
        with pytest.raises(SignatureError):
            identity.verify_renewal(key, csr, moment, bad)


def test_the_signed_bytes_are_those_of_the_wires_definition() -> None:
    signature = identity.sign_renewal(KEY, b"csr", 1.5)
    signed = b"fedge.v1.renew" + b"csr" + bytes.fromhex("3ff8000000000000")  # 1.5, big-endian
    PUBLIC.verify(signature, signed, ec.ECDSA(hashes.SHA256()))


def certificate(key: ec.EllipticCurvePrivateKey, algorithm: hashes.HashAlgorithm) -> x509.Certificate:
    name = x509.Name([])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, PUBLIC, 1, now, now + timedelta(days=1))
    return builder.sign(key, algorithm)


def test_only_ecdsa_with_sha256_counts_as_issued() -> None:
    assert identity.issued_by(certificate(KEY, hashes.SHA256()), PUBLIC)
    assert not identity.issued_by(certificate(KEY, hashes.SHA384()), PUBLIC)
    other = ec.generate_private_key(ec.SECP256R1())
    assert not identity.issued_by(certificate(other, hashes.SHA256()), PUBLIC)


def test_a_certificate_of_an_unknown_algorithm_is_not_issued_by_us() -> None:
    der = certificate(KEY, hashes.SHA256()).public_bytes(Encoding.DER)
    known, unknown = bytes.fromhex("06082a8648ce3d040302"), bytes.fromhex("06082a8648ce3d04037f")
    assert known in der
    strange = x509.load_der_x509_certificate(der.replace(known, unknown))
    assert not identity.issued_by(strange, PUBLIC)


def test_a_certificate_without_usage_or_names_has_none() -> None:
    plain = certificate(KEY, hashes.SHA256())
    assert not identity.has_usage(plain, x509.ExtendedKeyUsageOID.CLIENT_AUTH)
    assert identity.names_of(plain) == frozenset()
    assert not identity.stands_for(plain, "localhost")


@pytest.mark.parametrize("pem", [b"", b"x", b"x" * 70_000])
def test_what_is_no_bundle_is_refused(pem: bytes) -> None:
    with pytest.raises(FormatError, match="certificate"):
        identity.load_certificates(pem)
