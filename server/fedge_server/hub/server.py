"""The hub: three servers in one event loop, put together, started and stopped."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fedge.errors import FedgeError, UserError
from fedge.files import sole_holder, write_atomically
from fedge.identity import address
from fedge.wire import MAX_MESSAGE_BYTES
from fedge.wire.v1 import admin_pb2_grpc, enrolment_pb2, enrolment_pb2_grpc, link_pb2, link_pb2_grpc
from fedge_server.hub import enrolment
from fedge_server.hub.exchange import Exchange
from fedge_server.hub.fleet import Fleet
from fedge_server.hub.gate import Gate
from fedge_server.hub.home import Home
from fedge_server.hub.link import LinkServicer
from fedge_server.hub.roster import Roster
from fedge_server.hub.runs import AdminServicer, RunsServicer
from fedge_server.hub.settings import Settings
from fedge_server.hub.supervisor import Argv, Supervisor, worker_argv
from fedge_server.identity.authority import Authority, ServerCertificate
from fedge_server.registry.database import Registry

_log = logging.getLogger("fedge.hub")

HOUSEKEEPING_S: Final = 60.0
STOP_S: Final = 2.0  # that calls have to end when the hub stops
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3  # of malloc.h
MAX_FILES: Final = 65_536
MAX_SOCKET_PATH: Final = 100  # bytes; the kernel's limit is 107
_TRANSFER_GRACE_S: Final = 3600  # that a transfer may go on after its connection's age
_ENROLMENT_AGE_S: Final = 60  # of a connection of somebody who has proved nothing yet
_ENROLMENT_GRACE_S: Final = 30

# A connection keeps little memory: windows stay small (a device sends to the spool's pace), and pings are
# rare. A peer that is dead is noticed within a minute.
_DEVICE_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", 40_000),
    ("grpc.keepalive_timeout_ms", 15_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 16 * 1024),  # kept for each stream that waits; one that is read gets more
    ("grpc.experimental.tcp_read_chunk_size", 4 * 1024),  # a connection keeps a buffer of the size that it
    ("grpc.experimental.tcp_min_read_chunk_size", 1024),  # read last: up to 4 MiB, if it may
    ("grpc.experimental.tcp_max_read_chunk_size", 16 * 1024),
    ("grpc.max_concurrent_streams", 16),
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not half of the connections
)
_LINK_OPTIONS: Final = (
    *_DEVICE_OPTIONS,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8 * 1024),
)
_LOCAL_OPTIONS: Final = (  # a worker pushes the contents of a round at once
    ("grpc.max_receive_message_length", 64 * MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", 4 * MAX_MESSAGE_BYTES),
)


class Hub:
    """Everything that is up; `start`, then `wait`, then `stop`."""

    def __init__(
        self,
        home: Home,
        settings: Settings,
        registry: Registry,
        *,
        argv: Argv = worker_argv,
        first_backoff_s: float = 1.0,
    ) -> None:
        self.home = home
        self._settings = settings
        self._registry = registry
        self._authority = Authority.open(home.ca)
        limits = settings.limits
        self._fleet = Fleet()
        self._gate = Gate(self._authority, registry.devices)
        self.exchange = Exchange(registry.queue, self._fleet, grace_s=limits.offline_grace_s)
        self._roster = Roster(self._gate, self._authority, registry.devices, self._fleet, self.exchange)
        self._supervisor = Supervisor(
            home,
            registry,
            restarts=settings.workers.restarts,
            forget=self.exchange.forget,
            argv=argv,
            first_backoff_s=first_backoff_s,
        )
        self._servers: list[Any] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._bundle = self._authority.bundle
        self._stopped = asyncio.Event()
        self.link_port = self.enrolment_port = 0

    async def start(self) -> None:
        """Open the database's messages, listen, and take up unfinished runs.

        Raises:
            FedgeError: a port is taken, or a certificate cannot be made.
        """
        self._renew()
        await self._gate.refresh()
        await self.exchange.start()
        limits = self._settings.limits
        link = self._device_server(_LINK_OPTIONS + _age(limits.max_connection_age_s))
        listen = self._settings.listen
        self.link_port = self._bind(link, listen.host, listen.link_port, mutual=True)
        enrol = self._device_server(
            _DEVICE_OPTIONS + enrolment.SERVER_OPTIONS + _age(_ENROLMENT_AGE_S, _ENROLMENT_GRACE_S)
        )
        self.enrolment_port = self._bind(enrol, listen.host, listen.enrolment_port, mutual=False)
        link_pb2_grpc.add_LinkServicer_to_server(  # type: ignore[no-untyped-call]  # generated
            LinkServicer(
                self.home,
                self._gate,
                self._authority,
                self._fleet,
                self.exchange,
                self._roster,
                max_connection_age_s=limits.max_connection_age_s,
            ),
            link,
        )
        enrolment_pb2_grpc.add_EnrolmentServicer_to_server(  # type: ignore[no-untyped-call]
            self._enrolment(), enrol
        )
        _describe(link, link_pb2)
        _describe(enrol, enrolment_pb2)
        self._servers = [link, enrol, self._local_server()]
        for server in self._servers:
            await server.start()
        self.home.socket.chmod(0o600)
        ports = json.dumps({"link": self.link_port, "enrolment": self.enrolment_port})
        write_atomically(self.home.ports, ports.encode() + b"\n")
        await self._supervisor.look()
        self._tasks = [asyncio.create_task(self._keep_house())]
        _log.info(
            "hub is up: devices on %s, enrolment on %s",
            address(listen.host, self.link_port),
            address(listen.host, self.enrolment_port),
        )

    async def wait(self) -> None:
        """Until `ask_to_stop`."""
        await self._stopped.wait()

    def ask_to_stop(self) -> None:
        """End `wait`."""
        self._stopped.set()

    async def stop(self) -> None:
        """Stop workers, then streams and servers; what is open stays in the database."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        running = self._supervisor.workers()
        if running:
            names = ", ".join(worker.run_id for worker in running)
            _log.info("stopping %d workers (%s); their runs go on at the next start", len(running), names)
        await self._supervisor.stop()
        self._roster.end_all(FedgeError("the hub is stopping"))
        await asyncio.gather(*(server.stop(STOP_S) for server in self._servers))
        await self.exchange.stop()
        await self._roster.save_seen()
        self.home.ports.unlink(missing_ok=True)
        self.home.socket.unlink(missing_ok=True)
        _log.info("hub is down")

    async def refresh(self) -> None:
        """The database or the CA's folder has changed: devices, runs and certificates are looked at anew."""
        await asyncio.to_thread(self._authority.reload)
        await asyncio.to_thread(self._renew)
        if self._authority.bundle != self._bundle:
            self._bundle = self._authority.bundle
            _log.info("the certificate authority has changed: %d CAs", len(self._authority.certificates))
            self._roster.announce_bundle()
        await self._roster.refresh()
        await self._supervisor.look()

    def _renew(self) -> None:
        names, days = self._settings.public.names, self._settings.certificates.server_days
        if self._authority.ensure_server_certificate(self.home.tls, names, days):
            _log.info("made a new certificate for the server, valid for %d days", days)

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            try:
                await self._roster.save_seen()
                await self.refresh()
            except Exception as error:  # noqa: BLE001 - else nobody would renew the server's certificate
                _log.error("cannot look at the database or the certificates: %s", error)

    def _device_server(self, options: Sequence[tuple[str, int]]) -> Any:
        return grpc.aio.server(options=list(options))

    def _local_server(self) -> Any:
        server = grpc.aio.server(options=list(_LOCAL_OPTIONS))
        admin_pb2_grpc.add_RunsServicer_to_server(  # type: ignore[no-untyped-call]
            RunsServicer(
                self.home,
                self._gate,
                self._fleet,
                self.exchange,
                self._roster,
                default_deadline_s=self._settings.limits.default_deadline_s,
            ),
            server,
        )
        admin_pb2_grpc.add_AdminServicer_to_server(  # type: ignore[no-untyped-call]
            AdminServicer(self._fleet, self.exchange, self._supervisor, self.refresh), server
        )
        if len(os.fsencode(self.home.socket)) > MAX_SOCKET_PATH:
            raise UserError(
                f"{self.home.socket}: too long for a unix socket (over {MAX_SOCKET_PATH} bytes); "
                "give a home with a shorter path"
            )
        self.home.socket.unlink(missing_ok=True)  # of a hub that was killed: we hold the lock
        before = os.umask(0o177)
        try:
            server.add_insecure_port(f"unix:{self.home.socket}")
        finally:
            os.umask(before)
        return server

    def _enrolment(self) -> enrolment.EnrolmentServicer:
        host = self._settings.public.names[0]
        settings = enrolment.EnrolmentSettings(
            address(host, self.link_port),
            address(host, self.enrolment_port),
            self._settings.certificates.device_hours,
        )
        return enrolment.EnrolmentServicer(self._authority, self._registry.devices, settings)

    def _bind(self, server: Any, host: str, port: int, *, mutual: bool) -> int:
        credentials = _credentials(self.home, self._authority, mutual=mutual)
        try:
            bound = int(server.add_secure_port(address(host, port), credentials))
        except RuntimeError as error:
            bound, why = 0, str(error).splitlines()[0][:200]
        else:
            why = "refused"
        if not bound:
            raise FedgeError(f"cannot listen on {address(host, port)} ({why}); is the port taken?")
        return bound


def _age(seconds: float, grace_s: int = _TRANSFER_GRACE_S) -> tuple[tuple[str, int], ...]:
    """After this age a connection takes no new calls; the device's stream is ended by the Link service."""
    return (
        ("grpc.max_connection_age_ms", max(int(seconds * 1000), 1)),
        ("grpc.max_connection_age_grace_ms", grace_s * 1000),
    )


def _credentials(home: Home, authority: Authority, *, mutual: bool) -> Any:
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


def _describe(server: Any, module: Any) -> None:
    """Health and reflection."""
    names = [service.full_name for service in module.DESCRIPTOR.services_by_name.values()]
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for name in names:
        servicer._server_status[name] = health_pb2.HealthCheckResponse.SERVING
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)


@contextmanager
def only_hub(home: Home) -> Iterator[None]:
    """Hold the home's lock.

    Raises:
        UserError: another hub holds it.
    """
    home.root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(sole_holder(home.lock))
        except BlockingIOError as error:
            raise UserError(f"{home.root}: another hub is up here; stop it first") from error
        yield


def serve(home: Home, settings: Settings, *, ready: Callable[[Hub], None] = lambda _: None) -> None:
    """Run a hub until SIGTERM or SIGINT.

    Raises:
        UserError: another hub is up, or the home is none.
        FedgeError: the database, a port or a certificate refuses.
    """
    _raise_file_limit()
    _give_memory_back()
    with only_hub(home), Registry.open(home.root, settings.database_url) as registry:
        asyncio.run(_serve(home, settings, registry, ready))


async def _serve(home: Home, settings: Settings, registry: Registry, ready: Callable[[Hub], None]) -> None:
    hub = Hub(home, settings, registry)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, hub.ask_to_stop)
    try:
        await hub.start()
        tell_systemd("READY=1")
        ready(hub)
        await hub.wait()
        tell_systemd("STOPPING=1")
    finally:
        await hub.stop()


def _raise_file_limit() -> None:
    """Each device needs a socket, and often a file: take what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _give_memory_back() -> None:
    """Let glibc return the memory of chunks: kept for reuse, it would grow with the number of transfers."""
    with suppress(OSError, AttributeError):
        allocator = ctypes.CDLL(None)
        allocator.mallopt(_M_ARENA_MAX, 2)
        allocator.mallopt(_M_MMAP_THRESHOLD, 128 * 1024)


def tell_systemd(state: str) -> None:
    """Tell the service manager, if there is one that wants to know (sd_notify)."""
    name = os.environ.get("NOTIFY_SOCKET")
    if not name:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect("\0" + name[1:] if name.startswith("@") else name)
        channel.send(state.encode())


def read_ports(home: Home) -> dict[str, int]:
    """The ports of the hub that is up; empty when none is."""
    try:
        found: dict[str, int] = json.loads(Path(home.ports).read_text())
    except (OSError, ValueError):
        return {}
    return found
