"""What a search makes: candidates, what became of them in a tier, and the variant that a tier gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedge.config import Tier
from fedge.counts import Counts
from fedge.inference import Float32
from fedge.routing import Routing
from fedge_server.compression.budgets import Figure, figures
from fedge_server.compression.gate import GateReport
from fedge_server.compression.measure import Cost
from fedge_server.compression.recipes import Recipe


@dataclass(frozen=True, slots=True)
class Candidate:
    """A built version of the global model, before any gate."""

    recipe: Recipe
    cost: Cost
    parameters: int
    counts: Counts | None  # on the selection data; None: there is none
    seconds: float  # that its own stages took
    delta_bytes: int | None = None  # that make it of the tier's last variant; None: none has its graph
    changed: float | None = None  # share of codes that are not the last variant's; None: freshly rounded

    @property
    def name(self) -> str:
        """Of its recipe."""
        return self.recipe.name

    @property
    def accuracy(self) -> float | None:
        """On the selection data; None: there is none."""
        return None if self.counts is None else self.counts.accuracy

    def figures(self, tier: Tier) -> tuple[Figure, ...]:
        """What it needs of each of the tier's budgets."""
        return figures(
            tier,
            wire_bytes=len(self.cost.wire),
            memory_bytes=self.cost.memory_bytes,
            latency_us=self.latency_us(tier),
        )

    def latency_us(self, tier: Tier) -> float:
        """On a device of the tier."""
        return self.cost.latency_us[tier.threads] * tier.slowdown


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one recipe in one tier."""

    recipe: str
    result: str  # passed, gate: why not, over budget: which, not needed, not built: why
    wire_bytes: int | None = None  # None: not built
    installed_bytes: int | None = None
    memory_bytes: int | None = None
    latency_us: float | None = None  # on a device of the tier
    accuracy: float | None = None  # on the selection data; None: there is none
    seconds: float | None = None  # that its own stages took
    delta_bytes: int | None = None  # as a candidate has it
    changed: float | None = None  # likewise
    on_front: bool = False  # no other candidate is smaller, faster and more accurate at once
    gate: GateReport | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """The compact version for one tier, with its evidence."""

    tier: str
    recipe: str
    installed: bytes  # ONNX
    wire: bytes  # as it travels
    accuracy: float  # on the gate's data
    latency_us: float  # median at batch 1 on a device of the tier
    memory_bytes: int  # installed plus largest activations
    parameters: int
    gate: GateReport
    probabilities: Float32 | None  # (N, C) that the gate scored, in the order of its data; None: clients have
    routing: Routing  # when a device should ask the cloud
    delta_bytes: int | None = None  # as a candidate has it
    changed: float | None = None  # likewise


@dataclass(frozen=True, slots=True)
class TierOutcome:
    """A tier's variant, or why there is none."""

    tier: str
    variant: Variant | None
    reason: str  # one line, with figures
    tried: tuple[Trial, ...]  # every recipe, in the order in which it was considered


def front(candidates: Sequence[Candidate], tier: Tier) -> frozenset[str]:
    """Names of the candidates that no other beats: at least as small, fast and accurate, and better in one.

    The Pareto front of (bytes on the wire, latency, accuracy on the selection data); of those that are equal
    in all three, all.
    """
    points = {each.name: _point(each, tier) for each in candidates}
    return frozenset(
        name for name, point in points.items() if not any(_beats(other, point) for other in points.values())
    )


def _point(candidate: Candidate, tier: Tier) -> tuple[float, float, float]:
    """Less is better."""
    accuracy = candidate.accuracy
    return len(candidate.cost.wire), candidate.latency_us(tier), -1.0 if accuracy is None else -accuracy


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
