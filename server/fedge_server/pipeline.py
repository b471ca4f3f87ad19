"""From a run's rounds to its results: compress, gate, publish, and write down; the same in every world.

`history.jsonl` grows with the rounds; `model.safetensors`, `report.html`, `privacy.json` and, last of all,
`summary.json` are written when the run is whole.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedge.config import Config
from fedge.files import write_atomically
from fedge.task import Task
from fedge_server.compression import TierOutcome, compress
from fedge_server.compression.choose import source_of
from fedge_server.compression.clients import Fleet
from fedge_server.compression.sources import Source
from fedge_server.data import ServerData
from fedge_server.evaluation.intervals import Answered, stated
from fedge_server.plots import Holdings
from fedge_server.privacy import accounting
from fedge_server.privacy.report import PrivacyReport, privacy_report
from fedge_server.registry.database import Registry
from fedge_server.registry.ledger import Ledger
from fedge_server.release import REPOSITORY, ReleasePlace
from fedge_server.release.lineage import last_variants
from fedge_server.release.outcomes import publish_outcomes
from fedge_server.release.publishing import Published
from fedge_server.release.references import NONE, examples_of
from fedge_server.report import Report, write_report
from fedge_server.rounds.loop import Learned, Observer
from fedge_server.rounds.moments import kept_moments
from fedge_server.rounds.record import RoundRecord
from fedge_server.rounds.scoring import probabilities_of
from fedge_server.rounds.starting import describe
from fedge_server.summary import summarise

SUMMARY, HISTORY, MODEL, REPORT = "summary.json", "history.jsonl", "model.safetensors", "report.html"
PRIVACY = "privacy.json"
CANDIDATES = "candidates"  # folder of a home: what searches for variants have made

Say = Callable[[str], None]
"""Takes one line of progress."""


@dataclass(frozen=True, slots=True)
class Place:
    """A run, and where its results go."""

    run_id: str
    folder: Path  # history, model, report, summary
    home: Path  # the repository of releases and the keys
    registry: Registry
    config: Config
    task: Task
    server: ServerData
    say: Say = lambda _: None
    started: float = field(default_factory=time.perf_counter)
    fleet: Fleet | None = None  # how the run's clients are asked once its rounds are over; None: they are not
    page: bool = True  # whether to draw the report, which takes longer than a small run

    def source(self, learned: Learned) -> Source:
        """Where the compression of what was learned learns about data."""
        last = self.registry.last_round(self.run_id)
        return source_of(
            self.config,
            self.task,
            self.server,
            learned.model,
            moments=None if last is None else kept_moments(last.model),
            fleet=self.fleet,
            say=self.say,
        )


def observer(place: Place, further: Observer = lambda _: None) -> Observer:
    """Write each committed round into `history.jsonl`, then tell `further`.

    A resumed run tells the earlier rounds again, so the file starts anew with the first.
    """
    path = place.folder / HISTORY

    def observe(record: RoundRecord) -> None:
        with path.open("w" if record.round == 1 else "a", encoding="utf-8") as file:
            file.write(json.dumps(record.to_json()) + "\n")
        further(record)

    return observe


def round_line(config: Config, record: RoundRecord) -> str:
    """A round in one line."""
    count = config.rounds.count
    metrics = [
        f"{name} {value:.4f}"
        for name, value in record.metrics.items()
        if isinstance(value, float) and name != "macro_f1"
    ]
    missing = f"  {record.failures} without an update" if record.failures else ""
    why = f" ({record.rejected[0].reason})" if record.rejected else ""
    late = f"  {record.late} late" if record.late else ""
    odd = f"  {record.standing_out}" if record.conspicuous else ""
    return (
        f"round {record.round:>{len(str(count))}}/{count}  {'  '.join(metrics)}  {record.clients} clients"
        f"  {record.seconds:.2f} s{missing}{why}{late}{odd}"
    )


def release(place: Place, learned: Learned) -> tuple[tuple[TierOutcome, ...], bool]:
    """Compress for all tiers, and publish what passed its gate.

    Returns:
        One outcome per tier, and whether there is a release of them; else they may wait to be signed.
    """
    if learned.origin:
        place.say(describe(learned.origin))
    place.say(f"stopped: {learned.reason}")
    shutil.copyfile(place.registry.store.path(learned.model_sha256), place.folder / MODEL)
    outcomes, made = publish(place, learned)
    for line in () if made is None else made.lines(place.home / REPOSITORY):
        place.say(line)
    return outcomes, made is not None and made.release is not None


def publish(place: Place, learned: Learned) -> tuple[tuple[TierOutcome, ...], Published | None]:
    """A variant for each tier of the configuration; what passed its gate is drafted, and published as can be.

    Returns:
        One outcome per tier, and what became of the draft; None: no tier has a variant.
    """
    outcomes: tuple[TierOutcome, ...] = ()
    if place.config.tiers:
        source = place.source(learned)
        config = replace(place.config, tiers=ReleasePlace.of(place.home).leaving_room(place.config.tiers))
        place.say(f"compress: {source.describe()}")
        outcomes = compress(
            learned.model,
            place.task,
            place.server.spec,
            source,
            config,
            place.say,
            folder=place.home / CANDIDATES,
            before=last_variants(place.registry, config.tiers, besides=learned.model_sha256),
        )
    examples = examples_of(place.server)
    if outcomes and examples is None:
        place.say(NONE)
    made = publish_outcomes(
        place.home,
        place.registry,
        place.run_id,
        learned,
        place.config.task,
        place.server.spec,
        outcomes,
        place.config.tiers,
        examples=examples,
    )
    return outcomes, made


def conclude(
    place: Place,
    learned: Learned,
    outcomes: tuple[TierOutcome, ...],
    *,
    clients: int,
    holdings: Holdings | None = None,
    further: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write both reports and the summary; the summary says that the run is whole.

    Args:
        place: of the run.
        learned: its result.
        outcomes: one per tier.
        clients: how many took part.
        holdings: who holds what; None where only the clients know.
        further: parts of the summary that only some worlds have.
    """
    privacy = _privacy(place, learned.records)
    summary = summarise(
        place.config,
        learned,
        outcomes,
        travels=ReleasePlace.of(place.home).travels,
        clients=clients,
        seconds=time.perf_counter() - place.started,
        privacy=privacy,
        intervals=_intervals(place, learned),
        further=further or {},
    )
    if place.page:
        report = Report.of(place.config, place.server.spec, learned, outcomes, summary, privacy, holdings)
        write_report(place.folder / REPORT, report)
    write_atomically(place.folder / PRIVACY, json.dumps(privacy.to_json(), indent=2).encode())
    write_atomically(place.folder / SUMMARY, json.dumps(summary, indent=2).encode())
    return summary


def _intervals(place: Place, learned: Learned) -> dict[str, Any]:
    """How sure the final metrics are."""
    settings, test = place.config.evaluate, place.server.test
    answers = probabilities_of(learned.model, test)
    return stated(
        [name for name, value in learned.records[-1].metrics.items() if isinstance(value, float)],
        Answered.of(answers, test.y, place.server.test_owners),
        confidence=settings.confidence,
        resamples=settings.resamples,
        seed=place.config.seed,
    )


def _privacy(place: Place, records: Sequence[RoundRecord]) -> PrivacyReport:
    config, epsilon = place.config, None
    if config.privacy.mechanism != "none":
        entries = Ledger(place.registry.engine, config.privacy.ledger).entries()
        epsilon = accounting.epsilon(
            [entry.spend for entry in entries],
            config.privacy.delta,
            unit="example" if config.privacy.mechanism == "example" else "client",
            accountant=config.privacy.accountant,
        )
    return privacy_report(
        config,
        records,
        epsilon=epsilon,
        moments=config.model.standardise and place.server.spec.numeric,
        simulated=records[-1].simulated_s is not None,
    )
