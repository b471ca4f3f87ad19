"""What federated learning reaches on real signals and real text, each client a person or a speaker.

    har          uji_har.npz, the phone's windows (50 x 6): five folds of whole people, each person of the
                 other folds a client; beside it a random forest on pooled data, with the usual features
    shakespeare  shakespeare_by_speaker.npz: the next character, each speaker a client; loss in nats on the
                 last 20 % of every speaker's text

Nothing is chosen by the data that is tested on: rounds and settings are fixed. Windows overlap by half, so a
fold holds whole people.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from _harness import Options, Row, machine, options, publish

from fedge.config import Config
from fedge.dataset import Examples
from fedge.learning.whole import WholeModel
from fedge.task import resolve
from fedge_server.data import source_of, split_of
from fedge_simulations import run

FOLDS = 5
PARTS = ("har", "shakespeare")

Array = npt.NDArray[Any]
Figures = tuple[dict[str, float], list[Row]]


def har(asked: Options, folder: Path) -> Figures:
    """Mean accuracy over the folds, federated and of the forest."""
    with np.load(asked.data / "uji_har.npz") as file:
        phone = file["device"] == 0
        x, y, person = file["x"][phone], file["y"][phone], file["client"][phone]
    folds = np.array_split(np.random.default_rng(0).permutation(np.unique(person)), FOLDS)
    rows: list[Row] = []
    for number, people in enumerate(folds[:2] if asked.quick else folds, start=1):
        held = np.isin(person, people)
        data = folder / f"fold{number}.npz"
        np.savez(
            data,
            x_train=x[~held],
            y_train=y[~held],
            client_train=person[~held],
            x_test=x[held],
            y_test=y[held],
        )
        started = time.perf_counter()
        result = run(har_config(data, rounds=15 if asked.quick else 40))
        seconds = time.perf_counter() - started
        answers = answered(result.learned.model, x[held].astype(np.float32)).argmax(1)
        trees = forest(features(x[~held]), y[~held]).predict(features(x[held]))
        rows.append(
            {
                "part": f"har, fold {number}",
                "clients": len(np.unique(person[~held])),
                "tested on": int(held.sum()),
                "federated": float((answers == y[held]).mean()),
                "forest": float((trees == y[held]).mean()),
                "s": seconds,
            }
        )
    federated, pooled = (statistics.mean(float(row[key]) for row in rows) for key in ("federated", "forest"))
    return {
        "har_accuracy": federated,
        "har_forest_accuracy": pooled,
        "har_points_below_forest": 100 * (pooled - federated),
    }, rows


def har_config(data: Path, *, rounds: int) -> Config:
    """Everybody takes part in each round, with two passes over some 190 windows of his own."""
    return Config.from_mapping(
        {
            "task": "signals",
            "data": str(data),
            "clients": {"partition": "natural"},
            "rounds": {"count": rounds},
            "train": {"epochs": 2, "batch_size": 16, "learning_rate": 0.05, "augment": ["noise:0.2"]},
            "evaluate": {"proxy_fraction": 0.0, "gate_fraction": 0.1, "metrics": ["accuracy"]},
        }
    )


def forest(x: Array, y: Array) -> Any:
    """300 trees."""
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(300, random_state=0).fit(x, y)


def features(x: Array) -> Array:
    """What is usual for inertial windows (N, T, C): moments, quantiles, change, magnitudes, spectrum."""
    x = x.astype(np.float64)
    size = np.stack([np.linalg.norm(x[:, :, :3], axis=2), np.linalg.norm(x[:, :, 3:], axis=2)], axis=2)
    spectrum = np.abs(np.fft.rfft(x - x.mean(1, keepdims=True), axis=1))
    found = [f(v, axis=1) for v in (x, size) for f in (np.mean, np.std, np.min, np.max)]
    found += [np.percentile(x, q, axis=1) for q in (25, 50, 75)]
    found += [np.abs(np.diff(x, axis=1)).mean(1), np.square(x).mean(1)]
    found += [spectrum[:, 1:6].reshape(len(x), -1), spectrum[:, 1:].argmax(1)]
    return np.concatenate(found, axis=1)


def shakespeare(asked: Options, folder: Path) -> Figures:
    """Loss on the last fifth of every speaker."""
    config = shakespeare_config(asked.data / "shakespeare_by_speaker.npz", rounds=5 if asked.quick else 30)
    dataset = resolve(config.task).read(source_of(config))
    parts = split_of(config, dataset)
    held = dataset.examples.take(np.sort(np.concatenate([parts.test, parts.gate])))
    if asked.quick:
        held = held.take(np.arange(0, len(held), 10))
    started = time.perf_counter()
    result = run(config)
    seconds = time.perf_counter() - started
    losses = loss_of_each(result.learned.model, held)
    row: Row = {
        "part": "shakespeare",
        "clients": len(dataset.clients),
        "tested on": len(held),
        "loss": float(losses.mean()),
        "accuracy": result.learned.records[-1].metrics["accuracy"],  # type: ignore[dict-item]  # a number
        "s": seconds,
    }
    return {"shakespeare_loss": float(losses.mean()), "shakespeare_s": seconds}, [row]


def shakespeare_config(data: Path, *, rounds: int) -> Config:
    """Twenty speakers in each round, with one pass over their own text."""
    return Config.from_mapping(
        {
            "task": "characters",
            "data": str(data),
            "model": {"name": "gru"},
            "clients": {"partition": "natural"},
            "rounds": {"count": rounds, "cohort": 20},
            "train": {"epochs": 1, "batch_size": 32, "learning_rate": 0.003, "optimizer": "adam"},
            "evaluate": {
                "holdout_fraction": 0.2,
                "gate_fraction": 0.95,  # so that a round looks at little of what is held out
                "proxy_fraction": 0.0,
                "metrics": ["accuracy"],
            },
        }
    )


@torch.no_grad()
def answered(model: WholeModel, x: Array) -> Array:
    """Logits (N, K) of raw inputs."""
    model.eval()
    return np.concatenate([model(torch.from_numpy(x[i : i + 1024])).numpy() for i in range(0, len(x), 1024)])


def loss_of_each(model: WholeModel, examples: Examples) -> Array:
    """Cross-entropy of each example, in nats."""
    logits = torch.from_numpy(answered(model, examples.x))
    found: Array = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(examples.y), reduction="none"
    ).numpy()
    return found


def main() -> None:
    """Measure what is asked for."""
    asked = options(str(__doc__), parts=PARTS, data=True)
    before = machine()
    claims: dict[str, float] = {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fedge-tasks-") as folder:
        for name, measure in (("har", har), ("shakespeare", shakespeare)):
            if not asked.only or name in asked.only:
                found, lines = measure(asked, Path(folder))
                claims |= found
                rows += lines
    columns = dict.fromkeys(key for row in rows for key in row)
    publish(asked, before, claims, [{key: row.get(key, "") for key in columns} for row in rows])


if __name__ == "__main__":
    main()
