"""What befalls clients on the simulated clock: when an answer arrives, who is there, what they hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message

from fedge.dataset import Indices
from fedge.learning import draws


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one message to one client."""

    arrives_s: float  # seconds after sending until its answer is there; infinite: never
    lost: str = ""  # why there is no answer but an error
    attack: str = ""  # what the client does to its update


class Course(Protocol):
    """Decides about clients; each of them by (seed, client, time) alone, so that nobody has to be listed."""

    attacks: bool  # whether any client changes its update: then no sums are made

    def fate(
        self,
        node_id: int,
        *,
        kind: str,
        round: int,  # noqa: A002 - the word of the domain
        clock_s: float,
        examples: int,
        bytes_down: int,
        bytes_up: int,
    ) -> Fate:
        """What becomes of a message of type `kind` that is sent now."""
        ...

    def online(self, node_ids: Sequence[int], clock_s: float) -> list[int]:
        """Those that are there at that time."""
        ...

    def examples(
        self,
        node_id: int,
        indices: Indices,
        *,
        round: int,  # noqa: A002 - the word of the domain
        clock_s: float,
    ) -> Indices:
        """What the client holds then, of all that it ever holds."""
        ...

    def attack(self, fate: Fate, sent: Message, reply: Message) -> Message:
        """The answer of a client whose fate names an attack."""
        ...


class Steady:
    """Clients that are always there and differ in speed alone.

    Training takes examples times passes times the client's slowness, a log-normal with median 1; without a
    backward pass a third of a pass is counted. Sending takes no time.
    """

    attacks = False

    def __init__(
        self, seconds_per_example: float = 0.0, *, passes: float = 1.0, speed_sigma: float = 0, seed: int = 0
    ) -> None:
        """Set the pace.

        Args:
            seconds_per_example: simulated, to train on one example once.
            passes: over a client's data in one round.
            speed_sigma: of the logarithm of the slowness.
            seed: of the run.
        """
        self._train_s, self._sigma, self._seed = seconds_per_example * passes, speed_sigma, seed
        self._look_s = seconds_per_example / 3

    def fate(
        self,
        node_id: int,
        *,
        kind: str,
        round: int,  # noqa: A002 - the word of the domain
        clock_s: float,
        examples: int,
        bytes_down: int,
        bytes_up: int,
    ) -> Fate:
        """It arrives after the work is done."""
        seconds = examples * (self._train_s if kind == "train" else self._look_s)
        return Fate(seconds * self._slowness(node_id) if self._sigma else seconds)

    def online(self, node_ids: Sequence[int], clock_s: float) -> list[int]:
        """All of them."""
        return list(node_ids)

    def examples(self, node_id: int, indices: Indices, *, round: int, clock_s: float) -> Indices:  # noqa: A002
        """All that it holds."""
        return indices

    def attack(self, fate: Fate, sent: Message, reply: Message) -> Message:
        """Nobody attacks."""
        return reply

    def _slowness(self, node_id: int) -> float:
        first, second = (_uniform(self._seed, node_id, word) for word in (1, 2))
        normal = math.sqrt(-2 * math.log(1 - first)) * math.cos(math.tau * second)
        return math.exp(self._sigma * normal)


def _uniform(*words: int) -> float:
    """A number from 0 to below 1 that the words decide."""
    return (draws.plain_key(*words) & (2**53 - 1)) * 2.0**-53
