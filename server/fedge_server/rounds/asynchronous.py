"""Who is at work, and from which model: rounds that close while clients work on.

A round is one step of the global model. Whoever has answered is replaced at once, from the newest model, so
that as many clients as a round asks for are at work at any time; nobody waits for a slow one.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from flwr.app import Message, MetricRecord
from flwr.serverapp import Grid

from fedge.config import Config
from fedge.learning.messages import ARRAYS, EXAMPLES, METRICS, arrays_named, from_record, to_record
from fedge.learning.state import NamedArrays
from fedge.wire.arrays import put, records_of
from fedge_server.rounds.closing import Admit, Collected, payload_bytes, payload_bytes_of
from fedge_server.rounds.grids import Dropping, Simulated, nodes_of
from fedge_server.rounds.record import SILENT, STALE, Rejected
from fedge_server.rounds.sampling import cohort_size, draw, key_of
from fedge_server.rounds.validation import Rules, UnfitError, Valid, validated
from fedge_server.strategies.asynchronous import Asynchronous

PATIENCE_S: Final = 3600.0  # for one answer, where no deadline is set: as long as Flower waits
HOPELESS: Final = 10  # answers that come to nothing, for each client at work, with which a round closes
PAUSE_S: Final = 0.05  # between two looks at a Grid that can only be asked

Make = Callable[[Sequence[int]], Sequence[Message]]
"""The messages that have these clients train from the newest model."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What one client is at."""

    node_id: int
    version: int  # the round that was under way when it was asked
    sent_s: float  # by `_now`


@dataclass(slots=True)
class UnderWay:
    """Clients at work across rounds. A run that is taken up again begins with none."""

    grid: Grid
    seed: int
    at_once: int  # clients at work at any time
    patience_s: float  # for one answer
    max_staleness: int  # in rounds: with older models nothing is done any more
    _open: dict[str, _Work] = field(default_factory=dict)  # by message id
    _models: dict[int, NamedArrays] = field(default_factory=dict)  # what was sent, by version
    _arrived: deque[Message] = field(default_factory=deque)  # that nobody has looked at
    _answered: dict[str, _Work] = field(default_factory=dict)  # of these, and of those in use
    _draws: int = 0  # of this round

    @classmethod
    def of(cls, grid: Grid, config: Config, strategy: Asynchronous) -> UnderWay:
        """Nobody yet; as many as a synchronous round would ask will be."""
        at_once = cohort_size(len(nodes_of(grid)), config.rounds)
        patience_s = config.rounds.deadline_s or PATIENCE_S
        return cls(grid, config.seed, at_once, patience_s, strategy.max_staleness)

    def replies(
        self, number: int, arrays: NamedArrays, make: Make, collected: Collected
    ) -> Iterator[Message]:
        """Answers as they arrive; everybody who has answered is replaced.

        There is no end of them, unless so many come to nothing that waiting for more has no sense.

        Args:
            number: of the round.
            arrays: what clients are sent.
            make: their messages.
            collected: is told who was asked, what was sent, and whose answer is waited for no longer.
        """
        self._models[number], self._draws = arrays, 0
        self._forget()
        while len(collected.rejected) < HOPELESS * self.at_once:
            self._fill(number, make, collected)
            if not self._arrived:
                self._pull()
                self._give_up(collected)
            while self._arrived:
                collected.asked += 1
                yield self._arrived.popleft()
                self._fill(number, make, collected)

    def admit(self, rules: Rules, number: int) -> Admit:
        """Updates that are not too old; a message is answered once, since it is waited for until then.

        Args:
            rules: of the round.
            number: of the round.
        """

        def look(reply: Message, collected: Collected) -> Valid:
            collected.bytes_up += payload_bytes(reply)
            work = self._answered[reply.metadata.reply_to_message_id]
            if (age := number - work.version) > self.max_staleness:
                raise UnfitError(
                    f"began with the model of {age} rounds ago, over {self.max_staleness}", STALE
                )
            return validated(reply, rules)

        return look

    def moved(
        self, updates: Iterable[Message], number: int, strategy: Asynchronous, collected: Collected
    ) -> Iterator[Message]:
        """Valid updates, moved to where the global model stands in this round."""
        for update in updates:
            work = self._answered[update.metadata.reply_to_message_id]
            age, start, now = number - work.version, self._models[work.version], self._models[number]
            collected.ages.append(age)
            trained = from_record(arrays_named(update.content, ARRAYS))
            arrays = {
                name: strategy.moved(now[name], start[name], value, age) if value.dtype.kind == "f" else value
                for name, value in trained.items()
            }
            put(update.content, {ARRAYS: to_record(arrays, shared=False)})
            if strategy.weighting == "clients":
                records_of(update.content, MetricRecord)[METRICS][EXAMPLES] = 1
            yield update

    def _fill(self, number: int, make: Make, collected: Collected) -> None:
        """Have as many at work as there should be; whose answer nobody has looked at yet is one of them."""
        busy = {work.node_id for work in self._open.values()}
        busy |= {reply.metadata.src_node_id for reply in self._arrived}
        if len(busy) >= self.at_once:
            return
        chosen = self._choose(number, busy)
        sent = list(make(chosen)) if chosen else []
        collected.bytes_down += payload_bytes_of(sent)
        for message_id, message in zip(self.grid.push_messages(sent), sent, strict=True):
            self._open[message_id] = _Work(message.metadata.dst_node_id, number, self._now())

    def _choose(self, number: int, busy: set[int]) -> list[int]:
        nodes, free = nodes_of(self.grid), self.at_once - len(busy)
        self._draws += 1
        purpose = f"asynchronous {self._draws}"
        wanted = min(free + len(busy), len(nodes))
        drawn = random.Random(key_of(self.seed, number, purpose)).sample(nodes, wanted)  # noqa: S311 - a choice
        there = self.grid.online(drawn) if isinstance(self.grid, Simulated) else drawn
        chosen = [node for node in there if node not in busy][:free]
        if not chosen and not busy:  # time goes on until somebody is there
            return draw(self.grid, nodes, free, seed=self.seed, number=number, purpose=purpose)
        return chosen

    def _pull(self) -> None:
        """Take what is there; where it can only be asked, pause."""
        found = self.grid.pull_messages(list(self._open))
        for reply in found:
            message_id = reply.metadata.reply_to_message_id
            if message_id in self._open:
                self._answered[message_id] = self._open.pop(message_id)
                self._arrived.append(reply)
        if found:
            return
        if not isinstance(self.grid, Simulated):
            time.sleep(PAUSE_S)
        elif self._open:  # nobody at work will ever answer
            first = min(work.sent_s for work in self._open.values())
            self.grid.elapsed_s = max(self.grid.elapsed_s, first + self.patience_s)

    def _give_up(self, collected: Collected) -> None:
        """Wait no longer for whoever has taken too long."""
        now = self._now()
        late = [i for i, work in self._open.items() if now - work.sent_s >= self.patience_s]
        for message_id in late:
            node_id = self._open.pop(message_id).node_id
            collected.asked += 1
            collected.rejected.append(Rejected(node_id, f"no answer in {self.patience_s:g} s", SILENT))
        self._drop(late)

    def _forget(self) -> None:
        """Let go of what the last round has used, and of models that nobody at work has begun with."""
        waiting = {reply.metadata.reply_to_message_id for reply in self._arrived}
        self._drop([i for i in self._answered if i not in waiting])
        self._answered = {i: work for i, work in self._answered.items() if i in waiting}
        newest = max(self._models)
        used = {work.version for work in (*self._open.values(), *self._answered.values())} | {newest}
        self._models = {
            version: arrays
            for version, arrays in self._models.items()
            if version in used and newest - version <= self.max_staleness
        }

    def _drop(self, message_ids: Sequence[str]) -> None:
        if message_ids and isinstance(self.grid, Dropping):
            self.grid.drop_messages(message_ids)

    def _now(self) -> float:
        return self.grid.elapsed_s if isinstance(self.grid, Simulated) else time.monotonic()
