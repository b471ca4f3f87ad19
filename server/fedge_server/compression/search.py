"""From one global model to one variant per tier: try what promises most, gate the best, explain the rest.

Cheap before dear: what needs no training is built first; sizes and speeds are measured on untrained networks;
students are trained for a short while and compared (successive halving, Jamieson and Talwalkar 2016,
"Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS, with one halving), and only
then trained whole, in the order of what they promise, until nothing can improve on what is built or
`compress.max_seconds` have passed.

Data by purpose, no example serving two: what trains and calibrates, what orders the candidates (selection),
and what only ever decides (the gate). Where they come from, the `Source` knows.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from fedge.config import Config, Tier
from fedge.counts import Counts
from fedge.errors import CompressionError, FormatError, TimeUpError
from fedge.files import sha256
from fedge.learning.whole import WholeModel
from fedge.routing import Routing
from fedge.spec import Spec
from fedge.task import Task
from fedge_server.compression.candidates import Candidate, TierOutcome, Trial
from fedge_server.compression.gate import Evidence, GateReport, decide
from fedge_server.compression.keeping import Keeper
from fedge_server.compression.measure import measure
from fedge_server.compression.outcome import Sitting
from fedge_server.compression.prospects import Known, Prospect, next_of, useful
from fedge_server.compression.recipes import Architecture, Recipe, recipes
from fedge_server.compression.shelf import Shelf
from fedge_server.compression.sources import Source
from fedge_server.compression.workshop import Workshop

_SHORT: Final = 1 / 6  # of the epochs: the training that architectures are compared after
_FEW: Final = 3  # so many architectures are trained whole without comparing them first

Say = Callable[[str], None]


def compress(
    teacher: WholeModel,
    task: Task,
    spec: Spec,
    source: Source,
    config: Config,
    progress: Say,
    *,
    folder: Path | None = None,
    before: Mapping[str, bytes] | None = None,
) -> tuple[TierOutcome, ...]:
    """For each tier the best candidate within its budgets that passes the gate; what is best, its `aim` says.

    Every candidate is built and measured once, whatever the number of tiers. Those within a tier's budgets
    face the gate in the order of `prospects.in_order` until one passes, `MAX_ATTEMPTS` at most; after each
    that it refuses the search goes on, more cautiously, while there is time.

    Args:
        teacher: the global model; it is not changed.
        task: its students are candidates.
        spec: of the data.
        source: of all that is learned about data; one that knows none leaves only "fp32".
        config: tiers, stages, time and seed; they decide everything but latencies and what there is time for.
        progress: takes one line per candidate and tier.
        folder: where what is made is kept: a search that was stopped goes on, and the next one starts its
            students from this one's; None: nowhere.
        before: installed bytes of each tier's last variant: what is made of the same graph keeps near it
            where that costs nothing (`keeping`), so that devices fetch little; None: there are none.
    """
    if not config.tiers:
        return ()
    teacher = copy.deepcopy(teacher).eval()
    deadline = time.monotonic() + config.compress.max_seconds
    shelf = Shelf.of(folder, teacher, task, source.identity(), config) if folder is not None else None
    workshop = Workshop(teacher, task, spec, source, config, shelf=shelf, deadline=deadline, say=progress)
    search = Search(workshop, source, config, deadline, progress)
    every = recipes(task, config, teachable=source.learns)
    keeper = Keeper(workshop, source, before or {}, deadline, progress)
    exam = _Exam(source, spec, config, len(every) + keeper.most(every))
    sittings = [Sitting(name, exam, keeper.versions) for name in config.tiers]
    search.run(every, sittings)
    outcomes = []
    for sitting in sittings:
        outcomes.append(sitting.outcome(list(search.built.values()), tuple(search.left)))
        progress(f"compress: tier {sitting.name}: {outcomes[-1].reason}")
        if (variant := outcomes[-1].variant) is not None:
            progress(f"compress: tier {sitting.name}: {variant.routing.describe()}")
    if shelf is not None:
        shelf.tidy()
    return tuple(outcomes)


@dataclass(slots=True)
class Search:
    """One search: what is built, what is left, and what it takes next."""

    workshop: Workshop
    source: Source
    config: Config
    deadline: float  # of time.monotonic()
    say: Say
    built: dict[Recipe, Candidate] = field(default_factory=dict)
    short: dict[Architecture, Counts] = field(default_factory=dict)
    warm: set[Architecture] = field(default_factory=set)  # those of `short` that have been trained whole
    left: list[Trial] = field(default_factory=list)  # what could not be built, and why

    def run(self, every: Sequence[Recipe], sittings: Sequence[Sitting]) -> None:
        """Build until nothing promises anything or the time is up; go on for those whom the gate refuses."""
        for recipe in every:
            if not recipe.architecture.learns and not recipe.trained:
                self._build(recipe)
        waiting = self._screened([recipe for recipe in every if recipe not in self.built])
        if waiting:
            self.source.make_ready()
        self._compare(waiting)
        done: set[Recipe] = set()
        searching = list(sittings)
        while searching:
            self._build_for(searching, waiting, done)
            searching = [sitting for sitting in searching if sitting.sit(self.built.values())]
            for sitting in searching:
                self.say(f"compress: tier {sitting.name}: the gate refused {sitting.refused[-1].name}")

    def _build_for(self, sittings: Sequence[Sitting], waiting: Sequence[Prospect], done: set[Recipe]) -> None:
        """What promises most, for each tier in turn, until nothing promises any tier more than is built."""
        turns = [(sitting, useful(waiting, sitting.tier)) for sitting in sittings]
        while turns:
            sitting, prospects = turns.pop(0)
            prospects = [each for each in prospects if each.recipe not in done]
            known, examples = Known(self.built, self.short, self.warm), self.source.gate_examples
            chosen = next_of(prospects, known, sitting.tier, examples, self.config, sitting.refused)
            if chosen is None:
                continue  # nothing more for this tier
            turns.append((sitting, prospects))
            recipe = chosen.recipe
            if recipe.trained:  # its architecture is trained first in any case: what that shows, decides anew
                plain = Recipe(recipe.architecture, "fp32")
                recipe = recipe if plain in done or plain in self.built else plain
            done.add(recipe)
            self._build(recipe)

    def _screened(self, every: Sequence[Recipe]) -> list[Prospect]:
        """What may fit some tier, by size first, then by the speed of untrained networks."""
        tiers, sizes = list(self.config.tiers.values()), {}
        for architecture in dict.fromkeys(recipe.architecture for recipe in every):
            try:
                sizes[architecture] = self.workshop.parameters(architecture)
            except CompressionError as error:
                self._failed(Recipe(architecture, "int8" if architecture.cut else "fp32"), error)
        failed = [trial.recipe for trial in self.left]
        prospects = [
            Prospect(recipe, sizes[recipe.architecture], {})
            for recipe in every
            if recipe.architecture in sizes and recipe.name not in failed
        ]
        prospects = _for_any(prospects, tiers)
        if not any(tier.max_latency_ms or tier.aim == "latency" for tier in tiers):
            return prospects
        architectures = dict.fromkeys(each.recipe.architecture for each in prospects)  # each has many forms
        speeds = {architecture: self._latency(architecture) for architecture in architectures}
        measured = [replace(each, latency_us=speeds[each.recipe.architecture]) for each in prospects]
        return _for_any(measured, tiers)

    def _latency(self, architecture: Architecture) -> Mapping[int, float]:
        try:
            graph = self.workshop.exported(self.workshop.untrained(architecture))
            return measure(graph, self.workshop.spec, threads=self._threads()).latency_us
        except (CompressionError, FormatError):
            return {}

    def _compare(self, waiting: Sequence[Prospect]) -> None:
        """Train each student for a short while, where there are more than a few."""
        students = [
            each for each in dict.fromkeys(each.recipe.architecture for each in waiting) if each.student
        ]
        if len(students) <= _FEW or not self.source.trains_grids:
            return
        for architecture in students:
            try:
                network = self.workshop.tried_out(architecture, _SHORT)
                counts = self.source.selection_of(network)
            except CompressionError as error:
                self.say(f"compress: {architecture.name} was not compared: {error}")
                continue
            if counts is not None:
                self.short[architecture] = counts
                warm = self.workshop.is_warm(architecture)
                self.warm |= {architecture} if warm else set()
                self.say(
                    f"compress: {architecture.name}: {100 * counts.accuracy:.1f} % on selection data after "
                    + ("going on from the last search" if warm else "a short training")
                )

    def _build(self, recipe: Recipe) -> None:
        began = time.monotonic()
        try:
            if recipe.architecture.learns or recipe.trained:
                self._check_time(recipe)
            cost = measure(self.workshop.build(recipe), self.workshop.spec, threads=self._threads())
            self.built[recipe] = candidate = Candidate(
                recipe,
                cost,
                self.workshop.parameters(recipe.architecture),
                self.source.selection(cost.wire, len(cost.installed)),
                time.monotonic() - began,
            )
            self.say(f"compress: {_line(candidate)}")
        except (CompressionError, FormatError) as error:
            self._failed(recipe, error)

    def _check_time(self, recipe: Recipe) -> None:
        """Refuse to begin what cannot end in time.

        Raises:
            TimeUpError: the time is up, or will be before this is built.
        """
        left, needs = self.deadline - time.monotonic(), self._needs(recipe)
        limit = f"compress.max_seconds = {self.config.compress.max_seconds:g}"
        if left <= 0:
            raise TimeUpError(f"the time is up ({limit})")
        if left < needs:
            raise TimeUpError(f"it takes about {needs:.0f} s, and of {limit} there are {left:.0f} left")

    def _needs(self, recipe: Recipe) -> float:
        """Seconds of training, by what the short one took; 0 where there was none."""
        name, seconds = recipe.architecture.name, self.workshop.seconds
        whole = seconds.get(name, seconds.get(f"{name}.short", 0.0) / _SHORT)
        settings = self.config.compress
        needs = 0.0 if name in seconds else whole
        if recipe.trained:
            whole = self.workshop.lessons.get(name, whole)
            needs += whole * settings.grid.epochs / settings.distil.epochs
        return needs

    def _failed(self, recipe: Recipe, error: Exception) -> None:
        self.left.append(Trial(recipe.name, f"not built: {error}"))
        self.say(f"compress: {recipe.name} is no candidate: {error}")

    def _threads(self) -> set[int]:
        return {tier.threads for tier in self.config.tiers.values()}


class _Exam:
    """The gate for all tiers of one search: every candidate is scored once, by the bytes that ship."""

    def __init__(self, source: Source, spec: Spec, config: Config, among: int) -> None:
        self.config, self.examples = config, source.gate_examples
        self._source, self._spec, self._among = source, spec, among
        self._seen: dict[tuple[Recipe, str], Evidence] = {}

    def evidence(self, candidate: Candidate) -> Evidence:
        """What is known of a candidate."""
        cost = candidate.cost
        key = (candidate.recipe, sha256(cost.installed))  # of versions, each its own
        if key not in self._seen:
            self._seen[key] = self._source.evidence(cost.wire, len(cost.installed))
        return self._seen[key]

    def routing(self, candidate: Candidate) -> Routing:
        """When a device should ask the cloud, whichever recipe is chosen."""
        cost = candidate.cost
        return self._source.routing(cost.wire, len(cost.installed), self._among)

    def sit(self, candidate: Candidate, tier: Tier, attempt: int) -> GateReport:
        """The report on a tier's candidate number `attempt`."""
        return decide(
            self.evidence(candidate),
            labels=self._spec.labels,
            tier=tier,
            settings=self.config.compress.gate,
            attempt=attempt,
            seed=self.config.seed,
        )


def _for_any(prospects: Sequence[Prospect], tiers: Sequence[Tier]) -> list[Prospect]:
    """Those that are useful for some tier, in their order."""
    wanted = {each.recipe for tier in tiers for each in useful(prospects, tier)}
    return [each for each in prospects if each.recipe in wanted]


def _line(candidate: Candidate) -> str:
    cost, accuracy = candidate.cost, candidate.accuracy
    known = "" if accuracy is None else f", {100 * accuracy:.1f} % on selection data"
    return f"{candidate.name}: {len(cost.wire):,} bytes, {min(cost.latency_us.values()):.0f} us{known}"
