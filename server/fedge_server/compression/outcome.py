"""What a search ends with for one tier: the first candidate that passes the gate, a word on all others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from fedge.config import Config, Tier
from fedge.routing import Routing
from fedge_server.compression.budgets import Figure, shortage
from fedge_server.compression.candidates import Candidate, TierOutcome, Trial, Variant, front
from fedge_server.compression.gate import MAX_ATTEMPTS, Evidence, GateReport
from fedge_server.compression.prospects import in_order
from fedge_server.compression.recipes import Recipe


class Exam(Protocol):
    """The gate, whoever holds its data."""

    config: Config
    examples: int | None  # None: not known before

    def evidence(self, candidate: Candidate) -> Evidence:
        """What is known of a candidate."""

    def sit(self, candidate: Candidate, tier: Tier, attempt: int) -> GateReport:
        """The report on a tier's candidate number `attempt`."""

    def routing(self, candidate: Candidate) -> Routing:
        """When a device should ask the cloud."""


Versions = Callable[[Candidate, str], tuple[Candidate, ...]]
"""A candidate as it shall face a tier's gate: the version to begin with, and what follows if that fails."""


class Sitting:
    """One tier at the gate: one candidate after the other, until one passes or the attempts are used up."""

    def __init__(self, name: str, exam: Exam, versions: Versions = lambda fresh, _: (fresh,)) -> None:
        self.name, self.tier, self._exam, self._versions = name, exam.config.tiers[name], exam, versions
        self._spared: list[Candidate] = []  # versions of what has passed, which had no need to sit
        self._sat: list[tuple[Candidate, GateReport]] = []

    @property
    def refused(self) -> tuple[Recipe, ...]:
        """What the gate has refused so far."""
        return tuple(candidate.recipe for candidate, report in self._sat if not report.passed)

    @property
    def _is_over(self) -> bool:
        return len(self._sat) == MAX_ATTEMPTS or any(report.passed for _, report in self._sat)

    def sit(self, candidates: Iterable[Candidate]) -> bool:
        """Let the next one sit; whether it was refused, and another one may try."""
        waiting = self._waiting(candidates)
        if self._is_over or not waiting:
            return False
        left = MAX_ATTEMPTS - len(self._sat)
        for version in self._versions(waiting[0], self.name)[-left:]:  # the last attempt is the fresh one's
            if any(report.passed for _, report in self._sat):
                self._spared.append(version)
            elif all(figure.met for figure in version.figures(self.tier)):
                report = self._exam.sit(version, self.tier, len(self._sat) + 1)
                self._sat.append((version, report))
        return not self._is_over

    def outcome(self, candidates: Sequence[Candidate], left: tuple[Trial, ...]) -> TierOutcome:
        """What the tier ends with.

        Args:
            candidates: all that were built.
            left: what was not, and why.
        """
        while self.sit(candidates):
            pass
        best, tier = front(candidates, self.tier), self.tier
        trials = [_trial(each, tier, _verdict(report), best, report) for each, report in self._sat]
        passed = next(((each, report) for each, report in self._sat if report.passed), None)
        result = "not needed" if passed else f"not tried after {MAX_ATTEMPTS} failed"
        trials += [_trial(each, tier, result, best) for each in (*self._spared, *self._waiting(candidates))]
        needs = {each.name: each.figures(tier) for each in candidates}
        for candidate in candidates:
            if over := "; ".join(str(figure) for figure in needs[candidate.name] if not figure.met):
                trials.append(_trial(candidate, tier, f"over budget: {over}", best))
        tried = (*trials, *left)
        if passed is not None:
            variant = _variant(self.name, *passed, self._exam)
            return TierOutcome(self.name, variant, _success(variant), tried)
        within = any(all(figure.met for figure in figures) for figures in needs.values())
        return TierOutcome(self.name, None, _failure({} if within else needs, tried), tried)

    def _waiting(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Those within the budgets that have not sat, in the order in which they shall."""
        sat = {candidate.recipe for candidate, _ in self._sat}
        within = [
            each
            for each in candidates
            if each.recipe not in sat and all(figure.met for figure in each.figures(self.tier))
        ]
        return in_order(within, self.tier, self._exam.examples, self._exam.config, len(self._sat) + 1)


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
        delta_bytes=candidate.delta_bytes,
        changed=candidate.changed,
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
        routing=exam.routing(candidate),
        delta_bytes=candidate.delta_bytes,
        changed=candidate.changed,
    )


def _success(variant: Variant) -> str:
    report, near = variant.gate, ""
    if variant.delta_bytes is not None:
        kept = (
            "" if variant.changed is None else f", as {100 * (1 - variant.changed):.1f} % of the codes stay"
        )
        near = f"; {variant.delta_bytes:,} bytes from the last variant{kept}"
    return (
        f"{variant.recipe} passed at attempt {report.attempt}: {len(variant.wire):,} bytes, "
        f"accuracy {100 * report.accuracy:.2f} %, drop {100 * report.drop:.2f} "
        f"(at most {100 * report.drop_upper:.2f}) points{near}"
    )


def _failure(needs: Mapping[str, tuple[Figure, ...]], tried: tuple[Trial, ...]) -> str:
    """Why there is no variant; `needs` of all candidates where none is within the budgets, else empty."""
    if needs:
        return f"no candidate is within the budgets: {shortage(needs)}"
    gated = [f"{trial.recipe} ({trial.result.removeprefix('gate: ')})" for trial in tried if trial.gate]
    if gated:
        return f"no candidate passed the gate in {len(gated)} attempts: {'; '.join(gated)}"
    return f"no candidate could be built: {'; '.join(f'{trial.recipe}: {trial.result}' for trial in tried)}"
