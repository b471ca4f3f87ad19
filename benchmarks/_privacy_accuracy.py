"""Accuracy against epsilon: fedge's own runs with central client-level differential privacy on Fashion-MNIST.

Rounds, clipping norm and settings of training are the same at every epsilon, fixed beforehand; only the noise
differs. All clients take part in every round, so no amplification is claimed. "distributed" is the same noise
shared out among the clients, under masks.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from _harness import Row

from fedge.config import Config
from fedge_server.page import draw
from fedge_server.privacy.accounting import Spend, epsilon
from fedge_simulations import run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLIENTS = 100
DELTA = 1e-3  # a tenth of 1 / clients
TARGETS = (1.0, 2.0, 4.0, 8.0, math.inf)
DISTRIBUTED = (1.0, 8.0)  # rounds under masks take ten times as long
CLIP_NORM = 0.5  # chosen once, by 10 rounds at epsilon 1 and 8: 0.25 is slower, 1 noisier


def accuracy(data: Path, plot: Path, *, quick: bool) -> tuple[dict[str, float], list[Row]]:
    """Accuracy at each epsilon, as rows and as a picture; the claims are those of epsilon 1.

    Args:
        data: fashion_mnist.npz.
        plot: the SVG that is written.
        quick: fewer rounds and targets.
    """
    rounds = 10 if quick else 20
    seeds = (0,) if quick else (0, 1, 2)
    asked = [("central", target) for target in (TARGETS[::2] if quick else TARGETS)]
    asked += [("distributed", target) for target in (DISTRIBUTED[:1] if quick else DISTRIBUTED)]
    rows: list[Row] = [_row(data, how, target, rounds, seed) for how, target in asked for seed in seeds]
    _plot(plot, rows)
    mean = {target: _mean(rows, target) for target in (1.0, math.inf)}
    return {
        "dp_points_lost_by_sharing_the_noise": 100 * (mean[1.0] - _mean(rows, 1.0, "distributed")),
        "dp_accuracy_epsilon_1": mean[1.0],
        "dp_points_lost_at_epsilon_1": 100 * (mean[math.inf] - mean[1.0]),
    }, rows


def noise_for(target: float, rounds: int) -> float:
    """The smallest noise multiplier, to three digits, whose epsilon over so many rounds keeps the target."""

    def spent(multiplier: float) -> float:
        return epsilon([Spend("client", 1.0, multiplier, rounds)], DELTA, unit="client", accountant="pld")

    low, high = 0.1, 1000.0
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(middle) > target else (low, middle)
    return high


def config_of(data: Path, mechanism: str, target: float, rounds: int, seed: int) -> Config:
    """The run that is to have this epsilon."""
    protected = {
        "privacy": {
            "mechanism": mechanism,
            "secure_aggregation": mechanism == "distributed",
            "clip_norm": CLIP_NORM,
            "noise_multiplier": noise_for(target, rounds),
            "delta": DELTA,
        }
    }
    return Config.from_mapping(
        {
            "task": "images",
            "data": str(data),
            "seed": seed,
            "model": {"name": "logistic", "standardise": False},
            "clients": {"count": CLIENTS},
            "rounds": {"count": rounds},
            "train": {"epochs": 1, "batch_size": 32, "learning_rate": 0.05, "momentum": 0.0},
            "evaluate": {"metrics": ["accuracy"], "proxy_fraction": 0.0},
            **({} if math.isinf(target) else protected),
        }
    )


def _row(data: Path, mechanism: str, target: float, rounds: int, seed: int) -> Row:
    config = config_of(data, mechanism, target, rounds, seed)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = run(config, Path(folder) / "run")
    said = result.summary.get("privacy", {})
    return {
        "mechanism": "none" if math.isinf(target) else mechanism,
        "epsilon wanted": f"{target:g}",
        "epsilon of the run": f"{said.get('epsilon', math.inf):.4g}",  # text: JSON has no infinity
        "noise multiplier": 0.0 if math.isinf(target) else config.privacy.noise_multiplier,
        "rounds": rounds,
        "seed": seed,
        "accuracy": result.accuracy,
        "CPU s": time.process_time() - started,
    }


def _mean(rows: list[Row], target: float, mechanism: str = "central") -> float:
    wanted = ("none" if math.isinf(target) else mechanism, f"{target:g}")
    found = [float(row["accuracy"]) for row in rows if (row["mechanism"], row["epsilon wanted"]) == wanted]
    return sum(found) / len(found)


def _plot(path: Path, rows: list[Row]) -> None:
    finite = sorted({float(row["epsilon wanted"]) for row in rows} - {math.inf})

    def paint(axes: Axes) -> None:
        axes.plot(finite, [_mean(rows, target) for target in finite], "o-", label="noise of the server")
        shared = sorted({float(row["epsilon wanted"]) for row in rows if row["mechanism"] == "distributed"})
        axes.plot(
            shared,
            [_mean(rows, target, "distributed") for target in shared],
            "s",
            label="shared out, under masks",
        )
        axes.axhline(_mean(rows, math.inf), color="grey", linestyle="--", label="without (epsilon infinite)")
        axes.set_xscale("log", base=2)
        axes.set_xticks(finite, [f"{target:g}" for target in finite])
        axes.set_xlabel(f"epsilon of a client, delta {DELTA:g}")
        axes.set_ylabel("accuracy")
        axes.legend()

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw("Accuracy against epsilon", f"Fashion-MNIST, logistic regression, {CLIENTS} clients", paint)
    path.write_text(drawn.svg, encoding="utf-8")
