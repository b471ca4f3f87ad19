"""What to build next: recipes that are not built yet, what is known of them, and which of them promises most.

Nothing here trains or measures; the functions are pure.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Final

from fedge.config import Config, FormName, Tier
from fedge.counts import Counts
from fedge_server.compression.candidates import Candidate
from fedge_server.compression.gate import level
from fedge_server.compression.recipes import PRECISION, Architecture, Recipe

# Points of accuracy that a form costs, until this search has measured it: Fashion-MNIST, students of 5,000 to
# 100,000 weights (docs/compression.md).
_COST_OF_FORM: Final[Mapping[FormName, float]] = {
    "fp32": 0.0, "int8": 0.001, "w8": 0.0, "w4": 0.002, "ternary": 0.01, "binary": 0.02,
}  # fmt: skip
_BITS: Final[Mapping[FormName, float]] = {
    "fp32": 28.0, "int8": 7.5, "w8": 7.5, "w4": 4.0, "ternary": 1.7, "binary": 1.1,
}  # fmt: skip
# Of the errors that a short training leaves, the whole one leaves so many, until this search has seen it:
# small and large students of Fashion-MNIST alike (83 to 85 %).
_ERRORS_LEFT: Final = 0.85
_SKELETON: Final = 1200  # bytes of a packed graph without weights, about
_ROOM: Final = 1.3  # a recipe is left out only where its estimate is so many times a budget
_INT8_GAIN: Final = 4.0  # how many times faster whole numbers may be, at most
_GATE: Final = 1000  # examples of a gate whose size is not known
_DIFFER: Final = 0.05  # of the examples teacher and candidate tell apart, until they are seen
MOST_ARCHITECTURES: Final = 8  # that learn, for each tier


@dataclass(frozen=True, slots=True)
class Prospect:
    """A recipe, and what can be told before it is built."""

    recipe: Recipe
    parameters: int
    latency_us: Mapping[int, float]  # of its architecture as float32, by threads; empty: not measured

    @property
    def wire_bytes(self) -> float:
        """About what will cross the network."""
        return _SKELETON + self.parameters * _BITS[self.recipe.form] / 8

    def may_fit(self, tier: Tier) -> bool:
        """Whether the tier's budgets do not rule it out."""
        if tier.max_wire_bytes is not None and self.wire_bytes > _ROOM * tier.max_wire_bytes:
            return False
        if tier.max_memory_bytes is not None and self._least_memory > tier.max_memory_bytes:
            return False
        if tier.max_latency_ms is None or not self.latency_us:
            return True
        gain = _INT8_GAIN if self.recipe.form == "int8" else _ROOM
        return self.latency_us[tier.threads] * tier.slowdown <= gain * tier.max_latency_ms * 1000

    @property
    def _least_memory(self) -> float:
        """Bytes of the weights as installed: those of few bits compute as float32 again."""
        return self.parameters * (1 if self.recipe.form == "int8" else 4)


@dataclass(frozen=True, slots=True)
class Known:
    """What a search has seen so far."""

    built: Mapping[Recipe, Candidate]
    short: Mapping[Architecture, Counts]  # on the selection data, after a short training
    warm: Collection[Architecture] = ()  # those of `short` that have been trained whole

    @property
    def examples(self) -> int:
        """Of the selection data; a thousand where nothing has been counted."""
        counted = [each.counts for each in self.built.values() if each.counts is not None]
        return max((counts.examples for counts in (*counted, *self.short.values())), default=0) or _GATE

    def drop(self, recipe: Recipe) -> float:
        """The drop on the selection data that a recipe will show, as far as can be told; fractions of 1."""
        if recipe in self.built and (counts := self.built[recipe].counts) is not None:
            return drop_of(counts)
        return self._of_architecture(recipe.architecture) + self._of_form(recipe.form)

    def _of_architecture(self, architecture: Architecture) -> float:
        finest = [
            drop_of(candidate.counts) - _COST_OF_FORM[recipe.form]
            for recipe, candidate in self.built.items()
            if recipe.architecture == architecture and candidate.counts is not None and not recipe.trained
        ]
        if finest:
            return min(finest)
        if not architecture.learns:
            return 0.0
        if architecture in self.short:
            counts = self.short[architecture]
            left = 1.0 if architecture in self.warm else self._errors_left()
            return counts.teacher_accuracy - 1 + (1 - counts.accuracy) * left
        return 0.01

    def _errors_left(self) -> float:
        """The share of a short training's errors that the whole training leaves."""
        seen = []
        for recipe, candidate in self.built.items():
            counts = self.short.get(recipe.architecture)
            if recipe.form != "fp32" or recipe.architecture in self.warm:
                continue
            if counts is None or candidate.counts is None or counts.accuracy == 1:
                continue
            seen.append((1 - candidate.counts.accuracy) / (1 - counts.accuracy))
        return fmean(seen) if seen else _ERRORS_LEFT

    def _of_form(self, form: FormName) -> float:
        """What a form costs against float32, in the mean over the architectures that were built as both."""
        seen = []
        for recipe, candidate in self.built.items():
            finest = self.built.get(Recipe(recipe.architecture, "fp32"))
            if recipe.form == form and finest is not None and candidate.counts and finest.counts:
                seen.append(drop_of(candidate.counts) - drop_of(finest.counts))
        return fmean(seen) if seen else _COST_OF_FORM[form]


def drop_of(counts: Counts) -> float:
    """The drop of accuracy, a fraction of 1."""
    return counts.teacher_accuracy - counts.accuracy


def room(
    counts: Counts | None,
    gate_examples: int | None,
    config: Config,
    attempt: int = 1,
    *,
    selection: int = _GATE,
) -> float:
    """How far the gate's bound will lie above the drop that the selection data show, about: fractions of 1.

    The first candidate of a tier is taken at its word. After each that the gate has refused, one standard
    error of the selection's drop is added: few examples order candidates by chance, and attempts are few.

    Args:
        counts: how often teacher and candidate differ on the selection data; None: a twentieth of the time.
        gate_examples: that the gate has; None: not known, and taken to be a thousand.
        config: its confidence.
        attempt: at the gate.
        selection: examples of the selection data, where there are no counts.
    """
    differ, seen = _DIFFER, selection
    if counts is not None and counts.examples:
        differ, seen = float((counts.losses + counts.wins).sum() + 1) / counts.examples, counts.examples
    quantile = NormalDist().inv_cdf(level(config.compress.gate.confidence, attempt))
    n = _GATE if gate_examples is None else max(gate_examples, 1)
    return quantile * math.sqrt(differ / n) + (attempt - 1) * math.sqrt(differ / seen)


def useful(prospects: Sequence[Prospect], tier: Tier) -> list[Prospect]:
    """Those worth building for a tier, in their order.

    Weights of few values are worth their training where bytes are the aim, or where no finer form of the
    architecture fits: they lose accuracy and win nothing else. Of the architectures that learn,
    `MOST_ARCHITECTURES` are looked at: the largest that fit where accuracy is the aim, since they lose
    least; else some of every size.
    """
    fitting = [each for each in prospects if each.may_fit(tier)]
    if tier.aim != "bytes":
        fitting = [each for each in fitting if _needed(each, fitting)]
    chosen = _chosen(fitting, tier)
    return [
        each for each in fitting if not each.recipe.architecture.learns or each.recipe.architecture in chosen
    ]


def _needed(prospect: Prospect, fitting: Sequence[Prospect]) -> bool:
    """Whether no finer form of its architecture fits; float32 and int8 cost no training of their own."""
    if not prospect.recipe.trained:
        return True
    finer = PRECISION[: PRECISION.index(prospect.recipe.form)]
    return not any(
        other.recipe.architecture == prospect.recipe.architecture and other.recipe.form in finer
        for other in fitting
    )


def _chosen(fitting: Sequence[Prospect], tier: Tier) -> set[Architecture]:
    sizes = {each.recipe.architecture: each.parameters for each in fitting if each.recipe.architecture.learns}
    ordered = sorted(sizes, key=lambda each: -sizes[each])
    if tier.aim == "accuracy" or len(ordered) <= MOST_ARCHITECTURES:
        return set(ordered[:MOST_ARCHITECTURES])
    step = (len(ordered) - 1) / (MOST_ARCHITECTURES - 1)
    return {ordered[round(i * step)] for i in range(MOST_ARCHITECTURES)}


def next_of(
    waiting: Sequence[Prospect],
    known: Known,
    tier: Tier,
    gate_examples: int | None,
    config: Config,
    refused: Collection[Recipe] = (),
) -> Prospect | None:
    """Which of the useful recipes promises most for a tier; None: none can improve on what is built.

    Where accuracy is the aim, that of the least drop to be expected. Else the smallest or fastest of those
    that will pass the gate as far as can be told; where nothing is built that will, the one that comes
    nearest. Of what the gate has refused, only that it did is used: what is tried after so many refusals was
    certain before the first, so the levels of the attempts add up (`gate.level`).
    """
    attempt = len(refused) + 1
    if not waiting:
        return None
    if tier.aim == "accuracy":
        return min(waiting, key=lambda each: (known.drop(each.recipe), each.wire_bytes))
    limit = tier.max_drop - room(None, gate_examples, config, attempt, selection=known.examples)
    passing = [each for each in waiting if known.drop(each.recipe) <= limit]
    best = min(
        (
            _aimed(candidate, tier)
            for candidate in known.built.values()
            if candidate.recipe not in refused
            and will_pass(candidate, tier, gate_examples, config, attempt)
            and all(figure.met for figure in candidate.figures(tier))
        ),
        default=math.inf,
    )
    better = [each for each in passing if _expected(each, tier) < best]
    if better:
        return min(better, key=lambda each: (_expected(each, tier), known.drop(each.recipe)))
    if best < math.inf:
        return None
    return min(waiting, key=lambda each: (known.drop(each.recipe), each.wire_bytes))


def will_pass(
    candidate: Candidate, tier: Tier, gate_examples: int | None, config: Config, attempt: int = 1
) -> bool:
    """Whether the selection data lets one expect that a candidate passes the gate."""
    if candidate.counts is None:
        return True
    return drop_of(candidate.counts) + room(candidate.counts, gate_examples, config, attempt) <= tier.max_drop


def in_order(
    candidates: Iterable[Candidate],
    tier: Tier,
    gate_examples: int | None,
    config: Config,
    attempt: int = 1,
) -> list[Candidate]:
    """The candidates of a tier as they shall face the gate, at an attempt.

    By accuracy, equal ones by fewer bytes; where bytes or latency are the aim, those that are expected to
    pass by it, before the others.
    """

    def by_accuracy(candidate: Candidate) -> tuple[float, int]:
        return -1.0 if candidate.accuracy is None else -candidate.accuracy, len(candidate.cost.wire)

    ordered = sorted(candidates, key=by_accuracy)
    if tier.aim == "accuracy":
        return ordered
    expected = [each for each in ordered if will_pass(each, tier, gate_examples, config, attempt)]
    expected.sort(key=lambda each: _aimed(each, tier))
    return expected + [each for each in ordered if each not in expected]


def _aimed(candidate: Candidate, tier: Tier) -> float:
    return len(candidate.cost.wire) if tier.aim == "bytes" else candidate.latency_us(tier)


def _expected(prospect: Prospect, tier: Tier) -> float:
    if tier.aim == "bytes":
        return prospect.wire_bytes
    return prospect.latency_us.get(tier.threads, prospect.parameters / 1000)
