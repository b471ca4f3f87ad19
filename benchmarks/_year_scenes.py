"""What the devices of `year.py` see by day, on real data: two tiers, and three changes of their world.

Nothing of it is made to look nice: what changes, when, and which examples are whose is written down here, and
a day is a draw. What is asked of devices trained nothing, and is in no file of the server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from fedge.dataset import Examples

Array = npt.NDArray[Any]
Positions = npt.NDArray[np.int64]
Draw = Callable[[str, int, np.random.Generator], Positions]
"""Condition, device and randomness to what the device is asked on one day: positions in the pool."""


@dataclass(frozen=True, slots=True)
class Change:
    """From this day on the world is another one."""

    day: int
    condition: str
    what: str


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A tier of devices, what they learn, and what they see.

    Args:
        name: of the learning, and of the task.
        tier: of its devices.
        devices: so many.
        config: of its runs, without data.
        changes: by day.
        pools: by condition, what devices are asked, with the answers that only the benchmark knows.
        draw: of the pools.
        teaching: by condition, examples whose labels come to be known on devices.
        dealt: by condition and device, positions of these in the order in which they come.
        held: the server's own labelled examples, all of the first condition; it never gets others.
        labels_a_day: that a device comes to know.
    """

    name: str
    tier: str
    devices: int
    config: Mapping[str, Any]
    changes: tuple[Change, ...]
    pools: Mapping[str, Examples]
    draw: Draw
    teaching: Mapping[str, Examples]
    dealt: Mapping[str, Sequence[Positions]]
    held: Examples
    labels_a_day: int

    def condition(self, day: int) -> str:
        """What the world is like on a day."""
        return ([""] + [change.condition for change in self.changes if change.day <= day])[-1]


def cameras(path: Path, days: int, devices: int) -> Scene:
    """Fashion-MNIST on cameras with classes of their own (Dirichlet .5); darker, then turned as well.

    Half of the light goes after a third of the year. After two thirds the cameras are turned by 45 degrees,
    as in `continual.py`, and it is as dark as before.
    """
    with np.load(path) as file:
        x, y = file["x_train"], file["y_train"].astype(np.int64)
        x_test, y_test = file["x_test"], file["y_test"].astype(np.int64)
    asked, held = Examples(x_test[:8000], y_test[:8000]), Examples(x_test[8000:], y_test[8000:])
    rng, labels = np.random.default_rng(0), 20
    mixes = rng.dirichlet(np.full(10, 0.5), devices)
    of_class = [[np.flatnonzero(each == label) for label in range(10)] for each in (y, asked.y)]

    def draw(_: str, device: int, rng: np.random.Generator) -> Positions:
        return of_mix(of_class[1], mixes[device], 60, rng)

    conditions: dict[str, Callable[[Array], Array]] = {
        "": lambda values: values,
        "dark": lambda values: values // 2,
        "dark and turned": lambda values: turned(values // 2),
    }
    # A first year of labels, and 400 on each device before it; what is turned is what comes to be known.
    dealt = {
        name: [of_mix(of_class[0], mix, 400 + labels * days, rng, shuffle=True) for mix in mixes]
        for name in conditions
    }
    used = {name: np.unique(np.concatenate(own)) for name, own in dealt.items()}
    teaching = {name: Examples(altered(x[used[name]]), y[used[name]]) for name, altered in conditions.items()}
    places = {name: [np.searchsorted(used[name], each) for each in own] for name, own in dealt.items()}
    return Scene(
        name="images",
        tier="camera",
        devices=devices,
        config={
            "task": "images",
            "model": {"name": "mlp"},
            "clients": {"partition": "natural"},
            "rounds": {"count": 15},
            "train": {"optimizer": "adam", "learning_rate": 0.001, "epochs": 1, "batch_size": 32},
            "evaluate": {"proxy_fraction": 0.0, "client_holdout": 0.2, "metrics": ["accuracy"]},
            "compress": {"data": "clients", "students": [], "forms": ["int8"], "prune": {"kinds": []}},
            "tiers": {"camera": {"aim": "bytes", "max_drop": 0.02}},
        },
        changes=(
            Change(days // 3, "dark", "half of the light"),
            Change(2 * days // 3, "dark and turned", "turned by 45 degrees"),
        ),
        pools={name: Examples(altered(asked.x), asked.y) for name, altered in conditions.items()},
        draw=draw,
        teaching=teaching,
        dealt=places,
        held=held,
        labels_a_day=labels,
    )


def wearers(path: Path, days: int) -> Scene:
    """Ten people's phones tell what they do (uji_har.npz); at half-time ten others take over, with watches.

    Half of a person's recordings teach, the others are asked. The server has three further people's phones.
    """
    with np.load(path) as file:
        x, y = file["x"].astype(np.float32), file["y"].astype(np.int64)
        person, watch, execution = file["client"].astype(int), file["device"] == 1, file["execution"]
    crews = {"": (range(10), False), "watches": (range(10, 20), True)}
    rng = np.random.default_rng(0)
    recordings: dict[tuple[str, int], list[Positions]] = {}
    dealt, pools = dict[str, list[Positions]](), dict[str, Examples]()
    for name, (crew, kind) in crews.items():
        dealt[name], asked = [], list[Positions]()
        for device, who in enumerate(crew):
            own = np.flatnonzero((person == who) & (watch == kind))
            numbers = rng.permutation(np.unique(execution[own]))
            half = len(numbers) // 2
            begin = sum(map(len, asked))
            found = [own[execution[own] == each] for each in numbers[:half]]
            ends = begin + np.cumsum([len(each) for each in found])
            recordings[name, device] = np.split(np.arange(begin, ends[-1]), ends[:-1] - begin)
            asked += found
            dealt[name].append(rng.permutation(own[np.isin(execution[own], numbers[half:])]))
        pools[name] = Examples(x, y).take(np.concatenate(asked))

    def draw(condition: str, device: int, rng: np.random.Generator) -> Positions:
        own = recordings[condition, device]
        return np.concatenate([own[i] for i in rng.integers(len(own), size=3)])

    everything, apart = Examples(x, y), np.flatnonzero((person >= 20) & ~watch)
    return Scene(
        name="signals",
        tier="wearable",
        devices=10,
        config={
            "task": "signals",
            "model": {"name": "cnn1d"},
            "clients": {"partition": "natural"},
            "rounds": {"count": 40},
            "train": {"optimizer": "adam", "learning_rate": 0.001, "epochs": 3, "batch_size": 32},
            "evaluate": {"proxy_fraction": 0.0, "metrics": ["accuracy"]},
            "compress": {"data": "none", "students": [], "forms": ["fp32"], "prune": {"kinds": []}},
            "tiers": {"wearable": {"max_drop": 0.05}},
        },
        changes=(Change(days // 2, "watches", "other people, with watches"),),
        pools=pools,
        draw=draw,
        teaching=dict.fromkeys(crews, everything),
        dealt=dealt,
        held=everything.take(apart),
        labels_a_day=16,
    )


def of_mix(
    of_class: Sequence[Positions], mix: Array, count: int, rng: np.random.Generator, *, shuffle: bool = False
) -> Positions:
    """Positions of so many examples, of classes by these shares."""
    counts = rng.multinomial(count, mix)
    found = np.concatenate([rng.choice(own, n) for own, n in zip(of_class, counts, strict=True)])
    return rng.permutation(found) if shuffle else found


def turned(x: Array) -> Array:
    """By 45 degrees."""
    found: Array = ndimage.rotate(x, 45, axes=(1, 2), reshape=False, order=1)
    return found
