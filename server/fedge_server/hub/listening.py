"""How the hub listens: options, certificates, and what its servers say of themselves."""

from __future__ import annotations

import logging
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fedge.errors import FedgeError
from fedge.identity import address
from fedge.wire import MAX_MESSAGE_BYTES, PING_MS
from fedge_server.hub.home import Home
from fedge_server.identity.authority import Authority, ServerCertificate

_log = logging.getLogger("fedge.hub")

TRANSFER_GRACE_S: Final = 3600  # that a transfer may go on after its connection's age

# A connection keeps little memory: windows stay small (a device sends to the spool's pace), and pings are
# rare. A peer that is dead is noticed within a minute.
DEVICE_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", 40_000),
    ("grpc.keepalive_timeout_ms", 15_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", PING_MS // 3),  # gRPC's own 5 min would cut off the idle
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 16 * 1024),  # kept for each stream that waits; one that is read gets more
    ("grpc.experimental.tcp_read_chunk_size", 4 * 1024),  # a connection keeps a buffer of the size that it
    ("grpc.experimental.tcp_min_read_chunk_size", 1024),  # read last: up to 4 MiB, if it may
    ("grpc.experimental.tcp_max_read_chunk_size", 16 * 1024),
    ("grpc.max_concurrent_streams", 16),
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not half of the connections
)
LINK_OPTIONS: Final = (
    *DEVICE_OPTIONS,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8 * 1024),
)
LOCAL_OPTIONS: Final = (  # a worker pushes the contents of a round at once
    ("grpc.max_receive_message_length", 64 * MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", 4 * MAX_MESSAGE_BYTES),
)


def age(seconds: float, grace_s: int = TRANSFER_GRACE_S) -> tuple[tuple[str, int], ...]:
    """After this age a connection takes no new calls; the device's stream is ended by the Link service."""
    return (
        ("grpc.max_connection_age_ms", max(int(seconds * 1000), 1)),
        ("grpc.max_connection_age_grace_ms", grace_s * 1000),
    )


def credentials(home: Home, authority: Authority, *, mutual: bool) -> Any:
    """Credentials that follow the certificates on the disk: asked at each new connection."""
    state: dict[str, Any] = {}

    def configuration() -> Any:
        found = (home.tls / "server.pem").stat().st_mtime_ns, authority.bundle if mutual else b""
        if state.get("key") == found:
            return None
        server = ServerCertificate.load(home.tls)
        state["key"] = found
        return grpc.ssl_server_certificate_configuration(
            [(server.key, server.chain)], root_certificates=authority.bundle if mutual else None
        )

    def fetch() -> Any:
        try:
            return configuration()
        except (OSError, FedgeError) as error:
            _log.error("the server's certificate cannot be read: %s", error)
            return None  # the one that was read before still serves

    return grpc.dynamic_ssl_server_credentials(configuration(), fetch, require_client_authentication=mutual)


def describe(server: Any, *modules: Any) -> None:
    """Health and reflection."""
    found = [module.DESCRIPTOR.services_by_name.values() for module in modules]
    names = [service.full_name for services in found for service in services]
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for name in names:
        servicer._server_status[name] = health_pb2.HealthCheckResponse.SERVING
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)


def bind(server: Any, home: Home, authority: Authority, where: tuple[str, int], *, mutual: bool) -> int:
    """Listen on a host and port; returns the port.

    Raises:
        FedgeError: it is taken, or the system refuses it.
    """
    shown = address(*where)
    try:
        bound = int(server.add_secure_port(shown, credentials(home, authority, mutual=mutual)))
    except RuntimeError as error:
        bound, why = 0, str(error).splitlines()[0][:200]
    else:
        why = "refused"
    if not bound:
        raise FedgeError(f"cannot listen on {shown} ({why}); is the port taken?")
    return bound
