"""What a delta takes between one round's variants and the next one's, on Fashion-MNIST.

Three seeds, of which the last was looked at for the first time when everything was chosen. A federation of 20
clients trains McMahan's CNN (1.66 million parameters) on 16,800 images; then, from its model, come two
rounds more at the same learning rate, and two at a tenth of it, as a schedule ends. The global model of each
is calibrated to int8 as the search does it; a small student is distilled from the first, and taught on from
the ones after (warm), in int8 and on a grid of eight bits. What ships is what the search would ship: the
version near the last variant where the selection data and the gate let it pass, else the fresh one; and that
is the base of the next round. Accuracies are on the 10,000 test images, which decide nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from _harness import Row

from fedge import delta
from fedge.artefact import pack
from fedge.config import Config, Tier
from fedge.counts import Counts
from fedge.inference import CompactModel, Float32
from fedge.spec import Spec
from fedge.task import Task, resolve
from fedge_server.compression.candidates import Candidate
from fedge_server.compression.choose import source_of
from fedge_server.compression.gate import Evidence, decide, evidence_of
from fedge_server.compression.keeping import Keeper
from fedge_server.compression.measure import measure
from fedge_server.compression.recipes import Architecture, Recipe
from fedge_server.compression.shelf import Shelf
from fedge_server.compression.sources import Source
from fedge_server.compression.workshop import Workshop
from fedge_server.data import ServerData, server_part, split_of
from fedge_server.data import source_of as data_of
from fedge_server.rounds.starting import whole_model
from fedge_simulations import run

IMAGES, ROUNDS, QUICK_ROUNDS = 24_000, 8, 2
SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)
RATE, LATE_RATE = 0.001, 0.0001
BATCH = 500
STUDENT = "cnn-16-64"
FORMS = {"teacher int8": ("", "int8"), "student int8": (STUDENT, "int8"), "student w8": (STUDENT, "w8")}
DROPS = {"teacher int8": 0.01, "student int8": 0.02, "student w8": 0.02}  # that the gate allows


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """Images on which nothing is decided."""

    x: npt.NDArray[Any]
    y: npt.NDArray[np.int64]

    def counts(self, graph: bytes, exact: Float32, spec: Spec) -> Counts:
        """What a graph gets right of them, beside the global model, whose probabilities these are."""
        return evidence_of(self.answers(graph, spec), exact, self.y, spec.classes).counts

    def answers(self, graph: bytes, spec: Spec) -> Float32:
        """A graph's probabilities (N, C)."""
        model = CompactModel(graph, spec, threads=2)
        parts = [self.x[i : i + BATCH] for i in range(0, len(self.x), BATCH)]
        return np.concatenate([model.run(part.reshape(-1, *spec.shape))[1] for part in parts])


def images(data: Path, folder: Path) -> tuple[Path, Judge]:
    """A part of the training images in a file of its own; and the test images."""
    path = folder / "fashion.npz"
    with np.load(data / "fashion_mnist.npz") as found:
        np.savez(path, x=found["x_train"][:IMAGES], y=found["y_train"][:IMAGES])
        return path, Judge(found["x_test"], found["y_test"].astype(np.int64))


def config_of(data: Path, rounds: int, rate: float, start: str, *, seed: int, quick: bool) -> Config:
    """A federation that goes on from an earlier model."""
    return Config.from_mapping(
        {
            "task": "images",
            "data": str(data),
            "seed": seed,
            "model": {"name": "cnn", **({"start": start} if start else {})},
            "clients": {"count": 20},
            "rounds": {"count": rounds},
            "train": {"batch_size": 32, "learning_rate": rate, "optimizer": "adam"},
            "evaluate": {"holdout_fraction": 0.3, "gate_fraction": 0.5, "proxy_fraction": 0.4},
            "compress": {"distil": {"epochs": 3 if quick else 18}, "grid": {"epochs": 1 if quick else 6}},
        }
    )


def models(data: Path, folder: Path, *, seed: int, quick: bool) -> Iterator[tuple[str, Config, Path]]:
    """The name, configuration and run folder of each global model, one after the other."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    steps = [("first", rounds, RATE), *[("next", 1, RATE)] * 2, *[("late", 1, LATE_RATE)] * 2]
    before = ""
    for number, (name, count, rate) in enumerate(steps):
        config = config_of(data, count, rate, before, seed=seed, quick=quick)
        where = folder / f"run-{number}"
        run(config, where)
        before = str(where)
        yield name, config, where


def workshop_of(config: Config, where: Path, shelves: Path) -> tuple[Workshop, Source]:
    """What makes variants of a run's model; students go on from what those of the last round have learned."""
    task: Task = resolve(config.task)
    dataset = task.read(data_of(config))
    server: ServerData = server_part(dataset, split_of(config, dataset))
    fresh = replace(config, model=replace(config.model, start=""))
    teacher, digest = whole_model(str(where), fresh, task, server.spec, None)
    teacher = teacher.eval()
    shelf = Shelf.of(shelves, teacher, task, digest.encode(), fresh)
    source = source_of(fresh, task, server, teacher)
    return Workshop(teacher, task, server.spec, source, fresh, shelf=shelf), source


def measured(data: Path, folder: Path, *, quick: bool) -> tuple[dict[str, float], list[Row]]:
    """A line for each seed, form and step, and the claims."""
    rows = list[Row]()
    source, judge = images(data, folder)
    for seed in QUICK_SEEDS if quick else SEEDS:
        place, shipped = folder / f"seed-{seed}", dict[str, tuple[bytes, bytes]]()
        place.mkdir()
        for step, config, where in models(source, place, seed=seed, quick=quick):
            workshop, known = workshop_of(config, where, place / "shelves")
            for name, (student, form) in FORMS.items():
                recipe = Recipe(Architecture(student=student), form)  # type: ignore[arg-type]
                row, shipped[name] = _shipped(name, step, recipe, workshop, known, judge, shipped.get(name))
                rows += [{"seed": seed, **row}] if row else []
                sys.stderr.write(f"{seed} {step} {row}\n")
    return _claims(rows), rows


def _shipped(
    name: str,
    step: str,
    recipe: Recipe,
    workshop: Workshop,
    source: Source,
    judge: Judge,
    before: tuple[bytes, bytes] | None,
) -> tuple[Row, tuple[bytes, bytes]]:
    """A line, where there was a variant before; and what ships, beside the freshly rounded one."""
    cost = measure(workshop.build(recipe), workshop.spec)
    counts = source.selection(cost.wire, len(cost.installed))
    fresh = Candidate(recipe, cost, workshop.parameters(recipe.architecture), counts, 0.0)
    if before is None:
        return {}, (cost.installed, cost.installed)
    base, always_fresh = before
    began = time.perf_counter()
    versions = Keeper(workshop, source, {name: base}).versions(fresh, name)
    keeping = time.perf_counter() - began
    chosen = versions[0]
    evidence = source.evidence(chosen.cost.wire, len(chosen.cost.installed))
    passed = _passed(evidence, workshop, DROPS[name])
    if not passed:
        chosen = fresh
    teacher = judge.answers(workshop.exact(Architecture()), workshop.spec)
    on_test = {
        what: judge.counts(graph, teacher, workshop.spec)
        for what, graph in (
            ("fresh", cost.installed),
            ("shipped", chosen.cost.installed),
            ("of the last variant", base),
        )
    }
    row = {
        "variant": name,
        "round": step,
        "near s": keeping,
        "passed": passed,
        "changed %": 100.0 if chosen.changed is None else 100 * chosen.changed,
        **{f"accuracy {what}": counts.accuracy for what, counts in on_test.items()},
        **{f"apart {what} %": _apart(counts) for what, counts in on_test.items()},
        "times fresh": len(cost.wire) / len(delta.make(always_fresh, cost.installed)),
    }
    return row | _sizes(base, chosen.cost.installed), (chosen.cost.installed, cost.installed)


def _passed(evidence: Evidence, workshop: Workshop, drop: float) -> bool:
    tier = Tier(max_drop=drop)
    labels, settings = workshop.spec.labels, Config().compress.gate
    return decide(evidence, labels=labels, tier=tier, settings=settings, attempt=1, seed=0).passed


def _apart(counts: Counts) -> float:
    """Per cent of the examples on which only one is right, the global model or the variant."""
    return 100 * float((counts.losses + counts.wins).sum()) / counts.examples


def _sizes(base: bytes, new: bytes) -> Row:
    began = time.perf_counter()
    made = delta.make(base, new)
    making = time.perf_counter() - began
    began = time.perf_counter()
    delta.apply(base, made, len(new))
    whole = len(pack(new))
    return {
        "whole bytes": whole,
        "delta bytes": len(made),
        "times smaller": whole / len(made),
        "make s": making,
        "apply s": time.perf_counter() - began,
    }


def _claims(rows: list[Row]) -> dict[str, float]:
    """The least of all steps, at the end of the schedule and while all still moves; and what it costs."""

    def of(name: str, step: str) -> list[Row]:
        return [row for row in rows if (row["variant"], row["round"]) == (name, step)]

    def least(name: str, step: str, key: str = "times smaller") -> float:
        found: Any = [row[key] for row in of(name, step)]
        return float(min(found))

    def lost(name: str) -> tuple[float, float]:
        found: Any = [
            (row["accuracy fresh"], row["accuracy shipped"]) for row in rows if row["variant"] == name
        ]
        each = [fresh - shipped for fresh, shipped in found]
        return float(max(each)), float(np.mean(each))

    (most_teacher, teacher), (most_student, student) = lost("teacher int8"), lost("student int8")

    return {
        "delta_teacher_times": least("teacher int8", "late"),
        "delta_student_times": least("student int8", "late"),
        "delta_teacher_times_early": least("teacher int8", "next"),
        "delta_student_times_early": least("student int8", "next"),
        "delta_teacher_times_fresh": least("teacher int8", "late", "times fresh"),
        "delta_student_times_fresh": least("student int8", "late", "times fresh"),
        "delta_teacher_accuracy_lost": teacher,
        "delta_student_accuracy_lost": student,
        "delta_teacher_most_accuracy_lost": most_teacher,
        "delta_student_most_accuracy_lost": most_student,
    }
