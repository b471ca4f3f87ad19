"""What a year was like for one tier, and whether it was as stated beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

from _harness import Row
from _year_scenes import Change, Scene
from _year_site import BEGINS, DAY_S, Site
from scipy.stats import poisson

from fedge_server.continual.steps import versions
from fedge_server.drift.watch import Settings

if TYPE_CHECKING:
    from _year_device import Simulated
    from matplotlib.axes import Axes

DELAY_DAYS, RECOVERED, FORGOTTEN_POINTS = 3.0, 0.8, 1.0
TOO_RARE: Final = 0.01  # so improbable is more than chance
MEAN_DAYS: Final = 14  # over which accuracy is taken before a change, and after what answers it
BETWEEN_DAYS: Final = math.exp(Settings().threshold)  # between false alarms, or more


@dataclass(slots=True)
class Checks:
    """What was stated, and what was seen."""

    claims: dict[str, float] = field(default_factory=dict)
    _rows: list[Row] = field(default_factory=list)
    hold: bool = True

    def most(self, name: str, seen: float, stated: float) -> None:
        """No more than that; a number that is none is more."""
        self._add(name, seen, f"at most {stated:g}", seen <= stated)

    def least(self, name: str, seen: float, stated: float) -> None:
        """No less than that."""
        self._add(name, seen, f"at least {stated:g}", seen >= stated)

    def rate(self, name: str, seen: int, expected: float) -> None:
        """No more often than is expected at most, but for chance (Poisson)."""
        self.claims[f"{name}_expected_at_most"] = expected
        chance = float(poisson.sf(seen - 1, expected)) if seen else 1.0
        self._add(name, float(seen), f"at most {expected:.3g} expected", chance >= TOO_RARE)

    def rows(self) -> list[Row]:
        """As a table."""
        return self._rows

    def _add(self, name: str, seen: float, stated: str, holds: bool) -> None:
        self.claims[name] = seen
        self.hold = self.hold and holds
        self._rows.append({"check": name, "stated": stated, "seen": round(seen, 3), "holds": str(holds)})


@dataclass(slots=True)
class Story:
    """One tier's year."""

    scene: Scene
    accuracy: dict[int, float] = field(default_factory=dict)  # by day, of what devices answered
    evidence: dict[int, float] = field(default_factory=dict)  # by day, of the release that devices have
    alarms: dict[int, tuple[int, str]] = field(default_factory=dict)  # by release: day and stream
    begun: dict[int, int] = field(default_factory=dict)  # by release: first day on a device
    whole: dict[int, int] = field(default_factory=dict)  # by release: first day on all
    right: dict[int, Mapping[str, float]] = field(default_factory=dict)  # by release and condition
    quiet_days: int = 0  # on which an alarm would be false
    over: bool = True  # no cycle is under way at the end
    cycles: int = 0
    said: list[tuple[int, str, str]] = field(default_factory=list)  # day, what, why: of the audit trail

    # --- what happens

    def answered(self, day: int, accuracy: float) -> None:
        """A day's answers."""
        self.accuracy[day] = accuracy

    def note(self, site: Site, fleet: Sequence[Simulated]) -> None:
        """Who runs what now."""
        running = {device.has for device in fleet}
        for device in fleet:
            if device.has and device.has not in self.right:
                self.begun[device.has], self.right[device.has] = site.day, device.accuracy()
        if len(running) == 1 and (version := running.pop()):
            self.whole.setdefault(version, site.day)

    def watched(self, site: Site) -> None:
        """What the server's watches say, once the windows of yesterday are in."""
        version = versions(site.registry.engine, (self.scene.tier,)).get(self.scene.tier)
        if version is None:
            return
        for each in self.begun:
            alarm = site.telemetry.watch(self.scene.tier, each).alarm
            if alarm is not None:
                self.alarms.setdefault(each, (site.day, alarm.stream))
        self.evidence[site.day] = site.telemetry.watch(self.scene.tier, version).log_evidence
        since = self.begun.get(version, site.day)
        self.quiet_days += not any(since < change.day < site.day for change in self.scene.changes)

    def ended(self, site: Site, over: bool, cycles: int) -> None:
        """The year is over."""
        self.over, self.cycles = over, cycles
        own = (f"learning {self.scene.name}", f"{self.scene.tier}-")
        for entry in site.story():
            if entry["subject"] == own[0] or entry["subject"].startswith(own[1]):
                day = int(entry["at"] - BEGINS) // DAY_S
                name = "" if entry["subject"] == own[0] else f"rollout {entry['subject']}: "
                self.said.append((day, name + entry["what"], entry["why"]))

    # --- what it was like

    def alarm_of(self, change: Change) -> tuple[int, int] | None:
        """The day of the first alarm that a change explains, and the release under which it came."""
        found = [
            (day, version)
            for version, (day, _) in self.alarms.items()
            if self.begun[version] <= change.day <= day and not self._between(change.day, day)
        ]
        return min(found, default=None)

    def answer_to(self, change: Change) -> int | None:
        """The release that came after the alarm of a change, and that all devices have got."""
        alarm = self.alarm_of(change)
        later = [v for v in self.whole if alarm and v > alarm[1] and self.begun[v] >= alarm[0]]
        return min(later, default=None)

    def false_alarms(self) -> int:
        """Alarms that no change explains."""
        explained = {alarm[1] for change in self.scene.changes if (alarm := self.alarm_of(change))}
        return len(self.alarms.keys() - explained)

    def mean(self, begin: int, end: int) -> float:
        """Accuracy from a day on until before another one."""
        found = [
            value for day, value in self.accuracy.items() if begin <= day < end and not math.isnan(value)
        ]
        return fmean(found) if found else float("nan")

    def levels(self, change: Change) -> tuple[float, float, float]:
        """Accuracy before a change, from it to the release that answers it, and with that on all devices."""
        before = self.mean(change.day - MEAN_DAYS, change.day)
        answer = self.answer_to(change)
        if answer is None:
            return before, self.mean(change.day, change.day + MEAN_DAYS), float("nan")
        whole = self.whole[answer]
        later = [other.day for other in self.scene.changes if other.day > change.day]
        end = min([whole + 1 + MEAN_DAYS, *later])
        return before, self.mean(change.day, self.begun[answer]), self.mean(whole + 1, end)

    def forgotten(self) -> dict[tuple[int, str], float]:
        """By release and world that the one before it knew: points lost."""
        known, found = sorted(self.right), dict[tuple[int, str], float]()
        for before, after in pairwise(known):
            worlds = {self.scene.condition(day) for day in range(self.begun[before] + 1)}
            for world in sorted(worlds):
                found[after, world] = 100 * (self.right[before][world] - self.right[after][world])
        return found

    def _between(self, begin: int, end: int) -> bool:
        """Whether another change lies in between, which explains an alarm better."""
        return any(begin < other.day <= end for other in self.scene.changes)

    # --- as tables, checks and a picture

    def rows(self) -> list[Row]:
        """Each change and what came of it."""
        rows: list[Row] = []
        for change in self.scene.changes:
            alarm, answer = self.alarm_of(change), self.answer_to(change)
            before, during, after = self.levels(change)
            rows.append(
                {
                    "tier": self.scene.tier,
                    "day": change.day,
                    "change": change.what,
                    "alarm after (days)": str(alarm[0] - change.day) if alarm else "never",
                    "stream": self.alarms[alarm[1]][1] if alarm else "",
                    "release": str(answer or "none"),
                    "on all after": str(self.whole[answer] - change.day) if answer else "never",
                    "before": round(before, 3),
                    "until then": round(during, 3),
                    "with it": round(after, 3),
                }
            )
        return rows

    def released(self, checks: Checks) -> list[Row]:
        """Each release, and its accuracy on each world; the worst loss is checked."""
        lost = self.forgotten()
        worst = max(lost.values(), default=float("nan"))
        checks.most(f"forgotten_points_{self.scene.name}", worst, FORGOTTEN_POINTS - 1e-9)
        rows: list[Row] = []
        for version, right in sorted(self.right.items()):
            of_all = {f"on {name or 'the first world'}": round(value, 4) for name, value in right.items()}
            most = max((value for (each, _), value in lost.items() if each == version), default=0.0)
            about: dict[str, str | int | float] = {
                "tier": self.scene.tier,
                "release": version,
                "from day": self.begun[version],
            }
            rows.append(about | of_all | {"most points lost": round(most, 2)})
        return rows

    @staticmethod
    def judge(stories: Sequence[Story], checks: Checks) -> None:
        """Delays, recovery, false alarms, and whether all of it came to an end by itself."""
        for story in stories:
            for number, change in enumerate(story.scene.changes, 1):
                alarm, name = story.alarm_of(change), f"{story.scene.name}_{number}"
                delay = float(alarm[0] - change.day) if alarm else math.inf
                checks.most(f"delay_days_{name}", delay, DELAY_DAYS)
                before, during, after = story.levels(change)
                lost = before - during
                checks.least(f"recovered_{name}", (after - during) / lost if lost else math.nan, RECOVERED)
            wanted = 1 + len(story.scene.changes)  # the first release was asked for
            checks.most(f"cycles_{story.scene.name}", float(story.cycles), float(wanted))
        quiet = sum(story.quiet_days for story in stories)
        checks.rate("false_alarms", sum(s.false_alarms() for s in stories), quiet / BETWEEN_DAYS)
        checks.claims |= {"false_alarms_stated_per_day": 1 / BETWEEN_DAYS, "quiet_days": float(quiet)}

    def paint(self, axes: Axes) -> None:
        """Accuracy by day, with changes, alarms and rollouts."""
        days = sorted(self.accuracy)
        axes.plot(days, [self.accuracy[day] for day in days], linewidth=0.9, label=f"{self.scene.tier}s")
        labels: dict[str, Any] = {"change": "change", "alarm": "alarm", "rollout": "rollout"}
        for change in self.scene.changes:
            axes.axvline(change.day, color="black", linewidth=0.9, label=labels.pop("change", None))
            axes.annotate(
                f" {change.what}", (change.day, 0.03), xycoords=("data", "axes fraction"), fontsize=7
            )
        for day, _ in self.alarms.values():
            axes.axvline(day, color="tab:red", linestyle=":", label=labels.pop("alarm", None))
        for version, begin in self.begun.items():
            end = self.whole.get(version, begin)
            axes.axvspan(begin, end + 0.5, color="tab:green", alpha=0.25, label=labels.pop("rollout", None))
        axes.set(ylabel="accuracy", xlabel="day", ylim=(0, 1), xlim=(0, max(days, default=1)))
        axes.legend(fontsize=7, loc="lower left", ncol=4, bbox_to_anchor=(0, 1))
