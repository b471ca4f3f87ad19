"""What devices report of a version, checked, and what each report changes in the counts."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from fedge.errors import FormatError
from fedge_server.rollout.plan import Plan

CONFIDENCE, LATENCY = "confidence", "latency_ms"
VERDICTS: Final = {  # report -> criterion, whether it is bad, the report that speaks of the same
    "installed": ("install", False, "install_failed"),
    "install_failed": ("install", True, "installed"),
    "healthy": ("health", False, "unhealthy"),
    "unhealthy": ("health", True, "healthy"),
}
NUMBERS: Final = {CONFIDENCE: "confidence", LATENCY: "latency"}  # report -> criterion
MAX_LATENCY_MS: Final = 86_400_000.0


@dataclass(frozen=True, slots=True)
class Report:
    """One thing that a device says of a version, once."""

    device: str  # id
    version: int
    kind: str  # of VERDICTS or NUMBERS
    value: float = 1.0  # confidence: mean over answers, 0 to 1; latency_ms: milliseconds; else 1

    def __post_init__(self) -> None:
        """Refuse what no honest device sends: one of them must not spoil the counts of all.

        Raises:
            FormatError: it says why.
        """
        where = f"report of device {self.device[:8]}"
        if self.kind not in VERDICTS and self.kind not in NUMBERS:
            raise FormatError(
                f"{where}: kind {self.kind[:40]!r} is none of {', '.join((*VERDICTS, *NUMBERS))}"
            )
        if not 1 <= self.version < 2**31:
            raise FormatError(f"{where}: version {self.version} is none")
        most = {CONFIDENCE: 1.0, LATENCY: MAX_LATENCY_MS}.get(self.kind, 1.0)
        if not (math.isfinite(self.value) and 0 <= self.value <= most):
            raise FormatError(f"{where}: {self.kind} = {self.value:g}: must be 0 to {most:g}")


@dataclass(frozen=True, slots=True)
class Change:
    """What a report adds to one of the counts."""

    name: str  # a criterion's kind, or installed
    judged: int
    bad: int


def changes(report: Report, plan: Plan, known: Collection[str], before: float | None) -> list[Change]:
    """What a report adds.

    A device counts once for each criterion, and once bad it stays so: a failure that comes after a success
    turns its verdict, a success after a failure does not.

    Args:
        report: a new one.
        plan: of the rollout.
        known: kinds that the device has reported of this version before.
        before: the device's confidence under an earlier version, if it sent one.
    """
    if report.kind in VERDICTS:
        kind, bad, opposite = VERDICTS[report.kind]
        found = [Change(kind, int(opposite not in known), int(bad))]
        if report.kind == "installed":
            found.append(Change("installed", 1, 0))
        return [change for change in found if change.judged or change.bad]
    criterion = plan.criterion(NUMBERS[report.kind])
    worse = criterion.is_bad(report.value, before) if criterion is not None else None
    return [] if worse is None or criterion is None else [Change(criterion.kind, 1, int(worse))]
