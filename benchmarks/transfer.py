"""What an earlier model is worth to a run with other classes, and what freezing parts of it saves.

Digits: a multilayer perceptron learns 0 to 4 federated, then runs on 5 to 9 with few examples begin with the
seed's weights, with that model's body, and with that body frozen from below.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
from _harness import Row, machine, options, publish
from sklearn.datasets import load_digits

from fedge.config import Config
from fedge_simulations import run
from fedge_simulations.simulate import Result

LAYERS: Final = ("1.*", "3.*")  # below the head
SHOWN: Final = (1, 3, 10)  # rounds
CLIENTS, PER_CLIENT = 5, 12


def config(
    data: Path, seed: int, rounds: int, start: Path | None = None, freeze: tuple[str, ...] = ()
) -> Config:
    """One run."""
    model: dict[str, Any] = {"name": "mlp"} | ({"start": str(start)} if start else {})
    return Config.from_mapping(
        {
            "task": "images",
            "data": str(data),
            "seed": seed,
            "model": model,
            "clients": {"count": CLIENTS},
            "rounds": {"count": rounds},
            "train": {"freeze": freeze, "epochs": 10, "batch_size": 12},
            "evaluate": {"proxy_fraction": 0.0, "gate_fraction": 0.1},
        }
    )


def write(folder: Path, seed: int) -> tuple[Path, Path]:
    """Digits 0 to 4, and 5 to 9 with few for training."""
    x, y = load_digits(return_X_y=True)
    x, rng = (x.reshape(-1, 8, 8) * 15).astype(np.uint8), np.random.default_rng(seed)
    low, high = np.flatnonzero(y < 5), rng.permutation(np.flatnonzero(y >= 5))
    np.savez(folder / "low.npz", x=x[low], y=y[low])
    few, rest = np.split(high, [CLIENTS * PER_CLIENT])
    np.savez(folder / "high.npz", x_train=x[few], y_train=y[few], x_test=x[rest], y_test=y[rest])
    return folder / "low.npz", folder / "high.npz"


def measure(seed: int, folder: Path) -> dict[str, Result]:
    """The four runs of a seed."""
    low, high = write(folder, seed)
    earlier = folder / "earlier"
    run(config(low, seed, 3), earlier)
    ways = {
        "from the seed": config(high, seed, max(SHOWN)),
        "from an earlier model": config(high, seed, max(SHOWN), earlier),
        "first layer frozen": config(high, seed, max(SHOWN), earlier, LAYERS[:1]),
        "all but the head frozen": config(high, seed, max(SHOWN), earlier, LAYERS),
    }
    return {name: run(each) for name, each in ways.items()}


def main() -> None:
    """Measure over seeds."""
    asked, before = options(str(__doc__)), machine()
    found: list[dict[str, Result]] = []
    for seed in range(2 if asked.quick else 5):
        with tempfile.TemporaryDirectory(prefix="fedge-transfer-") as folder:
            found.append(measure(seed, Path(folder)))
    rows: list[Row] = []
    for name in found[0]:
        results = [each[name] for each in found]
        row: Row = {"begins": name, "seeds": len(results)}
        for number in SHOWN:
            values = [float(result.history[number - 1].metrics["accuracy"]) for result in results]  # type: ignore[arg-type]
            row[f"after {number}"] = round(statistics.mean(values), 4)
            row[f"deviation {number}"] = round(statistics.stdev(values), 4)
        row["kB up, client and round"] = results[0].history[0].bytes_up / CLIENTS / 1e3
        rows.append(row)
    kb = [float(row["kB up, client and round"]) for row in rows]
    gain = float(rows[1]["after 3"]) - float(rows[0]["after 3"])
    publish(asked, before, {"frozen_bytes_ratio": kb[-1] / kb[0], "start_gain_after_3": gain}, rows)


if __name__ == "__main__":
    main()
