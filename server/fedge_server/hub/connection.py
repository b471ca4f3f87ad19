"""One device's live stream: what it said, and what waits to be sent to it."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from fedge.errors import FedgeError, FormatError
from fedge.wire import OLDEST_WIRE_VERSION
from fedge.wire.v1 import link_pb2 as link
from fedge_server.hub.exchange import Exchange
from fedge_server.hub.fleet import Member, offered
from fedge_server.identity.admission import Peer

MAX_ITEMS: Final = 256  # tasks or tags of one Hello
MAX_WORKING_ON: Final = 4096
MAX_TEXT: Final = 256  # characters of a name, a digest, a tag


def read_hello(first: Any) -> link.Hello:
    """A device's first message.

    Raises:
        FormatError: it is no Hello, too long, or of a wire version that is not served.
    """
    if not isinstance(first, link.DeviceMessage) or first.WhichOneof("kind") != "hello":
        raise FormatError("the first message must be Hello")
    hello: link.Hello = first.hello
    if hello.wire_version < OLDEST_WIRE_VERSION:
        raise FormatError(
            f"wire version {hello.wire_version} is not served, the oldest is {OLDEST_WIRE_VERSION}; "
            "install a newer fedge on the device"
        )
    texts = [*(text for task in hello.tasks for text in (task.name, task.digest)), *hello.tags]
    if len(hello.tasks) > MAX_ITEMS or len(hello.tags) > MAX_ITEMS or len(hello.working_on) > MAX_WORKING_ON:
        raise FormatError(f"Hello: more than {MAX_ITEMS} tasks or tags, or {MAX_WORKING_ON} messages")
    if any(len(text) > MAX_TEXT for text in (*texts, *hello.working_on, hello.fedge_version)):
        raise FormatError(f"Hello: a name, tag or message id has more than {MAX_TEXT} characters")
    hello.DiscardUnknownFields()  # of a newer device, or ballast: kept as long as the connection
    return hello


class Connection:
    """The outgoing side of a stream. It holds ids, not contents: what waits stays small."""

    def __init__(self, peer: Peer, tier: str, hello: link.Hello, version: int) -> None:
        self.peer = peer
        self.version = version
        self.hello = hello
        self.member = Member(
            peer.device_id,
            peer.node_id,
            tier,
            offered((task.name, task.digest) for task in hello.tasks),
            frozenset(hello.tags),
            version,
            time.time(),
        )
        self.woken = asyncio.Event()
        self.ended = False
        self.superseded = False
        self.error: FedgeError | None = None
        self._ready: list[link.HubMessage] = []
        self._work: dict[str, None] = {}  # ids in order, each once: at most what is open for the device
        self._cancels: dict[str, None] = {}

    def post(self, message: link.HubMessage) -> None:
        """Send a message that is ready: Welcome, or a bundle, which replaces one that still waits."""
        self._ready = [m for m in self._ready if m.WhichOneof("kind") != message.WhichOneof("kind")]
        self._ready.append(message)
        self.woken.set()

    def post_work(self, message_id: str) -> None:
        """Send the Work of a message."""
        self._work[message_id] = None
        self.woken.set()

    def post_cancel(self, message_id: str) -> None:
        """Say that nobody waits for an answer any more; a Work that has not gone yet does not go."""
        if message_id in self._work:
            del self._work[message_id]
        elif self.version >= 2:
            self._cancels[message_id] = None
            self.woken.set()

    def next(self, exchange: Exchange) -> link.HubMessage | None:
        """What to write now; None: nothing waits."""
        if self._ready:
            return self._ready.pop(0)
        if self._cancels:
            message_id = next(iter(self._cancels))
            del self._cancels[message_id]
            return link.HubMessage(cancel=link.Cancel(message_id=message_id))
        while self._work:
            message_id = next(iter(self._work))
            del self._work[message_id]
            if (work := exchange.work(message_id)) is not None:
                return link.HubMessage(work=work)
        return None

    def end(self, error: FedgeError | None, *, superseded: bool = False) -> None:
        """End the stream as soon as its sender looks."""
        if not self.ended:
            self.ended, self.error, self.superseded = True, error, superseded
            self.woken.set()
