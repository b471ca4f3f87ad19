"""Cross-validation: train without a part of the data again and again, and test each model on that part.

Parts are whole natural clients (does the model hold where it was not trained?), else examples, class by
class. Each training is a run of its own in a folder of its own; it goes on where it was interrupted, and is
not done again once its result is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedge.dataset import Indices
from fedge.files import write_atomically
from fedge_server.data import split_of
from fedge_server.pipeline import Say
from fedge_server.rounds.loop import Learned, Observer
from fedge_simulations.partition import people
from fedge_simulations.statistics import corrected
from fedge_simulations.world import World

FOLDS: Final = "folds"  # in the run folder

_STREAM: Final = 0xF01D

Learn = Callable[[World, Path, str, Observer], Learned]
"""Runs a world's rounds, with its state in that folder, under that name."""


@dataclass(frozen=True, slots=True)
class Fold:
    """One training, and what it is tested on."""

    name: str  # 1, 2, ...
    clients: tuple[str, ...]  # that are left out; none: examples are
    trained_on: int  # examples that its clients hold; those of a population that is drawn count each time
    world: World  # its test data are what is left out


def folds_of(world: World) -> Iterator[Fold]:
    """The trainings that the configuration asks for, decided by its seed."""
    settings, rng = world.config.evaluate, np.random.default_rng([world.config.seed, _STREAM])
    if settings.leave_one_client_out:
        groups = [np.array([i]) for i in range(len(world.clients))]
    elif settings.folds is None:
        return
    elif world.config.clients.partition == "natural":
        groups = np.array_split(rng.permutation(len(world.clients)), settings.folds)
    else:
        yield from _over_examples(world, settings.folds, rng)
        return
    for number, group in enumerate(groups, start=1):
        left_out = sorted(int(i) for i in group)
        made = world.without(left_out)
        yield Fold(str(number), tuple(world.names[i] for i in left_out), _held(made), made)


def _over_examples(world: World, folds: int, rng: np.random.Generator) -> Iterator[Fold]:
    """Of training and test data together; what the server keeps for distillation and gate stays its own."""
    config, dataset = world.config, world.dataset
    parts = split_of(config, dataset)
    pool = np.sort(np.concatenate([parts.train, parts.test]))
    part = dealt(dataset.y[pool], folds, rng)
    for number in range(folds):
        held, rest = pool[part == number], pool[part != number]
        server = replace(world.server, test=dataset.examples.take(held), test_owners=None)
        made = replace(world, server=server, clients=people(dataset, rest, config.clients, config.seed))
        yield Fold(str(number + 1), (), _held(made), made)


def dealt(y: Indices, folds: int, rng: np.random.Generator) -> Indices:
    """(N,) which part each example is in, from 0; sizes of parts, and of a class in them, differ by one."""
    shuffled = rng.permutation(len(y))
    order = shuffled[np.argsort(y[shuffled], kind="stable")]
    part = np.empty(len(y), dtype=np.int64)
    part[order] = np.arange(len(y)) % folds
    return part


def _held(world: World) -> int:
    return sum(world.clients.size(i) for i in range(len(world.clients)))


def cross_validate(world: World, folder: Path, learn: Learn, say: Say) -> dict[str, Any]:
    """Do the trainings, or what is left of them, and put their results together; empty where there are none.

    Args:
        world: of the run.
        folder: keeps each result, and what an unfinished training needs to go on.
        learn: does a training.
        say: hears of each.
    """
    found = [_result(fold, folder, learn, say) for fold in folds_of(world)]
    if not found:
        return {}
    confidence = world.config.evaluate.confidence
    names = [name for name in ("accuracy", "loss", "macro_f1", "auc") if all(name in one for one in found)]
    ratio = sum(one["examples"] / one["trained_on"] for one in found) / len(found)
    return {
        "over": "clients" if "clients" in found[0] else "examples",
        "confidence": confidence,
        "metrics": {name: corrected([one[name] for one in found], ratio, confidence) for name in names},
        "folds": found,
    }


def _result(fold: Fold, folder: Path, learn: Learn, say: Say) -> dict[str, Any]:
    path, home = folder / f"{fold.name}.json", folder / fold.name
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return known
    home.mkdir(parents=True, exist_ok=True)
    learned = learn(fold.world, home, f"fold-{fold.name}", lambda _: None)
    scalars = {k: v for k, v in learned.records[-1].metrics.items() if isinstance(v, float)}
    found = {
        "fold": fold.name,
        **({"clients": list(fold.clients)} if fold.clients else {}),
        "examples": len(fold.world.server.test),
        "trained_on": fold.trained_on,
        **scalars,
    }
    write_atomically(path, json.dumps(found, indent=2).encode())
    shutil.rmtree(home)
    who = f"client {', '.join(fold.clients)}" if fold.clients else f"part {fold.name}"
    say(f"left out {who}: " + ", ".join(f"{key} {value:.3f}" for key, value in scalars.items()))
    return found
