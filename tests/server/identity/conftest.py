"""A real Enrolment service and a Link-like one on loopback, over a real authority and registry."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedge.errors import IdentityError, RevokedError
from fedge.identity import JoinString, address
from fedge.wire.v1 import enrolment_pb2_grpc
from fedge_server.hub.enrolment import SERVER_OPTIONS, EnrolmentServicer, EnrolmentSettings
from fedge_server.identity.admission import RateLimiter, check, peer_of
from fedge_server.identity.authority import Authority, ServerCertificate
from fedge_server.identity.tokens import new_join_string
from fedge_server.registry.database import Registry

DAY = 86400.0


class Link(grpc.GenericRpcHandler):
    """Answers any method with the caller's device id, after the checks that the hub makes."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def service(self, _: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self.answer)

    async def answer(self, _: bytes, context: Any) -> bytes:
        server = self.server
        try:
            peer = peer_of(context.auth_context()["x509_pem_cert"][0], server.authority.certificates)
            check(peer, server.registry.devices.get(peer.device_id), server.clock())
        except RevokedError as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        except IdentityError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        return peer.device_id.encode()


class Server:
    """What a hub is to a device: both ports, the authority, the registry. Times follow `shift`."""

    def __init__(self, home: Path, name: str = "localhost") -> None:
        self.shift = 0.0  # seconds that the server's clock differs from this machine's
        self.home, self.name = home, name
        self.listen = "127.0.0.1"
        self.authority = Authority.create(home / "ca", clock=self.clock)
        self.authority.ensure_server_certificate(home / "tls", [name], 90)
        self.registry = Registry.open(home)
        self.limiter = RateLimiter()
        self.device_hours = 168.0
        self.enrolment_port = self.link_port = 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.servers: list[Any] = []

    def clock(self) -> float:
        return time.time() + self.shift

    def start(self) -> Server:
        """Listen; again after `stop`, on the same ports, as a hub that was restarted."""
        self._run(self._start())
        return self

    def stop(self) -> None:
        self._run(self._stop())

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        self.registry.close()

    def join(self, tier: str = "micro", hours: float = 24.0, **changes: Any) -> JoinString:
        """A join string for this server."""
        where = {"host": self.name, "port": self.enrolment_port, "pin": self.authority.pin} | changes
        return new_join_string(self.registry.devices, tier, hours=hours, now=self.clock(), **where)

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    async def _start(self) -> None:
        shown = ServerCertificate.load(self.home / "tls")
        pair = [(shown.key, shown.chain)]
        enrolment, link = grpc.aio.server(options=SERVER_OPTIONS), grpc.aio.server()
        self.enrolment_port = enrolment.add_secure_port(
            f"{self.listen}:{self.enrolment_port}", grpc.ssl_server_credentials(pair)
        )
        mutual = grpc.ssl_server_credentials(pair, self.authority.bundle, require_client_auth=True)
        self.link_port = link.add_secure_port(f"{self.listen}:{self.link_port}", mutual)
        settings = EnrolmentSettings(
            address(self.name, self.link_port), address(self.name, self.enrolment_port), self.device_hours
        )
        servicer = EnrolmentServicer(
            self.authority, self.registry.devices, settings, clock=self.clock, limiter=self.limiter
        )
        enrolment_pb2_grpc.add_EnrolmentServicer_to_server(servicer, enrolment)
        link.add_generic_rpc_handlers((Link(self),))
        self.servers = [enrolment, link]
        for server in self.servers:
            await server.start()

    async def _stop(self) -> None:
        for server in self.servers:
            await server.stop(0)
        self.servers = []


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    """Makes servers under these folder names, each with an authority of its own."""
    made: list[Server] = []

    def make(name: str) -> Server:
        made.append(Server(tmp_path / name).start())
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def server(make_server: Callable[[str], Server]) -> Server:
    return make_server("server")
