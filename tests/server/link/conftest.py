"""A small hub in this process: the Runs service on a unix socket, whose devices are Flower ClientApps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from flwr.app import Context, Message, Metadata, RecordDict

from fedge.wire.records import pack, unpack
from fedge.wire.v1 import admin_pb2 as admin
from fedge.wire.v1.admin_pb2_grpc import RunsServicer, add_RunsServicer_to_server
from fedge.wire.v1.records_pb2 import Content, Failure, Result
from fedge_server.hub.home import Home
from fedge_server.link.grid import RUN_ID, SERVER_NODE, LinkGrid

Device = Callable[[Message, Context], Message]
"""A device's answer; what it raises becomes its failure, and None means that it never answers."""

RUN = "run"


class SmallHub(RunsServicer):
    """Keeps messages in memory; answers each by calling its device in a thread."""

    def __init__(self, home: Home, devices: dict[int, Device]) -> None:
        self.home, self.devices = home, devices
        self.sessions = 0
        self.open: dict[str, admin.Outgoing] = {}
        self.replies: dict[str, admin.Reply] = {}
        self.closed: list[str] = []
        self.late = self.down = self.up = 0
        self.pushes: list[admin.PushRequest] = []
        self.asked: list[admin.NodesRequest] = []
        self.changed = threading.Condition()
        self.threads = futures.ThreadPoolExecutor(4)
        self.node_config: dict[str, Any] = {}
        self.states: dict[int, RecordDict] = {}  # what each device remembers
        self.run_config: dict[str, Any] = {}
        self.default_deadline_s = 60.0
        home.root.mkdir(exist_ok=True)
        self.start()

    def start(self) -> None:
        """Listen; also again after `stop`."""
        self.server = grpc.server(futures.ThreadPoolExecutor(16))
        add_RunsServicer_to_server(self, self.server)  # type: ignore[no-untyped-call]
        self.server.add_insecure_port(f"unix:{self.home.socket}")
        self.server.start()

    def stop(self) -> None:
        """Break all calls, as a killed hub does."""
        self.server.stop(None).wait()
        self.server = grpc.server(futures.ThreadPoolExecutor(1))  # the old one's connections end with it

    def _check(self, request: Any, context: grpc.ServicerContext) -> None:
        if request.session != str(self.sessions):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "a newer worker has taken over")

    def Attach(self, request, context):  # noqa: N802
        self.sessions += 1
        self._end(list(self.open))
        return admin.AttachReply(session=str(self.sessions), default_deadline_s=self.default_deadline_s)

    def Nodes(self, request, context):  # noqa: N802
        self.asked.append(request)
        with self.changed:
            self.changed.wait_for(lambda: len(self.devices) >= request.at_least, request.timeout_s)
        return admin.NodesReply(node_ids=sorted(self.devices))

    def Push(self, request, context):  # noqa: N802
        self._check(request, context)
        self.pushes.append(request)
        for message in request.messages:
            if message.message_id not in self.open and message.message_id not in self.replies:
                self.open[message.message_id] = message
                self.threads.submit(self._work, request, message)
        return admin.PushReply()

    def Replies(self, request, context):  # noqa: N802
        self._check(request, context)
        given: set[str] = set()
        while True:
            with self.changed:
                self.changed.wait_for(
                    lambda: (
                        not context.is_active()
                        or any(i in self.replies for i in request.message_ids if i not in given)
                        or not any(i in self.open for i in request.message_ids)
                    ),
                    0.05,
                )
                ready = [i for i in request.message_ids if i in self.replies and i not in given]
                over = not any(i in self.open for i in request.message_ids)
            for message_id in ready:
                given.add(message_id)
                yield self.replies[message_id]
            if not context.is_active() or (over and not ready):
                return

    def Close(self, request, context):  # noqa: N802
        self._check(request, context)
        self._end(request.message_ids)
        reply = admin.CloseReply(late=self.late, bytes_down=self.down, bytes_up=self.up)
        self.late = self.down = self.up = 0
        return reply

    def _end(self, ids: Any) -> None:
        with self.changed:
            for message_id in ids:
                if self.open.pop(message_id, None) is not None:
                    self.closed.append(message_id)
                self.replies.pop(message_id, None)
            self.changed.notify_all()

    def _work(self, request: admin.PushRequest, message: admin.Outgoing) -> None:
        content = request.contents[message.content]
        reply = admin.Reply(message_id=message.message_id, node_id=message.node_id)
        try:
            answer = self._answer(request, message, content)
            if answer is None:
                return
            if isinstance(answer, bytes):
                reply.result = answer
            else:
                packed = pack(answer.content)
                if packed.content.object.size:
                    self.up += packed.content.object.size
                    reply.spool = message.message_id
                    self.home.spool(RUN).mkdir(parents=True, exist_ok=True)
                    (self.home.spool(RUN) / reply.spool).write_bytes(b"".join(packed.buffers()))
                reply.result = Result(content=packed.content, seconds=0.1).SerializeToString()
        except Exception as error:  # noqa: BLE001 - a device's failure is its answer
            failure = Failure(code=6, reason=f"{type(error).__name__}: {error}")
            reply.result = Result(failure=failure).SerializeToString()
        with self.changed:
            if self.open.pop(message.message_id, None) is None:
                self.late += 1
                return
            self.replies[message.message_id] = reply
            self.changed.notify_all()

    def _answer(self, request: admin.PushRequest, message: admin.Outgoing, content: Content) -> Any:
        path = self.home.objects(RUN) / content.object.sha256.hex() if content.object.size else None
        self.down += content.object.size
        sent = Message(
            content=unpack(content, path),
            metadata=Metadata(
                run_id=RUN_ID,
                message_id=message.message_id,
                src_node_id=SERVER_NODE,
                dst_node_id=message.node_id,
                reply_to_message_id="",
                group_id=request.group_id,
                created_at=0.0,
                ttl=1e9,
                message_type=request.message_type,
            ),
        )
        node_config = {**self.node_config, "partition-id": message.node_id - 1}
        state = self.states.setdefault(message.node_id, RecordDict())
        context = Context(RUN_ID, message.node_id, node_config, state, self.run_config)
        return self.devices[message.node_id](sent, context)

    def join(self, node_id: int, device: Device) -> None:
        """A device comes online."""
        with self.changed:
            self.devices[node_id] = device
            self.changed.notify_all()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def hub(home: Home) -> Iterator[SmallHub]:
    made = SmallHub(home, {})
    yield made
    made.stop()
    made.threads.shutdown()


@pytest.fixture
def grid(hub: SmallHub) -> Iterator[LinkGrid]:
    made = LinkGrid(hub.home, RUN, admin.Selection(task="digits", task_digest="d"), patience_s=20)
    yield made
    made.close()
