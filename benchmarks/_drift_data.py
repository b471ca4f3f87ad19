"""Fleets of devices with real inputs, for `drift.py`: binned once; a window is a draw of positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fedge.spec import Spec
from fedge.telemetry.reference import Reference
from fedge.telemetry.sketch import CELLS, CONFIDENCE_BINS, binned, counted, padded
from fedge.telemetry.views import features_of
from fedge_server.drift.scores import Shapes
from fedge_server.drift.watch import Settings, Track, Watch, observe

Array = npt.NDArray[Any]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Condition:
    """All examples of a world, as its devices would count them."""

    bins: Positions  # (N, F)
    answers: Positions  # (N,)
    confidence: Positions  # (N,)

    def window(self, chosen: Positions, classes: int) -> Shapes:
        """The histograms of some of them."""
        return Shapes(
            counted(self.bins[chosen], CELLS).astype(np.float64),
            np.bincount(self.confidence[chosen], minlength=CONFIDENCE_BINS).astype(np.float64),
            np.bincount(self.answers[chosen], minlength=classes).astype(np.float64),
        )


Draw = Callable[[str, int, np.random.Generator, int], Positions]
"""Condition, device, randomness and number of answers (0: the usual) to positions."""


@dataclass(frozen=True, slots=True)
class World:
    """A fleet."""

    devices: int
    classes: int
    reference: Shapes
    conditions: Mapping[str, Condition]  # "" is that of before
    draw: Draw

    def window(self, condition: str, device: int, rng: np.random.Generator, answers: int) -> Shapes:
        """A window of a device."""
        seen = self.conditions.get(condition, self.conditions[""])
        return seen.window(self.draw(condition, device, rng, answers), self.classes)


@dataclass(slots=True)
class Watched:
    """A world whose devices' windows a watch sees."""

    world: World
    settings: Settings
    watch: Watch = field(default_factory=Watch)
    tracks: dict[int, Track] = field(default_factory=dict)  # by device

    def see(self, period: int, device: int, window: Shapes) -> None:
        """A device's window of a period."""
        self.watch, self.tracks[device] = observe(
            self.settings,
            self.watch,
            self.tracks.get(device, Track()),
            period=period,
            slot=period,
            window=window,
            reference=self.world.reference,
        )


def quiet_evidence(world: World, settings: Settings, seed: int, periods: int) -> list[float]:
    """The watch's highest evidence (natural logarithm) in each period, where nothing changes."""
    rng, fleet, found = np.random.default_rng(seed), Watched(world, settings), list[float]()
    for period in range(periods):
        found.append(-np.inf)
        for device in range(world.devices):
            fleet.see(period, device, world.window("", device, rng, 0))
            found[-1] = max(found[-1], fleet.watch.log_evidence)
    return found


def people(path: Path) -> World:
    """15 people with phones."""
    with np.load(path) as file:
        x, y = file["x"].astype(np.float32), file["y"].astype(np.int64)
        person, watch, execution = file["client"], file["device"] == 1, file["execution"]
    spec = Spec("signal", (50, 6), "float32", tuple("abcde"))
    features = features_of(x, spec)
    taught = (person < 8) & ~watch
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(features[taught], y[taught])

    def seen(values: Array) -> Condition:
        return _condition(values, model.predict_proba(features_of(values, spec)), reference, spec)

    reference = Reference.of(x[taught], model.predict_proba(features[taught]), spec)
    recordings: dict[tuple[bool, int], list[Positions]] = {}
    for kind in (False, True):
        for number in range(8, 23):
            own = np.flatnonzero((person == number) & (watch == kind))
            recordings[kind, number - 8] = [own[execution[own] == e] for e in np.unique(execution[own])]

    def draw(condition: str, device: int, rng: np.random.Generator, answers: int) -> Positions:
        own = recordings[condition == "watch", device]
        return np.concatenate([own[i] for i in rng.integers(len(own), size=answers // 20 or 3)])

    turned = x[:, :, [1, 2, 0, 4, 5, 3]]
    conditions = {"": seen(x), "turned": seen(turned)}
    return World(15, 5, Shapes.of(reference), conditions, draw)


def images(path: Path) -> World:
    """20 devices with images of classes of their own."""
    with np.load(path) as file:
        x, y = file["x_test"], file["y_test"].astype(np.int64)
        x_taught, y_taught = file["x_train"][:6000], file["y_train"][:6000]
    spec = Spec("image", (28, 28), "uint8", tuple("0123456789"))
    model = LogisticRegression(C=0.05, max_iter=300).fit(_flat(x_taught), y_taught)
    reference = Reference.of(x_taught, model.predict_proba(_flat(x_taught)), spec)
    altered = {
        "": x,
        "quarter": np.rot90(x, axes=(1, 2)),
        "tilted": ndimage.rotate(x, 15, axes=(1, 2), reshape=False, order=1),
        "slight": ndimage.rotate(x, 3, axes=(1, 2), reshape=False, order=1),
        "dark": (x * 0.7).astype(np.uint8),
    }
    conditions = {
        name: _condition(values, model.predict_proba(_flat(values)), reference, spec)
        for name, values in altered.items()
    }
    rng = np.random.default_rng(0)
    mixes, others = rng.dirichlet(np.full(10, 0.5), 20), rng.dirichlet(np.full(10, 0.5), 20)
    of_class = [np.flatnonzero(y == label) for label in range(10)]

    def draw(condition: str, device: int, rng: np.random.Generator, answers: int) -> Positions:
        mix = others[device] if condition == "classes" else mixes[device]
        counts = rng.multinomial(answers or 60, mix)
        return np.concatenate([rng.choice(of_class[k], n) for k, n in enumerate(counts)])

    return World(20, 10, Shapes.of(reference), conditions, draw)


def _flat(x: Array) -> Array:
    return x.reshape(len(x), -1).astype(np.float32) / 255


def _condition(x: Array, probabilities: Array, reference: Reference, spec: Spec) -> Condition:
    places = np.minimum((probabilities.max(1) * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
    bins = binned(features_of(x, spec), padded(reference.edges))
    return Condition(bins, probabilities.argmax(1).astype(np.int64), places)
