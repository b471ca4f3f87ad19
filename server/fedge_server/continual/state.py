"""The values of the decision: policy, state, events."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Final

from fedge.errors import UserError

HAND, DRIFT, DATA, SCHEDULE = "hand", "drift", "data", "schedule"
CAUSES: Final = (HAND, DRIFT, DATA, SCHEDULE)  # the first that holds is named


@dataclass(frozen=True, slots=True)
class Policy:
    """What makes the server learn again, and how often it may.

    Raises:
        UserError: a number is out of range.
    """

    every_s: float | None = None  # schedule: after so long since the last cycle began; None: never for that
    drift: bool = True
    steady_s: float = 0.0  # an alarm of drift must stand for so long
    new_examples: int | None = None  # that devices hold more than at the last cycle; None: never for that
    min_gap_s: float = 86_400.0  # from the end of a cycle to the beginning of the next
    most_cycles: int = 7  # that may begin ...
    within_s: float = 7 * 86_400.0  # ... in so long
    max_gap_s: float = 7 * 86_400.0  # each failure doubles the gap, up to this

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        for name in ("every_s", "within_s", "max_gap_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"learn: {name} = {value:g}: must be above 0")
        for name in ("steady_s", "min_gap_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"learn: {name} = {value:g}: must be 0 or more")
        if self.most_cycles < 1 or (self.new_examples is not None and self.new_examples < 1):
            raise UserError("learn: most_cycles and new_examples must be 1 or more")


class Status(StrEnum):
    """Where the loop stands."""

    WATCHING = "watching"  # nothing to be done
    RUNNING = "running"  # rounds
    COMPRESSING = "compressing"
    RELEASING = "releasing"
    AWAITING_SIGNATURE = "awaiting signature"
    ROLLING_OUT = "rolling out"


@dataclass(frozen=True, slots=True)
class State:
    """All that the decision remembers; it is written down after each event."""

    status: Status = Status.WATCHING
    at: float = 0.0  # Unix seconds of the newest event; a clock that is set back stands still here
    since: float = 0.0  # when this status began
    cycle: int = 0  # number of the last that was begun: it names the run
    cause: str = ""  # of CAUSES, of the cycle under way
    why: str = ""
    begun: tuple[float, ...] = ()  # when cycles began, as far as the budget looks back
    ended: float = -math.inf  # when the last one ended
    failures: int = 0  # of the last cycles in a row
    alarm_since: float | None = None  # drift stands since then
    alarm_release: int = 0  # under which release
    answered: int = 0  # newest release whose drift a cycle has answered
    examples: int = 0  # that devices hold
    examples_before: int = 0  # at the last cycle
    asked: tuple[str, str] | None = None  # who, why
    version: int = 0  # of the release under way
    paused: bool = False  # nothing begins

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        values = asdict(self)
        values["ended"] = None if self.ended == -math.inf else self.ended
        return values

    @classmethod
    def from_json(cls, value: Any) -> State:
        """Of `to_json`."""
        found = {f.name: value[f.name] for f in fields(cls)}
        found["status"], found["begun"] = Status(found["status"]), tuple(found["begun"])
        found["ended"] = -math.inf if found["ended"] is None else found["ended"]
        found["asked"] = tuple(found["asked"]) if found["asked"] else None
        return cls(**found)


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Nothing but that."""


@dataclass(frozen=True, slots=True)
class Drift:
    """What the watch says."""

    stands: bool
    release: int  # newest under which it is looked for


@dataclass(frozen=True, slots=True)
class Examples:
    """How many devices hold, all together."""

    count: int


@dataclass(frozen=True, slots=True)
class Asked:
    """A person wants a cycle."""

    who: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Paused:
    """A person wants that nothing begins; what is under way goes on."""

    who: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """And again."""

    who: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """A person ends the cycle under way."""

    who: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """A step of the cycle is over."""

    cycle: int
    step: Status
    failed: str = ""  # why: any step may fail; empty: RUNNING, COMPRESSING or ROLLING_OUT is done


@dataclass(frozen=True, slots=True)
class Released:
    """What a cycle has made is there, for some of its tiers or for all."""

    cycle: int
    version: int  # the highest; 0: none is signed yet
    signed: bool  # for all tiers that are to be


@dataclass(frozen=True, slots=True)
class Signed:
    """What waited is signed."""

    cycle: int
    version: int  # the highest


Event = TimePassed | Drift | Examples | Asked | Paused | Resumed | Stopped | Ended | Released | Signed


@dataclass(frozen=True, slots=True)
class Note:
    """For the audit trail."""

    who: str
    what: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done now; doing it twice for the same cycle must do it once."""

    status: Status
    cycle: int = 0
    version: int = 0  # of the release, once there is one
    why: str = field(default="", compare=False)
