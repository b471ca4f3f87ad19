"""From one global model to one variant per tier: try the candidates, gate the best, explain the rest.

Data by purpose, no example serving two: the proxy data is split into a part that trains and calibrates and a
part that orders the candidates (selection); the gate's data only ever decides.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedge.artefact import unpack
from fedge.config import Config, Tier
from fedge.dataset import Examples, stratified
from fedge.errors import CompressionError, FormatError
from fedge.inference import CompactModel, Float32
from fedge.learning.whole import WholeModel
from fedge.spec import Spec
from fedge.task import Task
from fedge_server.compression.budgets import Figure, figures, shortage
from fedge_server.compression.gate import MAX_ATTEMPTS, GateReport, judge, score
from fedge_server.compression.measure import Cost, measure
from fedge_server.compression.recipes import Recipe, Workshop, recipes

SELECTION_SHARE = 0.3  # of the proxy data: orders the candidates, trains nothing

_BATCH = 256


@dataclass(frozen=True, slots=True)
class Candidate:
    """A built version of the global model, before any gate."""

    recipe: str
    cost: Cost
    parameters: int
    accuracy: float  # on the selection data; NaN where there is none


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one recipe in one tier."""

    recipe: str
    result: str  # passed, gate: why not, over budget: which, not needed, not built: why
    wire_bytes: int | None = None  # None: not built
    installed_bytes: int | None = None
    memory_bytes: int | None = None
    latency_us: float | None = None
    accuracy: float | None = None  # on the selection data; None: there is none
    gate: GateReport | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """The compact version for one tier, with its evidence."""

    tier: str
    recipe: str
    installed: bytes  # ONNX
    wire: bytes  # as it travels
    accuracy: float  # on the gate's data
    latency_us: float  # median at batch 1, one thread
    memory_bytes: int  # installed plus largest activations
    parameters: int
    gate: GateReport
    probabilities: Float32  # (N, C) that the gate scored, in the order of its data


@dataclass(frozen=True, slots=True)
class TierOutcome:
    """A tier's variant, or why there is none."""

    tier: str
    variant: Variant | None
    reason: str  # one line, with figures
    tried: tuple[Trial, ...]  # every recipe, in the order in which it was considered


def compress(
    teacher: WholeModel,
    task: Task,
    spec: Spec,
    proxy: Examples,
    gate: Examples,
    config: Config,
    progress: Callable[[str], None],
) -> tuple[TierOutcome, ...]:
    """For each tier the most accurate candidate within its budgets that passes the gate.

    Every candidate is built and measured once, whatever the number of tiers. Candidates within a tier's
    budgets are ordered by accuracy on the selection data, ties by fewer bytes on the wire, and face the
    gate in that order until one passes, `MAX_ATTEMPTS` at most.

    Args:
        teacher: the global model; it is not changed.
        task: its students are candidates.
        spec: of the data.
        proxy: the server's own labelled data in the training distribution; empty leaves only "fp32".
        gate: the data kept apart for the gate.
        config: tiers, stages and seed; everything but the latencies is decided by them.
        progress: takes one line per candidate and tier.
    """
    if not config.tiers:
        return ()
    teacher = copy.deepcopy(teacher).eval()
    training, selection = parts(proxy, config.seed)
    if not len(training):
        progress("compress: no proxy data, so only the unchanged global model (fp32) is a candidate")
    workshop = Workshop(teacher, task, spec, training, config)
    candidates: list[Candidate] = []
    failed: list[Trial] = []
    for recipe in recipes(task, config.compress.prune, proxy=len(training) > 0):
        try:
            candidates.append(_candidate(recipe, workshop, selection, spec))
            progress(f"compress: {_line(candidates[-1])}")
        except (CompressionError, FormatError) as error:
            failed.append(Trial(recipe.name, f"not built: {error}"))
            progress(f"compress: {recipe.name} is no candidate: {error}")
    exam = _Exam(teacher, gate, spec, config)
    outcomes = []
    for name in config.tiers:
        outcomes.append(_outcome(name, candidates, tuple(failed), exam))
        progress(f"compress: tier {name}: {outcomes[-1].reason}")
    return tuple(outcomes)


def parts(proxy: Examples, seed: int) -> tuple[Examples, Examples]:
    """The proxy data as (training and calibration, selection), stratified by class; both or neither empty."""
    rng = np.random.default_rng([seed, 0x5E1EC7])
    selected, rest = stratified(proxy.y, SELECTION_SHARE, rng)
    if len(selected) == 0 or len(rest) < 2:
        return proxy.take(selected[:0]), proxy.take(selected[:0])
    return proxy.take(rest), proxy.take(selected)


@torch.no_grad()
def teacher_probabilities(teacher: WholeModel, examples: Examples) -> Float32:
    """The global model's own answers (N, C), by torch; it must be in evaluation mode."""
    chunks = [
        torch.softmax(teacher(torch.from_numpy(examples.x[i : i + _BATCH])), dim=1).numpy()
        for i in range(0, len(examples), _BATCH)
    ]
    return np.concatenate(chunks) if chunks else np.zeros((0, 0), np.float32)


class _Exam:
    """The gate for all tiers of one search: every candidate is scored once, by the bytes that ship."""

    def __init__(self, teacher: WholeModel, gate: Examples, spec: Spec, config: Config) -> None:
        self.config, self.spec = config, spec
        self._gate = gate
        self._teacher = teacher_probabilities(teacher, gate)
        self._scores: dict[str, Float32] = {}

    def scores(self, candidate: Candidate) -> Float32:
        """Probabilities (N, C) of a candidate."""
        if candidate.recipe not in self._scores:
            cost = candidate.cost
            self._scores[candidate.recipe] = score(cost.wire, len(cost.installed), self.spec, self._gate.x)
        return self._scores[candidate.recipe]

    def sit(self, candidate: Candidate, tier: Tier, attempt: int) -> GateReport:
        """The report on a tier's candidate number `attempt`."""
        return judge(
            self.scores(candidate),
            self._teacher,
            self._gate.y,
            labels=self.spec.labels,
            tier=tier,
            settings=self.config.compress.gate,
            attempt=attempt,
            seed=self.config.seed,
        )


def _candidate(recipe: Recipe, workshop: Workshop, selection: Examples, spec: Spec) -> Candidate:
    cost = measure(workshop.build(recipe), spec)
    model = CompactModel(unpack(cost.wire, len(cost.installed)), spec)
    right = [
        model.run(selection.x[i : i + _BATCH])[1].argmax(axis=1) == selection.y[i : i + _BATCH]
        for i in range(0, len(selection), _BATCH)
    ]
    accuracy = float(np.concatenate(right).mean()) if right else math.nan
    return Candidate(recipe.name, cost, workshop.parameters(recipe.architecture), accuracy)


def _outcome(name: str, candidates: list[Candidate], failed: tuple[Trial, ...], exam: _Exam) -> TierOutcome:
    """One tier's search; pure but for the exam's scoring."""
    tier = exam.config.tiers[name]
    needs = {candidate.recipe: _figures(tier, candidate.cost) for candidate in candidates}
    fitting = [candidate for candidate in candidates if all(figure.met for figure in needs[candidate.recipe])]
    fitting.sort(key=lambda candidate: (-_known(candidate.accuracy), len(candidate.cost.wire)))
    trials: list[Trial] = []
    variant = None
    for attempt, candidate in enumerate(fitting, start=1):
        if variant is not None or attempt > MAX_ATTEMPTS:
            trials.append(
                _trial(candidate, "not needed" if variant else f"not tried after {MAX_ATTEMPTS} failed")
            )
            continue
        report = exam.sit(candidate, tier, attempt)
        trials.append(_trial(candidate, _verdict(report), report))
        if report.passed:
            variant = _variant(name, candidate, report, exam)
    for candidate in candidates:
        if candidate not in fitting:
            over = "; ".join(str(figure) for figure in needs[candidate.recipe] if not figure.met)
            trials.append(_trial(candidate, f"over budget: {over}"))
    tried = (*trials, *failed)
    if variant is not None:
        return TierOutcome(name, variant, _success(variant), tried)
    return TierOutcome(name, None, _failure(needs if not fitting else {}, tried), tried)


def _figures(tier: Tier, cost: Cost) -> tuple[Figure, ...]:
    return figures(
        tier, wire_bytes=len(cost.wire), memory_bytes=cost.memory_bytes, latency_us=cost.latency_us
    )


def _known(accuracy: float) -> float:
    return -1.0 if math.isnan(accuracy) else accuracy


def _verdict(report: GateReport) -> str:
    return "passed" if report.passed else f"gate: {'; '.join(report.reasons)}"


def _trial(candidate: Candidate, result: str, report: GateReport | None = None) -> Trial:
    cost = candidate.cost
    return Trial(
        recipe=candidate.recipe,
        result=result,
        wire_bytes=len(cost.wire),
        installed_bytes=len(cost.installed),
        memory_bytes=cost.memory_bytes,
        latency_us=cost.latency_us,
        accuracy=None if math.isnan(candidate.accuracy) else candidate.accuracy,
        gate=report,
    )


def _variant(tier: str, candidate: Candidate, report: GateReport, exam: _Exam) -> Variant:
    return Variant(
        tier=tier,
        recipe=candidate.recipe,
        installed=candidate.cost.installed,
        wire=candidate.cost.wire,
        accuracy=report.accuracy,
        latency_us=candidate.cost.latency_us,
        memory_bytes=candidate.cost.memory_bytes,
        parameters=candidate.parameters,
        gate=report,
        probabilities=exam.scores(candidate),
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


def _line(candidate: Candidate) -> str:
    cost = candidate.cost
    known = "" if math.isnan(candidate.accuracy) else f", {100 * candidate.accuracy:.1f} % on selection data"
    return f"{candidate.recipe}: {len(cost.wire):,} bytes, {cost.latency_us:.0f} us{known}"
