"""The release gate: evidence, on data used for nothing else, that a variant loses no more than it may.

Teacher and variant answer the same N examples. An example is a *loss* where only the teacher is right, a
*win* where only the variant is, else a *tie*, so the drop of accuracy is (losses - wins) / N. Its upper
confidence bound is the percentile bootstrap (Efron 1979, "Bootstrap Methods: Another Look at the
Jackknife"): resampling N values of -1, 0 and 1 is exactly a multinomial draw of the three counts, so no
example is ever resampled. So counts are all that `decide` needs, whether the server has counted on its own
data or clients have on theirs.

Shapes: N examples, C classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedge.artefact import unpack
from fedge.config import Gate, Tier
from fedge.counts import Counts, Whole, rightly
from fedge.inference import CompactModel, Float32
from fedge.spec import Spec
from fedge_server.evaluation import bootstrap

MAX_ATTEMPTS = 3  # candidates of one tier that may face the gate

_EMPTY = "the gate set is empty; keep data for it (evaluate.holdout_fraction, evaluate.gate_fraction)"


@dataclass(frozen=True, slots=True)
class Bound:
    """A drop and how large it might be; fractions of 1."""

    n: int
    drop: float
    drop_upper: float  # one-sided upper confidence bound; 1 where there are no examples


@dataclass(frozen=True, slots=True)
class ClassReport:
    """One class: its recall (share of its examples that are recognised) before and after."""

    label: str
    n: int
    teacher_recall: float  # 0 where n is 0
    recall: float
    drop: float
    drop_upper: float


@dataclass(frozen=True, slots=True)
class GateReport:
    """The evidence for or against one variant in one tier; fractions of 1."""

    passed: bool
    reasons: tuple[str, ...]  # why not; empty when passed
    n: int
    accuracy: float
    teacher_accuracy: float
    drop: float
    drop_upper: float
    max_drop: float  # what the tier allows
    max_class_drop: float | None  # None: reported, not required
    confidence: float  # of each bound, one-sided; already adjusted for the attempt
    attempt: int  # 1, 2, ...: how many candidates this tier has tried, this one included
    worst_class: str  # of the largest observed drop
    worst_class_drop: float
    worst_class_drop_upper: float  # the largest bound of any class, perhaps another one
    classes: tuple[ClassReport, ...]
    clients: int | None = None  # on whose own data was counted; None: on the server's

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {
            **asdict(self),
            "reasons": list(self.reasons),
            "classes": [asdict(row) for row in self.classes],
        }


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a decision rests on."""

    counts: Counts
    faults: tuple[str, ...] = ()  # why no figure at all could be trusted
    clients: int | None = None  # that have counted; None: the server has
    probabilities: Float32 | None = None  # (N, C) that were counted; None: clients have


def score(wire: bytes, installed_bytes: int, spec: Spec, x: npt.NDArray[Any]) -> Float32:
    """Probabilities (N, C) from the bytes that ship: unpacked and run as a device does, one by one.

    Raises:
        FormatError: the bytes do not unpack or are not a model of this spec.
    """
    return CompactModel(unpack(wire, installed_bytes), spec).run_each(x)


def judge(
    probabilities: Float32,
    teacher: Float32,
    y: npt.NDArray[np.int64],
    *,
    labels: Sequence[str],
    tier: Tier,
    settings: Gate,
    attempt: int = 1,
    seed: int = 0,
) -> GateReport:
    """Hold a variant's answers to a tier's limits: count, then `decide`.

    Args:
        probabilities: (N, C) of the variant, from `score`.
        teacher: (N, C) of the global model on the same examples.
        y: (N,) true classes.
        labels: names of the C classes.
        tier: as in `decide`.
        settings: likewise.
        attempt: likewise.
        seed: likewise.
    """
    found = evidence_of(probabilities, teacher, y, len(labels))
    return decide(found, labels=labels, tier=tier, settings=settings, attempt=attempt, seed=seed)


def evidence_of(probabilities: Float32, teacher: Float32, y: npt.NDArray[np.int64], classes: int) -> Evidence:
    """What answers are evidence of; those that cannot be used count as wrong.

    Args:
        probabilities: (N, C) of the variant.
        teacher: (N, C) of the global model on the same examples.
        y: (N,) true classes.
        classes: C.
    """
    y = np.asarray(y, dtype=np.int64)
    faults = _faults(probabilities, teacher, y, classes)
    usable = probabilities.shape == teacher.shape == (len(y), classes)
    right = rightly(probabilities, y) if usable else np.zeros(len(y), dtype=bool)
    teacher_right = rightly(teacher, y) if usable else np.ones(len(y), dtype=bool)
    return Evidence(Counts.of(right, teacher_right, y, classes), faults, probabilities=probabilities)


def decide(
    evidence: Evidence,
    *,
    labels: Sequence[str],
    tier: Tier,
    settings: Gate,
    attempt: int = 1,
    seed: int = 0,
) -> GateReport:
    """Hold counts to a tier's limits; whatever cannot be shown counts against the variant.

    All requirements must be met at once, so each may be tested at the full level (an intersection-union
    test); several candidates of one tier may not: see `level`.

    Args:
        evidence: of the variant.
        labels: names of the C classes.
        tier: max_drop bounds the drop of accuracy, max_class_drop that of each class's recall.
        settings: confidence over all attempts, and resamples.
        attempt: 1 for a tier's first candidate.
        seed: decides the resampling.
    """
    counts, faults = evidence.counts, evidence.faults
    if not counts.examples:
        faults = (_EMPTY,)
    confidence = level(settings.confidence, attempt)
    rng = np.random.default_rng([seed, attempt])

    def bounded(losses: int, wins: int, n: int) -> Bound:
        return bound(losses, wins, n, confidence, settings.resamples, rng)

    whole = bounded(int(counts.losses.sum()), int(counts.wins.sum()), counts.examples)
    classes = tuple(_class_report(label, i, counts, bounded) for i, label in enumerate(labels))
    worst = max(classes, key=lambda row: row.drop)
    reasons = (*faults, *_shortfalls(whole, classes, tier, confidence))
    return GateReport(
        passed=not reasons,
        reasons=reasons,
        n=counts.examples,
        accuracy=counts.accuracy,
        teacher_accuracy=counts.teacher_accuracy,
        drop=whole.drop,
        drop_upper=whole.drop_upper,
        max_drop=tier.max_drop,
        max_class_drop=tier.max_class_drop,
        confidence=confidence,
        attempt=attempt,
        worst_class=worst.label,
        worst_class_drop=worst.drop,
        worst_class_drop_upper=max(row.drop_upper for row in classes),
        classes=classes,
        clients=evidence.clients,
    )


def level(confidence: float, attempt: int) -> float:
    """Confidence at which attempt k is tested, 1 - alpha / 2^k, so that any number of attempts err by alpha.

    Otherwise trying candidates until one passes would let a bad one through sooner or later.
    """
    return 1.0 - (1.0 - confidence) * 0.5**attempt


def bound(
    losses: int, wins: int, n: int, confidence: float, resamples: int, rng: np.random.Generator
) -> Bound:
    """The drop (losses - wins) / n and its one-sided upper bound by the paired bootstrap.

    One loss that was not observed joins those that are resampled. A bootstrap of none at all can only
    draw none and would claim a bound of 0 from any number of examples; with it, n examples without a loss
    show a drop below about 3 / n at 95 %, which is what exact (Clopper-Pearson) limits say too.

    Args:
        losses: examples that only the teacher has right.
        wins: examples that only the variant has right; losses + wins <= n.
        n: examples.
        confidence: one-sided, 0 .. 1.
        resamples: how often to resample; more where the tail would hold too few.
        rng: source of the resampling.
    """
    if n == 0:
        return Bound(0, 0.0, 1.0)
    kinds = (losses + 1, wins, n - losses - wins)
    drawn = bootstrap.drawn(kinds, n, bootstrap.enough(resamples, 1.0 - confidence), rng)  # (R, 3)
    drops = (drawn[:, 0] - drawn[:, 1]) / n
    upper = float(np.quantile(drops, confidence, method="inverted_cdf"))
    return Bound(n, (losses - wins) / n, min(upper, 1.0))


def smallest_provable(n: int, settings: Gate, *, attempt: int = 1) -> float:
    """The bound that n examples without a single loss or win would give: no max_drop below it can be met."""
    rng = np.random.default_rng([0, attempt])
    return bound(0, 0, n, level(settings.confidence, attempt), settings.resamples, rng).drop_upper


def _faults(
    probabilities: Float32, teacher: Float32, y: npt.NDArray[np.int64], classes: int
) -> tuple[str, ...]:
    """Why no figure at all could be trusted; empty where nothing is wrong."""
    if len(y) == 0:
        return (_EMPTY,)
    faults = []
    for name, scores in (("variant", probabilities), ("teacher", teacher)):
        if scores.shape != (len(y), classes):
            faults.append(f"the {name} answers {scores.shape}, not {(len(y), classes)}")
        elif bad := int((~np.isfinite(scores).all(axis=1)).sum()):
            faults.append(f"the {name} gives NaN or infinite probabilities for {bad} of {len(y)} examples")
    return tuple(faults)


def _shortfalls(
    whole: Bound, classes: Sequence[ClassReport], tier: Tier, confidence: float
) -> tuple[str, ...]:
    reasons = []
    if whole.n and not whole.drop_upper <= tier.max_drop:
        reasons.append(_excess("accuracy", "max_drop", whole, tier.max_drop, confidence))
    if tier.max_class_drop is not None:
        for row in classes:
            name = f"recall of class {row.label!r}"
            if row.n == 0:
                reasons.append(f"{name} cannot be judged: the gate set has no example of it")
            elif not row.drop_upper <= tier.max_class_drop:
                found = Bound(row.n, row.drop, row.drop_upper)
                reasons.append(_excess(name, "max_class_drop", found, tier.max_class_drop, confidence))
    return tuple(reasons)


def _excess(what: str, key: str, found: Bound, limit: float, confidence: float) -> str:
    return (
        f"{what} may drop by up to {100 * found.drop_upper:.2f} points ({key} allows {100 * limit:.2f}): "
        f"{100 * found.drop:.2f} observed on {found.n} examples, bound at {100 * confidence:.2f} %"
    )


def _class_report(
    label: str, index: int, counts: Counts, bounded: Callable[[int, int, int], Bound]
) -> ClassReport:
    n, both, losses, wins = (int(values[index]) for values in _columns(counts))
    found = bounded(losses, wins, n)
    shares = ((both + losses) / max(n, 1), (both + wins) / max(n, 1))
    return ClassReport(label, n, *shares, found.drop, found.drop_upper)


def _columns(counts: Counts) -> tuple[Whole, Whole, Whole, Whole]:
    return counts.n, counts.both, counts.losses, counts.wins
