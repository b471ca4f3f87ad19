"""A Flower Grid whose clients are the resident devices of a hub."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError

from fedge.errors import FormatError
from fedge.wire.arrays import records_of
from fedge.wire.records import pack, unpack, write_object
from fedge.wire.v1 import admin_pb2 as admin
from fedge.wire.v1.records_pb2 import Content, Object, Result
from fedge_server.hub.home import Home
from fedge_server.link.calls import PATIENCE_S, Calls
from fedge_server.rounds.grids import OwnGrid

_log = logging.getLogger("fedge.worker")

RUN_ID, SERVER_NODE = 1, 0xFED  # Flower's numbers for the one run and the server of this process
RESULT_SLACK: Final = 16 * 1024**2  # bytes: an answer may be twice what was sent, and this much longer
BATCH: Final = 1000  # messages of one call to the hub
WAIT_S: Final = 30.0  # for devices, before it is said that there are none
ROUND: Final = "server-round"  # the key in which Flower's strategies name the round
PULL_S: Final = 0.2  # `pull_messages` takes what arrives in this time


class LinkGrid(OwnGrid):
    """Messages to devices through the hub's unix socket.

    Tensors going down are written once, however many devices they are for; those that came up stay in the
    hub's files until they are used. The files of a call are removed at the next one.
    """

    identified = True

    def __init__(
        self, home: Home, run_id: str, selection: admin.Selection, *, patience_s: float = PATIENCE_S
    ) -> None:
        """Begin a session; open messages of an earlier worker of this run are closed by it.

        Args:
            home: of the server; its hub must be up, or come up within `patience_s`.
            run_id: name of the run.
            selection: which devices take part.
            patience_s: how long the hub may be away at any time.

        Raises:
            RoundError: there is no hub, or it does not know the run.
        """
        self._calls = Calls(home.socket, run_id, patience_s=patience_s)
        self._objects, self._spool = home.objects(run_id), home.spool(run_id)
        self._selection = selection
        self._sent: dict[str, Message] = {}  # by message id: not yet closed
        self._waiting: dict[str, None] = {}  # ids not yet answered, in the order of sending
        self._files: set[Path] = set()  # of messages sent and answered since the last call
        self._files_of: dict[str, set[Path]] = {}  # of each message that is not closed
        self.late = 0  # answers that came after nobody waited for them
        self.bytes_down = 0  # tensor bytes that have travelled
        self.bytes_up = 0
        # Flower keeps one identity per process; Message() reads it.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE, 1

    def set_run(self, run: Run) -> None:
        """Nothing to do: there is one run."""

    @property
    def run(self) -> Run:
        """A run record without an app behind it."""
        return Run.create_empty(RUN_ID)

    def get_node_ids(self) -> Iterable[int]:
        """Suitable devices that are online, after waiting until there is one."""
        return self.wait_for(1)

    def wait_for(self, count: int) -> list[int]:
        """Suitable devices that are online, once there are at least so many."""
        while len(nodes := self._calls.nodes(self._selection, at_least=count, timeout_s=WAIT_S)) < count:
            _log.warning("waiting for devices: %d of %d are online", len(nodes), count)
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages for their devices and return their ids."""
        return self._push(list(messages), self._calls.default_deadline_s)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers that are there; waits a moment for the first."""
        ids = [message_id for message_id in message_ids if message_id in self._waiting]
        return list(self._receive(ids, time.monotonic() + PULL_S)) if ids else []

    def drop_messages(self, message_ids: Sequence[str]) -> None:
        """Close these messages, and remove what was sent and answered with them and no other."""
        gone = {path for message_id in message_ids for path in self._files_of.get(message_id, ())}
        self._close(message_ids)
        for path in gone.difference(*self._files_of.values()):
            path.unlink(missing_ok=True)
            self._files.discard(path)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send, and iterate over replies as they arrive, until `timeout` seconds have passed.

        The replies can be iterated again; their arrays are read from files when they are used, until the
        next call. Who stops iterating waits no longer: the messages without an answer are closed.
        """
        sent = list(messages)
        timeout_s = self._calls.default_deadline_s if timeout is None else timeout
        before, self._files = self._files, set()
        self._close(list(self._sent))
        ids = self._push(sent, timeout_s)
        for path in before - self._files:  # the same model may go down twice
            path.unlink(missing_ok=True)
        return Replies(self, ids, time.monotonic() + timeout_s)

    def close(self) -> None:
        """Close all messages and let go of the hub."""
        self._close(list(self._sent))
        for path in self._files:
            path.unlink(missing_ok=True)
        self._calls.hang_up()

    def receive(self, ids: Sequence[str], deadline: float) -> Iterator[Message]:
        """Replies to these messages as they arrive; the rest is closed at the deadline, or when one stops."""
        try:
            yield from self._receive(ids, deadline)
        finally:
            self._close([message_id for message_id in ids if message_id in self._waiting])

    def _receive(self, ids: Sequence[str], deadline: float) -> Iterator[Message]:
        def waited_for() -> list[str]:
            return [message_id for message_id in ids if message_id in self._waiting]

        for reply in self._calls.replies(waited_for, deadline):
            if reply.message_id in self._waiting:  # else it came twice, before and after a break
                del self._waiting[reply.message_id]
                yield self._message(reply)

    def _message(self, reply: admin.Reply) -> Message:
        """A device's answer as Flower's message; one that cannot be read is an error reply."""
        asked = self._sent[reply.message_id]
        path = self._spool / Path(reply.spool).name if reply.spool else None
        if path is not None:
            self._files.add(path)
            self._files_of[reply.message_id].add(path)
        try:
            result = Result.FromString(reply.result)
            if result.WhichOneof("kind") == "content":
                return Message(unpack(result.content, path), reply_to=asked)
            failure = result.failure
            return Message(Error(failure.code, failure.reason or "no reason given"), reply_to=asked)
        except (FormatError, DecodeError) as error:
            reason = f"the answer cannot be read ({error})"
            return Message(Error(ErrorCode.UNKNOWN, reason), reply_to=asked)

    def _push(self, messages: Sequence[Message], deadline_s: float) -> list[str]:
        outbox = _Outbox(self._objects)
        ids = []
        for message in messages:
            message_id = secrets.token_hex(16)
            message.metadata.__dict__["_message_id"] = message_id  # as Flower's own in-memory Grid sets it
            outbox.add(message_id, message)
            ids.append(message_id)
        self._files |= outbox.files
        self._files_of |= {message_id: set(outbox.files) for message_id in ids}
        # Before the calls: who is interrupted in one closes what the hub may have queued.
        self._sent |= dict(zip(ids, messages, strict=True))
        self._waiting |= dict.fromkeys(ids)
        for request in outbox.requests(self._selection, deadline_s):
            self._calls.push(request)
        return ids

    def _close(self, ids: Sequence[str]) -> None:
        reply = self._calls.close(ids)
        self.late += reply.late
        self.bytes_down += reply.bytes_down
        self.bytes_up += reply.bytes_up
        for message_id in ids:
            self._waiting.pop(message_id, None)
            self._sent.pop(message_id, None)
            self._files_of.pop(message_id, None)


class Replies:
    """Replies of one call as they arrive, remembered for a second pass."""

    def __init__(self, grid: LinkGrid, ids: Sequence[str], deadline: float) -> None:
        self._seen: list[Message] = []
        self._more = grid.receive(ids, deadline)

    def __iter__(self) -> Iterator[Message]:
        yield from self._seen
        try:
            for reply in self._more:
                self._seen.append(reply)
                yield reply
        finally:
            self._more.close()  # type: ignore[attr-defined]  # a generator


class _Outbox:
    """Messages on their way to the hub: what is the same for many is described and written once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._contents: list[Content] = []
        self._places: dict[int, int] = {}  # by identity of the content, which `_messages` keeps alive
        self._written: dict[tuple[int, ...], Object] = {}  # by identity of the array records
        self._messages: list[tuple[str, Message]] = []
        self.files: set[Path] = set()

    def add(self, message_id: str, message: Message) -> None:
        """Take a message; its tensors are in their file afterwards.

        Raises:
            FormatError: its content cannot travel.
        """
        self._messages.append((message_id, message))
        if id(message.content) not in self._places:
            self._places[id(message.content)] = len(self._contents)
            self._contents.append(self._content(message.content))

    def _content(self, records: RecordDict) -> Content:
        packed = pack(records)
        key = tuple(map(id, records_of(records, ArrayRecord).values()))
        if key in self._written:
            packed.content.object.CopyFrom(self._written[key])
        else:
            self._written[key] = found = write_object(self._folder, packed)
            if found.size:
                self.files.add(self._folder / found.sha256.hex())
        return packed.content

    def requests(self, selection: admin.Selection, deadline_s: float) -> Iterator[admin.PushRequest]:
        """What the hub is told, in calls of at most BATCH messages of one type and group."""
        groups: dict[tuple[str, str], list[tuple[str, Message]]] = {}
        for message_id, message in self._messages:
            kind = (message.metadata.message_type, _group_of(message))
            groups.setdefault(kind, []).append((message_id, message))
        for (message_type, group_id), members in groups.items():
            for start in range(0, len(members), BATCH):
                request = admin.PushRequest(
                    task=selection.task,
                    task_digest=selection.task_digest,
                    message_type=message_type,
                    group_id=group_id,
                    deadline_s=deadline_s,
                )
                self._fill(request, members[start : start + BATCH])
                yield request

    def _fill(self, request: admin.PushRequest, members: Sequence[tuple[str, Message]]) -> None:
        index: dict[int, int] = {}
        for message_id, message in members:
            place = self._places[id(message.content)]
            if place not in index:
                index[place] = len(request.contents)
                request.contents.append(self._contents[place])
            request.messages.add(
                message_id=message_id, node_id=message.metadata.dst_node_id, content=index[place]
            )
        largest = max(content.object.size for content in request.contents)
        request.max_result_bytes = 2 * largest + RESULT_SLACK


def _group_of(message: Message) -> str:
    """The message's own group, else its round: Flower's strategies name no group."""
    if message.metadata.group_id:
        return message.metadata.group_id
    rounds = [record.get(ROUND) for record in records_of(message.content, ConfigRecord).values()]
    return next((str(number) for number in rounds if number is not None), "")
