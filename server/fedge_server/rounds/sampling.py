"""Which clients a round asks: decided by the seed and the round, at a cost that only the cohort decides."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedge.config import Rounds
from fedge.errors import RoundError
from fedge_server.rounds.grids import OwnGrid, Simulated

MANY: Final = 1000  # clients that moments and evaluation ask at most: beyond, a sample says as much
TRIES: Final = 100  # clients looked at for each that is wanted, before a round takes those that are online
WAIT_S: Final = 600.0  # simulated, until it is looked again whether anybody is online
MAX_WAITS: Final = 2016  # two weeks


def cohort_size(population: int, rounds: Rounds) -> int:
    """How many of so many clients a round asks: `cohort`, else the share `fraction`, at least one."""
    wanted = int(population * rounds.fraction) if rounds.cohort is None else rounds.cohort
    return min(max(wanted, 1), population)


def draw(grid: Grid, nodes: Sequence[int], wanted: int, *, seed: int, number: int, purpose: str) -> list[int]:
    """So many clients that are online, drawn without replacement from (seed, number, purpose).

    A population that is a range is never listed. Where nobody is online, simulated time goes on until
    somebody is.

    Args:
        grid: knows who is online, if it is simulated.
        nodes: the population.
        wanted: how many.
        seed: of the run.
        number: of the round.
        purpose: what they are asked for.

    Raises:
        RoundError: nobody is there, or comes online in two weeks.
    """
    key = key_of(seed, number, purpose)

    def attempt() -> list[int]:
        if isinstance(grid, Simulated):
            return _online(grid, nodes, wanted, key)
        return random.Random(key).sample(nodes, min(wanted, len(nodes)))  # noqa: S311 - a simulation's choice

    return when_online(grid, nodes, attempt, number)


def when_online(grid: Grid, nodes: Sequence[int], attempt: Callable[[], list[int]], number: int) -> list[int]:
    """What an attempt to choose clients gives, once it gives anybody.

    Raises:
        RoundError: nobody is there, or comes online in two weeks.
    """
    if not nodes:
        raise RoundError(f"round {number}: there are no clients")
    for _ in range(MAX_WAITS):
        if (found := attempt()) or not isinstance(grid, Simulated):
            return found
        grid.elapsed_s += WAIT_S
    raise RoundError(f"round {number}: no client is online, and none came in two simulated weeks")


def draw_each(grid: Grid, nodes: Sequence[int], share: float, *, seed: int, number: int) -> list[int]:
    """Each client by itself with this probability, of those that are online; there may be none.

    A mechanism is stronger as long as nobody knows who was drawn. In a simulation the seed decides; devices
    know the seed, so that among them a secret does.

    Args:
        grid: knows who is online, if it is simulated.
        nodes: the population.
        share: the probability, above 0, at most 1.
        seed: of the run.
        number: of the round.

    Raises:
        RoundError: nobody is there, or comes online in two weeks.
    """
    simulated = isinstance(grid, Simulated)
    draw(grid, nodes, 1, seed=seed, number=number, purpose="anybody")  # time goes on until somebody is there
    key = key_of(seed, number, "each") if simulated else secrets.randbits(128)
    count = int(np.random.default_rng(key).binomial(len(nodes), share))
    found = random.Random(key).sample(nodes, count)  # noqa: S311 - its key is secret where it must be
    return grid.online(found) if isinstance(grid, Simulated) else found


def key_of(seed: int, number: int, purpose: str) -> int:
    """What decides a choice in a round."""
    words = np.random.SeedSequence([seed, number, *purpose.encode()]).generate_state(4)
    return int.from_bytes(words.tobytes(), "little")


def _online(grid: Simulated, nodes: Sequence[int], wanted: int, key: int) -> list[int]:
    """Those online among a growing sample, until there are enough or TRIES times as many were looked at."""
    looked = min(wanted, len(nodes))
    limit = min(max(TRIES * wanted, MANY), len(nodes))
    while True:
        found = grid.online(random.Random(key).sample(nodes, looked))[:wanted]  # noqa: S311 - as above
        if len(found) >= min(wanted, len(nodes)) or looked >= limit:
            return found
        looked = min(4 * looked, limit)


class Cohort(OwnGrid):
    """What a strategy sees of the Grid while it makes its messages: the clients of this round alone."""

    def __init__(self, grid: Grid, node_ids: Sequence[int]) -> None:
        self._grid, self._node_ids = grid, list(node_ids)

    def get_node_ids(self) -> Iterable[int]:
        """The clients of this round."""
        return list(self._node_ids)

    def set_run(self, run: Run) -> None:
        """As the Grid does."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The Grid's."""
        return self._grid.run

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the Grid does."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the Grid does."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """As the Grid does."""
        return self._grid.send_and_receive(messages, timeout=timeout)
