"""Answers coming in: checked before a byte is written, spooled, and committed before they are confirmed."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NoReturn

import grpc

from fedge.errors import FedgeError, FormatError
from fedge.wire.v1 import link_pb2 as link
from fedge.wire.v1 import records_pb2 as records
from fedge_server.hub import answers, spool
from fedge_server.hub.disk import on_disk
from fedge_server.hub.exchange import Exchange, Flight
from fedge_server.hub.fleet import Fleet
from fedge_server.hub.gate import Gate, refuse
from fedge_server.hub.home import Home
from fedge_server.hub.lanes import Few, Lanes, Place
from fedge_server.identity.admission import Peer
from fedge_server.monitoring import signals
from fedge_server.monitoring.metrics import ANSWER_SECONDS, ANSWERS
from fedge_server.registry.queue import Answer

_log = logging.getLogger("fedge.hub")

PART_S: Final = 60.0  # until the next part of an answer, or the stream is given up
AT_ONCE: Final = 8  # answers of one device
LINGER_S: Final = 1.0
LINGER_PARTS: Final = 64
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class Submitting:
    """Receives the answers of all devices."""

    def __init__(self, home: Home, gate: Gate, fleet: Fleet, exchange: Exchange, lanes: Lanes) -> None:
        self._home = home
        self._gate = gate
        self._fleet = fleet
        self._exchange = exchange
        self._lanes = lanes
        self._uploads: dict[str, spool.Upload] = {}
        self._few = Few(AT_ONCE)

    async def arrived(self, flight: Flight, sha256: bytes) -> int:
        """How many bytes of an answer's object are here."""
        folder = self._home.spool(flight.message.run_id)
        return await on_disk(spool.arrived, folder, flight.message.id, sha256)

    async def receive(self, peer: Peer, context: Any) -> link.SubmitReply:
        """Take one answer in, and say what became of it."""
        with self._few.one(peer.node_id) as allowed:
            if not allowed:
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, "too many answers of one device at once"
                )
            reply = await self._receive(peer, context)
        if reply is not _ACCEPTED:  # it came before the device had sent everything
            await _linger(context)
        return reply

    async def _receive(self, peer: Peer, context: Any) -> link.SubmitReply:
        part = await self._next(context)
        if part is None or part.WhichOneof("kind") != "header":
            return _reply("REFUSED", "an answer begins with its header")
        header = part.header
        flight = self._exchange.flight(header.message_id)
        node_id = flight.message.node_id if flight else self._exchange.owner_of_ended(header.message_id)
        if node_id is not None and node_id != peer.node_id:
            signals.foreign_request(peer.device_id, f"message {header.message_id} of node {node_id}")
            await _linger(context)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the message is another device's")
        if flight is None:
            return await self._commit(header.message_id, header.result, "", context)
        try:
            result = answers.read_result(header.result, flight.message.max_result_bytes)
        except FormatError as error:
            return await self._refuse(flight, peer, str(error), context)
        data = result.SerializeToString()
        if not result.content.object.size:  # a failure, or metrics alone
            return await self._take(flight, data, "", context)
        return await self._object(flight, peer, result, data, header.offset, context)

    async def _object(
        self, flight: Flight, peer: Peer, result: records.Result, data: bytes, offset: int, context: Any
    ) -> link.SubmitReply:
        message = flight.message
        described = result.content.object
        folder = self._home.spool(message.run_id)
        earlier = self._uploads.get(message.id)
        lock = earlier.lock if earlier is not None else asyncio.Lock()
        upload = spool.Upload(folder, message.id, described.size, described.sha256, lock)
        with self._registered(message.id, upload):
            try:
                async with self._lanes.place(message.id) as place:
                    await upload.begin(offset)
                    whole = await self._stream(flight, peer, upload, place, context)
            except FormatError as error:
                if offset > upload.received:  # a break lost more than the device knows
                    return _reply("INCOMPLETE", str(error))
                upload.drop()
                return await self._refuse(flight, peer, str(error), context)
            except OSError as error:
                await self._no_room(upload, error, context)
            if not whole:
                return await self._broken(flight, upload, data, context)
            try:
                upload.check()
            except FormatError as error:
                upload.drop()
                return await self._refuse(flight, peer, str(error), context)
            if self._exchange.flight(message.id) is not flight:
                upload.drop()
                return await self._commit(message.id, data, "", context)
            upload.keep()
            reply = await self._take(flight, data, upload.final.name, context)
            if reply is _TOO_LATE:  # ended at the last moment: nobody reads the file
                upload.final.unlink(missing_ok=True)
            return reply  # sent twice: both name one file, or this one goes with its message

    @contextmanager
    def _registered(self, message_id: str, upload: spool.Upload) -> Iterator[None]:
        """One upload for each message: the newest."""
        if (earlier := self._uploads.get(message_id)) is not None:
            earlier.stale = True
        self._uploads[message_id] = upload
        try:
            yield
        finally:
            upload.close()
            if self._uploads.get(message_id) is upload:
                del self._uploads[message_id]

    async def _stream(
        self, flight: Flight, peer: Peer, upload: spool.Upload, place: Place, context: Any
    ) -> bool:
        """Write what comes; False: it ended early, was taken over, or nobody waits any more."""
        while self._exchange.flight(flight.message.id) is flight and not upload.stale:
            with place.chunk():
                part = await self._next(context)
            if part is None:
                return upload.complete
            try:
                self._gate.still(peer)
            except FedgeError as error:
                await refuse(context, error, peer)
            if not await upload.write(part.data):
                return False
            place.moved(len(part.data))
            flight.touched = time.time()
            self._exchange.count(flight.message.run_id, up=len(part.data))
        return False

    async def _broken(
        self, flight: Flight, upload: spool.Upload, data: bytes, context: Any
    ) -> link.SubmitReply:
        if self._exchange.flight(flight.message.id) is not flight:
            upload.drop()
            return await self._commit(flight.message.id, data, "", context)
        if upload.stale:
            return _reply("INCOMPLETE", "a newer Submit of this answer has taken over")
        return _reply("INCOMPLETE", f"{upload.received} of {upload.size} bytes have arrived")

    async def _no_room(self, upload: spool.Upload, error: OSError, context: Any) -> NoReturn:
        upload.drop()
        _log.error("answer %s cannot be kept: %s", upload.final.name, error.strerror)
        full = error.errno in _FULL
        await _linger(context)
        code = grpc.StatusCode.RESOURCE_EXHAUSTED if full else grpc.StatusCode.UNAVAILABLE
        await context.abort(code, "the server's disk is full" if full else "the server's disk refuses it")
        raise AssertionError("abort raises")

    async def _take(self, flight: Flight, data: bytes, name: str, context: Any) -> link.SubmitReply:
        """Commit a good answer and learn how long it took."""
        reply = await self._commit(flight.message.id, data, name, context)
        if reply is _ACCEPTED and flight.sent is not None:
            seconds = time.monotonic() - flight.sent
            self._fleet.answered(flight.message.node_id, seconds)
            ANSWER_SECONDS.observe(seconds)
        return reply

    async def _refuse(self, flight: Flight, peer: Peer, reason: str, context: Any) -> link.SubmitReply:
        """Record a bad answer as the device's failure, so that its round need not wait."""
        signals.answer_refused(peer.device_id, flight.message.run_id, flight.message.id, reason)
        failure = answers.failure(answers.ANSWER_REFUSED, reason)
        await self._commit(flight.message.id, failure, "", context, refused=True)
        return _reply("REFUSED", reason)

    async def _commit(
        self, message_id: str, data: bytes, name: str, context: Any, *, refused: bool = False
    ) -> link.SubmitReply:
        try:
            outcome = await self._exchange.answer(Answer(message_id, data, name))
        except FedgeError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the answer cannot be kept now; try again")
            raise
        ANSWERS.labels("refused" if refused else outcome).inc()
        return {"accepted": _ACCEPTED, "again": _AGAIN}.get(outcome, _TOO_LATE)

    async def _next(self, context: Any) -> link.SubmitPart | None:
        """The next part; None: the stream has ended or is stuck."""
        try:
            part = await asyncio.wait_for(context.read(), PART_S)
        except TimeoutError:
            return None
        return None if part is grpc.aio.EOF else part


async def _linger(context: Any) -> None:
    """Read on for a moment before the call ends early: grpc's client loses the status while it writes."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            for _ in range(LINGER_PARTS):
                if await context.read() is grpc.aio.EOF:
                    return


def _reply(outcome: str, reason: str = "") -> link.SubmitReply:
    return link.SubmitReply(outcome=link.SubmitReply.Outcome.Value(outcome), reason=reason)


_ACCEPTED: Final = _reply("ACCEPTED")
_AGAIN: Final = _reply("ACCEPTED", "it had arrived before")
_TOO_LATE: Final = _reply("TOO_LATE", "nobody waits for this answer any more")
