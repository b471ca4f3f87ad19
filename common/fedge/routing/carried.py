"""What a release says about routing one variant's answers: made where it is compressed, read where it runs.

It travels in the variant's `evidence` of the signed manifest, under `routing`, as plain JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fedge.errors import DataError, FormatError
from fedge.routing.calibration import Bool, for_accuracy, for_gap, for_share, most_losses
from fedge.routing.rules import Float64, Rule

KEY: Final = "routing"  # in a variant's evidence
SHARES: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # of requests, that thresholds are kept for
ACCURACIES: Final = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99,
                     0.995)  # likewise, of device and cloud together  # fmt: skip
_MAX_PAIRS: Final = 64
_MAX_TEXT: Final = 500  # characters


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which of a release's thresholds; neither: that of its own promise."""

    share: float | None = None  # of requests that are sent, at most
    accuracy: float | None = None  # of device and cloud together, at least

    def __post_init__(self) -> None:
        """Refuse nonsense on construction.

        Raises:
            FormatError: both at once, or out of range.
        """
        given = [value for value in (self.share, self.accuracy) if value is not None]
        if len(given) > 1 or not all(0 < value < 1 for value in given):
            raise FormatError(f"routing: {self}; give one of them, above 0 and below 1")


@dataclass(frozen=True, slots=True)
class Routing:
    """A threshold with its promise, or why there is none; and thresholds by what else may be wanted."""

    doubt: str = "confidence"  # the measure that all thresholds are of
    rule: Rule | None = None  # None: `reason` says why
    reason: str = ""
    promise: str = ""  # in words
    limit: float = 0.0  # what is kept below: share of answers worse than the cloud's
    confidence: float = 0.0  # of each promise by itself, over the draw of the examples
    seen: float = 0.0  # the same share among the examples
    sent: float = 0.0  # share of the examples that would be sent
    examples: int = 0
    shares: Mapping[float, float] = field(default_factory=dict)  # share of requests, to its threshold
    accuracies: Mapping[float, float] = field(default_factory=dict)  # accuracy, to its threshold

    def wanted(self, what: Wanted) -> Rule:
        """The rule that sends as much as it may for a share, and as little as it must for an accuracy.

        Raises:
            DataError: no such threshold is known.
        """
        if what.share is not None:
            near = [share for share in self.shares if share <= what.share]
            return self._rule("share", what.share, self.shares, max(near, default=None))
        if what.accuracy is not None:
            near = [accuracy for accuracy in self.accuracies if accuracy >= what.accuracy]
            return self._rule("accuracy", what.accuracy, self.accuracies, min(near, default=None))
        if self.rule is None:
            raise DataError(f"this release carries no threshold ({self.reason})")
        return self.rule

    def _rule(self, what: str, wanted: float, known: Mapping[float, float], near: float | None) -> Rule:
        if near is None:
            said = ", ".join(f"{value:g}" for value in sorted(known)) or "none"
            raise DataError(f"this release carries no threshold for {what} {wanted:g}; it has: {said}")
        return Rule(self.doubt, known[near])

    def describe(self) -> str:
        """In a line."""
        if self.rule is not None:
            return (
                f"ask above {self.rule.threshold:.3g} of {self.doubt}, {self.promise} at "
                f"{100 * self.confidence:.4g} %; of {self.examples} examples {100 * self.sent:.1f} % are sent"
            )
        known = [
            f"{what} from {min(values):g} to {max(values):g}"
            for what, values in (("a share", self.shares), ("an accuracy", self.accuracies))
            if values
        ]
        return f"no threshold by itself ({self.reason}); for {' or '.join(known) or 'nothing else either'}"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        said: dict[str, Any] = {
            "measure": self.doubt,
            "shares": [list(pair) for pair in sorted(self.shares.items())],
            "accuracies": [list(pair) for pair in sorted(self.accuracies.items())],
        }
        if self.rule is None:
            return said | {"reason": self.reason}
        return said | {
            "threshold": self.rule.threshold,
            "promise": self.promise,
            "limit": self.limit,
            "confidence": self.confidence,
            "seen": self.seen,
            "sent": self.sent,
            "examples": self.examples,
        }

    @classmethod
    def from_json(cls, value: Any) -> Routing:
        """Read what a manifest says.

        Raises:
            FormatError: of another form.
        """
        if not isinstance(value, dict):
            raise FormatError("routing: must be an object")
        doubt = _text(value, "measure")
        shares, accuracies = (_pairs(value, name) for name in ("shares", "accuracies"))
        for threshold in (0.0, *shares.values(), *accuracies.values()):
            Rule(doubt, threshold)
        if "threshold" not in value:
            return cls(doubt, reason=_text(value, "reason"), shares=shares, accuracies=accuracies)
        examples = value.get("examples")
        if type(examples) is not int or examples < 1:
            raise FormatError("routing: examples must be a positive whole number")
        return cls(
            doubt,
            Rule(doubt, _number(value, "threshold", -1.0, 1.0)),
            promise=_text(value, "promise"),
            limit=_number(value, "limit"),
            confidence=_number(value, "confidence"),
            seen=_number(value, "seen"),
            sent=_number(value, "sent"),
            examples=examples,
            shares=shares,
            accuracies=accuracies,
        )


def calibrated(
    doubts: Float64,
    device: Bool,
    cloud: Bool,
    gap: float,
    *,
    doubt: str,
    confidence: float,
    labelled: bool = True,
) -> Routing:
    """What can be promised of one variant's answers.

    Args:
        doubts: of the variant's answers to N examples (N,), that have trained neither model.
        device: whether the variant's answer is right (N,).
        cloud: whether the global model's is (N,).
        gap: share of all requests that the device may answer worse than the cloud, over 0 and below 1.
        doubt: the measure that `doubts` are of.
        confidence: of each promise.
        labelled: False: what is right is not known, and the cloud's answers were taken for it; a gap is then
            no larger than is promised, and nothing is promised of an accuracy.

    Returns:
        A routing whose reason says why there is no rule, where the examples are too few.

    Raises:
        DataError: arrays that do not belong together, or values out of range.
    """
    shares = _for_shares(doubts, doubt, confidence)
    accuracies = _for_accuracies(doubts, device, cloud, doubt, confidence) if labelled else {}
    if most_losses(len(doubts), gap, 1 - confidence) < 0:
        why = (
            f"{len(doubts)} examples cannot show a gap of {gap:g} at confidence {confidence:.4g}; "
            f"{enough(gap, confidence)} can"
        )
        return Routing(doubt, reason=why, shares=shares, accuracies=accuracies)
    found = for_gap(doubts, device, cloud, gap, doubt=doubt, confidence=confidence)
    return Routing(
        doubt,
        found.rule,
        promise=found.promise,
        limit=found.limit,
        confidence=found.confidence,
        seen=found.seen,
        sent=found.sent,
        examples=found.examples,
        shares=shares,
        accuracies=accuracies,
    )


def _for_shares(doubts: Float64, doubt: str, confidence: float) -> dict[float, float]:
    shown = [share for share in SHARES if most_losses(len(doubts), share, 1 - confidence) >= 0]
    return {
        share: for_share(doubts, share, doubt=doubt, confidence=confidence).rule.threshold for share in shown
    }


def _for_accuracies(
    doubts: Float64, device: Bool, cloud: Bool, doubt: str, confidence: float
) -> dict[float, float]:
    thresholds: dict[float, float] = {}
    for wanted in ACCURACIES:
        try:
            found = for_accuracy(doubts, device, cloud, wanted, doubt=doubt, confidence=confidence)
        except DataError:  # not even the cloud alone is shown to be so good
            break
        thresholds[wanted] = found.rule.threshold
    return thresholds


def enough(limit: float, confidence: float) -> int:
    """The least number of examples that can show a limit: without one loss among them."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-limit))


def _text(value: Mapping[str, Any], name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or not 1 <= len(found) <= _MAX_TEXT:
        raise FormatError(f"routing: {name} must be a short text")
    return found


def _number(value: Mapping[str, Any], name: str, least: float = 0.0, most: float = 1.0) -> float:
    found: Any = value.get(name)
    if type(found) not in (int, float) or not least <= found <= most:  # NaN neither
        raise FormatError(f"routing: {name} must be a number from {least:g} to {most:g}")
    return float(found)


def _pairs(value: Mapping[str, Any], name: str) -> dict[float, float]:
    given = value.get(name)
    if not isinstance(given, list) or len(given) > _MAX_PAIRS:
        raise FormatError(f"routing: {name} must be a list of at most {_MAX_PAIRS} pairs")
    found = {}
    for pair in given:
        if not isinstance(pair, list) or len(pair) != 2:
            raise FormatError(f"routing: {name} must be pairs of what is wanted and a threshold")
        both = {name: pair[0], "threshold": pair[1]}
        found[_number(both, name)] = _number(both, "threshold", -1.0, 1.0)
    return found
