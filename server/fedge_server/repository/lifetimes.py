"""How long each role's metadata is good for: short where the key is online, long where people must sign."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Final

from fedge.errors import UserError

Clock = Callable[[], datetime]
"""The time, in UTC."""

RENEW_BELOW: Final = 0.75  # of a lifetime left: a timestamp of 48 hours is signed again after 12
_ONLINE_MAXIMUM = timedelta(days=30)
_MAXIMUM = timedelta(days=10 * 365)


def utc_now() -> datetime:
    """The time by this machine's clock."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """From signature to expiry, by role; `docs/repository.md` gives the reasons."""

    root: timedelta = timedelta(days=365)  # people come together to sign it
    targets: timedelta = timedelta(days=365)  # a person signs it
    tier: timedelta = timedelta(days=90)  # signed with each release
    snapshot: timedelta = timedelta(days=7)  # a long weekend without a publisher
    timestamp: timedelta = timedelta(days=2)  # the longest that a mirror can hide a release

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        for item in fields(self):
            value = getattr(self, item.name)
            most = _ONLINE_MAXIMUM if item.name in ("snapshot", "timestamp") else _MAXIMUM
            if not isinstance(value, timedelta) or not timedelta(minutes=1) <= value <= most:
                raise UserError(
                    f"lifetime of {item.name}: {value!r}; it must be a minute to {most.days} days"
                )
        if self.timestamp > self.snapshot:
            raise UserError("lifetimes: a timestamp must not outlive the snapshot that it names")

    def of(self, role: str) -> timedelta:
        """The lifetime of a role; all tiers have the same."""
        by_role: dict[str, timedelta] = {item.name: getattr(self, item.name) for item in fields(self)}
        return by_role.get(role, self.tier)

    def is_due(self, role: str, expires: datetime, now: datetime) -> bool:
        """Whether metadata should be signed again."""
        return expires - now < RENEW_BELOW * self.of(role)
