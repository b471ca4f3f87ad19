"""How a device gets its certificate: with a join string the first time, with its own key from then on.

The join string pins the key of the server's CA. Whoever sits in between and shows another CA's certificate
never sees the token: the server's certificate is fetched and checked first, and then it is the only one
that the connection with the token accepts.
"""

from __future__ import annotations

import socket
import ssl
import time as clock
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import grpc
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

import fedge
from fedge.errors import FedgeError, FormatError, IdentityError, RevokedError, UserError
from fedge.identity import (
    JoinString,
    has_usage,
    issued_by,
    load_certificates,
    names_of,
    pins_of,
    sign_renewal,
    stands_for,
)
from fedge.wire import WIRE_VERSION
from fedge.wire.v1 import enrolment_pb2 as pb
from fedge.wire.v1 import enrolment_pb2_grpc
from fedge_client.agent.identity import (
    FOLDER,
    Hub,
    Identity,
    Keys,
    commit,
    is_enrolled,
    load_or_create_keys,
    locked,
)
from fedge_client.device import Device

TIMEOUT_S: Final = 20.0
_MAX_REPLY_BYTES: Final = 256 * 1024


def enrol(
    home: Path, join: JoinString, *, now: float | None = None, timeout_s: float = TIMEOUT_S
) -> Identity:
    """Make this folder the home of an enrolled device.

    Killed at any point, it can be called again with the same join string: the keys are kept before the
    token is used, and the server gives the same key its certificate again. A device that is enrolled may
    enrol again with the same server, with its key: after the server has lost it, or for another tier.

    Args:
        home: the device's folder.
        join: from `fedge-server token create`.
        now: Unix seconds by this device's clock.
        timeout_s: seconds for each step.

    Raises:
        UserError: the folder belongs to another server, or the join string is wrong, used or expired.
        FedgeError: the server cannot be reached, or the disk refuses it.
    """
    folder, moment = home / FOLDER, clock.time() if now is None else now
    with locked(folder):
        before = _enrolled(home, join)
        keys = load_or_create_keys(folder)
        leaf = server_certificate(join.host, join.port, timeout_s)
        check_server(leaf, join, moment)
        request = pb.EnrolRequest(
            wire_version=WIRE_VERSION,
            token=join.token,
            csr=keys.request(),
            sealing_key=keys.sealing_public,
            fedge_version=fedge.__version__,
        )
        try:
            with _service(join.address, ssl.DER_cert_to_PEM_cert(leaf).encode(), timeout_s) as stub:
                reply = stub.Enrol(request, timeout=timeout_s)
        except RevokedError as error:
            raise UserError(f"{error}; remove {folder} to enrol this device with a new key") from error
        except IdentityError as error:
            if before is not None:  # the same command, days later: the token is over, the device is not
                with suppress(FedgeError):
                    return _renewed(before, moment, timeout_s)
            raise UserError(str(error)) from error
        if join.pin not in pins_of(load_certificates(reply.ca_bundle)):
            raise IdentityError("enrolment: the server's CAs do not hold the one that the join string pins")
        _trust(home, reply)
        return _keep(folder, keys, reply)


def renew(identity: Identity, *, now: float | None = None, timeout_s: float = TIMEOUT_S) -> Identity:
    """Get a new certificate for the device's key; works after the old one has expired, too.

    Args:
        identity: of the device.
        now: Unix seconds by this device's clock, which may be wrong by up to two days.
        timeout_s: seconds for the call.

    Raises:
        RevokedError: the device was revoked.
        IdentityError: the server does not know it, or the clocks differ too much.
        FedgeError: the server cannot be reached, or the disk refuses it.
    """
    with locked(identity.folder):
        return _renewed(identity, clock.time() if now is None else now, timeout_s)


def _renewed(identity: Identity, now: float, timeout_s: float) -> Identity:
    csr = identity.keys.request()
    request = pb.RenewRequest(
        wire_version=WIRE_VERSION,
        csr=csr,
        time=now,
        signature=sign_renewal(identity.keys.device, csr, now),
    )
    with _service(identity.hub.enrolment_address, identity.bundle, timeout_s) as stub:
        reply = stub.Renew(request, timeout=timeout_s)
    with suppress(FedgeError):  # a certificate is needed more
        _trust(identity.folder.parent, reply)
    return _keep(identity.folder, identity.keys, reply)


def server_certificate(host: str, port: int, timeout_s: float) -> bytes:
    """DER of the certificate that a server shows, unchecked.

    Raises:
        FedgeError: nothing answers there, or it does not speak TLS.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # `check_server` verifies it against the pin
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            shown = secured.getpeercert(binary_form=True)
    except socket.gaierror as error:
        raise FedgeError(f"{host}: the name does not resolve ({error.strerror})") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise FedgeError(f"{host} port {port}: no server answers there ({reason})") from error
    if shown is None:
        raise FedgeError(f"{host} port {port}: the server shows no certificate")
    return shown


def check_server(leaf_der: bytes, join: JoinString, now: float) -> None:
    """Whether a certificate is that of the server which the join string means.

    Args:
        leaf_der: as it was shown.
        join: holds the pin, and the name that it must stand for.
        now: Unix seconds by this device's clock.

    Raises:
        UserError: another CA's (somebody in between, or a server made anew), another name, or this
            device's clock is wrong.
    """
    try:
        leaf = x509.load_der_x509_certificate(leaf_der)
        trusted = issued_by(leaf, join.ca_key) and has_usage(leaf, ExtendedKeyUsageOID.SERVER_AUTH)
    except ValueError as error:
        raise UserError(f"{join.address}: what answers there is no fedge server") from error
    if not trusted:
        raise UserError(
            f"{join.address}: the server's certificate is not from the CA that the join string pins; either "
            "somebody sits in between, or the join string is of another server: ask for a new one"
        )
    if not leaf.not_valid_before_utc.timestamp() <= now <= leaf.not_valid_after_utc.timestamp():
        raise UserError(
            f"clock: this device's says {_shown(now)}, and the server's certificate is valid from "
            f"{leaf.not_valid_before_utc:%Y-%m-%d} to {leaf.not_valid_after_utc:%Y-%m-%d}; set the clock"
        )
    if not stands_for(leaf, join.host):
        raise UserError(
            f"{join.host}: the server's certificate is for {', '.join(sorted(names_of(leaf)))}; use one of "
            "these names, or add this one to [public] names in its server.toml"
        )


def _enrolled(home: Path, join: JoinString) -> Identity | None:
    """What a folder holds already, which must be of the server that the join string means."""
    if not is_enrolled(home):
        return None
    found = Identity.open(home)
    if join.pin not in pins_of(load_certificates(found.bundle)):
        raise UserError(
            f"{home}: enrolled with another server ({found.hub.enrolment_address}); use another --home, "
            f"or remove {home / FOLDER} to leave that one"
        )
    return found


def _trust(home: Path, reply: pb.EnrolReply) -> None:
    """Begin to trust the server's repository of releases, if it has one and this device trusts none yet."""
    if reply.trusted_root:
        Device.create(home, reply.tier, reply.trusted_root, floor=reply.floor)


def _keep(folder: Path, keys: Keys, reply: pb.EnrolReply) -> Identity:
    hub = Hub(reply.link_address, reply.enrolment_address, reply.device_id, reply.tier, reply.node_id)
    return commit(folder, keys, hub, reply.certificate, reply.ca_bundle)


@contextmanager
def _service(address: str, roots: bytes, timeout_s: float) -> Iterator[Any]:
    """A stub of the Enrolment service; what gRPC raises becomes an error of ours."""
    options = [("grpc.max_receive_message_length", _MAX_REPLY_BYTES), ("grpc.enable_retries", 0)]
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(roots), options) as channel:
        try:
            yield enrolment_pb2_grpc.EnrolmentStub(channel)  # type: ignore[no-untyped-call]  # generated
        except grpc.RpcError as error:
            raise _explained(error, address, timeout_s) from error


def _explained(error: Any, address: str, timeout_s: float) -> FedgeError:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return RevokedError(f"server: {details}")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return IdentityError(f"server: {details}")
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return FormatError(f"server: {details}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return FedgeError(f"{address}: {details}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return FedgeError(f"{address}: no answer within {timeout_s:g} s; try again")
    return FedgeError(f"{address}: cannot be reached or gave up ({code.name}: {details[:200]}); try again")


def _shown(seconds: float) -> str:
    return clock.strftime("%Y-%m-%dT%H:%M:%SZ", clock.gmtime(seconds))
