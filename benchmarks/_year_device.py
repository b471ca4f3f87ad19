"""The devices of `year.py`: they install, answer, count, remember and report with the client's own code."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from _year_scenes import Positions, Scene
from _year_site import DAY_S, Site

from fedge.dataset import Examples
from fedge.inference import CompactModel
from fedge.spec import Spec
from fedge_client.agent.identity import Identity
from fedge_client.agent.installation import bring
from fedge_client.delivery import Report
from fedge_client.device import Device
from fedge_client.memory.memory import Memory
from fedge_client.memory.training import with_memory
from fedge_client.reports import Reports
from fedge_client.telemetry.collector import Answering, Collector
from fedge_client.telemetry.settings import Settings as Collecting
from fedge_server.rollout.reports import Report as Taken
from fedge_server.telemetry.store import Sender

RECENT: Final = 14  # days of labels that a device's own data goes back; what is older is in its memory
LATENCY_S: Final = 0.005  # that an answer is said to take: no time passes here
MOST: Final = 16  # windows of a call

Floats = npt.NDArray[np.float32]


class Answers:
    """What installed models answer to the pools of a scene: each is asked once for each example."""

    def __init__(self, scene: Scene) -> None:
        self._scene, self._known = scene, dict[tuple[str, str], Floats]()

    def of(self, data: bytes, digest: str, spec: Spec, condition: str) -> Floats:
        """(N, classes) probabilities of a model for all of a pool, as a device computes them."""
        place = (digest, condition)
        if place not in self._known:
            self._known[place] = CompactModel(data, spec).run_each(self._scene.pools[condition].x)
        return self._known[place]


@dataclass(slots=True)
class Simulated:
    """One device.

    Args:
        home: enrolled.
        number: within its scene.
        scene: what it sees.
        site: its server.
        answers: of all devices of the scene.
        spec: of its task's inputs.
    """

    home: Path
    number: int
    scene: Scene
    site: Site
    answers: Answers
    spec: Spec
    device: Device = field(init=False)
    id: str = field(init=False)
    has: int = 0  # the version that runs; 0: none
    errors: list[str] = field(default_factory=list)
    _collector: Collector | None = None
    _memory: Memory = field(init=False)
    _recent: deque[tuple[str, Positions]] = field(default_factory=deque)
    _dealt: dict[str, int] = field(default_factory=dict)  # by condition, how many labels were dealt
    _sure: tuple[int, list[float]] = (0, [])  # version, and its confidences of a day
    _probabilities: dict[str, Floats] = field(default_factory=dict)  # of what runs, by condition

    def __post_init__(self) -> None:
        self.device, self.id = Device.open(self.home), Identity.open(self.home).device_id
        self._memory = Memory(self.home / "memory", self.spec)
        self._memory.give_consent()

    # --- releases

    def poll(self) -> None:
        """Ask which version is for it, install it as the agent does, and send the reports."""
        told = self.site.rollouts.offer(self.id, self.has)
        if told is None:
            return
        done = bring(self.device, self.site.fetcher(self.id, self.scene.tier), told)
        self.has = done.version
        if done.fault:
            self.errors.append(done.fault)
        if done.changed:
            self._counts_anew()
        self._send_reports()

    def _counts_anew(self) -> None:
        installed, data = self.device.running()
        self._probabilities = {
            condition: self.answers.of(data, installed.entry.installed_sha256, self.spec, condition)
            for condition in self.scene.pools
        }
        release = installed.release
        answering = Answering(release.version, release.spec, self.device.reference(installed))
        if self._collector is None:
            settings = Collecting(period_s=DAY_S, keep_every_s=DAY_S)
            self._collector = Collector(self.home / "telemetry", answering, settings, now=self.site.clock)
        else:
            self._collector.installed(answering)
        self._sure = (release.version, [])

    def _send_reports(self) -> None:
        kept = Reports(self.home)
        waiting = kept.waiting()
        for each in waiting:
            self.site.rollouts.note(Taken(self.id, each.version, each.kind, each.value))
        kept.drop(waiting)

    # --- a day

    def answer(self, condition: str, rng: np.random.Generator) -> tuple[int, int]:
        """Be asked for a day; how many answers were right, and how many there were."""
        if self._collector is None:
            return 0, 0
        chosen, pool = self.scene.draw(condition, self.number, rng), self.scene.pools[condition]
        probabilities = self._probabilities[condition][chosen]
        self._collector.answered(pool.x[chosen], probabilities, LATENCY_S)
        version, sure = self._sure
        if not sure:  # a day's answers are enough to say how sure it is
            sure += probabilities.max(1).tolist()
            Reports(self.home).add([Report(version, "confidence", float(np.mean(sure)))])
            self._send_reports()
        return int((probabilities.argmax(1) == pool.y[chosen]).sum()), len(chosen)

    def learns(self, condition: str, count: int) -> None:
        """Some labels come to be known; the memory is offered what leaves the data of the last days."""
        begin = self._dealt.get(condition, 0)
        positions = self.scene.dealt[condition][self.number][begin : begin + count]
        self._dealt[condition] = begin + len(positions)
        self._recent.append((condition, positions))
        while len(self._recent) > RECENT:
            then, gone = self._recent.popleft()
            own = self.scene.teaching[then].take(gone)
            for x, y in zip(own.x, own.y, strict=True):
                self._memory.add(x, int(y), self.site.now)

    def report(self) -> None:
        """Send the windows whose time is over."""
        if self._collector is None:
            return
        windows = self._collector.due(MOST)
        sender = Sender(self.id, self.scene.tier)
        outcomes = self.site.telemetry.take(sender, [data for _, data in windows])
        for (slot, _), outcome in zip(windows, outcomes, strict=True):
            if outcome.kind == "refused":
                raise AssertionError(f"device {self.id[:8]}: a window was refused: {outcome.reason}")
            self._collector.sent(slot)

    def holds(self) -> Examples:
        """What it would train on now: its data of the last days, and its memory."""
        parts = [self.scene.teaching[condition].take(positions) for condition, positions in self._recent]
        x, y = (np.concatenate([getattr(part, name) for part in parts]) for name in ("x", "y"))
        return with_memory(Examples(x, y), self.home / "memory", self.spec)

    def accuracy(self) -> dict[str, float]:
        """Of what runs, on the whole pool of each condition."""
        return {
            condition: float((found.argmax(1) == self.scene.pools[condition].y).mean())
            for condition, found in self._probabilities.items()
        }

    def close(self) -> None:
        """Release its files."""
        self._memory.close()


def spec_of(scene: Scene, path: Path) -> Spec:
    """Of a scene's task, as its own reader says of the file of a run."""
    from fedge.task import Source, resolve

    found: Any = resolve(scene.config["task"]).read(Source(path))
    spec: Spec = found.spec
    return spec
