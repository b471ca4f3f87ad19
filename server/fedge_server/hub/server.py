"""The hub: three servers in one event loop, put together, started and stopped."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc

from fedge.errors import FedgeError, UserError
from fedge.files import sole_holder, write_atomically
from fedge.identity import address
from fedge.wire.v1 import admin_pb2_grpc
from fedge_server.delivery import Distribution, Shelf
from fedge_server.hub import devices, enrolment
from fedge_server.hub.exchange import Exchange
from fedge_server.hub.fleet import Fleet
from fedge_server.hub.gate import Gate
from fedge_server.hub.home import Home
from fedge_server.hub.keeping import keep_repository
from fedge_server.hub.learning import learn_always
from fedge_server.hub.link import LinkServicer
from fedge_server.hub.listening import DEVICE_OPTIONS, LINK_OPTIONS, LOCAL_OPTIONS, age, bind
from fedge_server.hub.returning import take_back_always
from fedge_server.hub.roster import Roster
from fedge_server.hub.runs import AdminServicer, RunsServicer
from fedge_server.hub.settings import Settings
from fedge_server.hub.supervisor import Argv, Supervisor, worker_argv
from fedge_server.hub.systemd import tell_systemd
from fedge_server.hub.tidying import tidy_always
from fedge_server.identity.authority import Authority
from fedge_server.inference.models import Models
from fedge_server.monitoring.monitor import Monitor
from fedge_server.monitoring.state import Seen
from fedge_server.registry.database import Registry
from fedge_server.rollout.service import Rollouts
from fedge_server.telemetry.keeping import prune_always

_log = logging.getLogger("fedge.hub")

HOUSEKEEPING_S: Final = 60.0
STOP_S: Final = 2.0  # that calls have to end when the hub stops
_ENROLMENT_AGE_S: Final = 60  # of a connection of somebody who has proved nothing yet
_ENROLMENT_GRACE_S: Final = 30
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3  # of malloc.h
MAX_FILES: Final = 65_536
MAX_SOCKET_PATH: Final = 100  # bytes; the kernel's limit is 107


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
        self._rollouts, self._shelf = Rollouts(registry), Shelf(home.repository)
        self._distribution: Distribution | None = None
        self._models: Models | None = None
        self._telemetry = devices.telemetry_of(registry, settings.telemetry)
        self._roster = Roster(self._gate, self._authority, registry.devices, self._fleet, self.exchange)
        self._supervisor = Supervisor(
            home,
            registry,
            restarts=settings.workers.restarts,
            forget=self.exchange.forget,
            argv=argv,
            first_backoff_s=first_backoff_s,
        )
        self._monitor = Monitor(home, settings.metrics, registry, self._seen)
        self._servers: list[Any] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._bundle = self._authority.bundle
        self._stopped, self._changed = asyncio.Event(), asyncio.Event()
        self.link_port = self.enrolment_port = 0

    async def start(self) -> None:
        """Open the database's messages, listen, and take up unfinished runs.

        Raises:
            FedgeError: a port is taken, or a certificate cannot be made.
        """
        self._renew()
        await self._gate.refresh()
        await self._supervisor.tidy()
        await self.exchange.start()
        self._distribution = distribution = devices.distribution_of(
            self.home, self._gate, self._registry, self._rollouts, self._shelf
        )
        if self._settings.inference.enabled:
            self._models = devices.models_of(self.home, self._registry, self._settings.inference)
        link, enrol = self._link_server(distribution), self._enrolment_server()
        await distribution.start()
        self._servers = [link, enrol, self._local_server()]
        for server in self._servers:
            await server.start()
        self.home.socket.chmod(0o600)
        self._tasks = [self._monitor.start()]
        ports = {"link": self.link_port, "enrolment": self.enrolment_port}
        if self._monitor.port:
            ports["metrics"] = self._monitor.port
        write_atomically(self.home.ports, json.dumps(ports).encode() + b"\n")
        await self._supervisor.look()
        self._tasks += [
            asyncio.create_task(self._keep_house()),
            asyncio.create_task(keep_repository(self.home)),
            asyncio.create_task(take_back_always(self.home, self._registry, self._shelf, distribution.look)),
            asyncio.create_task(
                learn_always(self.home, self._registry, self._supervisor.look, self._changed)
            ),
        ]
        if self._telemetry is not None:
            self._tasks.append(asyncio.create_task(prune_always(self._telemetry)))
        if self._settings.keeping.automatic:
            keep = self._settings.keeping.terms()
            self._tasks.append(asyncio.create_task(tidy_always(self.home, self._registry, keep)))
        _log.info(
            "hub is up: devices on %s, enrolment on %s",
            address(self._settings.listen.host, self.link_port),
            address(self._settings.listen.host, self.enrolment_port),
        )

    def _link_server(self, distribution: Distribution) -> Any:
        """What enrolled devices reach: work, releases, answers; and who hears what they have counted."""
        limits = self._settings.limits
        link = LinkServicer(
            self.home,
            self._gate,
            self._authority,
            self._fleet,
            self.exchange,
            self._roster,
            max_connection_age_s=limits.max_connection_age_s,
        )
        services = [devices.link(link), devices.distribution(distribution)]
        if self._models is not None:
            services.append(devices.inference(self._gate, self._models, self._settings.inference))
        if self._telemetry is not None:
            services.append(devices.telemetry(self._gate, self._telemetry, self._fleet))
        server = grpc.aio.server(options=LINK_OPTIONS + age(limits.max_connection_age_s))
        self.link_port = self._bind(server, self._settings.listen.link_port, mutual=True)
        devices.carry(server, *services)
        return server

    def _enrolment_server(self) -> Any:
        """What devices reach that have no certificate, or an old one; join strings name the link's port."""
        options = DEVICE_OPTIONS + enrolment.SERVER_OPTIONS + age(_ENROLMENT_AGE_S, _ENROLMENT_GRACE_S)
        server = grpc.aio.server(options=options)
        self.enrolment_port = self._bind(server, self._settings.listen.enrolment_port, mutual=False)
        devices.carry(server, devices.enrolment(self._enrolment()))  # its answers name both ports
        return server

    def _seen(self) -> Seen:
        """What is so now, for the metrics."""
        polls, streams = self._distribution.load if self._distribution is not None else (0, 0)
        messages, unsent, commits = self.exchange.load
        return Seen(
            online=Counter(member.tier for member in self._fleet.members.values()),
            open=messages,
            unsent=unsent,
            commits=commits,
            polls=polls,
            streams=streams,
            workers=len(self._supervisor.workers()),
            offered=self._distribution.offered if self._distribution is not None else {},
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
        await asyncio.to_thread(self._monitor.stop)
        self._roster.end_all(FedgeError("the hub is stopping"))
        if self._distribution is not None:
            await self._distribution.end()
        await asyncio.gather(*(server.stop(STOP_S) for server in self._servers))
        if self._distribution is not None:
            self._distribution.close()
        if self._models is not None:
            await asyncio.to_thread(self._models.close)
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
        if self._distribution is not None:
            self._distribution.recheck()
            await self._distribution.look()
        await self._supervisor.look()
        self._changed.set()

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

    def _local_server(self) -> Any:
        server = grpc.aio.server(options=list(LOCAL_OPTIONS))
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

    def _bind(self, server: Any, port: int, *, mutual: bool) -> int:
        return bind(server, self.home, self._authority, (self._settings.listen.host, port), mutual=mutual)

    def _enrolment(self) -> enrolment.EnrolmentServicer:
        host = self._settings.public.names[0]
        settings = enrolment.EnrolmentSettings(
            address(host, self.link_port),
            address(host, self.enrolment_port),
            self._settings.certificates.device_hours,
        )
        return enrolment.EnrolmentServicer(
            self._authority, self._registry.devices, settings, trust=self._trust
        )

    def _trust(self, tier: str) -> tuple[bytes, int]:
        """What a new device of a tier begins with: a root, and the lowest version that it may run."""
        floor = self._shelf.refresh().floor(tier)
        return self._shelf.root(), max(floor, self._rollouts.channel(tier).floor)


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


def serve(
    home: Home,
    settings: Settings,
    *,
    log_format: str = "text",
    ready: Callable[[Hub], None] = lambda _: None,
) -> None:
    """Run a hub until SIGTERM or SIGINT; its workers log in the same format.

    Raises:
        UserError: another hub is up, or the home is none.
        FedgeError: the database, a port or a certificate refuses.
    """
    _raise_file_limit()
    _give_memory_back()
    with only_hub(home), Registry.open(home.root, settings.database_url) as registry:
        argv = partial(worker_argv, log_format=log_format)
        asyncio.run(_serve(Hub(home, settings, registry, argv=argv), ready))


async def _serve(hub: Hub, ready: Callable[[Hub], None]) -> None:
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


def read_ports(home: Home) -> dict[str, int]:
    """The ports of the hub that is up; empty when none is."""
    try:
        found: dict[str, int] = json.loads(Path(home.ports).read_text())
    except (OSError, ValueError):
        return {}
    return found
