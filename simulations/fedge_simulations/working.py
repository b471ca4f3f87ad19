"""Clients at work: a ClientApp answers each message, and those that train do so together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode

from fedge.learning.local import Job
from fedge_simulations.course import Fate
from fedge_simulations.states import States
from fedge_simulations.trainers import Trainers, Turn

UserConfig = dict[str, bool | float | int | str]
ClientCall = Callable[[Message, Context], Message]
"""A ClientApp, or what answers like one; it trains by `trainers.hand_over`, or as it likes."""

RUN_ID = 1


@dataclass(order=True, slots=True)
class Pending:
    """A message under way."""

    arrives: float  # simulated seconds; infinite: never
    sequence: int  # breaks ties in the order of sending
    message: Message = field(compare=False)
    fate: Fate = field(compare=False)
    context: Context | None = field(compare=False, default=None)  # once the client has worked
    reply: Message | None = field(compare=False, default=None)  # likewise


@dataclass(slots=True)
class _Working:
    """A client whose app has begun to answer."""

    item: Pending
    context: Context
    turn: Turn


class Clients:
    """Lets clients answer what they were sent; what a client raises becomes its error reply.

    Args:
        app: what every node runs.
        node_configs: of the nodes, whose ids count from 1; looked at one by one when a node is asked.
        run_config: what every node's context carries.
        trainers: does the jobs that clients hand over.
        states: what clients remember.
    """

    def __init__(
        self,
        app: ClientCall,
        node_configs: Sequence[UserConfig],
        run_config: Mapping[str, bool | float | int | str],
        trainers: Trainers,
        states: States,
    ) -> None:
        self._app, self._nodes, self._run_config = app, node_configs, dict(run_config)
        self._trainers, self._states = trainers, states

    def __len__(self) -> int:
        """How many there are."""
        return len(self._nodes)

    def work(self, item: Pending, later: Sequence[Pending]) -> None:
        """Let a client work, and those that come after it along with it as far as that is worth while."""
        if item.reply is not None:
            return
        waiting = self._begin(item)
        if not waiting:
            return
        wanted = self._trainers.at_once(waiting[0][1])
        for other in later:
            if len(waiting) >= wanted:
                break
            if other.reply is None:
                waiting += self._begin(other)
        while waiting:
            results = self._trainers.train([job for _, job in waiting])
            pairs = zip(waiting, results, strict=True)
            waiting = [more for (client, _), result in pairs for more in self._go_on(client, result)]

    def done(self, item: Pending) -> Message:
        """The reply of a client that has worked; only now has it really done what it did."""
        assert item.reply is not None  # noqa: S101 - `work` came before
        if item.context is not None:
            try:
                self._states.save(item.context.node_id, item.context.state)
                item.context = None
            except Exception as error:  # noqa: BLE001 - a client's failure is its reply, whatever it was
                return _error(item.message, error)
        return item.reply

    def _begin(self, item: Pending) -> list[tuple[_Working, Job]]:
        """Start a client; it has handed over a job, or answered already and is not in the list."""
        message = item.message
        if item.fate.lost:
            item.reply = Message(Error(ErrorCode.UNKNOWN, item.fate.lost), reply_to=message)
            return []
        node_id = message.metadata.dst_node_id
        # The same content goes to every client of a round; a copy of the records' table keeps one client's
        # mods from changing what the next one is sent. The arrays are shared, read-only.
        sent = Message.__new__(Message)  # its constructor looks at each of a dozen arguments
        sent.__dict__.update(message.__dict__, _content=message.content.copy())
        try:
            config = dict(self._nodes[node_id - 1])
            context = Context(RUN_ID, node_id, config, self._states.load(node_id), dict(self._run_config))
        except Exception as error:  # noqa: BLE001 - as above
            item.reply = _error(message, error)
            return []
        return self._go_on(_Working(item, context, Turn(self._app)), sent, context)

    def _go_on(self, client: _Working, *values: object) -> list[tuple[_Working, Job]]:
        """Let a client go on until it hands over a job, or answers and is not in the list."""
        try:
            found = client.turn.switch(*values)
        except Exception as error:  # noqa: BLE001 - as above
            client.item.reply = _error(client.item.message, error)
            return []
        if not client.turn.dead:
            return [(client, found)]
        client.item.reply, client.item.context = found, client.context
        return []


def _error(message: Message, error: Exception) -> Message:
    reason = f"{type(error).__name__}: {error}"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
