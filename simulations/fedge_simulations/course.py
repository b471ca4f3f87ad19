"""What befalls clients on the simulated clock: when an answer arrives, who is there, what they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from flwr.app import ArrayRecord, Message

from fedge.dataset import Examples, Indices


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one message to one client."""

    arrives_s: float  # seconds after sending until its answer is there; infinite: never
    lost: str = ""  # why there is no answer but an error
    attack: str = ""  # what the client does to its update


@dataclass(frozen=True, slots=True)
class Ring:
    """Those who make the same attack on the same round."""

    answers: tuple[ArrayRecord, ...]  # what each has honestly learned, by node id
    asked: int  # clients of the round, honest ones too


class Course(Protocol):
    """Decides about clients; each of them by (seed, client, time) alone, so that nobody has to be listed.

    `round` is the number of the round that has begun, 0 before the first.
    """

    attacks: bool  # whether any client changes its update: then no sums are made
    pause_s: float  # simulated seconds that pass before each round

    def begin_round(self, number: int) -> None:
        """Hear that a round begins; after a resume, that nothing of it or a later one has happened."""
        ...

    def fates(
        self,
        node_ids: Sequence[int],
        *,
        kind: str,
        round: int,  # noqa: A002 - the word of the domain
        clock_s: float,
        examples: Sequence[int],
        bytes_down: int,
        bytes_up: int,
        passes: int = 1,
    ) -> list[Fate]:
        """What becomes of messages of type `kind` that are sent to these clients now.

        Those who train make so many `passes` over their examples.
        """
        ...

    def online(self, node_ids: Sequence[int], clock_s: float) -> list[int]:
        """Those that are there at that time."""
        ...

    def examples(
        self,
        node_id: int,
        indices: Indices,
        *,
        round: int,  # noqa: A002 - as above
        clock_s: float,
    ) -> Indices:
        """What the client holds then, of all that it ever holds."""
        ...

    def believed(
        self,
        node_id: int,
        own: Examples,
        classes: int,
        *,
        round: int,  # noqa: A002 - as above
    ) -> Examples:
        """What the client takes for its examples."""
        ...

    def attack(self, fate: Fate, sent: Message, reply: Message, ring: Callable[[], Ring]) -> Message:
        """The answer of a client whose fate names an attack; the ring is made up when it is asked for."""
        ...


class Steady:
    """Clients that are always there, honest, and answer at once."""

    attacks = False
    pause_s = 0.0

    def begin_round(self, number: int) -> None:
        """Nothing changes."""

    def fates(
        self,
        node_ids: Sequence[int],
        *,
        kind: str,
        round: int,  # noqa: A002 - the word of the domain
        clock_s: float,
        examples: Sequence[int],
        bytes_down: int,
        bytes_up: int,
        passes: int = 1,
    ) -> list[Fate]:
        """All arrive at once."""
        return [Fate(0.0)] * len(node_ids)

    def online(self, node_ids: Sequence[int], clock_s: float) -> list[int]:
        """All of them."""
        return list(node_ids)

    def examples(
        self,
        node_id: int,
        indices: Indices,
        *,
        round: int,  # noqa: A002 - the word of the domain
        clock_s: float,
    ) -> Indices:
        """All that it holds."""
        return indices

    def believed(
        self,
        node_id: int,
        own: Examples,
        classes: int,
        *,
        round: int,  # noqa: A002 - the word of the domain
    ) -> Examples:
        """As they are."""
        return own

    def attack(self, fate: Fate, sent: Message, reply: Message, ring: Callable[[], Ring]) -> Message:
        """Nobody attacks."""
        return reply
