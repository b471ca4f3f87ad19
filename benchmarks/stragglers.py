"""Slow and dead devices: simulated seconds to 85 % on Fashion-MNIST, waiting for everyone or not.

50 clients (Dirichlet 0.5) whose speeds are log-normal (sigma 1) and of which a tenth never answers. Who waits
for everyone waits until the deadline, set to what the slowest living client needs, since the dead never
answer; "first 80 %" closes a round once so many have answered; "fitted work" gives each client as much as it
can do by a shorter deadline; fedbuff and fedasync wait for nobody. Clients, data, model (2NN) and settings of
training are the same. Every run is fedge's own on the simulated clock, on data of your own copy (`--data-dir
DIR` with `fashion_mnist.npz`); 10,000 of the 60,000 images, so that it takes minutes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _harness import Options, Row, machine, options, publish

from fedge.config import Config
from fedge_simulations import run

CLIENTS, IMAGES, TARGET = 50, 10_000, 0.85
SECONDS_PER_EXAMPLE = 0.05  # of the median client: 10 s for its 200 examples
DEADLINE_S = 250.0  # above the slowest living client's time at these seeds; checked by `_row`
WAYS: dict[str, dict[str, Any]] = {
    "waits for everyone": {"strategy": {"name": "fedavg"}},
    "first 80 %": {"strategy": {"name": "fedavg"}, "rounds": {"quorum": 0.8}},
    "fitted work, 40 s": {"strategy": {"name": "fedavg"}, "rounds": {"fit_work": True, "deadline_s": 40.0}},
    "fitted work, 20 s": {"strategy": {"name": "fedavg"}, "rounds": {"fit_work": True, "deadline_s": 20.0}},
    "fedbuff, 5": {"strategy": {"name": "fedbuff", "buffer": 5}},
    "fedbuff, 10": {"strategy": {"name": "fedbuff", "buffer": 10}},
    "fedbuff, 20": {"strategy": {"name": "fedbuff", "buffer": 20}},
    "fedasync, 0.2": {"strategy": {"name": "fedasync", "mixing": 0.2}},
}
QUICK = ("waits for everyone", "first 80 %", "fitted work, 20 s", "fedbuff, 10")
MOST = {"fedavg": 200, "fedbuff": 600, "fedasync": 2500}  # rounds; none needs so many


def part_of(data: Path, folder: Path) -> Path:
    """The images that are used, and the whole test set."""
    with np.load(data) as whole:
        chosen = np.random.default_rng(0).choice(len(whole["x_train"]), IMAGES, replace=False)
        path = folder / "part.npz"
        np.savez(
            path,
            x_train=whole["x_train"][chosen],
            y_train=whole["y_train"][chosen],
            x_test=whole["x_test"],
            y_test=whole["y_test"],
        )
    return path


def config_of(data: Path, name: str, seed: int) -> Config:
    """The run of one way."""
    way = WAYS[name]
    sections: dict[str, Any] = {
        "model": {"name": "mlp"},
        "clients": {"count": CLIENTS, "partition": "dirichlet:0.5"},
        "rounds": {
            "count": MOST[way["strategy"]["name"]],
            "target": f"accuracy>={TARGET}",
            "deadline_s": DEADLINE_S,
        },
        "train": {"epochs": 1, "batch_size": 20, "learning_rate": 0.05, "momentum": 0.0},
        "scenario": {"speed_sigma": 1.0, "silent": 0.1, "seconds_per_example": SECONDS_PER_EXAMPLE},
        "evaluate": {"metrics": ["accuracy"], "proxy_fraction": 0.0},
    }
    for section, values in way.items():
        sections[section] = {**sections.get(section, {}), **values}
    return Config.from_mapping({"task": "images", "data": str(data), "seed": seed, **sections})


def _row(data: Path, name: str, seed: int) -> Row:
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = run(config_of(data, name, seed), Path(folder) / "run")
    last, ages = result.history[-1], [r.staleness for r in result.history if r.staleness is not None]
    if name == "waits for everyone":
        assert last.clients >= 0.8 * CLIENTS, "the deadline cuts living clients off"
    return {
        "way": name,
        "seed": seed,
        "simulated s": last.simulated_s or 0.0,
        "accuracy": result.accuracy,
        "rounds": last.round,
        "updates": sum(record.clients for record in result.history),
        "mean age": statistics.mean(ages) if ages else 0.0,
        "given up": sum(len(record.rejected) for record in result.history),
        "CPU s": time.process_time() - began,
    }


def main(asked: Options) -> None:
    """Measure, print, write."""
    before, seeds = machine(), (0,) if asked.quick else (0, 1, 2)
    with tempfile.TemporaryDirectory() as folder:
        data = part_of(asked.data / "fashion_mnist.npz", Path(folder))
        rows = [_row(data, name, seed) for seed in seeds for name in (QUICK if asked.quick else WAYS)]

    def seconds(name: str) -> float:
        """Median over seeds; a run that did not get there never does."""
        found = [row for row in rows if row["way"] == name]
        return statistics.median(
            float(row["simulated s"]) if float(row["accuracy"]) >= TARGET else float("inf") for row in found
        )

    slow = seconds("waits for everyone")
    claims = {
        f"speedup of {name}": slow / seconds(name) for name in WAYS if any(r["way"] == name for r in rows)
    }
    claims["speedup"] = max(
        value for name, value in claims.items() if "%" not in name and "everyone" not in name
    )
    publish(asked, before, claims, rows)


if __name__ == "__main__":
    main(options(__doc__ or "", data=True))
