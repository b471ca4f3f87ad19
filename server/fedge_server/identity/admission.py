"""Who is let in: rules over values. No clock, socket or database is touched here.

Certificates: the TLS library checks them once, when a connection begins. A live connection outlives its
certificate and its revocation, so `peer_of` and `check` are asked again, `check` for every single message.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Protocol
from urllib.parse import unquote

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedge.errors import FormatError, IdentityError, RevokedError
from fedge.identity import (
    MAX_CERTIFICATE_BYTES,
    MAX_CLOCK_ERROR_S,
    device_id_of,
    has_usage,
    is_p256,
    issued_by,
    load_certificates,
    node_id_of,
)

MAX_TOKEN_LENGTH: Final = 128


class KnownDevice(Protocol):
    """What the rules need of a device's row."""

    @property
    def status(self) -> str:
        """`active` or `revoked`."""

    @property
    def reason(self) -> str:
        """Why it was revoked."""


class KnownToken(Protocol):
    """What the rules need of a token's row; times are Unix seconds."""

    @property
    def secret_sha256(self) -> str:
        """Of the secret."""

    @property
    def expires(self) -> float:
        """When it ends."""

    @property
    def used_by(self) -> str | None:
        """The device that has used it."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A device as its certificate names it, once the signature has been checked."""

    device_id: str
    not_before: float  # Unix seconds
    not_after: float

    @property
    def node_id(self) -> int:
        """The number by which Flower knows it."""
        return node_id_of(self.device_id)


def peer_of(certificate_pem: bytes, issuers: Sequence[x509.Certificate]) -> Peer:
    """Who a client certificate stands for; checks a signature, so remember what it says.

    Args:
        certificate_pem: as TLS hands it over (`x509_pem_cert`).
        issuers: the CAs that are trusted now: one that a finished rotation dropped does not count.

    Raises:
        IdentityError: not a certificate for a device of this server.
    """
    try:
        certificate = load_certificates(certificate_pem, MAX_CERTIFICATE_BYTES)[0]
        key = certificate.public_key()
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except (FormatError, ValueError) as error:
        raise IdentityError("certificate: malformed", "malformed") from error
    if not any(_signed(certificate, issuer) for issuer in issuers):
        raise IdentityError(
            "certificate: not issued by this server's authority; renew it, or enrol the device", "authority"
        )
    if not has_usage(certificate, ExtendedKeyUsageOID.CLIENT_AUTH):  # stops the server's own from being used
        raise IdentityError("certificate: not one of a device", "purpose")
    if not is_p256(key) or [name.value for name in names] != [device_id_of(certificate)]:
        raise IdentityError("certificate: its name is not that of its key", "name")
    return Peer(
        device_id_of(certificate),
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
    )


def check(peer: Peer, row: KnownDevice | None, now: float) -> None:
    """Whether a device may still speak: cheap, so ask before each call and each message.

    Args:
        peer: from `peer_of`.
        row: what the registry knows of it.
        now: Unix seconds.

    Raises:
        RevokedError: it was revoked.
        IdentityError: its certificate has expired or is not yet valid, or it was never enrolled.
    """
    if row is None:
        raise IdentityError(f"device {peer.device_id[:16]}: is not enrolled here", "unknown_device")
    if row.status != "active":
        raise RevokedError(
            f"device {peer.device_id[:16]}: revoked" + (f" ({row.reason})" if row.reason else "")
        )
    if now > peer.not_after:
        raise IdentityError(f"certificate: expired at {show_time(peer.not_after)}; renew it", "expired")
    if now < peer.not_before:
        raise IdentityError(f"certificate: not valid before {show_time(peer.not_before)}", "not_yet_valid")


def split_token(token: str) -> tuple[str, str]:
    """Id and secret of a token.

    Raises:
        IdentityError: it is none.
    """
    identifier, dot, secret = token[: MAX_TOKEN_LENGTH + 1].partition(".")
    if not dot or not identifier or not secret or len(token) > MAX_TOKEN_LENGTH or not token.isascii():
        raise IdentityError("token: malformed; copy the whole join string", "token_malformed")
    return identifier, secret


def secret_digest(secret: str) -> str:
    """What is stored of a token's secret; it has over 128 random bits, so one plain hash is enough."""
    return hashlib.sha256(secret.encode()).hexdigest()


def check_token(token: KnownToken | None, secret: str, device_id: str, now: float) -> None:
    """Whether a token lets this device in.

    A used one does so again for the device that used it, until it expires: the reply may have been lost.

    Args:
        token: its row; None when there is none of this id.
        secret: what the device shows.
        device_id: from the key that the device has proved to hold.
        now: Unix seconds.

    Raises:
        IdentityError: unknown, expired or used up.
    """
    stored = token.secret_sha256 if token is not None else "0" * 64
    same = hmac.compare_digest(stored, secret_digest(secret))  # takes as long for an id that does not exist
    if token is None or not same:
        raise IdentityError("token: unknown; make one with: fedge-server token create", "token_unknown")
    # Only who holds the secret learns more than this.
    if now > token.expires:
        raise IdentityError(
            f"token: expired at {show_time(token.expires)}; make another one", "token_expired"
        )
    if token.used_by not in (None, device_id):
        raise IdentityError("token: already used by another device; each device needs its own", "token_used")


def check_freshness(time: float, now: float) -> None:
    """Whether a renewal was signed lately, with room for a wrong clock.

    The signature proves the key. Somebody who replays a request within these days gets a certificate for
    that same key, and can do nothing with it without the key: the window only keeps old requests from
    costing work for ever.

    Args:
        time: Unix seconds by the device's clock.
        now: Unix seconds by ours.

    Raises:
        IdentityError: it is too old, or from the future.
    """
    if not abs(time - now) <= MAX_CLOCK_ERROR_S:  # so that NaN is refused
        shown = show_time(time) if math.isfinite(time) and 0 <= time < 2**37 else "no time"
        raise IdentityError(
            f"renewal: the device's clock says {shown}, the server's {show_time(now)}; "
            "set the device's clock",
            "clock",
        )


def show_time(seconds: float) -> str:
    """Unix seconds as people read them."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket: so many at once, and then so many a second."""

    burst: float
    per_second: float


@dataclass(slots=True)
class _Bucket:
    level: float
    at: float  # Unix seconds

    def wait(self, rate: Rate, now: float) -> float:
        """Fill up to now; seconds until one may be taken."""
        # A clock that was set back fills nothing and takes nothing.
        self.level = min(rate.burst, self.level + max(now - self.at, 0.0) * rate.per_second)
        self.at = now
        return max(1.0 - self.level, 0.0) / rate.per_second


@dataclass(slots=True)
class RateLimiter:
    """How often anybody may ask, per address and in all; memory is bounded."""

    per_peer: Rate = Rate(burst=120, per_second=2)
    overall: Rate = Rate(burst=1000, per_second=100)
    max_peers: int = 10_000
    _peers: OrderedDict[str, _Bucket] = field(default_factory=OrderedDict)
    _all: _Bucket | None = None

    def take(self, peer: str, now: float) -> float:
        """Take one; returns 0 when it is given, else the seconds to wait.

        One address that asks too often does not use up what all may have together.

        Args:
            peer: see `peer_address`.
            now: Unix seconds.
        """
        total = self._all = self._all or _Bucket(self.overall.burst, now)
        bucket = self._peers.pop(peer, None) or _Bucket(self.per_peer.burst, now)
        self._peers[peer] = bucket  # the one that asked last is forgotten last
        while len(self._peers) > self.max_peers:
            self._peers.popitem(last=False)
        wait = bucket.wait(self.per_peer, now) or total.wait(self.overall, now)
        if not wait:
            bucket.level -= 1
            total.level -= 1
        return wait


def peer_address(peer: str) -> str:
    """Whom a rate counts, of gRPC's `ipv4:1.2.3.4:567`: the address; of IPv6 the /64, which is one site's."""
    kind, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        return kind
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
    return str(parsed)


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    key = issuer.public_key()
    return certificate.issuer == issuer.subject and is_p256(key) and issued_by(certificate, key)  # type: ignore[arg-type]  # is_p256 says so
