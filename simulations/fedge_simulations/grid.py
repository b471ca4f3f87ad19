"""A Flower Grid that runs clients one after the other in this process, in the order of simulated time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

UserConfig = dict[str, bool | float | int | str]

Duration = Callable[[Message], float]
"""Simulated seconds from sending a message until its reply arrives."""

RUN_ID, SERVER_NODE = 1, 0xFED


@dataclass(order=True, slots=True)
class _Pending:
    """A message under way."""

    arrives: float  # simulated seconds
    sequence: int  # breaks ties in the order of sending
    message: Message = field(compare=False)


class SequentialGrid(Grid):
    """Clients of one process; neither app can tell that it is no network.

    A client runs when its reply is due on the simulated clock, so one that is cut off by quorum or
    deadline costs nothing. What a client raises becomes its error reply, as on a real Grid.
    """

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: Sequence[UserConfig],
        run_config: Mapping[str, bool | float | int | str],
        duration: Duration = lambda _: 0.0,
    ) -> None:
        """Make one node per node_config; node ids count from 1."""
        self._app = client_app
        self._contexts = {
            node_id: Context(RUN_ID, node_id, dict(config), RecordDict(), dict(run_config))
            for node_id, config in enumerate(node_configs, start=1)
        }
        self._duration = duration
        self._pending: dict[str, _Pending] = {}
        self._sequence = 0
        self.clock_s = 0.0  # since the last send_and_receive
        self.elapsed_s = 0.0  # of all earlier calls
        # Flower keeps one identity per process; Message() reads it.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE, 1

    def set_run(self, run: Run) -> None:
        """Nothing to do: there is one run."""

    @property
    def run(self) -> Run:
        """A run record without an app behind it."""
        return Run.create_empty(RUN_ID)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes; all are online."""
        return list(self._contexts)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message from the server to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send; each reply arrives after the message's own duration on the simulated clock."""
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        self._sequence += 1
        message_id = f"m{self._sequence}"
        message.metadata.__dict__["_message_id"] = message_id  # as Flower's own in-memory Grid sets it
        arrives = self.clock_s + self._duration(message)
        self._pending[message_id] = _Pending(arrives, self._sequence, message)
        return message_id

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that arrive next: those due now, else the clock moves on to the earliest one.

        Replies that arrive at the same simulated time come together, in the order of sending.
        """
        under_way = [self._pending[message_id] for message_id in message_ids if message_id in self._pending]
        if not under_way:
            return []
        self.clock_s = max(self.clock_s, min(under_way).arrives)
        due = sorted(item for item in under_way if item.arrives <= self.clock_s)
        return [self._answer(item) for item in due]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send, and iterate over replies as they arrive until `timeout` simulated seconds have passed.

        The replies can be iterated again. Whatever an earlier call still had under way is dropped: a
        synchronous round has closed before the next one opens.
        """
        self._pending.clear()
        # Each call's clock starts at 0: durations then compare with the deadline alike in every round, and
        # a resumed run needs no clock of the run before it.
        self.elapsed_s, self.clock_s = self.elapsed_s + self.clock_s, 0.0
        return _Replies(self, self.push_messages(messages), timeout)

    def next_reply(self, message_ids: Iterable[str], deadline_s: float | None) -> Message | None:
        """The reply that arrives next, or None when none does by the deadline (a time on the clock)."""
        item = min((self._pending[i] for i in message_ids if i in self._pending), default=None)
        if item is None:
            return None
        if deadline_s is not None and item.arrives > deadline_s:
            self.clock_s = max(self.clock_s, deadline_s)
            return None
        self.clock_s = max(self.clock_s, item.arrives)
        return self._answer(item)

    def _answer(self, item: _Pending) -> Message:
        message = item.message
        del self._pending[message.metadata.message_id]
        try:
            # The same content goes to every client of a round; a copy of the records' table keeps one
            # client's mods from changing what the next one is sent. The arrays are shared, read-only.
            sent = copy.copy(message)
            sent.content = RecordDict(dict(message.content))
            return self._app(sent, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # noqa: BLE001 - a client's failure is its reply, whatever it was
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


class _Replies:
    """Replies of one round: computed when first reached, remembered for a second pass."""

    def __init__(self, grid: SequentialGrid, ids: list[str], deadline_s: float | None) -> None:
        self._grid, self._ids, self._deadline_s = grid, ids, deadline_s
        self._seen: list[Message] = []

    def __iter__(self) -> Iterator[Message]:
        yield from self._seen
        while (reply := self._grid.next_reply(self._ids, self._deadline_s)) is not None:
            self._seen.append(reply)
            yield reply
