"""A Flower Grid whose clients live in this process and train together, in the order of simulated time."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flwr.app import Message
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedge.dataset import Examples, Indices
from fedge.learning.messages import ARRAYS, arrays_named
from fedge_server.rounds.closing import payload_bytes
from fedge_server.rounds.grids import OwnGrid
from fedge_simulations.course import Course, Fate, Ring, Steady
from fedge_simulations.sizes import answer_bytes, most_examples, passes, sized
from fedge_simulations.states import States
from fedge_simulations.summing import Holders, clients_in, failure, sum_of, sum_of_moments
from fedge_simulations.trainers import OneByOne, Trainers
from fedge_simulations.working import RUN_ID, ClientCall, Clients, Pending, UserConfig

__all__ = ["RUN_ID", "SERVER_NODE", "ClientCall", "UserConfig", "VectorGrid"]

SERVER_NODE = 0xFED


class VectorGrid(OwnGrid):
    """Clients of one process; neither app can tell that it is no network.

    A client works when its reply is due on the simulated clock, so one that is cut off by quorum or deadline
    costs nothing, or at most as much as the few that would be trained beside it. What a client raises becomes
    its error reply, as on a real Grid.
    """

    def __init__(
        self,
        client_app: ClientCall,
        node_configs: Sequence[UserConfig],
        run_config: Mapping[str, bool | float | int | str],
        *,
        trainers: Trainers | None = None,
        course: Course | None = None,
        holders: Holders | None = None,
        sums: bool = False,
        states: States | None = None,
    ) -> None:
        """Make one node per node_config; node ids count from 1.

        Args:
            client_app: what every node runs.
            node_configs: of the nodes; looked at one by one when a node is asked.
            run_config: what every node's context carries.
            trainers: does the jobs that clients hand over; None: one after the other.
            course: what befalls clients; None: all answer at once.
            holders: who holds what, where that is known.
            sums: clients' updates may be added up without running their app, which does nothing else.
            states: what clients remember; None: kept in memory.
        """
        self._trainers: Trainers = trainers or OneByOne()
        self._course: Course = course or Steady()
        self._holders, self._sums, self._states = holders, sums, states or States()
        self._clients = Clients(client_app, node_configs, run_config, self._trainers, self._states)
        self._pending: dict[str, Pending] = {}
        self._asked = 0  # messages that were sent together
        self._attackers: list[Pending] = []  # of these
        self._rings: dict[str, Ring] = {}  # likewise, by attack
        self._sequence = 0
        self.round = 0
        self.sent_s = 0.0  # simulated seconds of the run when the last messages were sent
        self.clock_s = 0.0  # since the last send_and_receive
        self._before_s = 0.0  # of all earlier calls
        # Flower keeps one identity per process; Message() reads it.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE, 1

    def close(self) -> None:
        """Give back what doing the clients' jobs took."""
        self._trainers.close()

    def set_run(self, run: Run) -> None:
        """Nothing to do: there is one run."""

    @property
    def run(self) -> Run:
        """A run record without an app behind it."""
        return Run.create_empty(RUN_ID)

    @property
    def elapsed_s(self) -> float:
        """Simulated seconds since the run began."""
        return self._before_s + self.clock_s

    @elapsed_s.setter
    def elapsed_s(self, seconds: float) -> None:
        self._before_s, self.clock_s = seconds, 0.0

    def begin_round(self, number: int) -> None:
        """Count what clients do and keep from now on to this round."""
        if number > self.round and self._course.pause_s:  # a resumed run begins its round twice
            self.elapsed_s += self._course.pause_s
        self.round = number
        self._states.begin_round(number)
        self._course.begin_round(number)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, as a range."""
        return range(1, len(self._clients) + 1)

    def online(self, node_ids: Sequence[int]) -> list[int]:
        """Those that are there now."""
        return self._course.online(node_ids, self.elapsed_s)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send; each reply arrives when the clients' course says, on the simulated clock."""
        self.sent_s = self.elapsed_s
        self._forget_rings()
        ids = []
        for (_, size), group in itertools.groupby(sized(messages), key=lambda each: each[0]):
            sent = [message for _, message in group]
            asked = [message.metadata.dst_node_id for message in sent]
            fates = self._fates(
                asked,
                sent[0],
                size,
                answer_bytes(sent[0], size),
                [most_examples(message) for message in sent],
            )
            for message, fate in zip(sent, fates, strict=True):
                self._sequence += 1
                message_id = f"m{self._sequence}"
                message.metadata.__dict__["_message_id"] = message_id  # as Flower's in-memory Grid sets it
                arrives = self.clock_s + fate.arrives_s
                item = self._pending[message_id] = Pending(arrives, self._sequence, message, fate)
                if fate.attack and not fate.lost:
                    self._attackers.append(item)
                ids.append(message_id)
        self._asked = len(ids)
        return ids

    def _fates(
        self,
        node_ids: Sequence[int],
        message: Message,
        bytes_down: int,
        bytes_up: int,
        most: Sequence[float] | None = None,
    ) -> list[Fate]:
        holders = self._holders
        sizes = [holders.size(node_id) if holders is not None else 0 for node_id in node_ids]
        if most is not None:
            sizes = [int(min(size, limit)) for size, limit in zip(sizes, most, strict=True)]
        return self._course.fates(
            node_ids,
            kind=message.metadata.message_type,
            round=self.round,
            clock_s=self.sent_s,
            examples=sizes,
            bytes_down=bytes_down,
            bytes_up=bytes_up,
            passes=passes(message),
        )

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that arrive next: those due now, else the clock moves on to the earliest one.

        Replies that arrive at the same simulated time come together, in the order of sending.
        """
        under_way = sorted(self._pending[i] for i in message_ids if i in self._pending)
        if not under_way or math.isinf(under_way[0].arrives):
            return []
        self.clock_s = max(self.clock_s, under_way[0].arrives)
        due = [item for item in under_way if item.arrives <= self.clock_s]
        replies = []
        for i, item in enumerate(due):
            self._clients.work(item, under_way[i + 1 :])  # who answers later may well work along with it
            replies.append(self._deliver(item))
        return replies

    def drop_messages(self, message_ids: Sequence[str]) -> None:
        """Nobody waits for these any more."""
        for message_id in message_ids:
            self._pending.pop(message_id, None)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send, and iterate over replies as they arrive until `timeout` simulated seconds have passed.

        The replies can be iterated again. Whatever an earlier call still had under way is dropped: a
        synchronous round has closed before the next one opens.
        """
        self._restart()
        return _Replies(self, self.push_messages(messages), timeout)

    def _restart(self) -> None:
        self._pending.clear()
        self._forget_rings()
        # Each call's clock starts at 0: durations then compare with the deadline alike in every round.
        self._before_s, self.clock_s = self._before_s + self.clock_s, 0.0

    def replies_to(self, message_ids: Sequence[str], deadline_s: float | None) -> Iterator[Message]:
        """Replies as they arrive, until the deadline (a time on this call's clock) or there are no more."""
        queue = sorted(self._pending[i] for i in message_ids if i in self._pending)
        last = math.inf if deadline_s is None else deadline_s
        due = [item for item in queue if item.arrives <= last and math.isfinite(item.arrives)]
        for i, item in enumerate(due):
            if item.message.metadata.message_id not in self._pending:
                return  # a later call has dropped it
            self._clients.work(item, due[i + 1 :])
            self.clock_s = max(self.clock_s, item.arrives)
            yield self._deliver(item)
        if len(due) < len(queue) and deadline_s is not None:
            self.clock_s = max(self.clock_s, deadline_s)

    def _deliver(self, item: Pending) -> Message:
        """Hand out a reply."""
        del self._pending[item.message.metadata.message_id]
        reply = self._clients.done(item)
        if item.fate.attack and not reply.has_error():
            reply = self._course.attack(item.fate, item.message, reply, lambda: self._ring_of(item))
        item.reply = None  # what the caller lets go of is kept by nobody
        return reply

    def _ring_of(self, item: Pending) -> Ring:
        """Those who make an attacker's attack, whether or not their answers will be waited for."""
        attack = item.fate.attack
        if attack not in self._rings:
            mates = [mate for mate in self._attackers if mate.fate.attack == attack]
            mates.sort(key=lambda mate: mate.message.metadata.dst_node_id)
            for i, mate in enumerate(mates):
                self._clients.work(mate, mates[i + 1 :])
            replies = [mate.reply for mate in mates if mate.reply is not None and mate.reply.has_content()]
            answers = tuple(arrays_named(reply.content, ARRAYS) for reply in replies)
            self._rings[attack] = Ring(answers, self._asked)
        return self._rings[attack]

    def _forget_rings(self) -> None:
        self._attackers, self._rings = [], {}

    def held_by(self, node_id: int) -> Indices:
        """Positions of the examples that a node held when it was last sent something."""
        return self._holders_there().indices(node_id, self.round, self.sent_s)

    def believed_by(self, node_id: int, own: Examples, classes: int) -> Examples:
        """What a node takes for its examples."""
        return self._course.believed(node_id, own, classes, round=self.round)

    @property
    def can_sum(self) -> bool:
        """Whether clients' updates may be added up without running their app."""
        known = self._holders is not None and self._sums
        return known and self._trainers.can_sum and not self._course.attacks

    def sum_updates(
        self, message: Message, node_ids: Sequence[int], *, timeout: float | None, enough: int
    ) -> Iterator[Message]:
        """Partial sums of the clients that are in, and an error for each that failed.

        The clock says beforehand who is in. When one of them fails, those that arrive next take its place.
        """
        arriving = self._arrivals(message, node_ids)
        held = 0
        while held < enough:
            group, lost = self._next(arriving, enough - held, timeout)
            for node_id, reason in lost:
                yield failure(message, node_id, reason)
            if not group:
                return
            # In a fixed order: sums are not associative in floating point.
            for reply in sum_of(
                message, sorted(group), self._holders_there(), self._trainers, self.round, self.sent_s
            ):
                held += 0 if reply.has_error() else clients_in(reply)
                yield reply

    def sum_moments(
        self, message: Message, node_ids: Sequence[int], *, timeout: float | None
    ) -> Iterator[Message]:
        """One reply with the moments of all that answer in time, and an error for each that failed."""
        arriving = self._arrivals(message, node_ids)
        group, lost = self._next(arriving, len(node_ids), timeout)
        for node_id, reason in lost:
            yield failure(message, node_id, reason)
        if group:
            yield sum_of_moments(message, sorted(group), self._holders_there(), self.round, self.sent_s)

    def _holders_there(self) -> Holders:
        assert self._holders is not None  # noqa: S101 - `can_sum` said so
        return self._holders

    def _arrivals(self, message: Message, node_ids: Sequence[int]) -> list[tuple[float, int, int, str]]:
        """When each answer arrives: (seconds on this call's clock, order of sending, node, why lost)."""
        self._restart()
        self.sent_s = self.elapsed_s
        size = payload_bytes(message)
        fates = self._fates(node_ids, message, size, answer_bytes(message, size))
        arriving = [
            (fate.arrives_s, order, node_id, fate.lost)
            for order, (node_id, fate) in enumerate(zip(node_ids, fates, strict=True))
        ]
        heapq.heapify(arriving)
        return arriving

    def _next(
        self, arriving: list[tuple[float, int, int, str]], wanted: int, timeout: float | None
    ) -> tuple[list[int], list[tuple[int, str]]]:
        """So many clients that answer next by the deadline, and those that are lost meanwhile."""
        last = math.inf if timeout is None else timeout
        group: list[int] = []
        lost: list[tuple[int, str]] = []
        while arriving and len(group) < wanted and arriving[0][0] <= last and math.isfinite(arriving[0][0]):
            arrives, _, node_id, reason = heapq.heappop(arriving)
            self.clock_s = max(self.clock_s, arrives)
            if reason:
                lost.append((node_id, reason))
            else:
                group.append(node_id)
        if len(group) < wanted and arriving and timeout is not None:
            self.clock_s = max(self.clock_s, timeout)
        return group, lost


class _Replies:
    """Replies of one round: computed when first reached, remembered for a second pass."""

    def __init__(self, grid: VectorGrid, ids: list[str], deadline_s: float | None) -> None:
        self._more = grid.replies_to(ids, deadline_s)
        self._seen: list[Message] = []

    def __iter__(self) -> Iterator[Message]:
        yield from self._seen
        for reply in self._more:
            self._seen.append(reply)
            yield reply
