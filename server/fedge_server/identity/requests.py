"""What a certificate is asked for with: a device's request, and the names of a server."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from fedge.errors import FormatError, UserError
from fedge.identity import is_p256

LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")
MAX_CSR_BYTES: Final = 4096

_DNS = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?(?:\.[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)*"
)


def csr_key(csr_der: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a certificate request that the request itself proves to hold.

    Raises:
        FormatError: malformed, too long, not signed by its own key, or the key is not P-256.
    """
    if len(csr_der) > MAX_CSR_BYTES:
        raise FormatError(f"certificate request: {len(csr_der)} bytes, over the {MAX_CSR_BYTES} it may have")
    try:
        request = x509.load_der_x509_csr(csr_der)
        key = request.public_key()
        sound = request.is_signature_valid if isinstance(key, ec.EllipticCurvePublicKey) else True
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise FormatError("certificate request: malformed, no PKCS #10 in DER form") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not is_p256(key):
        raise FormatError("certificate request: the key must be an EC key on P-256")
    if not sound:
        raise FormatError("certificate request: not signed by its own key")
    return key


def check_names(names: Sequence[str]) -> None:
    """Refuse what cannot stand in a certificate.

    Raises:
        UserError: there is no name, or one is neither a host name nor an address.
    """
    if not names:
        raise UserError("the server needs a name or address that devices reach it by; give --name HOST")
    for name in names:
        general_name(name)


def all_names(names: Sequence[str]) -> list[str]:
    """Names as they stand in the certificate, each once."""
    check_names(names)
    return list(dict.fromkeys(str(general_name(name).value) for name in [*names, *LOCAL_NAMES]))


def general_name(name: str) -> x509.DNSName | x509.IPAddress:
    """A host name or address as it stands in a certificate.

    Raises:
        UserError: it is neither.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if not _DNS.fullmatch(name) or name.replace(".", "").isdigit():
            raise UserError(
                f"name {name[:80]!r}: neither a host name nor an address; give it without port or scheme"
            ) from None
        return x509.DNSName(name.lower())
