"""Choice of a round's clients by what is known of them: how much they hold, or when they were last asked.

`size` is scheme I of Li et al. 2020, "On the Convergence of FedAvg on Non-IID Data", arXiv:1907.02189: K
draws with replacement, each client with the probability p_k = n_k / sum n of its share of the data, and the
plain mean of what is drawn, a client that was drawn m times counting m times. So the mean is right on
average, and no client counts twice for its data: by being drawn and by its weight. Sizes are those of earlier
answers; who has not answered yet is taken for as large as the others are on average.

`round_robin` takes those first who were asked longest ago (Yang et al. 2020, "Scheduling Policies for
Federated Learning in Wireless Networks", arXiv:1908.06287), ties by lot: with N clients and K in a round
nobody who is online is passed over for N / K rounds. Who does not answer was asked too, and holds nobody up.

Only clients that were asked before are remembered, and a population that is a range is never listed while
most of it is unknown.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from flwr.app import Message, MetricRecord
from flwr.serverapp import Grid

from fedge.config import Config
from fedge.learning.messages import EXAMPLES, METRICS
from fedge.wire.arrays import records_of
from fedge_server.rounds.closing import Admit, Collected
from fedge_server.rounds.grids import Simulated
from fedge_server.rounds.sampling import TRIES, key_of, when_online
from fedge_server.rounds.validation import Valid

KNOWN: Final = "choice-known"  # name of what is remembered


@dataclass(slots=True)
class Choice:
    """Who is asked, in runs that choose by what is known of clients."""

    by: Literal["size", "round_robin"]
    known: dict[int, int] = field(default_factory=dict)  # node: its examples, or the round it was asked in
    drawn: Counter[int] = field(default_factory=Counter)  # in this round: how often each

    @classmethod
    def of(cls, config: Config) -> Choice | None:
        """None where all clients are alike."""
        by = config.rounds.sampling
        return cls(by) if by in ("size", "round_robin") else None

    def draw(self, grid: Grid, nodes: Sequence[int], wanted: int, *, seed: int, number: int) -> list[int]:
        """Clients for a round: `wanted` of them, or so many draws.

        Raises:
            RoundError: nobody is there, or comes online in two weeks.
        """
        pick = self._by_size if self.by == "size" else self._in_turn

        def attempt() -> list[int]:
            lot = random.Random(key_of(seed, number, self.by))  # noqa: S311 - a simulation's choice
            return list(_online(grid, pick(lot, nodes), min(wanted, len(nodes)), TRIES * wanted))

        found = when_online(grid, nodes, attempt, number)
        self.drawn = Counter(found)
        if self.by == "round_robin":
            self.known |= dict.fromkeys(found, number)
        return list(self.drawn)

    def _by_size(self, lot: random.Random, nodes: Sequence[int]) -> Iterator[int]:
        """Endless draws."""
        known = self._there(nodes)
        sums = list(accumulate(self.known[node] for node in known))
        total = sums[-1] if sums else 0
        others = _Others(nodes, known)
        unknown = (len(nodes) - len(known)) * (total / len(known) if known else 1.0)
        while True:
            place = bisect_right(sums, lot.random() * (total + unknown))
            if place == len(known) and unknown:
                yield others.one(lot)
            else:
                yield known[min(place, len(known) - 1)]  # the last, where a product is rounded up

    def _in_turn(self, lot: random.Random, nodes: Sequence[int]) -> Iterator[int]:
        """All of them, once each: those never asked, by lot, then the others, the longest ago first."""
        known = self._there(nodes)
        yield from _Others(nodes, known).all(lot)
        lot.shuffle(known)
        yield from sorted(known, key=self.known.__getitem__)

    def _there(self, nodes: Sequence[int]) -> list[int]:
        there: Collection[int] = nodes if isinstance(nodes, range) else set(nodes)
        return sorted(node for node in self.known if node in there)

    def around(self, admit: Admit) -> Admit:
        """The same; sizes are learned, and whoever was drawn by size counts as often as it was drawn."""
        if self.by != "size":
            return admit

        def counted(reply: Message, collected: Collected) -> Valid:
            valid = admit(reply, collected)
            node = reply.metadata.src_node_id
            self.known[node] = valid.examples
            records_of(reply.content, MetricRecord)[METRICS][EXAMPLES] = self.drawn[node]
            return valid

        return counted

    def memory(self) -> dict[str, npt.NDArray[Any]]:
        """What must be there after a restart."""
        return {KNOWN: np.array(sorted(self.known.items()), np.uint64).reshape(-1, 2)}

    def remembering(self, memory: Mapping[str, npt.NDArray[Any]]) -> Choice:
        """The same, with what `memory` gave."""
        rows = memory[KNOWN].tolist() if KNOWN in memory else []
        return Choice(self.by, {int(node): int(value) for node, value in rows})


def _online(grid: Grid, candidates: Iterator[int], wanted: int, most: int) -> Iterator[int]:
    """The first `wanted` of the candidates that are online, of `most` that are looked at."""
    looked = 0
    while wanted and looked < most:
        part = [node for node, _ in zip(candidates, range(wanted), strict=False)]
        if not part:
            return
        looked += len(part)
        found = grid.online(part) if isinstance(grid, Simulated) else part
        yield from found
        wanted -= len(found)


class _Others:
    """The clients of a population that nothing is known of."""

    def __init__(self, nodes: Sequence[int], known: Sequence[int]) -> None:
        self._nodes, self._known = nodes, set(known)
        few = 2 * len(self._known) > len(nodes)  # then listing costs no more than what is remembered
        self._listed = [node for node in nodes if node not in self._known] if few else None

    def one(self, lot: random.Random) -> int:
        """Any of them."""
        if self._listed is not None:
            return lot.choice(self._listed)
        while (node := self._nodes[lot.randrange(len(self._nodes))]) in self._known:
            pass
        return node

    def all(self, lot: random.Random) -> Iterator[int]:
        """Each of them once, by lot."""
        if self._listed is not None:
            yield from lot.sample(self._listed, len(self._listed))
            return
        seen = set(self._known)
        while 2 * len(seen) <= len(self._nodes):
            if (node := self._nodes[lot.randrange(len(self._nodes))]) not in seen:
                seen.add(node)
                yield node
        yield from _Others(self._nodes, list(seen)).all(lot)
