"""A year of a fleet in minutes: its world drifts three times, and nobody lays a hand on it.

    images   16 cameras (Fashion-MNIST, classes of their own): half of the light goes after a third of the
             year, after two thirds they are turned by 45 degrees besides.
    signals  10 wearables (uji_har.npz): at half-time ten other people take over, with watches for phones.
    quiet    years of 20 devices on which nothing changes at all: the watch alone, at the same settings.

Drift is found in what devices count (a window is a day), the alarm begins a cycle of `learn` once it has
stood for 14 days (by then some labels of the new world are known on devices), the cycle's run begins with
the release that devices have, is compressed, gated, signed by a signer's process, and rolled out in three
stages. The benchmark only lets time pass, plays the devices, and asks for the first release. Learner,
watches, registry, rollouts, publisher, signer, installer, collector and memory are the product's own; see
`_year_site.py` for what is not.

Stated beforehand, and checked; the exit code is 1 where one does not hold:

    delay        the alarm comes within 3 days of each change
    false alarms one in 10,000 days at most (`false_alarms` / `periods`, the defaults): so many are expected
                 in the days without a change, and more than chance makes of that (p < .01) is too many
    recovery     at least 80 % of what a change costs in accuracy is back when the release is on all devices
    forgetting   less than 1 point on each earlier world, from the release before to the one that has learned
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from _drift_data import images, quiet_evidence
from _harness import Options, Row, machine, options, publish
from _year_device import Answers, Simulated, spec_of
from _year_scenes import Scene, cameras, wearers
from _year_site import DAY_S, Site, write_data
from _year_story import Checks, Story
from fleet import enrolled

from fedge_server.continual.state import Status
from fedge_server.drift.watch import Settings
from fedge_server.page import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DAYS, QUICK_DAYS = 365, 90
CAMERAS, QUICK_CAMERAS = 16, 8
QUIET_YEARS, QUICK_QUIET_YEARS = 12, 1
BEFORE: Final = 400  # labels that a device has, as far as there are so many, when the year begins
PARTS: Final = ("images", "signals", "quiet")
TERMS: Final = {"steady_s": 14 * DAY_S, "min_gap_s": DAY_S, "remember": 0.5}
CRITERIA: Final = {
    "install": {"tolerated": 0.02, "unacceptable": 0.10, "at_least": 3},
    "health": {"tolerated": 0.02, "unacceptable": 0.10, "at_least": 3},
    "confidence": {"tolerated": 0.10, "unacceptable": 0.40, "at_least": 3, "max_drop": 0.1},
}


def plan(devices: Sequence[Simulated]) -> dict[str, object]:
    """Three canaries, half, all; a day each."""
    canaries = [device.id for device in devices[:3]]
    return {
        "stages": [
            {"name": "canary", "devices": canaries, "percent": 0, "hold_h": 24, "min_installs": 3},
            {"name": "half", "percent": 50, "hold_h": 24, "min_installs": 3},
            {"name": "all", "percent": 100, "hold_h": 24, "min_installs": len(devices)},
        ],
        "criteria": CRITERIA,
    }


class Year:
    """A site, its devices, and what happened.

    Args:
        site: the server.
        scenes: each with a tier of its own.
        seed: of what a day brings.
    """

    def __init__(self, site: Site, scenes: Sequence[Scene], seed: int) -> None:
        self.site, self.scenes, self._rng = site, scenes, np.random.default_rng(seed)
        self.fleets: dict[str, list[Simulated]] = {}
        self.stories = {scene.name: Story(scene) for scene in scenes}
        for scene in scenes:
            # Only what the reader says of such a file is wanted here: the labels in their order.
            first = scene.teaching[""].take(scene.dealt[""][0])
            write_data(site.data(scene.name), [(first.x, first.y)], (scene.held.x, scene.held.y))
            spec, answers = spec_of(scene, site.data(scene.name)), Answers(scene)
            homes = enrolled(site.home.root, site.root, scene.devices, scene.tier)
            fleet = [Simulated(home, i, scene, site, answers, spec) for i, home in enumerate(homes)]
            for device in fleet:
                device.learns("", BEFORE)
            self.fleets[scene.name] = fleet
            site.begin(scene.name, scene.config, {**TERMS, "rollout": plan(fleet)})

    def live(self, days: int) -> None:
        """Let so many days pass, in quarters."""
        for _ in range(days):
            for quarter in range(4):
                self._pass(quarter)
        for fleet in self.fleets.values():
            for device in fleet:
                device.close()

    def _pass(self, quarter: int) -> None:
        """A quarter of a day: the hub looks, workers work, devices ask; once a day they answer and tell."""
        site = self.site
        if quarter == 0:
            self._report()
        site.take_back()
        site.learner.advance()
        for run_id in site.queued():
            self._gather(run_id.rsplit("-", 1)[0])
            site.work(run_id)
        for scene in self.scenes:
            channel, fleet = site.rollouts.channel(scene.tier), self.fleets[scene.name]
            rollout = channel.rollout and site.rollouts.get(channel.rollout)
            if rollout and (
                rollout.status not in ("done", "superseded") or self._lag(scene, rollout.version)
            ):
                for i in self._rng.permutation(len(fleet)):
                    fleet[i].poll()
            self.stories[scene.name].note(site, fleet)
        if quarter == 1:
            self._answer()
        site.now += DAY_S / 4

    def _lag(self, scene: Scene, version: int) -> bool:
        return any(device.has != version for device in self.fleets[scene.name])

    def _answer(self) -> None:
        for scene in self.scenes:
            condition, day = scene.condition(self.site.day), self.site.day
            found = [device.answer(condition, self._rng) for device in self.fleets[scene.name]]
            right, asked = (sum(each[i] for each in found) for i in (0, 1))
            self.stories[scene.name].answered(day, right / asked if asked else float("nan"))
            for device in self.fleets[scene.name]:
                device.learns(condition, scene.labels_a_day)

    def _report(self) -> None:
        """Windows of yesterday reach the server, from all devices in some order; it forgets the oldest."""
        everybody = [device for fleet in self.fleets.values() for device in fleet]
        for i in self._rng.permutation(len(everybody)):
            everybody[i].report()
        self.site.telemetry.prune()
        for story in self.stories.values():
            story.watched(self.site)

    def _gather(self, name: str) -> None:
        """What devices hold now is what a run's clients have; the server holds what it always did."""
        scene = next(scene for scene in self.scenes if scene.name == name)
        parts = [device.holds() for device in self.fleets[name]]
        own = [(part.x, part.y) for part in parts]
        write_data(self.site.data(name), own, (scene.held.x, scene.held.y))


def quiet(path: Path, years: int, checks: Checks) -> list[Row]:
    """Nothing changes: how often the evidence comes so far, beside what is stated at most."""
    world, settings = images(path), Settings()
    most = [max(quiet_evidence(world, settings, seed, DAYS)) for seed in range(years)]
    stated = settings.threshold
    rows: list[Row] = []
    for periods in (1000.0, float(np.exp(stated))):
        reached = sum(bool(each >= np.log(periods)) for each in most)
        expected = years * min(DAYS / periods, 1.0)
        rows.append(
            {
                "evidence of": f"{periods:,.0f}",
                "quiet years": years,
                "reached in": reached,
                "stated at most": round(expected, 2),
            }
        )
        name = "alarm" if periods > 1000 else "thousand"
        checks.rate(f"quiet_{name}", reached, expected)
    return rows


def main() -> None:
    """Measure, print, draw, write; exit with 1 where something stated does not hold."""
    asked, before = options(__doc__ or "", parts=PARTS, data=True), machine()
    only, checks, rows = asked.only or PARTS, Checks(), list[Row]()
    days = QUICK_DAYS if asked.quick else DAYS
    scenes = []
    if "images" in only:
        fleet = QUICK_CAMERAS if asked.quick else CAMERAS
        scenes.append(cameras(asked.data / "fashion_mnist.npz", days, fleet))
    if "signals" in only:
        scenes.append(wearers(asked.data / "uji_har.npz", days))
    if scenes:
        stories = lived(scenes, days)
        for story in stories:
            rows += story.rows()
        for story in stories:
            rows += story.released(checks)
        Story.judge(stories, checks)
        picture(asked, stories)
    if "quiet" in only:
        years = QUICK_QUIET_YEARS if asked.quick else QUIET_YEARS
        rows += quiet(asked.data / "fashion_mnist.npz", years, checks)
    rows += checks.rows()
    publish(asked, before, checks.claims, rows)
    sys.exit(0 if checks.hold else 1)


def lived(scenes: Sequence[Scene], days: int) -> list[Story]:
    """A year, and what it was like."""
    root = Path(tempfile.mkdtemp(prefix="fy"))  # a short name, for unix sockets
    try:
        with ExitStack() as stack:
            site = stack.enter_context(Site(root, [scene.tier for scene in scenes]))
            year = Year(site, scenes, seed=1)
            year.live(days)
            for scene in scenes:
                state = site.learnings.get(scene.name).state
                year.stories[scene.name].ended(site, state.status is Status.WATCHING, state.cycle)
            return list(year.stories.values())
    finally:
        shutil.rmtree(root, ignore_errors=True)


def picture(asked: Options, stories: Sequence[Story]) -> None:
    """Accuracy by day, changes, alarms and rollouts, beside the JSON file."""

    def paint(axes: Axes) -> None:
        figure = axes.figure
        axes.remove()
        for number, story in enumerate(stories):
            story.paint(figure.add_subplot(len(stories), 1, number + 1))

    note = "Accuracy on devices by day; a change, its alarm, and the days of the rollout that answers it"
    path = asked.json.with_suffix(".svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(draw("A simulated year", note, paint, height=2.6 * len(stories)).svg, encoding="utf-8")


if __name__ == "__main__":
    main()
