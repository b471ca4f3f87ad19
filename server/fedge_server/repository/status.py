"""Every role as it is published: its version, keys and dates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from tuf.api.metadata import Signed

from fedge.delivery import role_of
from fedge_server.repository import edits
from fedge_server.repository.lifetimes import Lifetimes
from fedge_server.repository.signing import role_in
from fedge_server.repository.state import State


@dataclass(frozen=True, slots=True)
class RoleStatus:
    """A role as it is published."""

    role: str
    version: int
    expires: datetime
    keys: tuple[str, ...]  # key ids; none: a tier that is suspended
    threshold: int
    is_due: bool  # whether it should be signed again now


def statuses(state: State, lifetimes: Lifetimes, now: datetime) -> list[RoleStatus]:
    """Every role, the four of the root first.

    Args:
        state: as it is published.
        lifetimes: by which a role is due.
        now: the time in UTC.
    """
    found = []
    for role, signed in _signed(state):
        held = role_in(state.root if role in edits.TOP_ROLES else state.targets.signed, role)
        due = lifetimes.is_due(role, signed.expires, now) or not state.is_signed(role)
        found.append(
            RoleStatus(role, signed.version, signed.expires, tuple(held.keyids), held.threshold, due)
        )
    return found


def _signed(state: State) -> Iterator[tuple[str, Signed]]:
    yield "root", state.root
    for role in ("targets", "snapshot", "timestamp"):
        yield role, getattr(state, role).signed
    for tier, metadata in sorted(state.tiers.items()):
        yield role_of(tier), metadata.signed
