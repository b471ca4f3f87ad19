"""The Link service: devices' resident streams, and their objects down and up."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import grpc

from fedge import __version__
from fedge.errors import FedgeError, FormatError
from fedge.wire import TURN_S, WIRE_VERSION
from fedge.wire.v1 import link_pb2 as link
from fedge.wire.v1 import link_pb2_grpc
from fedge_server.hub.connection import Connection, read_hello
from fedge_server.hub.disk import on_disk
from fedge_server.hub.exchange import Exchange, Flight
from fedge_server.hub.fleet import Fleet
from fedge_server.hub.gate import Gate, refuse
from fedge_server.hub.home import Home
from fedge_server.hub.lanes import Few, Lanes
from fedge_server.hub.roster import Roster
from fedge_server.hub.submitting import AT_ONCE, Submitting
from fedge_server.identity.admission import Peer
from fedge_server.identity.authority import Authority
from fedge_server.monitoring import signals

_log = logging.getLogger("fedge.hub")

HELLO_S: Final = 10.0  # until a device has said Hello
TRANSFERS: Final = 32  # at full speed at once, each way


class LinkServicer(link_pb2_grpc.LinkServicer):
    """Serves Link on a grpc.aio server with mutual TLS."""

    def __init__(
        self,
        home: Home,
        gate: Gate,
        authority: Authority,
        fleet: Fleet,
        exchange: Exchange,
        roster: Roster,
        *,
        max_connection_age_s: float,
    ) -> None:
        self._home = home
        self._gate = gate
        self._authority = authority
        self._exchange = exchange
        self._roster = roster
        self._age_s = max_connection_age_s
        self._few = Few(AT_ONCE)
        self._down, self._up = Lanes(TRANSFERS), Lanes(TRANSFERS)
        self._submitting = Submitting(home, gate, fleet, exchange, self._up)
        exchange.ended = self._ended

    async def Connect(self, _: Any, context: Any) -> None:  # noqa: N802 - the wire's name
        """A device's resident stream."""
        # Heard before it may be refused: a call that ends while it still sends loses the reason over there.
        first = await self._first(context)
        peer, row = await self._gate.admit(context)
        hello = await self._hello(context, first)
        version = min(hello.wire_version, WIRE_VERSION)
        connection = Connection(peer, row.tier, hello, version)
        bundle = self._authority.bundle
        same = version >= 2 and hello.bundle_sha256.hex() == self._authority.bundle_digest
        welcome = link.Welcome(
            wire_version=version,
            server_time=time.time(),
            device_id=peer.device_id,
            tier=row.tier,
            ca_bundle=b"" if same else bundle,
            fedge_version=__version__,
        )
        connection.post(link.HubMessage(welcome=welcome))
        self._roster.join(connection)  # and all that is open for it, with no await between
        reader = asyncio.create_task(self._listen(context, connection))
        try:
            await self._roster.introduce(connection, row)
            await self._send(context, connection)
        finally:
            reader.cancel()
            if self._roster.leave(connection):
                self._down.give_back(peer.node_id)
                self._up.give_back(peer.node_id)

    async def _first(self, context: Any) -> Any:
        try:
            return await asyncio.wait_for(context.read(), HELLO_S)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no Hello within {HELLO_S:g} s")
            raise

    async def _hello(self, context: Any, first: Any) -> link.Hello:
        try:
            return read_hello(first)
        except FormatError as error:
            _log.warning("%s: %s", context.peer(), error)
            too_old = "wire version" in str(error)
            code = grpc.StatusCode.FAILED_PRECONDITION if too_old else grpc.StatusCode.INVALID_ARGUMENT
            await context.abort(code, str(error))
            raise

    async def _listen(self, context: Any, connection: Connection) -> None:
        """Nothing more is expected from the device but the end of its stream."""
        try:
            while await context.read() is not grpc.aio.EOF:
                self._gate.still(connection.peer)
            connection.end(None)
        except FedgeError as error:
            connection.end(error)
        except Exception:  # noqa: BLE001 - the call is over, whatever grpc raises for it
            connection.end(None)

    async def _send(self, context: Any, connection: Connection) -> None:
        """Write what is posted until the device leaves, its certificate ends, or its time is up."""
        until = time.monotonic() + self._age_s
        while time.monotonic() < until:
            while (message := connection.next(self._exchange)) is not None:
                await self._admitted(context, connection.peer)
                await context.write(message)
            if connection.ended:
                await self._end(context, connection)
                return
            await self._admitted(context, connection.peer)
            left = min(until - time.monotonic(), max(connection.peer.not_after - time.time() + 0.1, 0.1))
            connection.woken.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(connection.woken.wait(), left)

    async def _end(self, context: Any, connection: Connection) -> None:
        if connection.superseded:
            await context.abort(grpc.StatusCode.ABORTED, "a newer connection of this device has taken over")
        if connection.error is not None:
            await refuse(context, connection.error, connection.peer)

    async def _admitted(self, context: Any, peer: Peer) -> None:
        try:
            self._gate.still(peer)
        except FedgeError as error:
            await refuse(context, error, peer)

    async def Fetch(  # noqa: N802 - the wire's name
        self, request: link.FetchRequest, context: Any
    ) -> AsyncIterator[link.Chunk]:
        """The object of an open message, to the device that it is for."""
        peer, _ = await self._gate.admit(context)
        flight = await self._own(request.message_id, peer, context)
        described = self._exchange.content_of(flight).object
        if not described.size or described.sha256 != request.sha256:
            await context.abort(grpc.StatusCode.NOT_FOUND, "the message has no such object")
        if request.offset > described.size:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the object has {described.size} bytes")
        run_id = flight.message.run_id
        path = self._home.objects(run_id) / described.sha256.hex()
        try:
            file = path.open("rb", buffering=0)
        except OSError as error:
            _log.error("object %s: cannot be read (%s)", path, error.strerror)
            await context.abort(grpc.StatusCode.NOT_FOUND, "the object is not there any more")
            raise
        with file, self._few.one(peer.node_id) as allowed:
            if not allowed:
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, "too many fetches of one device at once"
                )
            async for data in self._chunks(file.fileno(), request.offset, described.size, flight, path):
                await self._admitted(context, peer)
                if self._exchange.flight(request.message_id) is not flight:
                    await context.abort(grpc.StatusCode.NOT_FOUND, "the message has ended")
                self._exchange.count(run_id, down=len(data))
                yield link.Chunk(data=data)

    async def _chunks(
        self, handle: int, offset: int, size: int, flight: Flight, path: Path
    ) -> AsyncIterator[bytes]:
        async with self._down.place(flight.message.id) as place:
            while offset < size:
                wanted = min(place.chunk_bytes, size - offset)
                data = await on_disk(os.pread, handle, wanted, offset)
                if not data:
                    _log.error("object %s: %d bytes are missing", path, size - offset)
                    return  # its digest will not be right, and the device says so
                offset += len(data)
                with place.chunk():
                    yield data  # comes back when the device has room for more
                place.moved(len(data))
                flight.touched = time.time()

    async def Turn(self, request: link.TurnRequest, context: Any) -> link.TurnReply:  # noqa: N802
        """A place for the object of a message, or of its answer: kept until that transfer begins."""
        peer, _ = await self._gate.admit(context)
        message_id = request.message_id
        if self._exchange.flight(message_id) is None:
            return link.TurnReply(wanted=False)
        flight = await self._own(message_id, peer, context)
        lanes = {link.TurnRequest.FETCH: self._down, link.TurnRequest.SUBMIT: self._up}.get(request.kind)
        if lanes is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a turn of no known kind: {request.kind}")
            raise AssertionError("abort raises")
        granted = await lanes.turn(message_id, peer.node_id, TURN_S)
        await self._admitted(context, peer)
        if self._exchange.flight(message_id) is not flight:
            return link.TurnReply(wanted=False)
        submits = request.kind == link.TurnRequest.SUBMIT
        offset = await self._submitting.arrived(flight, request.sha256) if submits else 0
        return link.TurnReply(wanted=True, granted=granted, offset=offset)

    def _ended(self, message_id: str) -> None:
        self._down.forget(message_id)
        self._up.forget(message_id)

    async def Submit(self, _: Any, context: Any) -> link.SubmitReply:  # noqa: N802 - the wire's name
        """An answer: committed before the device hears that it is accepted."""
        peer, _ = await self._gate.admit(context)
        return await self._submitting.receive(peer, context)

    async def _own(self, message_id: str, peer: Peer, context: Any) -> Flight:
        """The open message of this id, if it is the caller's."""
        flight = self._exchange.flight(message_id)
        node_id = flight.message.node_id if flight else self._exchange.owner_of_ended(message_id)
        if node_id is not None and node_id != peer.node_id:
            signals.foreign_request(peer.device_id, f"message {message_id} of node {node_id}")
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the message is another device's")
        if flight is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such open message")
            raise AssertionError("abort raises")
        return flight
