"""The live connections: who joins and leaves, and what everybody must hear."""

from __future__ import annotations

import asyncio
import logging
import time

from fedge.errors import FedgeError
from fedge.wire.v1 import link_pb2 as link
from fedge_server.hub.connection import Connection
from fedge_server.hub.exchange import Exchange
from fedge_server.hub.fleet import Fleet
from fedge_server.hub.gate import Gate
from fedge_server.identity.authority import Authority
from fedge_server.monitoring.metrics import CONNECTIONS
from fedge_server.registry.devices import DeviceRow, Devices

_log = logging.getLogger("fedge.hub")


class Roster:
    """Connections by node id; the fleet's and the exchange's view of them."""

    def __init__(
        self, gate: Gate, authority: Authority, devices: Devices, fleet: Fleet, exchange: Exchange
    ) -> None:
        self._gate = gate
        self._authority = authority
        self._devices = devices
        self._fleet = fleet
        self._exchange = exchange
        self._connections: dict[int, Connection] = {}
        self._seen: dict[str, float] = {}
        self.changed = asyncio.Condition()  # somebody has joined
        self._announced: set[asyncio.Task[None]] = set()
        exchange.post_work = self._post_work
        exchange.post_cancel = self._post_cancel

    def join(self, connection: Connection) -> None:
        """A device is here; an earlier connection of it ends, and what is open for it is sent."""
        member = connection.member
        if (earlier := self._connections.get(member.node_id)) is not None:
            earlier.end(None, superseded=True)
        self._connections[member.node_id] = connection
        self._fleet.join(member)
        self._exchange.here(member.node_id)
        self._seen[member.device_id] = member.since
        holds = set(connection.hello.working_on)
        for message_id in self._exchange.open_of(member.node_id):
            if message_id not in holds:
                connection.post_work(message_id)
        if connection.version >= 2:
            for message_id in holds:  # what it holds and nobody waits for any more
                if self._exchange.flight(message_id) is None:
                    connection.post_cancel(message_id)
        CONNECTIONS.labels(member.tier).inc()
        about = {"device": member.device_id, "tier": member.tier, "wire": connection.version}
        _log.info("device %s connected, tier %s", member.device_id[:16], member.tier, extra=about)
        task = asyncio.create_task(self._announce())
        self._announced.add(task)
        task.add_done_callback(self._announced.discard)

    def leave(self, connection: Connection) -> bool:
        """A stream has ended; whether its device is away now."""
        member = connection.member
        self._seen[member.device_id] = time.time()
        if self._connections.get(member.node_id) is not connection:
            return False
        del self._connections[member.node_id]
        self._fleet.leave(member)
        self._exchange.gone(member.node_id)
        _log.info("device %s left", member.device_id[:16], extra={"device": member.device_id})
        return True

    async def introduce(self, connection: Connection, row: DeviceRow) -> None:
        """Write down what a device said of itself, if that is new."""
        hello = connection.hello
        bundle = hello.bundle_sha256.hex() if len(hello.bundle_sha256) == 32 else ""
        said = (hello.wire_version, hello.fedge_version, bundle or row.bundle)
        if said != (row.wire_version, row.fedge_version, row.bundle):
            try:
                await asyncio.to_thread(
                    self._devices.introduced,
                    row.id,
                    wire_version=min(hello.wire_version, 2**31 - 1),
                    fedge_version=hello.fedge_version[:64],
                    bundle=bundle,
                )
            except FedgeError as error:
                _log.error("device %s: what it said cannot be kept: %s", row.id[:16], error)

    async def refresh(self) -> None:
        """Look again at who may be here; streams of the others end at once."""
        await self._gate.refresh()
        for connection in list(self._connections.values()):
            try:
                self._gate.still(connection.peer)
            except FedgeError as error:
                device = connection.peer.device_id
                _log.warning("device %s is sent away: %s", device[:16], error, extra={"device": device})
                connection.end(error)

    def announce_bundle(self) -> None:
        """Give everybody the new bundle of CAs."""
        message = link.HubMessage(new_bundle=link.NewBundle(ca_bundle=self._authority.bundle))
        for connection in self._connections.values():
            if connection.version >= 2:
                connection.post(message)

    async def save_seen(self) -> None:
        """Write down when devices were here last."""
        seen, self._seen = self._seen, {}
        try:
            await asyncio.to_thread(self._devices.seen, seen)
        except FedgeError as error:
            _log.error("when devices were here cannot be kept: %s", error)

    def end_all(self, error: FedgeError) -> None:
        """End all streams: the hub stops."""
        for connection in list(self._connections.values()):
            connection.end(error)

    def _post_work(self, node_id: int, message_id: str) -> None:
        if (connection := self._connections.get(node_id)) is not None:
            connection.post_work(message_id)

    def _post_cancel(self, node_id: int, message_id: str) -> None:
        if (connection := self._connections.get(node_id)) is not None:
            connection.post_cancel(message_id)

    async def _announce(self) -> None:
        async with self.changed:
            self.changed.notify_all()
