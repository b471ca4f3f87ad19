"""Why a server cannot be reached: gRPC says UNAVAILABLE to everything, so this tries TLS by hand."""

from __future__ import annotations

import socket
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedge.errors import FedgeError
from fedge.identity import (
    has_usage,
    is_p256,
    issued_by,
    load_certificates,
    names_of,
    split_address,
    stands_for,
)
from fedge_client.agent.enrolment import server_certificate
from fedge_client.agent.identity import CERTIFICATE, DEVICE_KEY, Identity

Kind = Literal[
    "ok",
    "unreachable",
    "clock",
    "server_untrusted",
    "own_certificate_expired",
    "own_certificate_refused",
    "own_key_mismatch",
]
"""ok: TLS with this device's certificate works, so look beyond it."""

TIMEOUT_S: Final = 10.0
# TLS 1.3 lets the client finish before the server has looked at its certificate: a refusal comes later.
_ALERT_S: Final = 1.0
_PREFACE: Final = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
)  # and empty SETTINGS: it answers


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What stands between this device and the server."""

    kind: Kind
    detail: str  # one line: what, which value, what to do

    @property
    def renewable(self) -> bool:
        """Whether a renewed certificate could mend it."""
        return self.kind in ("own_certificate_expired", "own_certificate_refused")


def diagnose(
    identity: Identity, address: str, now: float | None = None, *, timeout_s: float = TIMEOUT_S
) -> Diagnosis:
    """Try the link's TLS step by step and name the first that fails. It blocks: call it in a thread.

    Args:
        identity: of this device.
        address: host:port of the Link service.
        now: Unix seconds by this device's clock.
        timeout_s: seconds for each step.
    """
    moment = time.time() if now is None else now
    try:
        host, port = split_address(address)
        leaf = x509.load_der_x509_certificate(server_certificate(host, port, timeout_s))
    except (FedgeError, ValueError) as error:
        return Diagnosis("unreachable", f"{error}; check the network, the address and the server")
    return (
        _server(identity, leaf, host, moment)
        or _own(identity, moment)
        or _handshake(identity, host, port, moment, timeout_s)
    )


def _server(identity: Identity, leaf: x509.Certificate, host: str, now: float) -> Diagnosis | None:
    """What is wrong with the certificate that the server shows."""
    keys = [issuer.public_key() for issuer in load_certificates(identity.bundle)]
    trusted = any(is_p256(key) and issued_by(leaf, key) for key in keys)  # type: ignore[arg-type]  # is_p256 says so
    if not trusted or not has_usage(leaf, ExtendedKeyUsageOID.SERVER_AUTH):
        return Diagnosis(
            "server_untrusted",
            f"{host}: its certificate is from another authority; somebody sits in between, or the server was "
            "made anew: then enrol this device again",
        )
    if not leaf.not_valid_before_utc.timestamp() <= now <= leaf.not_valid_after_utc.timestamp():
        return Diagnosis(
            "clock",
            f"this device's clock says {_shown(now)}, and the server's certificate is valid from "
            f"{leaf.not_valid_before_utc:%Y-%m-%d} to {leaf.not_valid_after_utc:%Y-%m-%d}: set the clock, or "
            "if it is right, the server's certificate was not renewed",
        )
    if not stands_for(leaf, host):
        shown = names_of(leaf)
        return Diagnosis(
            "server_untrusted", f"{host}: the server's certificate is for {', '.join(sorted(shown))}"
        )
    return None


def _own(identity: Identity, now: float) -> Diagnosis | None:
    """What is wrong with this device's certificate, as far as the device can tell."""
    certificate = load_certificates(identity.certificate)[0]
    if certificate.public_key() != identity.keys.device.public_key():
        return Diagnosis(
            "own_key_mismatch",
            f"{CERTIFICATE} is not for {DEVICE_KEY} in {identity.folder}; enrol the device again",
        )
    if identity.expired(now):
        return Diagnosis(
            "own_certificate_expired",
            f"this device's certificate ended at {_shown(identity.not_after)}, and its clock says "
            f"{_shown(now)}; renew it",
        )
    return None


def _handshake(identity: Identity, host: str, port: int, now: float, timeout_s: float) -> Diagnosis:
    """Whether the server takes this device's certificate; its own was checked above, with our clock."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        context.load_cert_chain(identity.folder / CERTIFICATE, identity.folder / DEVICE_KEY)
    except (OSError, ValueError) as error:
        return Diagnosis("own_key_mismatch", f"{identity.folder}: certificate and key do not load ({error})")
    try:
        with (
            socket.create_connection((host, port), timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            secured.sendall(_PREFACE)
            secured.settimeout(_ALERT_S)
            answered = bool(secured.recv(1))
    except TimeoutError:
        # Silence is no refusal: an alert would have come.
        return Diagnosis("ok", f"{host} port {port}: TLS works; the server says nothing more yet")
    except ssl.SSLError as error:
        return Diagnosis("own_certificate_refused", _refusal(identity, str(error.reason), now))
    except OSError as error:
        # A server that closes at once may lose its alert on the way: the reset is all that is seen.
        if isinstance(error, ConnectionResetError | BrokenPipeError):
            return Diagnosis("own_certificate_refused", _refusal(identity, "connection reset", now))
        return Diagnosis("unreachable", f"{host} port {port}: {error.strerror or error}")
    if not answered:
        return Diagnosis("own_certificate_refused", _refusal(identity, "connection closed", now))
    return Diagnosis("ok", f"{host} port {port}: TLS works with this device's certificate")


def _refusal(identity: Identity, reason: str, now: float) -> str:
    return (
        f"the server refuses this device's certificate ({reason.lower().replace('_', ' ')}), valid until "
        f"{_shown(identity.not_after)} by a clock that says {_shown(now)}; renew it"
    )


def _shown(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
