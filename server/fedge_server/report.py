"""`report.html`: one self-contained page about a run, plots inside, readable without a network."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedge.config import Config
from fedge.spec import Spec
from fedge_server import plots
from fedge_server.compression import TierOutcome
from fedge_server.page import Plot, flat, write_page
from fedge_server.plots import Holdings
from fedge_server.privacy.report import PrivacyReport
from fedge_server.rounds.loop import Learned
from fedge_server.rounds.record import RoundRecord, Score
from fedge_server.rounds.starting import describe

_MAX_REASONS = 12
_MAX_STANDINGS, _DRAWN = 10, 5  # clients in the table, and in the picture
_MAX_REASON = 160  # characters of a reason that are shown
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why updates were not used, and of how many."""

    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class Standing:
    """How much a client's updates stood out over all rounds that had them."""

    client: int
    rounds: int  # in which its update was held against the others'
    stood_out: int  # of these
    mean: float  # of its scores
    largest: float


@dataclass(frozen=True, slots=True)
class Report:
    """What the page shows."""

    config: Config
    summary: dict[str, Any]
    records: Sequence[RoundRecord]
    outcomes: Sequence[TierOutcome]
    plots: tuple[Plot, ...]
    failures: tuple[Failure, ...]
    privacy: PrivacyReport
    standings: tuple[Standing, ...]  # of the oddest clients, those first
    began: str  # with what, besides its seed; empty: nothing

    @classmethod
    def of(
        cls,
        config: Config,
        spec: Spec,
        learned: Learned,
        outcomes: Sequence[TierOutcome],
        summary: dict[str, Any],
        privacy: PrivacyReport,
        holdings: Holdings | None = None,
    ) -> Self:
        """Draw the plots of a run."""
        records = learned.records
        drawn = [plots.learning(records)]
        if holdings is not None:
            drawn += plots.holdings(holdings)
        if recall := records[-1].metrics.get("recall"):
            drawn.append(plots.per_class(recall, spec.labels))  # type: ignore[arg-type]  # recall is a list
        drawn += [plots.speed(records), plots.traffic(records)]
        failures = failures_by_reason(records)
        if failures:
            drawn.append(plots.answers(records))
        if any(trial.accuracy is not None for outcome in outcomes for trial in outcome.tried):
            drawn.append(plots.candidates(outcomes, summary["global_model"]["bytes"]))
        standings = standings_of(records)
        if standings:
            drawn.append(plots.anomalies(records, [each.client for each in standings[:_DRAWN]]))
        began = describe(learned.origin)
        return cls(
            config, summary, records, outcomes, tuple(drawn), failures, privacy, standings, began
        )  # fmt: skip


def write_report(path: Path, report: Report) -> None:
    """Render the page and put it in place whole."""
    write_page(
        path, "fedge_server", "report.html.j2", report=report, options=flat(report.config.to_mapping())
    )


def failures_by_reason(records: Sequence[RoundRecord]) -> tuple[Failure, ...]:
    """Why updates were not used in all rounds together, most frequent first.

    Reasons that differ only in numbers are one; whoever gave none was late or is not waited for any more.
    """
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(_kind(rejected.reason) for rejected in record.rejected)
        if silent := record.failures - len(record.rejected):
            uncounted = "the round did not count"
            counts["no answer in time" if record.counted else uncounted] += silent
    common = counts.most_common()
    rest = sum(count for _, count in common[_MAX_REASONS:])
    found = [Failure(reason, count) for reason, count in common[:_MAX_REASONS]]
    return tuple([*found, Failure("other reasons", rest)] if rest else found)


def standings_of(records: Sequence[RoundRecord]) -> tuple[Standing, ...]:
    """The clients whose updates stood out most, by the mean of their scores."""
    of_client: dict[int, list[Score]] = {}
    for record in records:
        for score in record.anomalies:
            of_client.setdefault(score.client, []).append(score)
    found = [
        Standing(
            client,
            len(scores),
            sum(score.stands_out for score in scores),
            statistics.fmean(score.value for score in scores),
            max(score.value for score in scores),
        )
        for client, scores in of_client.items()
    ]
    return tuple(sorted(found, key=lambda each: (-each.mean, each.client))[:_MAX_STANDINGS])


def _kind(reason: str) -> str:
    line = reason.strip().splitlines()[-1] if reason.strip() else "no reason given"
    return _NUMBER.sub("N", line)[:_MAX_REASON]
