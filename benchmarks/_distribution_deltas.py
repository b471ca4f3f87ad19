"""What a delta takes between one round's variants and the next one's, on Fashion-MNIST.

A federation of 20 clients trains McMahan's CNN (1.66 million parameters) on 10,000 images; then, from its
model, come two rounds more at the same learning rate, and two at a tenth of it, as a schedule ends. The
global model of each is calibrated to int8 as the search does it; a small student is distilled from the first,
and taught on from the ones after (warm), in int8 and on a grid of eight bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _harness import Row

from fedge import delta
from fedge.artefact import pack
from fedge.config import Config
from fedge.task import Task, resolve
from fedge_server.compression.choose import source_of
from fedge_server.compression.recipes import Architecture, Recipe
from fedge_server.compression.shelf import Shelf
from fedge_server.compression.workshop import Workshop
from fedge_server.data import ServerData, server_part, split_of
from fedge_server.data import source_of as data_of
from fedge_server.rounds.starting import whole_model
from fedge_simulations import run

IMAGES, ROUNDS, QUICK_ROUNDS = 24_000, 8, 2
RATE, LATE_RATE = 0.001, 0.0001
STUDENT = "cnn-16-64"
FORMS = {"teacher int8": ("", "int8"), "student int8": (STUDENT, "int8"), "student w8": (STUDENT, "w8")}


def images(data: Path, folder: Path) -> Path:
    """A part of the training images in a file of its own."""
    path = folder / "fashion.npz"
    with np.load(data / "fashion_mnist.npz") as found:
        np.savez(path, x=found["x_train"][:IMAGES], y=found["y_train"][:IMAGES])
    return path


def config_of(data: Path, rounds: int, rate: float, start: str, *, quick: bool) -> Config:
    """A federation that goes on from an earlier model."""
    return Config.from_mapping(
        {
            "task": "images",
            "data": str(data),
            "model": {"name": "cnn", **({"start": start} if start else {})},
            "clients": {"count": 20},
            "rounds": {"count": rounds},
            "train": {"batch_size": 32, "learning_rate": rate, "optimizer": "adam"},
            "evaluate": {"holdout_fraction": 0.3, "gate_fraction": 0.5, "proxy_fraction": 0.4},
            "compress": {"distil": {"epochs": 3 if quick else 18}, "grid": {"epochs": 1 if quick else 6}},
        }
    )


def models(data: Path, folder: Path, *, quick: bool) -> Iterator[tuple[str, Config, Path]]:
    """The name, configuration and run folder of each global model, one after the other."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    steps = [("first", rounds, RATE), *[("next", 1, RATE)] * 2, *[("late", 1, LATE_RATE)] * 2]
    before = ""
    for number, (name, count, rate) in enumerate(steps):
        config = config_of(data, count, rate, before, quick=quick)
        where = folder / f"run-{number}"
        run(config, where)
        before = str(where)
        yield name, config, where


def variants(config: Config, where: Path, shelves: Path) -> dict[str, bytes]:
    """The installed bytes of each form; students go on from what those of the round before have learned."""
    task: Task = resolve(config.task)
    dataset = task.read(data_of(config))
    server: ServerData = server_part(dataset, split_of(config, dataset))
    fresh = replace(config, model=replace(config.model, start=""))
    teacher, digest = whole_model(str(where), fresh, task, server.spec, None)
    teacher = teacher.eval()
    shelf = Shelf.of(shelves, teacher, task, digest.encode(), fresh)
    workshop = Workshop(
        teacher, task, server.spec, source_of(fresh, task, server, teacher), fresh, shelf=shelf
    )
    return {
        name: workshop.build(Recipe(Architecture(student=student), form))  # type: ignore[arg-type]
        for name, (student, form) in FORMS.items()
    }


def measured(data: Path, folder: Path, *, quick: bool) -> tuple[dict[str, float], list[Row]]:
    """A line for each form and step, and the claims."""
    rows, before = list[Row](), dict[str, bytes]()
    source = images(data, folder)
    for step, config, where in models(source, folder, quick=quick):
        made = variants(config, where, folder / "shelves")
        rows += [_row(step, name, before[name], made[name]) for name in made if before]
        before = made
    return _claims(rows), rows


def _row(step: str, name: str, base: bytes, new: bytes) -> Row:
    began = time.perf_counter()
    made = delta.make(base, new)
    making = time.perf_counter() - began
    began = time.perf_counter()
    delta.apply(base, made, len(new))
    whole = len(pack(new))
    return {
        "variant": name,
        "round": step,
        "whole bytes": whole,
        "delta bytes": len(made),
        "times smaller": whole / len(made),
        "make s": making,
        "apply s": time.perf_counter() - began,
    }


def _claims(rows: list[Row]) -> dict[str, float]:
    """The medians over the steps at the end of the schedule, and those while everything still moves."""

    def times(name: str, step: str) -> float:
        found: Any = [row["times smaller"] for row in rows if (row["variant"], row["round"]) == (name, step)]
        return float(np.median(found))

    return {
        "delta_teacher_times": times("teacher int8", "late"),
        "delta_student_times": times("student int8", "late"),
        "delta_teacher_times_early": times("teacher int8", "next"),
        "delta_student_times_early": times("student int8", "next"),
    }
