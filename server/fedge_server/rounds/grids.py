"""What a Grid may be able to do besides carrying messages; the loop does without where it cannot."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Final, Protocol, runtime_checkable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

_log = logging.getLogger("fedge.rounds")
POLL_S: Final = 1.0


class OwnGrid(Grid):
    """What our Grids have in common: a message is Flower's own."""

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


@runtime_checkable
class Summing(Protocol):
    """A Grid in which one reply may stand for many clients: a simulation, or a gateway on the way."""

    @property
    def can_sum(self) -> bool:
        """Whether it does for this run; where clients change their answers on the way, it cannot."""
        ...

    def sum_updates(
        self, message: Message, node_ids: Sequence[int], *, timeout: float | None, enough: int
    ) -> Iterable[Message]:
        """Ask all these nodes the same, and iterate over partial sums and over errors of single clients.

        Args:
            message: what each of them is sent, addressed to any one.
            node_ids: whom to ask.
            timeout: seconds after which nobody is waited for.
            enough: nobody is waited for once so many updates are in the sums.
        """
        ...

    def sum_moments(
        self, message: Message, node_ids: Sequence[int], *, timeout: float | None
    ) -> Iterable[Message]:
        """The same for moments, which are sums already."""
        ...


@runtime_checkable
class Simulated(Protocol):
    """A Grid with a clock of its own, and clients that are not always there."""

    elapsed_s: float  # simulated seconds since the run began; set when a run is resumed

    def begin_round(self, number: int) -> None:
        """Forget what clients have kept in this round or a later one: it was not committed."""
        ...

    def online(self, node_ids: Sequence[int]) -> list[int]:
        """Those that could be asked now, in the same order."""
        ...


@runtime_checkable
class Dropping(Protocol):
    """A Grid that can be told that nobody waits for an answer any more, or needs what it has brought."""

    def drop_messages(self, message_ids: Sequence[str]) -> None:
        """Let go of these messages, answered or not."""
        ...


@runtime_checkable
class Identified(Protocol):
    """A Grid whose node ids are hashes of devices' own keys (`fedge.identity`)."""

    @property
    def identified(self) -> bool:
        """Whether they are."""
        ...


def nodes_of(grid: Grid) -> Sequence[int]:
    """The ids of all nodes in ascending order; of a simulation a range, which lists nobody.

    Where there is none yet, as on a SuperLink that has just started, it waits, as Flower's strategies do.
    """
    while True:
        found = grid.get_node_ids()
        if isinstance(found, range):
            return found
        if nodes := sorted(found):
            return nodes
        _log.warning("waiting for clients: none is connected")
        time.sleep(POLL_S)  # Flower's Grid can only be asked
