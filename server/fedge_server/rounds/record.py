"""What is written down about a round; a round counts when its record is committed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

Metric = float | list[float]
_NAMED: Final = 5
THRESHOLD: Final = 4.0  # robust deviations from which on an update stands out


CLIENT, AWAY, REFUSED, FORM, METRICS = "client", "away", "refused", "form", "metrics"
NOT_FINITE, NORM, UNASKED, STALE = "not_finite", "norm", "unasked", "stale"
SILENT, PROTOCOL = "silent", "protocol"
KINDS: Final = {
    CLIENT: "the client says that its work failed",
    AWAY: "its device went away, or is enrolled no longer",
    REFUSED: "the hub would not take its answer in",
    FORM: "other records, arrays or shapes than asked for, or bytes that are none",
    METRICS: "numbers beside the arrays that cannot be, such as its count of examples",
    NOT_FINITE: "NaN or infinite values",
    NORM: "its change is longer than `validate.max_norm`",
    UNASKED: "it was not asked, or answered twice",
    STALE: "it began with too old a model",
    SILENT: "it did not answer in time",
    PROTOCOL: "it did not keep to the protocol of secure aggregation",
}
"""Why an answer was not used, in one word; metrics count by it."""
HOSTILE: Final = frozenset({REFUSED, FORM, METRICS, NOT_FINITE, NORM, UNASKED, PROTOCOL})
"""Of these, what an honest device does not do: worth a look."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A client whose answer was not used, and why."""

    client: int
    reason: str
    kind: str = CLIENT  # of KINDS


@dataclass(frozen=True, slots=True)
class Score:
    """How much a client's update stood out among those of its round (fedge_server.rounds.anomalies)."""

    client: int
    distance: float  # from the median update, in robust deviations; below 0: nearer than most
    direction: float  # how far it went another way, likewise; below 0: less than most

    def to_json(self) -> list[int | float]:
        """Three numbers: a line of history holds all clients."""
        return [self.client, self.distance, self.direction]

    @property
    def value(self) -> float:
        """The larger of both."""
        return max(abs(self.distance), self.direction)

    @property
    def stands_out(self) -> bool:
        """Whether somebody should look at the client."""
        return self.value >= THRESHOLD


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One committed round."""

    round: int  # from 1; 0 is the initial model
    metrics: Mapping[str, Metric]  # of the global model on the server's test data: loss, accuracy, ...
    clients: int = 0  # updates aggregated
    asked: int = 0  # clients asked
    rejected: tuple[Rejected, ...] = ()  # answers that were errors or did not pass validation
    train_loss: float | None = None  # mean of the clients' training losses, weighted by examples
    seconds: float = 0.0  # wall time of the whole round
    bytes_up: int = 0  # arrays received; over a link, what really travelled
    bytes_down: int = 0  # arrays sent; over a link, what really travelled
    late: int = 0  # answers that came since the last round to messages that nobody waited for any more
    updates: str = ""  # SHA-256 of the anonymous set of updates aggregated
    counted: bool = True  # False: too few updates, so the global model stayed as it was
    client_metrics: Mapping[str, float] = field(default_factory=dict)  # of federated evaluation, if asked for
    simulated_s: float | None = None  # simulated seconds of the run until the round closed; None: real time
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of the metric that stops
    origin: Mapping[str, Any] = field(default_factory=dict)  # of round 0: what it was made of, see `starting`
    target_bound: float | None = None  # of the target's metric, with rounds.target_confidence
    # With a mechanism: epsilon of its ledger after this round, delta, clip_norm, noise, next_clip_norm.
    privacy: Mapping[str, float | str] = field(default_factory=dict)
    staleness: float | None = None  # of asynchronous rounds: mean age of the updates, in rounds
    norm: float | None = None  # median L2 norm of the changes aggregated, where [validate] bounds it
    # With rounds.local_work = "adaptive": what each client made, and what the next rounds are decided by.
    passes: int | None = None
    answer_s: float | None = None  # median seconds from asking to a valid answer
    agreement: float | None = None  # mean cosine between the changes of two clients
    anomalies: tuple[Score, ...] = ()  # of each update, where they were held against each other

    @property
    def failures(self) -> int:
        """Clients asked whose update was not used: rejected, late, or never answered."""
        return self.asked - self.clients

    @property
    def conspicuous(self) -> tuple[int, ...]:
        """Clients whose updates stood out, the oddest first."""
        found = sorted((score for score in self.anomalies if score.stands_out), key=lambda s: -s.value)
        return tuple(score.client for score in found)

    @property
    def standing_out(self) -> str:
        """Who that was: the first five of them."""
        clients = self.conspicuous
        more = ", ..." if len(clients) > _NAMED else ""
        return f"{len(clients)} stand out (clients {', '.join(map(str, clients[:_NAMED]))}{more})"

    def to_json(self) -> dict[str, Any]:
        """The record as plain values."""
        return {
            "round": self.round,
            **self.metrics,
            "clients": self.clients,
            "failures": self.failures,
            "asked": self.asked,
            "rejected": [{"client": r.client, "reason": r.reason, "kind": r.kind} for r in self.rejected],
            "train_loss": self.train_loss,
            "seconds": round(self.seconds, 4),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "late": self.late,
            "updates": self.updates,
            "counted": self.counted,
            **({"norm": self.norm} if self.norm is not None else {}),
            **({"client_metrics": dict(self.client_metrics)} if self.client_metrics else {}),
            **({"intervals": {k: list(v) for k, v in self.intervals.items()}} if self.intervals else {}),
            **({"origin": dict(self.origin)} if self.origin else {}),
            **({"staleness": self.staleness} if self.staleness is not None else {}),
            **({"passes": self.passes} if self.passes is not None else {}),
            **({"answer_s": self.answer_s} if self.answer_s is not None else {}),
            **({"agreement": self.agreement} if self.agreement is not None else {}),
            **({"target_bound": self.target_bound} if self.target_bound is not None else {}),
            **({"privacy": dict(self.privacy)} if self.privacy else {}),
            **({"anomalies": [s.to_json() for s in self.anomalies]} if self.anomalies else {}),
            **({"simulated_s": self.simulated_s} if self.simulated_s is not None else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RoundRecord:
        """Rebuild from `to_json`'s value, read from our own database."""
        rest = dict(value)
        rest.pop("failures")
        rejected = tuple(Rejected(**item) for item in rest.pop("rejected"))  # older ones have no kind
        names = set(cls.__dataclass_fields__) - {"metrics", "rejected"}
        own = {name: rest.pop(name) for name in list(rest) if name in names}
        own["intervals"] = {name: (low, high) for name, (low, high) in own.pop("intervals", {}).items()}
        own["anomalies"] = tuple(Score(*each) for each in own.pop("anomalies", ()))
        return cls(metrics=rest, rejected=rejected, **own)
