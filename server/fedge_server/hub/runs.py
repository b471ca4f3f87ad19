"""The Runs and Admin services on the unix socket: what workers and the command line ask of the hub."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, NoReturn

import grpc

from fedge.errors import FedgeError, FormatError, RoundError
from fedge.files import sha256
from fedge.wire import MAX_MESSAGE_BYTES, MAX_OBJECT_BYTES
from fedge.wire.v1 import admin_pb2 as admin
from fedge.wire.v1 import admin_pb2_grpc
from fedge.wire.v1 import records_pb2 as records
from fedge_server.hub import spool
from fedge_server.hub.answers import check_content
from fedge_server.hub.exchange import Exchange
from fedge_server.hub.fleet import Fleet, Selection
from fedge_server.hub.gate import Gate
from fedge_server.hub.home import RUN_ID, Home
from fedge_server.hub.roster import Roster
from fedge_server.hub.supervisor import Supervisor
from fedge_server.hub.watching import Watch
from fedge_server.registry.queue import Answer, Queued

_log = logging.getLogger("fedge.hub")

MAX_CONTENT_BYTES: Final = MAX_MESSAGE_BYTES - 64 * 1024  # leaves room for the Work around it
MAX_NODES_S: Final = 3600.0  # that one Nodes call waits
ANSWERS_AT_ONCE: Final = 64  # read from the database for a worker

_MESSAGE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # names a file in the spool
_TYPE = re.compile(r"(train|evaluate|query)(\.[A-Za-z0-9_.-]{1,50})?")


class RunsServicer(admin_pb2_grpc.RunsServicer):
    """Serves workers."""

    def __init__(
        self,
        home: Home,
        gate: Gate,
        fleet: Fleet,
        exchange: Exchange,
        roster: Roster,
        *,
        default_deadline_s: float,
    ) -> None:
        self._home = home
        self._gate = gate
        self._fleet = fleet
        self._exchange = exchange
        self._roster = roster
        self._default_deadline_s = default_deadline_s

    async def Attach(  # noqa: N802 - the wire's name
        self, request: admin.AttachRequest, context: Any
    ) -> admin.AttachReply:
        """Begin a session."""
        run_id = await self._run_id(request.run_id, context)
        try:
            session = await self._exchange.attach(run_id)
        except RoundError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
            raise
        except FedgeError as error:
            await _abort(context, error)
        for folder in (self._home.spool(run_id), self._home.objects(run_id)):
            await asyncio.to_thread(spool.remove, folder)
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _log.info("run %s: a worker has attached", run_id, extra={"run": run_id})
        return admin.AttachReply(session=session, default_deadline_s=self._default_deadline_s)

    async def Nodes(  # noqa: N802 - the wire's name
        self, request: admin.NodesRequest, _: Any
    ) -> admin.NodesReply:
        """Devices that match, once there are enough or the time is up."""
        wanted = Selection(
            request.selection.task,
            request.selection.task_digest,
            frozenset(request.selection.tiers),
            frozenset(request.selection.tags),
            request.selection.max_seconds,
        )
        until = time.monotonic() + min(max(request.timeout_s, 0.0), MAX_NODES_S)
        async with self._roster.changed:
            while len(self._fleet.select(wanted)) < request.at_least:
                try:
                    await asyncio.wait_for(self._roster.changed.wait(), until - time.monotonic())
                except TimeoutError:
                    break
        return admin.NodesReply(node_ids=self._fleet.select(wanted))

    async def Push(self, request: admin.PushRequest, context: Any) -> admin.PushReply:  # noqa: N802
        """Queue messages."""
        run_id = await self._run_id(request.run_id, context)
        try:
            contents = [content.SerializeToString(deterministic=True) for content in request.contents]
            await asyncio.to_thread(self._check, request, contents)
            digests = [sha256(body) for body in contents]
            messages, hopeless = await self._messages(request, digests)
            bodies = dict(zip(digests, contents, strict=True))
            await self._exchange.push(run_id, request.session, messages, bodies, hopeless)
        except FedgeError as error:
            await _abort(context, error)
        return admin.PushReply()

    def _check(self, request: admin.PushRequest, contents: Sequence[bytes]) -> None:
        for message in request.messages:
            if not _MESSAGE_ID.fullmatch(message.message_id):
                raise FormatError(f"message id {message.message_id[:80]!r}: letters, digits, - and _ only")
            if message.content >= len(contents):
                raise FormatError(f"message {message.message_id}: content {message.content} was not given")
        if not _TYPE.fullmatch(request.message_type):
            raise FormatError(f"message type {request.message_type[:80]!r}: train, evaluate or query.NAME")
        for content, body in zip(request.contents, contents, strict=True):
            if len(body) > MAX_CONTENT_BYTES:
                raise FormatError(f"content of {len(body)} bytes without its tensors: too much for a message")
            check_content(content, MAX_OBJECT_BYTES)
            self._check_object(request.run_id, content)

    def _check_object(self, run_id: str, content: records.Content) -> None:
        described = content.object
        if not described.size:
            return
        path = self._home.objects(run_id) / described.sha256.hex()
        try:
            found = path.stat().st_size
        except OSError as error:
            raise FormatError(f"object {path}: cannot be read ({error.strerror})") from error
        if found != described.size:
            raise FormatError(f"object {path}: has {found} bytes, not {described.size}")

    async def _messages(
        self, request: admin.PushRequest, digests: Sequence[str]
    ) -> tuple[list[Queued], dict[str, str]]:
        """The messages to queue, and those among them that no device will answer."""
        rows = await self._gate.rows_of({message.node_id for message in request.messages})
        now = time.time()
        deadline = now + (request.deadline_s if request.deadline_s > 0 else self._default_deadline_s)
        messages, hopeless = [], {}
        for message in request.messages:
            row = rows.get(message.node_id)
            if row is None or row.status != "active":
                hopeless[message.message_id] = (
                    "the device is revoked" if row else "no such device is enrolled"
                )
            messages.append(
                Queued(
                    id=message.message_id,
                    run_id=request.run_id,
                    session=request.session,
                    device_id=row.id if row else "",
                    node_id=message.node_id,
                    task=request.task,
                    task_digest=request.task_digest,
                    type=request.message_type,
                    group_id=request.group_id,
                    content=digests[message.content],
                    created=now,
                    deadline=deadline,
                    max_result_bytes=min(request.max_result_bytes, MAX_OBJECT_BYTES),
                )
            )
        return messages, hopeless

    async def Replies(  # noqa: N802 - the wire's name
        self, request: admin.RepliesRequest, context: Any
    ) -> AsyncIterator[admin.Reply]:
        """Answers as they are committed; ends when every message is answered or closed."""
        run_id = await self._run_id(request.run_id, context)
        watch = self._exchange.watch(request.message_ids)
        try:
            there = [name for name in request.message_ids if name not in watch.waiting]
            async for answer in self._read(run_id, request.session, there):
                yield _to_reply(answer)
            async for answer in self._as_they_come(run_id, request.session, watch):
                yield _to_reply(answer)
        except FedgeError as error:
            await _abort(context, error)
        finally:
            self._exchange.unwatch(watch)

    async def _as_they_come(self, run_id: str, session: str, watch: Watch) -> AsyncIterator[Answer]:
        while ended := await watch.take():
            async for answer in self._read(run_id, session, ended):
                yield answer

    async def _read(self, run_id: str, session: str, names: Sequence[str]) -> AsyncIterator[Answer]:
        for start in range(0, len(names), ANSWERS_AT_ONCE):
            some = names[start : start + ANSWERS_AT_ONCE]
            for answer in await self._exchange.answered(run_id, session, some):
                yield answer

    async def Close(  # noqa: N802 - the wire's name
        self, request: admin.CloseRequest, context: Any
    ) -> admin.CloseReply:
        """Nobody waits for these any more."""
        run_id = await self._run_id(request.run_id, context)
        try:
            count = await self._exchange.close(run_id, request.session, list(request.message_ids))
        except FedgeError as error:
            await _abort(context, error)
        closed = frozenset(request.message_ids)
        await asyncio.to_thread(spool.remove, self._home.spool(run_id), closed)
        return admin.CloseReply(late=count.late, bytes_down=count.bytes_down, bytes_up=count.bytes_up)

    async def _run_id(self, run_id: str, context: Any) -> str:
        if not RUN_ID.fullmatch(run_id):  # it names folders
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"run id {run_id[:80]!r}: is none")
        return run_id


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """Serves the command line."""

    def __init__(
        self, fleet: Fleet, exchange: Exchange, supervisor: Supervisor, refresh: Callable[[], Awaitable[None]]
    ) -> None:
        self._fleet = fleet
        self._exchange = exchange
        self._supervisor = supervisor
        self._refresh = refresh
        self._since = time.time()

    async def Refresh(self, _: admin.RefreshRequest, context: Any) -> admin.RefreshReply:  # noqa: N802
        """Look at the database now."""
        try:
            await self._refresh()
        except FedgeError as error:
            await _abort(context, error)
        return admin.RefreshReply()

    async def Status(self, _: admin.StatusRequest, __: Any) -> admin.StatusReply:  # noqa: N802
        """Who is online, and which workers run."""
        devices = [
            admin.OnlineDevice(
                device_id=member.device_id,
                node_id=member.node_id,
                tier=member.tier,
                tags=sorted(member.tags),
                tasks=sorted(member.tasks),
                connected_since=member.since,
                messages_open=len(self._exchange.open_of(member.node_id)),
                seconds=self._fleet.seconds.get(member.node_id, 0.0),
            )
            for member in sorted(self._fleet.members.values(), key=lambda member: member.node_id)
        ]
        return admin.StatusReply(devices=devices, workers=self._supervisor.workers(), since=self._since)


def _to_reply(answer: Answer) -> admin.Reply:
    return admin.Reply(
        message_id=answer.message_id, node_id=answer.node_id, result=answer.result, spool=answer.spool
    )


async def _abort(context: Any, error: FedgeError) -> NoReturn:
    code = grpc.StatusCode.INTERNAL
    if isinstance(error, RoundError):
        code = grpc.StatusCode.FAILED_PRECONDITION
    elif isinstance(error, FormatError):
        code = grpc.StatusCode.INVALID_ARGUMENT
    await context.abort(code, str(error))
    raise AssertionError("abort raises")
