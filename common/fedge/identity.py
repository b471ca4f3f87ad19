"""Who a device is, on both sides of the wire: its id, its join string, and how it proves its key.

A device is its P-256 key: the id is the SHA-256 of the public half, so nobody can take another's. Only
`cryptography` is needed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedge.errors import FormatError, SignatureError

MAX_JOIN_LENGTH: Final = 512
MAX_CERTIFICATE_BYTES: Final = 16 * 1024  # PEM of one certificate, or DER of a request
MAX_BUNDLE_BYTES: Final = 64 * 1024  # PEM of all CAs
BACKDATED_S: Final = 24 * 3600.0  # a device's certificate begins so long before it is issued: clocks err
MAX_CLOCK_ERROR_S: Final = 2 * 24 * 3600.0  # between a device and the server, when a certificate is renewed

_CONTEXT: Final = b"fedge.v1.renew"  # a signature for this purpose serves no other
_HOST = re.compile(r"\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9_])?")
_TOKEN = re.compile(r"([0-9a-f]{16})\.([A-Za-z0-9_-]{22,64})")
_PIN = re.compile(r"[A-Za-z0-9_-]{44}")


@dataclass(frozen=True, slots=True)
class JoinString:
    """All that a new device needs: `fedge1:HOST:PORT:TOKENID.SECRET:PIN`."""

    host: str  # a name or an address; an IPv6 address without its brackets
    port: int  # of the Enrolment service
    token_id: str  # 16 hexadecimal digits
    secret: str = field(repr=False)  # 22 to 64 characters of base64url
    pin: str  # of the certificate authority, see `pin_of`

    @property
    def token(self) -> str:
        """What the server is shown."""
        return f"{self.token_id}.{self.secret}"

    @property
    def address(self) -> str:
        """Host and port as gRPC wants them."""
        return address(self.host, self.port)

    @property
    def ca_key(self) -> ec.EllipticCurvePublicKey:
        """The key that the pin names."""
        return _point(self.pin)

    def __str__(self) -> str:
        return f"fedge1:{self.address}:{self.token}:{self.pin}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a join string.

        Raises:
            FormatError: it is none; the message says which part is wrong, and never shows the secret.
        """
        text = text.strip()
        if len(text) > MAX_JOIN_LENGTH:
            raise _malformed(f"it has {len(text)} characters, at most {MAX_JOIN_LENGTH} are possible")
        first, _, rest = text.partition(":")
        if not re.fullmatch(r"fedge[0-9]{1,3}", first):
            raise _malformed("it must begin with fedge1:")
        if first != "fedge1":
            raise _malformed(f"it is of version {first[5:]}, and this fedge reads 1; install a newer fedge")
        parts = rest.rsplit(":", 3)  # from the right: an IPv6 address has colons of its own
        if len(parts) != 4 or not all(parts):
            raise _malformed("it has the form fedge1:HOST:PORT:TOKEN:PIN, and a part is missing")
        host, port, token, pin = parts
        if not _HOST.fullmatch(host):
            raise _malformed(f"{host[:80]!r} is no host; an IPv6 address stands in brackets")
        if not re.fullmatch(r"[1-9][0-9]{0,4}", port) or int(port) > 65535:
            raise _malformed(f"{port[:80]!r} is no port")
        if not (found := _TOKEN.fullmatch(token)):
            raise _malformed("its token is cut off or changed")
        if not _PIN.fullmatch(pin):
            raise _malformed(f"its last part, the pin, has {len(pin)} characters of 44; it is cut off")
        _point(pin)
        return cls(host.strip("[]"), int(port), found[1], found[2], pin)


def address(host: str, port: int) -> str:
    """`host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(text: str) -> tuple[str, int]:
    """Host (an IPv6 address without brackets) and port of `host:port`.

    Raises:
        FormatError: no such address.
    """
    host, _, port = text.rpartition(":")
    if not _HOST.fullmatch(host) or not re.fullmatch(r"[1-9][0-9]{0,4}", port) or int(port) > 65535:
        raise FormatError(f"address {text[:80]!r}: must be HOST:PORT, an IPv6 address in brackets")
    return host.strip("[]"), int(port)


def device_id_of(key: ec.EllipticCurvePublicKey | x509.Certificate) -> str:
    """64 hexadecimal digits: the SHA-256 of the DER of a public key, or of a certificate's."""
    public: Any = key.public_key() if isinstance(key, x509.Certificate) else key
    return hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def node_id_of(device_id: str) -> int:
    """The number by which Flower knows a device: 63 bits of its id, so that a database can hold it."""
    return int(device_id[:16], 16) & (2**63 - 1)


def pin_of(key: ec.EllipticCurvePublicKey) -> str:
    """A P-256 key in 44 characters: the compressed point in base64url."""
    point = key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    return base64.urlsafe_b64encode(point).decode("ascii")


def pins_of(certificates: Sequence[x509.Certificate]) -> list[str]:
    """The pin of each CA.

    Raises:
        FormatError: a key is not on P-256.
    """
    pins = []
    for certificate in certificates:
        key = certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not is_p256(key):
            raise FormatError("CA: its key is not on P-256")
        pins.append(pin_of(key))
    return pins


def bundle_digest(bundle: bytes) -> str:
    """The name of a CA bundle: SHA-256 of its PEM bytes as they are sent and kept."""
    return hashlib.sha256(bundle).hexdigest()


def load_certificates(pem: bytes, maximum: int = MAX_BUNDLE_BYTES) -> list[x509.Certificate]:
    """The certificates of a PEM text, at least one.

    Raises:
        FormatError: too long, or not certificates.
    """
    if len(pem) > maximum:
        raise FormatError(f"certificate: {len(pem)} bytes, over the {maximum} it may have")
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise FormatError("certificate: not certificates in PEM form") from error


def is_p256(key: Any) -> bool:
    """Whether a public key is of the one kind that fedge uses."""
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def issued_by(certificate: x509.Certificate, key: ec.EllipticCurvePublicKey) -> bool:
    """Whether this key signed the certificate; only ECDSA with SHA-256 counts."""
    try:
        if not isinstance(certificate.signature_hash_algorithm, SHA256):
            return False
        key.verify(certificate.signature, certificate.tbs_certificate_bytes, ec.ECDSA(SHA256()))
    except (InvalidSignature, UnsupportedAlgorithm):  # the latter of an algorithm that is not known here
        return False
    return True


def has_usage(certificate: x509.Certificate, usage: x509.ObjectIdentifier) -> bool:
    """Whether a certificate is for this use and no other (its extended key usage), and is no CA's."""
    try:
        extensions = certificate.extensions
        usages = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        return (
            list(usages) == [usage] and not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        )
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return False


def names_of(certificate: x509.Certificate) -> frozenset[str]:
    """The host names and addresses that a certificate stands for; none when it names none."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return frozenset()
    addresses = map(str, found.get_values_for_type(x509.IPAddress))
    return frozenset({*found.get_values_for_type(x509.DNSName), *addresses})


def stands_for(certificate: x509.Certificate, host: str) -> bool:
    """Whether a certificate names this host; an address may be written in any way."""
    try:
        wanted = str(ipaddress.ip_address(host))
    except ValueError:
        wanted = host.lower()
    return wanted in names_of(certificate)


def sign_renewal(key: ec.EllipticCurvePrivateKey, csr: bytes, time: float) -> bytes:
    """A device's proof that it asks for this renewal at this time.

    Args:
        key: the device's.
        csr: DER of the request.
        time: Unix seconds by the device's clock.
    """
    return key.sign(_renewal(csr, time), ec.ECDSA(SHA256()))


def verify_renewal(key: ec.EllipticCurvePublicKey, csr: bytes, time: float, signature: bytes) -> None:
    """Check a device's proof.

    Raises:
        SignatureError: the key did not sign this request and time.
    """
    try:
        key.verify(signature, _renewal(csr, time), ec.ECDSA(SHA256()))
    except InvalidSignature as error:
        raise SignatureError("renewal: the signature is not the device's") from error


def _renewal(csr: bytes, time: float) -> bytes:
    return _CONTEXT + csr + struct.pack(">d", time)


def _point(pin: str) -> ec.EllipticCurvePublicKey:
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), base64.urlsafe_b64decode(pin))
    except (ValueError, binascii.Error) as error:
        raise _malformed("its pin is no key; it is changed") from error


def _malformed(why: str) -> FormatError:
    return FormatError(f"join string: {why}; copy the whole line that fedge-server token create printed")
