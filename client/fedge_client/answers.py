"""How sure a release was of its answers here: a count and a sum, which the agent reports as a mean.

No input and no label is kept. The file names the tier whose version it is: in another one that number is
another release. Whoever answers adds to the file when it likes, and a disk or another process
in the way costs some answers of the mean, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedge.errors import FormatError
from fedge.files import read_bounded, sole_holder
from fedge_client.device import ANSWERS, DELIVERY, of_this_tier, tier_at

_MAX_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Tally:
    """The answers of one version."""

    version: int = 0
    answers: int = 0
    confidence: float = 0.0  # sum over the answers

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        whole = type(self.version) is int and type(self.answers) is int and self.answers >= 0
        if not whole or not math.isfinite(self.confidence) or not 0 <= self.confidence <= self.answers:
            raise FormatError(f"answers: {self.answers} with a sum of {self.confidence}; the file is damaged")

    @property
    def mean(self) -> float:
        """Mean confidence, 0 to 1; 0 where there is no answer."""
        return self.confidence / self.answers if self.answers else 0.0


def tally(home: Path) -> Tally:
    """What is counted of the version that answered last; nothing of another tier's."""
    try:
        value: Any = json.loads(read_bounded(home / DELIVERY / ANSWERS, _MAX_BYTES))
        if not of_this_tier(home, value.get("tier")):
            return Tally()
        return Tally(value["version"], value["answers"], float(value["confidence"]))
    except (FormatError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Tally()


def count(home: Path, version: int, confidences: Iterable[float]) -> None:
    """Add answers of a version; those of another one are forgotten."""
    new = [value for value in confidences if 0 <= value <= 1]
    if not new:
        return
    path = home / DELIVERY / ANSWERS
    with contextlib.suppress(OSError), sole_holder(path.with_name(".answers.lock"), patience_s=0.0):
        before = tally(home)
        if before.version != version:
            before = Tally(version)
        made = {
            "version": version,
            "answers": before.answers + len(new),
            "confidence": before.confidence + math.fsum(new),
            "tier": tier_at(home),
        }
        written = path.with_name(f".{ANSWERS}.new")
        written.write_text(json.dumps(made) + "\n", encoding="utf-8")  # not synced: a loss does not matter
        written.replace(path)
