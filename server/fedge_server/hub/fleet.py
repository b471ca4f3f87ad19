"""Which devices are online, what they offer and how fast they answer: rules over values, no sockets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

NEWEST_WEIGHT: Final = 0.3  # of the newest answer's seconds in the moving average


@dataclass(frozen=True, slots=True)
class Member:
    """A device that is connected, as it said Hello."""

    device_id: str
    node_id: int
    tier: str
    tasks: Mapping[str, str]  # name to digest
    tags: frozenset[str]
    wire_version: int
    since: float  # Unix seconds


@dataclass(frozen=True, slots=True)
class Selection:
    """Which devices a round asks for."""

    task: str
    task_digest: str
    tiers: frozenset[str] = frozenset()  # any of these; empty: all
    tags: frozenset[str] = frozenset()  # all of these
    max_seconds: float = 0.0  # 0: no limit


@dataclass(slots=True)
class Fleet:
    """Everybody who is connected, by node id, and how long everybody's answers have been taking."""

    members: dict[int, Member] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)  # moving averages; they outlive a connection

    def join(self, member: Member) -> None:
        """A device has connected; it takes the place of its earlier connection."""
        self.members[member.node_id] = member

    def leave(self, member: Member) -> bool:
        """A connection has ended; False when the device has a newer one and so is still here."""
        if self.members.get(member.node_id) is not member:
            return False
        del self.members[member.node_id]
        return True

    def tags(self, node_id: int) -> tuple[str, ...]:
        """What a device called itself when it connected, sorted; none while it is away."""
        member = self.members.get(node_id)
        return () if member is None else tuple(sorted(member.tags))

    def answered(self, node_id: int, seconds: float) -> None:
        """Take an answer's seconds, from work sent to answer accepted, into the device's average."""
        before = self.seconds.get(node_id)
        average = seconds if before is None else before + NEWEST_WEIGHT * (seconds - before)
        self.seconds[node_id] = average

    def select(self, wanted: Selection) -> list[int]:
        """Node ids of the members that match, ascending."""
        return sorted(member.node_id for member in self.members.values() if self._matches(member, wanted))

    def _matches(self, member: Member, wanted: Selection) -> bool:
        return (
            member.tasks.get(wanted.task) == wanted.task_digest
            and (not wanted.tiers or member.tier in wanted.tiers)
            and wanted.tags <= member.tags
            and (not wanted.max_seconds or self.seconds.get(member.node_id, 0.0) <= wanted.max_seconds)
        )


def offered(tasks: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Name to digest; of a name that comes twice, the last."""
    return dict(tasks)
