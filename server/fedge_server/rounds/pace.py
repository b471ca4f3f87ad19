"""How fast each client is, as measured, and as much work for it as it can do by the deadline.

A client's seconds for an example, training and travelling together, are those of its answers: the mean of
the last and all before it. Whoever misses the deadline is taken for half as fast as would have met it, until
an answer tells more. Before all that a client works on all that it has.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedge.config import Config
from fedge.learning.messages import CONFIG, EXAMPLES, METRICS, MOST_EXAMPLES
from fedge.wire.arrays import records_of

MARGIN: Final = 0.8  # of the deadline: speeds vary
NODES, SECONDS, GUESSED = "pace-nodes", "pace-seconds", "pace-guessed"  # names of what is remembered


@dataclass(slots=True)
class Pace:
    """The speeds of a run's clients."""

    deadline_s: float
    least: int  # examples: a batch
    _seconds: dict[int, float] = field(default_factory=dict)  # for an example, by node id
    _guessed: set[int] = field(default_factory=set)  # those who have never answered in time
    _typical: float = 0.0  # examples of an answer in the last round

    @classmethod
    def of(cls, config: Config) -> Pace | None:
        """None where work is not to be fitted."""
        rounds = config.rounds
        if not rounds.fit_work or rounds.deadline_s is None:
            return None
        return cls(rounds.deadline_s, config.train.batch_size)

    def most(self, node_id: int) -> int | None:
        """Examples that a client can train on in time; None: nothing is known of it."""
        each = self._seconds.get(node_id)
        return None if each is None else max(int(MARGIN * self.deadline_s / each + 1e-9), self.least)

    def fitted(self, messages: Iterable[Message]) -> list[Message]:
        """The same messages, each with what its client can do."""
        found = list(messages)
        for message in found:
            if (most := self.most(message.metadata.dst_node_id)) is not None:
                told = {**records_of(message.content, ConfigRecord)[CONFIG], MOST_EXAMPLES: most}
                message.content = RecordDict({**message.content, CONFIG: ConfigRecord(told)})
        return found

    def watched(
        self, replies: Iterable[Message], asked: Sequence[int], now: Callable[[], float]
    ) -> Iterator[Message]:
        """The same replies; how long each took is measured.

        Args:
            replies: as they arrive.
            asked: node ids.
            now: seconds, of whatever clock.
        """
        began, missing, examples = now(), set(asked), []
        for reply in replies:
            node_id, took = reply.metadata.src_node_id, now() - began
            missing.discard(node_id)
            if (count := _examples(reply)) > 0 and node_id in asked:
                self._learn(node_id, took / count)
                examples.append(count)
            yield reply
        self._typical = statistics.median(examples) if examples else self._typical
        for node_id in missing:  # not where a quorum ends the round: then nobody comes here
            self._missed(node_id)

    def _learn(self, node_id: int, each: float) -> None:
        before = each if node_id in self._guessed else self._seconds.get(node_id, each)
        self._guessed.discard(node_id)
        self._seconds[node_id] = (each + before) / 2

    def _missed(self, node_id: int) -> None:
        count = min(self.most(node_id) or self._typical, self._typical) or self.least
        if node_id not in self._seconds:
            self._guessed.add(node_id)
        self._seconds[node_id] = max(2 * self.deadline_s / count, self._seconds.get(node_id, 0.0))

    def memory(self) -> dict[str, npt.NDArray[Any]]:
        """What must be there after a restart."""
        nodes = sorted(self._seconds)
        return {
            NODES: np.array([*nodes, -1], np.int64),  # the last: what is typical
            SECONDS: np.array([*(self._seconds[node] for node in nodes), self._typical], np.float64),
            GUESSED: np.array(sorted(self._guessed), np.int64),
        }

    def remembering(self, memory: Mapping[str, npt.NDArray[Any]]) -> Pace:
        """The same, with what `memory` gave."""
        if NODES not in memory:
            return self
        *nodes, _ = memory[NODES].tolist()
        *seconds, typical = memory[SECONDS].tolist()
        known, guessed = dict(zip(nodes, seconds, strict=True)), set(memory[GUESSED].tolist())
        return Pace(self.deadline_s, self.least, known, guessed, typical)


def _examples(reply: Message) -> int:
    """What it says that it has trained on; 0: it says nothing of the kind. Nobody has looked at it yet."""
    if reply.has_error():
        return 0
    metrics = records_of(reply.content, MetricRecord).get(METRICS)
    found = None if metrics is None else metrics.get(EXAMPLES)
    return found if isinstance(found, int) and not isinstance(found, bool) else 0
