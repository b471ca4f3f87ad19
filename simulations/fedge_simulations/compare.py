"""Several runs side by side: those that differ in the seed alone are one group, with a mean and an interval.

Runs of two groups with the same seed share their splits, partition and first weights, so their difference is
taken pair by pair, which is surer than the difference of two means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedge.config import Rounds, Target
from fedge.errors import UserError
from fedge_server.rounds.record import RoundRecord
from fedge_server.rounds.stopping import reached_target_at
from fedge_simulations import runs
from fedge_simulations.runs import Past
from fedge_simulations.statistics import CONFIDENCE, Estimate, estimate

_LOWER_IS_BETTER: Final = ("loss",)
_LABEL_KEYS: Final = 4  # a group is called by what sets it apart, unless that is more than so many keys
_MACHINE: Final = "simulation."  # keys that change how fast a run is, and not what it learns
ABSENT: Final = "none"  # the value of a key that a run does not have
ALL: Final = "all"  # what the one group is called when there is no other


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ in nothing but the seed."""

    label: str
    settings: Mapping[str, Any]  # the keys in which the groups differ, and this group's values
    runs: tuple[Past, ...]  # by seed
    figures: Mapping[str, Estimate]  # final, best, seconds, bytes, ...
    reached: int | None  # so many of the runs reached the target; None: there is no target
    interval: tuple[float, float] | None  # of the final metric over the test data, where there is one run
    curve: tuple[Estimate, ...]  # the metric after round 1 .. the last that all runs have


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more of the metric a group has than the baseline, over seeds that both have."""

    label: str
    baseline: str
    difference: Estimate
    seeds: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        found = {"group": self.label, "baseline": self.baseline, "seeds": list(self.seeds)}
        return found | {"difference": self.difference.to_json()}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What there is to say about several runs."""

    task: str
    metric: str
    target: str | None
    keys: tuple[str, ...]  # in which the groups differ
    groups: tuple[Group, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]  # what to keep in mind when reading the figures

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "task": self.task,
            "metric": self.metric,
            "target": self.target,
            "confidence": CONFIDENCE,
            "groups": [_group_json(group) for group in self.groups],
            "differences": [difference.to_json() for difference in self.differences],
            "notes": list(self.notes),
        }


def compare(
    folders: Sequence[str | Path],
    *,
    metric: str | None = None,
    target: str | None = None,
    within: Path | None = None,
) -> Comparison:
    """Compare the runs in these folders.

    Args:
        folders: run folders, or folders of them; the first one's group is the baseline.
        metric: what to compare by; None: the targets' metric when they share one, else the accuracy.
        target: such as "accuracy>=0.9", for the rounds to reach it; None: the runs' own when they share one.
        within: a folder that the names of runs are relative to.

    Raises:
        UserError: a folder holds no run, no round is committed, or the runs cannot be compared.
        FedgeError: a database cannot be read.
    """
    found = runs.find([Path(folder) for folder in folders], within)
    notes = [f"{past.name}: no round is committed yet; left out" for past in found if not past.records]
    found = [past for past in found if past.records]
    if not found:
        raise UserError(f"{', '.join(map(str, folders))}: no run has a committed round yet; compare later")
    _check_tasks(found)
    wanted = _target(found, target)
    chosen = metric or (wanted.metric if wanted else "accuracy")
    _check_metric(found, chosen)
    found, doubled = _distinct(found)
    keys = _differing(found)
    groups = tuple(_group(members, keys, chosen, wanted) for members in _grouped(found))
    text = None if wanted is None else f"{wanted.metric}{'>=' if wanted.at_least else '<='}{wanted.value:g}"
    notes = [*notes, *doubled, *_cautions(found, keys, groups)]
    return Comparison(found[0].task, chosen, text, keys, groups, _differences(groups, chosen), tuple(notes))


def scalar(record: RoundRecord, metric: str) -> float:
    """A metric of a round that `compare` has found to be there."""
    value = record.metrics[metric]
    assert isinstance(value, (int, float))  # noqa: S101 - _check_metric has refused the others
    return float(value)


def simulated_s(past: Past) -> float | None:
    """The simulated clock after the run's last round, where its rounds tell it."""
    return past.records[-1].simulated_s or None


def _check_tasks(found: Sequence[Past]) -> None:
    tasks = {past.task: past for past in reversed(found)}
    if len(tasks) > 1:
        each = ", ".join(f"{past.name} ({task})" for task, past in sorted(tasks.items()))
        raise UserError(f"runs of different tasks cannot be compared: {each}; name runs of one task")


def _target(found: Sequence[Past], given: str | None) -> Target | None:
    own = {past.settings.get("rounds.target") for past in found}
    text = given if given is not None else own.pop() if len(own) == 1 else None
    try:
        return None if text is None else Target.parse(text)
    except ValueError as error:
        raise UserError(f"--target {text!r}: {error}") from error


def _check_metric(found: Sequence[Past], metric: str) -> None:
    for past in found:
        measured = [name for name, value in past.records[-1].metrics.items() if isinstance(value, float)]
        if metric not in measured:
            raise UserError(f"{past.name}: {metric!r} was not measured; measured: {', '.join(measured)}")


def _identity(past: Past) -> tuple[tuple[str, str], ...]:
    """What a run shares with the others of its group."""
    rest = {key: value for key, value in past.settings.items() if key != "seed"}
    return tuple(sorted((key, repr(value)) for key, value in rest.items()))


def _distinct(found: Sequence[Past]) -> tuple[list[Past], list[str]]:
    """Without the second run of the same configuration and seed: it would count as one more seed."""
    kept: dict[Any, Past] = {}
    notes = []
    for past in found:
        first = kept.setdefault((_identity(past), past.seed), past)
        if first is not past:
            notes.append(f"{past.name}: the same configuration and seed as {first.name}; left out")
    return list(kept.values()), notes


def _differing(found: Sequence[Past]) -> tuple[str, ...]:
    keys = dict.fromkeys(key for past in found for key in past.settings if key != "seed")
    return tuple(key for key in keys if len({repr(past.settings.get(key)) for past in found}) > 1)


def _grouped(found: Sequence[Past]) -> list[list[Past]]:
    groups: dict[Any, list[Past]] = {}
    for past in found:
        groups.setdefault(_identity(past), []).append(past)
    return [sorted(group, key=lambda past: past.seed) for group in groups.values()]


def _group(members: Sequence[Past], keys: Sequence[str], metric: str, target: Target | None) -> Group:
    settings = {key: members[0].settings.get(key, ABSENT) for key in keys}
    named = " ".join(f"{key}={_short(value)}" for key, value in settings.items())
    alone = members[0].name if len(members) == 1 else ALL
    several = members[0].name + (f" and {len(members) - 1} more" if len(members) > 1 else "")
    label = alone if not keys else named if len(keys) <= _LABEL_KEYS else several
    best = min if metric in _LOWER_IS_BETTER else max
    values: dict[str, list[float]] = {
        "final": [scalar(past.records[-1], metric) for past in members],
        "best": [best(scalar(record, metric) for record in past.records) for past in members],
        "rounds": [past.last for past in members],
        "seconds": [sum(record.seconds for record in past.records) for past in members],
        "bytes": [sum(r.bytes_up + r.bytes_down for r in past.records) for past in members],
    }
    clocks = [clock for past in members if (clock := simulated_s(past)) is not None]
    if len(clocks) == len(members):
        values["simulated_s"] = clocks
    at = [] if target is None else [_reached(past, target) for past in members]
    if at and all(at):
        values["rounds_to_target"] = [number for number in at if number is not None]
    length = min(len(past.records) for past in members)
    return Group(
        label=label,
        settings=settings,
        runs=tuple(members),
        figures={name: estimate(each) for name, each in values.items()},
        reached=None if target is None else sum(number is not None for number in at),
        interval=members[0].records[-1].intervals.get(metric) if len(members) == 1 else None,
        curve=tuple(estimate([scalar(p.records[i], metric) for p in members]) for i in range(length)),
    )


def _reached(past: Past, target: Target) -> int | None:
    """By the bound where the run itself asked for that target with a confidence."""
    own, sure = past.settings.get("rounds.target"), past.settings.get("rounds.target_confidence")
    if own and sure and Target.parse(str(own)) == target:
        return reached_target_at(past.records, Rounds(target=str(own), target_confidence=float(sure)))
    for record in past.records:
        scalars = {name: value for name, value in record.metrics.items() if isinstance(value, float)}
        if target.reached(scalars):
            return record.round
    return None


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _differences(groups: Sequence[Group], metric: str) -> tuple[Difference, ...]:
    """Each group against the first, over the seeds that both have."""
    base, *others = groups
    finals = {past.seed: scalar(past.records[-1], metric) for past in base.runs}
    found = []
    for group in others:
        shared = [past for past in group.runs if past.seed in finals]
        if shared:
            gains = [scalar(past.records[-1], metric) - finals[past.seed] for past in shared]
            seeds = tuple(past.seed for past in shared)
            found.append(Difference(group.label, base.label, estimate(gains), seeds))
    return tuple(found)


def _cautions(found: Sequence[Past], keys: Sequence[str], groups: Sequence[Group]) -> list[str]:
    notes = [
        f"{past.name}: {past.state} after round {past.last} of {past.settings.get('rounds.count')}"
        for past in found
        if past.state != "finished"
    ]
    if other := [key for key in keys if key == "task" or key.startswith(("data", "evaluate."))]:
        notes.append(f"the test data may differ between groups ({', '.join(other)} does)")
    if keys and all(key.startswith(_MACHINE) for key in keys):
        notes.append("the groups differ only in how they use the machine")
    if all(len(group.runs) == 1 for group in groups):
        notes.append("one seed each: a difference may be chance; run more seeds for intervals")
    if any(group.interval for group in groups):
        notes.append("in brackets: one run's interval over its test data, which other seeds may leave")
    return notes


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "label": group.label,
        "settings": dict(group.settings),
        "runs": [
            {"name": p.name, "folder": str(p.folder), "seed": p.seed, "rounds": p.last, "state": p.state}
            for p in group.runs
        ],
        "n": len(group.runs),
        **{name: figure.to_json() for name, figure in group.figures.items()},
        **({} if group.interval is None else {"test_interval": list(group.interval)}),
        **({} if group.reached is None else {"reached_target": group.reached}),
        "curve": [point.to_json() for point in group.curve],
    }
