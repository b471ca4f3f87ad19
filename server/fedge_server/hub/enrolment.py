"""The Enrolment service: certificates against tokens, and renewed ones against a signature."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedge.errors import FedgeError, FormatError, IdentityError, RevokedError, TrustError
from fedge.identity import (
    MAX_CERTIFICATE_BYTES,
    bundle_digest,
    device_id_of,
    load_certificates,
    node_id_of,
    verify_renewal,
)
from fedge.wire import OLDEST_WIRE_VERSION
from fedge.wire.v1 import enrolment_pb2 as pb
from fedge.wire.v1 import enrolment_pb2_grpc
from fedge_server.identity.admission import (
    RateLimiter,
    check_freshness,
    check_token,
    peer_address,
    split_token,
)
from fedge_server.identity.authority import Authority, Clock
from fedge_server.identity.requests import csr_key
from fedge_server.monitoring import signals
from fedge_server.monitoring.metrics import ENROLMENTS, RENEWALS
from fedge_server.registry.devices import DeviceRow, Devices

MAX_MESSAGE_BYTES: Final = 64 * 1024
SERVER_OPTIONS: Final = (("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),)
"""For the server that carries this service: nobody has proved anything yet, so nothing may be large."""

_SEALING_KEY_BYTES: Final = 32
_MAX_VERSION_LENGTH: Final = 64
_THREADS: Final = 2
_log = logging.getLogger("fedge.hub")


Trust = Callable[[str], tuple[bytes, int]]
"""What a device of a tier begins with: the repository's newest root (empty: there is none), and its floor."""


def no_trust(tier: str) -> tuple[bytes, int]:
    """Where there is no repository of releases."""
    return b"", 0


@dataclass(frozen=True, slots=True)
class EnrolmentSettings:
    """What devices are told, and for how long."""

    link_address: str  # host:port
    enrolment_address: str
    device_hours: float = 168.0  # a certificate is valid


class EnrolmentServicer(enrolment_pb2_grpc.EnrolmentServicer):
    """Serves Enrolment on a grpc.aio server; the database is asked in threads."""

    def __init__(
        self,
        authority: Authority,
        devices: Devices,
        settings: EnrolmentSettings,
        *,
        clock: Clock = time.time,
        limiter: RateLimiter | None = None,
        trust: Trust = no_trust,
    ) -> None:
        self._authority = authority
        self._devices = devices
        self._settings = settings
        self._clock, self._trust = clock, trust
        self._limiter = limiter or RateLimiter()
        # Threads of its own: strangers who ask too much must not hold up the hub's work for devices.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="enrolment")

    async def Enrol(  # noqa: N802 - the wire's name
        self, request: pb.EnrolRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.EnrolReply:
        """A certificate for a key, against a token."""
        return await self._answer(self._enrol, request, context)

    async def Renew(  # noqa: N802 - the wire's name
        self, request: pb.RenewRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.EnrolReply:
        """A new certificate for a key that is enrolled."""
        return await self._answer(self._renew, request, context)

    async def _answer(
        self,
        work: Callable[[Any, str], pb.EnrolReply],
        request: Any,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> pb.EnrolReply:
        peer = peer_address(context.peer())
        if wait := self._limiter.take(peer, self._clock()):
            seconds = math.ceil(wait)
            signals.enrolment_refused(work.__name__.strip("_"), None, peer)
            await _refuse(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"too many requests; ask again in {seconds} s",
                wait,
            )
        try:
            if request.wire_version < OLDEST_WIRE_VERSION:
                raise FormatError(
                    f"wire version {request.wire_version}: this server speaks {OLDEST_WIRE_VERSION} and newer"
                )
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, work, request, peer)
        except FedgeError as error:
            code = _code(error)
            signals.enrolment_refused(work.__name__.strip("_"), error, peer)
            # What went wrong inside is for the log, not for whoever asks.
            await _refuse(context, code, str(error) if isinstance(error, TrustError) else "try again later")

    def _enrol(self, request: pb.EnrolRequest, peer: str) -> pb.EnrolReply:
        now = self._clock()
        key = csr_key(request.csr)
        device_id = device_id_of(key)
        if len(request.sealing_key) != _SEALING_KEY_BYTES:
            raise FormatError(f"sealing key: {len(request.sealing_key)} bytes, must be {_SEALING_KEY_BYTES}")
        if len(request.fedge_version) > _MAX_VERSION_LENGTH:
            raise FormatError(f"fedge version: over {_MAX_VERSION_LENGTH} characters")
        token_id, secret = split_token(request.token)
        token = self._devices.token(token_id)
        check_token(token, secret, device_id, now)
        if token is None:  # check_token has refused it
            raise IdentityError("token: unknown", "token_unknown")
        known = self._devices.get(device_id)
        if known is not None and known.status != "active":
            raise RevokedError(f"device {device_id[:16]}: revoked; a new key is needed to come back")
        certificate = self._authority.issue_device(request.csr, self._settings.device_hours)
        row = self._devices.enrol(
            device_id=device_id,
            node_id=node_id_of(device_id),
            public_key=_pem(key),
            sealing_key=request.sealing_key.hex(),
            tier=token.tier,
            token_id=token_id,
            fedge_version=request.fedge_version,
            wire_version=request.wire_version,
            not_after=_not_after(certificate),
        )
        bundle = self._authority.bundle
        self._devices.renewed(device_id, row.certificate_not_after, bundle_digest(bundle))
        ENROLMENTS.labels(row.tier).inc()
        _log.info(
            "enrolled device %s, tier %s, with token %s, from %s",
            *(device_id, row.tier, token_id, peer),
            extra={"device": device_id, "tier": row.tier, "peer": peer},
        )
        return self._reply(certificate, bundle, row, now)

    def _renew(self, request: pb.RenewRequest, peer: str) -> pb.EnrolReply:
        now = self._clock()
        key = csr_key(request.csr)
        device_id = device_id_of(key)
        verify_renewal(key, request.csr, request.time, request.signature)
        check_freshness(request.time, now)
        row = self._devices.get(device_id)
        if row is None:
            raise IdentityError(f"device {device_id[:16]}: is not enrolled here", "unknown_device")
        if row.status != "active":
            raise RevokedError(
                f"device {device_id[:16]}: revoked" + (f" ({row.reason})" if row.reason else "")
            )
        certificate = self._authority.issue_device(request.csr, self._settings.device_hours)
        bundle = self._authority.bundle
        self._devices.renewed(device_id, _not_after(certificate), bundle_digest(bundle))
        RENEWALS.inc()
        about = {"device": device_id, "peer": peer}
        _log.info("renewed the certificate of device %s, from %s", device_id, peer, extra=about)
        return self._reply(certificate, bundle, row, now)

    def _reply(self, certificate: bytes, bundle: bytes, row: DeviceRow, now: float) -> pb.EnrolReply:
        root, floor = self._trust(row.tier)
        return pb.EnrolReply(
            certificate=certificate,
            ca_bundle=bundle,
            device_id=row.id,
            tier=row.tier,
            link_address=self._settings.link_address,
            enrolment_address=self._settings.enrolment_address,
            server_time=now,
            node_id=row.node_id,
            trusted_root=root,
            floor=floor,
        )


def _code(error: FedgeError) -> grpc.StatusCode:
    if isinstance(error, RevokedError):
        return grpc.StatusCode.PERMISSION_DENIED
    if isinstance(error, FormatError):
        return grpc.StatusCode.INVALID_ARGUMENT
    if isinstance(error, TrustError):
        return grpc.StatusCode.UNAUTHENTICATED
    return grpc.StatusCode.INTERNAL


async def _refuse(
    context: grpc.aio.ServicerContext[Any, Any], code: grpc.StatusCode, details: str, wait: float = 0.0
) -> NoReturn:
    trailers = (("fedge-wait-s", f"{wait:.3f}"),) if wait else ()
    await context.abort(code, details, trailers)
    raise AssertionError("abort raises")


def _pem(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")


def _not_after(certificate: bytes) -> float:
    return load_certificates(certificate, MAX_CERTIFICATE_BYTES)[0].not_valid_after_utc.timestamp()
