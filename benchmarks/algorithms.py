"""Algorithms for clients that differ, side by side: Fashion-MNIST, 20 clients, Dirichlet 0.1.

Each algorithm gets the same data, clients, cohorts, rounds and local steps; only the strategy differs (and,
for batch normalisation, the model). 6,000 training examples of the set are dealt out, so that all of it takes
some minutes. Beside the accuracy of the global model on the server's test data stands that of what each
client answers with, on examples that it keeps back from training, weighted by their number. Both are means
of the last five rounds, since they swing where clients' data differ; the spread is over seeds. Options of
fedavgm and fedadam are the better of two values on a seed that is not reported; the others were set before.

`--data-dir DIR` with `fashion_mnist.npz` (x_train, y_train, x_test, y_test).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _harness import Row, machine, options, publish

from fedge.config import Config
from fedge_simulations.simulate import learn
from fedge_simulations.world import prepare

EXAMPLES, ROUNDS, LAST = 6_000, 25, 5

# Name of the row: strategy, its options, and the model where it is not the two-layer perceptron.
CONTESTANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "fedavg": ("fedavg", {}, "mlp"),
    "fedprox": ("fedprox", {"proximal_mu": 0.01}, "mlp"),
    "fedavgm": ("fedavgm", {"server_momentum": 0.5}, "mlp"),
    "fedadam": ("fedadam", {"eta": 0.01}, "mlp"),
    "fednova": ("fednova", {}, "mlp"),
    "scaffold": ("scaffold", {}, "mlp"),
    "scaffold by examples": ("scaffold", {"weighting": "examples"}, "mlp"),
    "qfedavg": ("qfedavg", {}, "mlp"),
    "fedsgd": ("fedsgd", {"learning_rate": 0.1, "momentum": 0.9}, "mlp"),
    "fedper": ("fedper", {}, "mlp"),
    "ditto": ("ditto", {}, "mlp"),
    "feddf": ("feddf", {"epochs": 5}, "mlp"),
    "feddf, mlp and logistic": ("feddf", {"epochs": 5, "models": "mlp,logistic"}, "mlp"),
    "fedavg, mlp-bn": ("fedavg", {}, "mlp-bn"),
    "fedbn, mlp-bn": ("fedbn", {}, "mlp-bn"),
}
WHOLE = {name for name, (strategy, _, _) in CONTESTANTS.items() if strategy not in ("fedper", "fedbn")}


def config_of(data: Path, name: str, seed: int, rounds: int) -> Config:
    """One contestant's run; all else is the same."""
    strategy, own, model = CONTESTANTS[name]
    train = {"epochs": 2, "batch_size": 32, "learning_rate": 0.05, "momentum": 0.0}
    return Config.from_mapping(
        {
            "task": "images",
            "data": str(data),
            "seed": seed,
            "model": {"name": model},
            "clients": {"count": 20, "partition": "dirichlet:0.1"},
            "rounds": {"count": rounds, "cohort": 10},
            "train": {} if strategy == "fedsgd" else train,
            "strategy": {"name": strategy, **own},
            "evaluate": {
                "metrics": ["accuracy"],
                "federated": True,
                "anomalies": False,
                "client_holdout": 0.2,
                "proxy_fraction": 0.1,
            },
            "simulation": {"workers": 1},
        }
    )


def subset(data: Path, folder: Path, seed: int) -> Path:
    """A part of the set, another one for each seed."""
    with np.load(data / "fashion_mnist.npz") as whole:
        chosen = np.random.default_rng(seed).choice(len(whole["x_train"]), EXAMPLES, replace=False)
        path = folder / f"part-{seed}.npz"
        np.savez(
            path,
            x_train=whole["x_train"][chosen],
            y_train=whole["y_train"][chosen],
            x_test=whole["x_test"],
            y_test=whole["y_test"],
        )
    return path


def measure(data: Path, name: str, seed: int, rounds: int) -> dict[str, float]:
    """The accuracies of one run, and its processor seconds."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as home:
        learned = learn(prepare(config_of(data, name, seed, rounds)), Path(home), "run", lambda _: None)
    history = learned.records[-LAST:]
    return {
        "central": float(np.mean([record.metrics["accuracy"] for record in history])),
        "clients": float(np.mean([record.client_metrics["accuracy"] for record in history])),
        "seconds": time.process_time() - started,
    }


def row_of(name: str, found: list[dict[str, float]]) -> Row:
    """A contestant's line: means over seeds, and from the lowest to the highest."""

    def spread(key: str) -> str:
        values = [one[key] for one in found]
        return f"{100 * np.mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"

    return {
        "algorithm": name,
        "global model, test data %": spread("central") if name in WHOLE else "no whole model",
        "clients' own answers, held out %": spread("clients"),
        "CPU s a run": float(np.mean([one["seconds"] for one in found])),
    }


def main() -> None:
    """Measure, print, write."""
    asked = options(__doc__ or "", data=True)
    before, rounds = machine(), 8 if asked.quick else ROUNDS
    seeds = (0,) if asked.quick else (0, 1, 2)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:  # in turns
            part = subset(asked.data, Path(folder), seed)
            for name, measured in found.items():
                measured.append(measure(part, name, seed, rounds))
                print(f"seed {seed}  {name}:", row_of(name, measured[-1:]), flush=True)
    rows = [row_of(name, measured) for name, measured in found.items()]
    means = {
        name: {key: float(np.mean([one[key] for one in measured])) for key in ("central", "clients")}
        for name, measured in found.items()
    }
    plain = means["fedavg"]
    claims = {
        f"{name}_minus_fedavg_points": 100 * (means[name]["central"] - plain["central"])
        for name in ("fednova", "scaffold")
    } | {
        f"{name}_clients_minus_fedavg_points": 100 * (means[name]["clients"] - plain["clients"])
        for name in ("fedper", "ditto")
    }
    publish(asked, before, claims, rows)


if __name__ == "__main__":
    main()
