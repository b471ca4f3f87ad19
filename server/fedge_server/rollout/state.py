"""Where a rollout stands, what can happen to it, and what is to be done about it. Values only.

pending -> running <-> holding -> ... -> done          a stage runs until enough devices have it, then holds
              |  paused  |
              halted -> awaiting_signature -> rolling_back -> rolled_back
awaiting_signature -> pending                          a release that nobody has signed yet
any that is not over -> superseded                     by a newer release of the same tier
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from fedge_server.rollout.evidence import Tally
from fedge_server.rollout.plan import Plan, Stage

RULE: Final = "rule"  # who acts when nobody does


class Status(StrEnum):
    """See the top of the file."""

    AWAITING_SIGNATURE = "awaiting_signature"
    PENDING = "pending"
    RUNNING = "running"
    HOLDING = "holding"
    PAUSED = "paused"
    HALTED = "halted"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    DONE = "done"
    SUPERSEDED = "superseded"


OFFERING: Final = frozenset({Status.RUNNING, Status.HOLDING})
WATCHED: Final = OFFERING | {Status.PAUSED}  # evidence can halt it
OVER: Final = frozenset({Status.ROLLED_BACK, Status.DONE, Status.SUPERSEDED})


@dataclass(frozen=True, slots=True)
class Tallies:
    """What devices have reported of one version so far."""

    by_kind: Mapping[str, Tally] = field(default_factory=dict)  # criterion's kind -> counts
    installed: int = 0  # devices that have, or had, the version
    left: int = 0  # of those, devices that have the one that took its place

    def of(self, kind: str) -> Tally:
        """The counts of one criterion."""
        return self.by_kind.get(kind, Tally())


@dataclass(frozen=True, slots=True)
class State:
    """A rollout of one version to one tier."""

    id: str
    tier: str
    version: int
    base: int  # version that the tier had before, whose content a rollback brings back; 0: none
    plan: Plan
    status: Status = Status.PENDING
    stage: int = -1  # the newest that is open, from 0; -1: none
    at: float = 0.0  # Unix seconds of the last decision: time never goes back
    since: float = 0.0  # Unix seconds: holding since
    reason: str = ""  # why it is not going on
    before_pause: Status | None = None
    going_back: bool = False  # a rollback is ordered
    replacement: int | None = None  # version that took its place
    tallies: Tallies = field(default_factory=Tallies)
    forgiven: Mapping[str, Tally] = field(default_factory=dict)  # what an override has set aside

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        if not 0 <= self.base < self.version:
            raise ValueError(f"rollout {self.id}: version {self.version} is not above {self.base}")
        if not -1 <= self.stage < len(self.plan.stages):
            raise ValueError(f"rollout {self.id}: there is no stage {self.stage}")

    @property
    def offers(self) -> bool:
        """Whether devices that do not have the version yet may get it."""
        return self.status in OFFERING

    @property
    def current(self) -> Stage | None:
        """The newest stage that is open."""
        return self.plan.stages[self.stage] if self.stage >= 0 else None

    @property
    def due(self) -> float | None:
        """When time alone will change it, in Unix seconds."""
        if self.status is not Status.HOLDING or self.current is None:
            return None
        return self.since + self.current.hold_s

    def evidence(self, kind: str) -> Tally:
        """What counts for or against it: all that was reported since the last override."""
        return self.tallies.of(kind) - self.forgiven.get(kind, Tally())

    def to_json(self) -> dict[str, Any]:
        """Everything but the plan and the tallies, which have places of their own."""
        return {
            "id": self.id,
            "tier": self.tier,
            "version": self.version,
            "base": self.base,
            "status": str(self.status),
            "stage": self.stage,
            "at": self.at,
            "since": self.since,
            "reason": self.reason,
            "before_pause": self.before_pause and str(self.before_pause),
            "going_back": self.going_back,
            "replacement": self.replacement,
            "forgiven": {kind: [tally.judged, tally.bad] for kind, tally in self.forgiven.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], plan: Plan, tallies: Tallies) -> State:
        """What `to_json` wrote."""
        before = value["before_pause"]
        fields = dict(value) | {
            "status": Status(value["status"]),
            "before_pause": Status(before) if before else None,
            "forgiven": {kind: Tally(*counts) for kind, counts in value["forgiven"].items()},
        }
        return cls(plan=plan, tallies=tallies, **fields)

    def told(self, tallies: Tallies) -> State:
        """The same with newer tallies."""
        return replace(self, tallies=tallies)


@dataclass(frozen=True, slots=True)
class Signed:
    """The release is signed: it may begin."""

    who: str = RULE


@dataclass(frozen=True, slots=True)
class Started:
    """Somebody begins it."""

    who: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Tallied:
    """Devices have reported."""

    tallies: Tallies


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Nothing happened but time."""


@dataclass(frozen=True, slots=True)
class Paused:
    """Somebody stops it for a while."""

    who: str
    why: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """Somebody lets it go on; after a halt with an override and a reason only."""

    who: str
    why: str
    override: bool = False


@dataclass(frozen=True, slots=True)
class RollbackOrdered:
    """Somebody wants the release before it back."""

    who: str
    why: str


@dataclass(frozen=True, slots=True)
class Replaced:
    """The old content is published and signed under a new version."""

    version: int
    who: str = RULE


@dataclass(frozen=True, slots=True)
class Superseded:
    """A rollout of a newer release of the tier begins."""

    version: int
    who: str


Event = Signed | Started | Tallied | TimePassed | Paused | Resumed | RollbackOrdered | Replaced | Superseded


@dataclass(frozen=True, slots=True)
class Note:
    """Write into the audit trail; every change of a state comes with one."""

    who: str
    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Republish:
    """Sign and publish old content as a new version: devices never go down."""

    content_of: int  # version whose content
    above: int  # the new version must be higher than this


@dataclass(frozen=True, slots=True)
class SetBase:
    """From now on every device of the tier may have this version."""

    version: int


@dataclass(frozen=True, slots=True)
class RaiseFloor:
    """Nothing below this version is offered to the tier again."""

    version: int


Action = Note | Republish | SetBase | RaiseFloor
