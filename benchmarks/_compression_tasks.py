"""The search on other kinds of data: inertial signals of people, text by speakers.

What is asked for is the smallest variant that loses a point at most; what stands in the way of a smaller one,
the search's own words say. People that the gate counts on have taught nobody, since windows overlap.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _harness import Row

from fedge.config import Config
from fedge.task import resolve
from fedge_server.compression import TierOutcome, compress
from fedge_server.compression.choose import source_of
from fedge_server.data import server_part, split_of
from fedge_server.data import source_of as data_of
from fedge_server.rounds.starting import whole_model
from fedge_simulations import run

HELD_PEOPLE = 10  # of 23, for test and gate


def signals_config(data: Path, folder: Path, seconds: float, *, quick: bool) -> Config:
    """Thirteen people are clients; ten others are what the gate counts on."""
    with np.load(data / "uji_har.npz") as file:
        x, y, person = file["x"], file["y"], file["client"]
    held = np.isin(person, np.random.default_rng(0).permutation(np.unique(person))[:HELD_PEOPLE])
    path = folder / "har.npz"
    np.savez(
        path, x_train=x[~held], y_train=y[~held], client_train=person[~held], x_test=x[held], y_test=y[held]
    )
    return Config.from_mapping(
        {
            "task": "signals",
            "data": str(path),
            "clients": {"partition": "natural"},
            "rounds": {"count": 8 if quick else 40},
            "train": {
                "epochs": 2,
                "batch_size": 16,
                "learning_rate": 0.05,
                "schedule": "cosine",
                "augment": ["noise:0.2"],
            },
            "evaluate": {"proxy_fraction": 0.4, "gate_fraction": 0.9, "metrics": ["accuracy"]},
            "compress": {
                "max_seconds": seconds,
                "distil": {"epochs": 60, "augment": ["noise:0.2"], "batch_size": 64},
            },
        }
    )


def text_config(data: Path, _: Path, seconds: float, *, quick: bool) -> Config:
    """Twenty speakers in each round; the server has a share of the text of its own."""
    return Config.from_mapping(
        {
            "task": "characters",
            "data": str(data / "shakespeare_by_speaker.npz"),
            "model": {"name": "gru"},
            "clients": {"partition": "natural"},
            "rounds": {"count": 3 if quick else 30, "cohort": 20},
            "train": {
                "epochs": 1,
                "batch_size": 32,
                "learning_rate": 0.003,
                "optimizer": "adam",
                "schedule": "cosine",
            },
            "evaluate": {
                "holdout_fraction": 0.1,
                "gate_fraction": 0.9,
                "proxy_fraction": 0.2,
                "metrics": ["accuracy"],
            },
            "compress": {
                "max_seconds": seconds,
                "distil": {"epochs": 2 if quick else 6, "batch_size": 256, "views": 0},
                "grid": {"epochs": 1 if quick else 3},
            },
        }
    )


MAKES: dict[str, Any] = {"signals": signals_config, "text": text_config}


def row_of(part: str, data: Path, folder: Path, cache: Path, seconds: float, *, quick: bool) -> Row:
    """One data set's line."""
    config: Config = MAKES[part](data, folder, seconds, quick=quick)
    home = cache / f"{'quick-' if quick else ''}{part}"
    if not (home / "summary.json").exists():
        run(config, home)
    task = resolve(config.task)
    dataset = task.read(data_of(config))
    server = server_part(dataset, split_of(config, dataset))
    teacher, _ = whole_model(str(home), config, task, server.spec, None)
    tier = {"aim": "bytes", "max_drop": 0.01}
    config = replace(config, tiers=Config.from_mapping({"tiers": {"smallest": tier}}).tiers)
    began = time.perf_counter()
    source = source_of(config, task, server, teacher.eval())
    (outcome,) = compress(teacher, task, server.spec, source, config, print)
    return line(part, outcome, len(server.gate), time.perf_counter() - began)


def line(part: str, outcome: TierOutcome, gate: int, seconds: float) -> Row:
    """What was found, or what was in the way."""
    teacher = next(trial for trial in outcome.tried if trial.recipe == "fp32")
    variant = outcome.variant
    if variant is None:
        print(f"{part}: {outcome.reason}")
    smaller = [trial for trial in outcome.tried if _is_smaller(trial.wire_bytes, variant)]
    for trial in smaller:
        print(f"{part}: {trial.recipe}, {trial.wire_bytes} bytes: {trial.result}")
    return {
        "data": part,
        "gate": gate,
        "teacher bytes": teacher.wire_bytes or 0,
        "recipe": variant.recipe if variant else "none",
        "bytes": len(variant.wire) if variant else 0,
        "times smaller": (teacher.wire_bytes or 0) / len(variant.wire) if variant else 0.0,
        "teacher %": 100 * (variant.gate.teacher_accuracy if variant else teacher.accuracy or 0.0),
        "drop": 100 * variant.gate.drop if variant else 100.0,
        "at most": 100 * variant.gate.drop_upper if variant else 100.0,
        "s": seconds,
    }


def _is_smaller(wire_bytes: int | None, variant: Any) -> bool:
    return wire_bytes is not None and (variant is None or wire_bytes < len(variant.wire))
