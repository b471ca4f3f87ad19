"""What a search ends with for one tier: the first candidate that passes the gate, a word on all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from fedge.config import Config, Tier
from fedge_server.compression.budgets import Figure, shortage
from fedge_server.compression.candidates import Candidate, TierOutcome, Trial, Variant, front
from fedge_server.compression.gate import MAX_ATTEMPTS, Evidence, GateReport
from fedge_server.compression.prospects import in_order


class Exam(Protocol):
    """The gate, whoever holds its data."""

    config: Config
    examples: int | None  # None: not known before

    def evidence(self, candidate: Candidate) -> Evidence:
        """What is known of a candidate."""

    def sit(self, candidate: Candidate, tier: Tier, attempt: int) -> GateReport:
        """The report on a tier's candidate number `attempt`."""


def outcome_of(
    name: str, candidates: Sequence[Candidate], left: tuple[Trial, ...], exam: Exam
) -> TierOutcome:
    """The outcome for a tier.

    Args:
        name: of the tier.
        candidates: all that were built.
        left: what was not, and why.
        exam: lets candidates sit.
    """
    tier = exam.config.tiers[name]
    needs = {each.name: each.figures(tier) for each in candidates}
    within = [each for each in candidates if all(figure.met for figure in needs[each.name])]
    best = front(candidates, tier)
    trials: list[Trial] = []
    variant = None
    for attempt, candidate in enumerate(in_order(within, tier, exam.examples, exam.config), start=1):
        if variant is not None or attempt > MAX_ATTEMPTS:
            result = "not needed" if variant else f"not tried after {MAX_ATTEMPTS} failed"
            trials.append(_trial(candidate, tier, result, best))
            continue
        report = exam.sit(candidate, tier, attempt)
        trials.append(_trial(candidate, tier, _verdict(report), best, report))
        if report.passed:
            variant = _variant(name, candidate, report, exam)
    for candidate in candidates:
        if candidate not in within:
            over = "; ".join(str(figure) for figure in needs[candidate.name] if not figure.met)
            trials.append(_trial(candidate, tier, f"over budget: {over}", best))
    tried = (*trials, *left)
    if variant is not None:
        return TierOutcome(name, variant, _success(variant), tried)
    return TierOutcome(name, None, _failure(needs if not within else {}, tried), tried)


def _verdict(report: GateReport) -> str:
    return "passed" if report.passed else f"gate: {'; '.join(report.reasons)}"


def _trial(
    candidate: Candidate, tier: Tier, result: str, best: frozenset[str], report: GateReport | None = None
) -> Trial:
    cost = candidate.cost
    return Trial(
        recipe=candidate.name,
        result=result,
        wire_bytes=len(cost.wire),
        installed_bytes=len(cost.installed),
        memory_bytes=cost.memory_bytes,
        latency_us=candidate.latency_us(tier),
        accuracy=candidate.accuracy,
        seconds=candidate.seconds,
        on_front=candidate.name in best,
        gate=report,
    )


def _variant(tier: str, candidate: Candidate, report: GateReport, exam: Exam) -> Variant:
    return Variant(
        tier=tier,
        recipe=candidate.name,
        installed=candidate.cost.installed,
        wire=candidate.cost.wire,
        accuracy=report.accuracy,
        latency_us=candidate.latency_us(exam.config.tiers[tier]),
        memory_bytes=candidate.cost.memory_bytes,
        parameters=candidate.parameters,
        gate=report,
        probabilities=exam.evidence(candidate).probabilities,
    )


def _success(variant: Variant) -> str:
    report = variant.gate
    return (
        f"{variant.recipe} passed at attempt {report.attempt}: {len(variant.wire):,} bytes, "
        f"accuracy {100 * report.accuracy:.2f} %, drop {100 * report.drop:.2f} "
        f"(at most {100 * report.drop_upper:.2f}) points"
    )


def _failure(needs: Mapping[str, tuple[Figure, ...]], tried: tuple[Trial, ...]) -> str:
    """Why there is no variant; `needs` of all candidates where none is within the budgets, else empty."""
    if needs:
        return f"no candidate is within the budgets: {shortage(needs)}"
    gated = [f"{trial.recipe} ({trial.result.removeprefix('gate: ')})" for trial in tried if trial.gate]
    if gated:
        return f"no candidate passed the gate in {len(gated)} attempts: {'; '.join(gated)}"
    return f"no candidate could be built: {'; '.join(f'{trial.recipe}: {trial.result}' for trial in tried)}"
