"""What a tier's devices fetch when they have its last variant: candidates that keep near it, and are as good.

A candidate of the same graph as the last variant is offered in two versions: near the last one (`nearness`),
and freshly rounded. Which distance is far enough, the selection data say, never the gate's: the nearest whose
answers are hardly farther from those of the unrounded network than the fresh one's are. The gate judges the
bytes that ship, as always; where it refuses what is near, the fresh version is next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from fedge import delta
from fedge.artefact import pack
from fedge.errors import CompressionError, FormatError
from fedge.inference import Float32
from fedge_server.compression.candidates import Candidate
from fedge_server.compression.layer_inputs import Inputs, divergence
from fedge_server.compression.nearness import PRICES, Near, alike, near
from fedge_server.compression.recipes import Architecture, Recipe
from fedge_server.compression.sources import Source
from fedge_server.compression.workshop import Workshop

# Nats, in the mean over the selection data: so much farther than the fresh version's may a version's answers
# be from the unrounded network's. Accuracy would not do: it counts the few answers that turn, and in 2,000
# examples chance turns more of them than rounding does.
MOST_OFF: Final = 0.0001
FORM: Final = "int8"  # that has versions
WORTH: Final = 0.9  # of the delta to fresh codes, at most: else these are taken

Say = Callable[[str], None]


@dataclass(slots=True)
class Keeper:
    """Versions of candidates for tiers that have had a variant before."""

    workshop: Workshop
    source: Source
    before: Mapping[str, bytes]  # installed bytes of each tier's last variant
    deadline: float | None = None  # of `time.monotonic()`, after which nothing near is looked for
    say: Say = lambda _: None
    _made: dict[tuple[Recipe, bytes], tuple[Candidate, ...]] = field(default_factory=dict)
    _inputs: dict[Architecture, tuple[Inputs | None, ...]] = field(default_factory=dict)

    def most(self, recipes: Sequence[Recipe]) -> int:
        """How many versions of these recipes the selection data may choose among, beside the fresh ones."""
        return sum(recipe.form == FORM for recipe in recipes) * len(PRICES) if self.before else 0

    def versions(self, candidate: Candidate, tier: str) -> tuple[Candidate, ...]:
        """The candidate in the order in which its versions shall face the tier's gate.

        Args:
            candidate: freshly rounded; it is the last of them.
            tier: of the gate.
        """
        base = self.before.get(tier)
        if base is None or not alike(candidate.cost.installed, base):
            return (candidate,)
        key = (candidate.recipe, base)
        if key not in self._made:
            self._made[key] = self._versions(candidate, base)
        return self._made[key]

    def _versions(self, candidate: Candidate, base: bytes) -> tuple[Candidate, ...]:
        fresh = replace(candidate, delta_bytes=len(delta.make(base, candidate.cost.installed)))
        try:
            found = self._near(fresh, base)
        except (CompressionError, FormatError) as error:
            self.say(f"compress: {candidate.name} keeps fresh codes: {error}")
            return (fresh,)
        return (fresh,) if found is None else (found, fresh)

    def _near(self, fresh: Candidate, base: bytes) -> Candidate | None:
        """The nearest version that is as good as the fresh one; None: there is none, or nobody can tell."""
        if fresh.recipe.form != FORM or self._is_late(fresh):
            return None
        exact = self.workshop.exact(fresh.recipe.architecture)
        inputs, answers = self._inputs_of(fresh.recipe.architecture, exact), self.source.probabilities(exact)
        if not inputs or answers is None:
            return None
        most = MOST_OFF + self._off(answers, fresh.cost.installed)
        for each in near(fresh.cost.installed, base, exact, inputs):
            if self._is_late(fresh):
                return None
            off = self._off(answers, each.graph)
            self.say(
                f"compress: {fresh.name} near the last variant: {100 * each.changed:.1f} % of the codes "
                f"change, {off:.5f} nats from the unrounded network (at most {most:.5f})"
            )
            if off <= most:
                found = self._candidate(fresh, base, each)
                return found if _is_worth(found, fresh) else None
        return None

    def _is_late(self, fresh: Candidate) -> bool:
        late = self.deadline is not None and time.monotonic() > self.deadline
        if late:
            self.say(f"compress: {fresh.name} keeps fresh codes: the time is up")
        return late

    def _off(self, exact: Float32, graph: bytes) -> float:
        answers = self.source.probabilities(graph)
        return math.inf if answers is None else divergence(exact, answers)

    def _candidate(self, fresh: Candidate, base: bytes, version: Near) -> Candidate:
        graph = version.graph
        cost = replace(fresh.cost, installed=graph, wire=pack(graph))  # memory and speed are the graph's own
        counts, size = self.source.selection(cost.wire, len(graph)), len(delta.make(base, graph))
        return replace(fresh, cost=cost, counts=counts, delta_bytes=size, changed=version.changed)

    def _inputs_of(self, architecture: Architecture, exact: bytes) -> Sequence[Inputs | None]:
        if architecture not in self._inputs:
            self._inputs[architecture] = self.source.inputs_of(exact)
        return self._inputs[architecture]


def _is_worth(version: Candidate, fresh: Candidate) -> bool:
    if version.delta_bytes is None or fresh.delta_bytes is None:
        return False
    return version.delta_bytes <= WORTH * fresh.delta_bytes
