"""What a federated run on new data alone forgets, and what holding to the old model or old examples saves.

    people   uji_har.npz: a model learns from phones of 18 people; then the same people wear watches. Tested
             on both kinds of windows of 5 other people.
    images   fashion_mnist.npz: a model learns from upright images; then they come tilted by 45 degrees.

The second run begins with the first's model (`model.start`) and sees the new data, with nothing besides,
`model.remember`, a class-balanced reservoir of a client's old examples (`fedge_client.memory`; a tenth, a
third or as many as it has new ones), or both. Beside it, what nobody has on devices: all old and new data.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from _harness import Options, Row, machine, options, publish
from scipy import ndimage

from fedge.config import Config
from fedge.learning.local import logits
from fedge_client.memory.reservoir import balanced
from fedge_simulations import run
from fedge_simulations.simulate import Result

Array = npt.NDArray[Any]
WAYS = {
    "new data alone": (0.0, 0.0),
    "remember 0.5": (0.5, 0.0),
    "old examples, a tenth": (0.0, 0.1),
    "old examples, a third": (0.0, 1 / 3),
    "remember 0.5, a third": (0.5, 1 / 3),
    "old examples, as many": (0.0, 1.0),
    "remember 0.5, as many": (0.5, 1.0),
    "all old and new data": (0.0, float("inf")),
}
PARTS = ("people", "images")


@dataclass(frozen=True, slots=True)
class Set:
    """Examples of clients, and others to test on."""

    x: Array
    y: Array
    client: Array
    x_test: Array
    y_test: Array

    def write(self, path: Path, more: tuple[Array, Array, Array] | None = None) -> Path:
        """As a user's file; with further examples of the same clients."""
        x, y, client = (self.x, self.y, self.client) if more is None else (
            np.concatenate(pair) for pair in zip((self.x, self.y, self.client), more, strict=True)
        )  # fmt: skip
        np.savez(path, x_train=x, y_train=y, client_train=client, x_test=self.x_test, y_test=self.y_test)
        return path


def people(asked: Options, seed: int) -> tuple[str, Set, Set]:
    """Phones, then watches; the task's name first."""
    with np.load(asked.data / "uji_har.npz") as file:
        x, y, person, watch = file["x"], file["y"], file["client"], file["device"] == 1
    held = np.isin(person, np.random.default_rng(seed).permutation(23)[:5])

    def of(kind: Array) -> Set:
        own, other = kind & ~held, kind & held
        return Set(x[own], y[own], person[own], x[other], y[other])

    return "signals", of(~watch), of(watch)


def images(asked: Options, seed: int) -> tuple[str, Set, Set]:
    """Upright, then tilted; 10 clients of 300 images each."""
    with np.load(asked.data / "fashion_mnist.npz") as file:
        rng = np.random.default_rng(seed)
        chosen, tested = rng.choice(60_000, 6000, replace=False), rng.choice(10_000, 2000, replace=False)
        x, y = file["x_train"][chosen], file["y_train"][chosen]
        x_test, y_test = file["x_test"][tested], file["y_test"][tested]

    def tilted(values: Array) -> Array:
        return ndimage.rotate(values, 45, axes=(1, 2), reshape=False, order=1)

    client = np.arange(3000) % 10
    old = Set(x[:3000], y[:3000], client, x_test, y_test)
    return "images", old, Set(tilted(x[3000:]), y[3000:], client, tilted(x_test), y_test)


def kept(old: Set, new: Set, share: float, seed: int) -> tuple[Array, Array, Array] | None:
    """What clients' memories hold of their old examples."""
    if not share:
        return None
    if share == float("inf"):
        return old.x, old.y, old.client
    chosen: list[int] = []
    for number in np.unique(old.client):
        size = max(int(share * (new.client == number).sum()), 1)
        memory: list[int] = []
        seen, full, draw = Counter[int](), set[int](), random.Random(f"{seed} {number}")
        for position in np.flatnonzero(old.client == number).tolist():
            label = int(old.y[position])
            places = [int(old.y[each]) for each in memory]
            place = balanced(label, places, seen, full, size, draw.randrange)
            seen[label] += 1
            if place == len(memory):
                memory.append(position)
            elif place is not None:
                memory[place] = position
        chosen += memory
    return old.x[chosen], old.y[chosen], old.client[chosen]


def config_of(task: str, data: Path, rounds: int, rate: float, model: dict[str, Any]) -> Config:
    """One run; the model stays small, so that all of it takes minutes."""
    name = {"signals": "cnn1d", "images": "mlp"}[task]
    train = {"optimizer": "adam", "learning_rate": rate, "epochs": 1, "batch_size": 32}
    return Config.from_mapping(
        {
            "task": task,
            "data": str(data),
            "model": {"name": name, **model},
            "clients": {"partition": "natural"},
            "rounds": {"count": rounds},
            "train": train,
            "evaluate": {"proxy_fraction": 0.0, "metrics": ["accuracy"]},
        }
    )


def accuracy(result: Result, own: Set) -> float:
    """On a set's test part."""
    model = result.learned.model
    with torch.no_grad():
        x = model.preprocess(torch.from_numpy(own.x_test.astype(model_dtype(own))))
        answers = logits(model.network, x).argmax(1).numpy()
    return float((answers == own.y_test).mean())


def model_dtype(own: Set) -> str:
    """Raw inputs as their task reads them."""
    return "uint8" if own.x_test.dtype == np.uint8 else "float32"


def measure(part: str, asked: Options, seed: int, folder: Path) -> dict[str, tuple[float, float]]:
    """By way, accuracy on old and on new data."""
    task, old, new = (people if part == "people" else images)(asked, seed)
    first = run(
        config_of(task, old.write(folder / "old.npz"), 10 if asked.quick else 20, 0.002, {}), folder / "first"
    )
    found = {"before": (accuracy(first, old), accuracy(first, new))}
    for number, (name, (remember, share)) in enumerate(WAYS.items()):
        data = new.write(folder / f"{number}.npz", kept(old, new, share, seed))
        model = {"start": str(folder / "first"), "remember": remember}
        result = run(config_of(task, data, 8 if asked.quick else 15, 0.001, model))
        found[name] = accuracy(result, old), accuracy(result, new)
    return found


def main() -> None:
    """Measure over seeds, print, write."""
    asked, before = options(str(__doc__), parts=PARTS, data=True), machine()
    rows: list[Row] = []
    claims: dict[str, float] = {}
    for part in asked.only or PARTS:
        found = []
        for seed in range(1 if asked.quick else 2):
            with tempfile.TemporaryDirectory(prefix="fedge-continual-") as folder:
                found.append(measure(part, asked, seed, Path(folder)))
        base = statistics.mean(each["before"][0] for each in found)
        for name in ("before", *WAYS):
            old, new = (statistics.mean(each[name][i] for each in found) for i in (0, 1))
            lost = [100 * (each["before"][0] - each[name][0]) for each in found]
            rows.append(
                {
                    "data": part,
                    "second run": name,
                    "seeds": len(found),
                    "old data": round(old, 4),
                    "new data": round(new, 4),
                    "points lost on old": round(100 * (base - old), 2),
                    "worst seed": round(max(lost), 2),
                }
            )
            key = {
                "new data alone": "alone",
                "remember 0.5, as many": "both",
                "old examples, as many": "rehearsal",
            }
            if name in key:
                claims[f"points_lost_{part}_{key[name]}"] = 100 * (base - old)
    publish(asked, before, claims, rows)


if __name__ == "__main__":
    main()
