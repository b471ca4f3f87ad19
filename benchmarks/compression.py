"""The search for variants on Fashion-MNIST: how small and fast, at what loss, in what time; and who teaches.

The teacher is McMahan's CNN (1.66 million parameters), trained by a federation of 20 clients until five
rounds bring no gain; training the same network on the clients' data put together is printed beside it. The
search may take 270 s; its gate allows a drop of one point, and the tier a tenth of the teacher's time (part
lean: any, since the teacher itself takes little more than the runtime).
Sizes are bytes on the wire, times those of onnxruntime for one example on one thread. Data are your own copy
(`--data-dir DIR` with `fashion_mnist.npz`), all 70,000 images: 21,000 held out (17,850 of them for the gate),
19,600 the server's own, 29,400 with the clients. A teacher takes a quarter of an hour; it is kept in
`--cache DIR`.

Parts: autopilot; lean, the same with a teacher whose dense layer holds less than a tenth of the parameters;
federated, where clients teach; fixed, what recipes that are fixed beforehand give in the same time (the first
seed); signals and text, the search on `uji_har.npz` and `shakespeare_by_speaker.npz`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _compression_federated import measured
from _compression_fixed import RECIPES
from _compression_tasks import row_of as other_row
from _harness import Options, Row, machine, options, publish

from fedge.config import Config
from fedge.learning.whole import WholeModel
from fedge.task import Task, resolve
from fedge_server.compression import TierOutcome, compress
from fedge_server.compression.choose import source_of
from fedge_server.compression.export import export
from fedge_server.compression.measure import measure
from fedge_server.data import ServerData, server_part, split_of
from fedge_server.data import source_of as data_of
from fedge_server.rounds.starting import whole_model
from fedge_simulations import run

PARTS = ("autopilot", "lean", "federated", "fixed", "signals", "text")
SEEDS = (0, 1, 2)
SECONDS, MAX_DROP, FASTER = 270.0, 0.01, 10.0
MODELS = {"autopilot": "cnn", "lean": "cnn3"}


@dataclass(frozen=True)
class Setting:
    """One seed's teacher and data."""

    config: Config
    task: Task
    data: ServerData
    teacher: WholeModel
    accuracy: float  # of the teacher, on the gate's data
    rounds: int


def whole(data: Path, folder: Path) -> Path:
    """Training and test images in one file, to be divided by seed."""
    path = folder / "fashion.npz"
    if not path.exists():
        with np.load(data / "fashion_mnist.npz") as found:
            np.savez(
                path,
                x=np.concatenate([found["x_train"], found["x_test"]]),
                y=np.concatenate([found["y_train"], found["y_test"]]),
            )
    return path


def config_of(data: Path, seed: int, model: str, *, quick: bool) -> Config:
    """The federation and the search."""
    return Config.from_mapping(
        {
            "task": "images",
            "data": str(data),
            "seed": seed,
            "model": {"name": model},
            "clients": {"count": 20},
            "rounds": {"count": 4 if quick else 30, "patience": 5, "smooth": 3},
            "train": {"batch_size": 32, "learning_rate": 0.001, "optimizer": "adam", "schedule": "cosine"},
            "strategy": {"name": "fedavgm", "server_momentum": 0.6},
            "evaluate": {
                "metrics": ["accuracy"],
                "holdout_fraction": 0.3,
                "gate_fraction": 0.85,
                "proxy_fraction": 0.4,
            },
            "compress": {
                "max_seconds": SECONDS,
                "distil": {"epochs": 24, "augment": ["flip", "shift:1"], "batch_size": 128, "views": 4},
                "grid": {"epochs": 12},
            },
        }
    )


def setting_of(data: Path, cache: Path, seed: int, model: str, *, quick: bool) -> Setting:
    """The federation's global model, trained or from the cache."""
    config = config_of(data, seed, model, quick=quick)
    task = resolve(config.task)
    dataset = task.read(data_of(config))
    server = server_part(dataset, split_of(config, dataset))
    folder = cache / f"{'quick-' if quick else ''}{model}-{seed}"
    if not (folder / "summary.json").exists():
        run(config, folder)
    teacher, _ = whole_model(str(folder), config, task, server.spec, None)
    teacher = teacher.eval()
    rounds = len((folder / "history.jsonl").read_text().splitlines())
    return Setting(config, task, server, teacher, right(teacher, server), rounds)


@torch.no_grad()
def right(model: WholeModel, server: ServerData) -> float:
    """Accuracy on the gate's data."""
    answers = [model(torch.from_numpy(part)).argmax(1) for part in np.array_split(server.gate.x, 40)]
    return float((torch.cat(answers).numpy() == server.gate.y).mean())


def central(setting: Setting) -> float:
    """The same network trained on the clients' data put together, with Adam and one cycle."""
    dataset = setting.task.read(data_of(setting.config))
    parts = split_of(setting.config, dataset)
    examples = dataset.examples.take(parts.train)
    torch.manual_seed(setting.config.seed)
    network = setting.task.model(setting.config.model.name)(dataset.spec)
    model = WholeModel(setting.teacher.preprocess, network)
    optimizer, epochs, batch = torch.optim.AdamW(network.parameters()), 6, 128
    steps = epochs * (len(examples) // batch)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps)
    x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
    for _ in range(epochs):
        order = torch.randperm(len(x))[: batch * (len(x) // batch)]
        for chosen in order.view(-1, batch):
            loss = torch.nn.functional.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
    return right(model.eval(), setting.data)


def searched(
    setting: Setting,
    say: Any = print,
    *,
    faster: float | None = FASTER,
    only: Mapping[str, Any] | None = None,
) -> tuple[TierOutcome, float]:
    """The outcome of one search for the smallest variant, and its seconds.

    Args:
        setting: of the seed.
        say: takes progress.
        faster: how many times, at least, than the teacher; None: as fast as it comes.
        only: keys of [compress] that leave one recipe; None: the search chooses.
    """
    spec = setting.data.spec
    tier: dict[str, Any] = {"aim": "bytes", "max_drop": MAX_DROP}
    if faster is not None:
        slow = measure(export(setting.teacher, spec), spec).latency_us[1]
        tier["max_latency_ms"] = slow / faster / 1000
    values = setting.config.to_mapping()
    compression = values["compress"] | (only or {}) | _merged(values["compress"], only or {}, "prune")
    config = Config.from_mapping(values | {"compress": compression, "tiers": {"smallest": tier}})
    began = time.perf_counter()
    source = source_of(config, setting.task, setting.data, setting.teacher)
    (outcome,) = compress(setting.teacher, setting.task, spec, source, config, say)
    return outcome, time.perf_counter() - began


def _merged(values: Mapping[str, Any], only: Mapping[str, Any], table: str) -> dict[str, Any]:
    return {table: {**values[table], **only[table]}} if table in only else {}


def fixed(setting: Setting) -> tuple[list[Row], dict[str, float]]:
    """What the search finds, and what each fixed recipe gives; how many times smaller it is than the best."""
    outcome, seconds = searched(setting)
    rows = [_fixed_row("the search", outcome, seconds)]
    for name, only in RECIPES.items():
        rows.append(_fixed_row(name, *searched(setting, only=only)))
    passing = [float(row["bytes"]) for row in rows[1:] if row["passes"] == "yes"]
    found = float(rows[0]["bytes"])
    times = min(passing, default=float("inf")) / found if rows[0]["passes"] == "yes" else 0.0
    return rows, {"smaller_than_best_fixed": times}


def _fixed_row(name: str, outcome: TierOutcome, seconds: float) -> Row:
    variant = outcome.variant
    tried = [trial for trial in outcome.tried if trial.recipe != "fp32"]
    last = next((trial for trial in tried if trial.gate is not None), tried[-1])
    print(f"{name}: {outcome.reason}")
    return {
        "recipe": name,
        "passes": "yes" if variant else "no",
        "chosen": variant.recipe if variant else last.recipe,
        "bytes": len(variant.wire) if variant else last.wire_bytes or 0,
        "us": variant.latency_us if variant else last.latency_us or 0.0,
        "at most": 100 * (variant.gate.drop_upper if variant else last.gate.drop_upper if last.gate else 1.0),
        "why not": "" if variant else last.result[:60],
        "s": seconds,
    }


def row_of(part: str, setting: Setting, outcome: TierOutcome, seconds: float, beside: float) -> Row:
    """One seed's line."""
    teacher = next(trial for trial in outcome.tried if trial.recipe == "fp32")
    shared: dict[str, Any] = {
        "teacher": MODELS[part],
        "seed": setting.config.seed,
        "rounds": setting.rounds,
        "teacher %": 100 * setting.accuracy,
        "central %": 100 * beside,
        "teacher bytes": teacher.wire_bytes,
    }
    variant = outcome.variant
    if variant is None:
        nothing = {"bytes": 0, "times smaller": 0.0, "times faster": 0.0, "drop": 100.0, "at most": 100.0}
        return {**shared, "recipe": "none", **nothing, "worst class": 100.0, "s": seconds}
    return {
        **shared,
        "recipe": variant.recipe,
        "bytes": len(variant.wire),
        "times smaller": (teacher.wire_bytes or 0) / len(variant.wire),
        "times faster": (teacher.latency_us or 0) / variant.latency_us,
        "drop": 100 * variant.gate.drop,
        "at most": 100 * variant.gate.drop_upper,
        "worst class": 100 * variant.gate.worst_class_drop,
        "s": seconds,
    }


def claims_of(part: str, rows: list[Row]) -> Mapping[str, float]:
    """The worst of all seeds."""
    if part == "lean":
        return {"lean_times_smaller": min(float(row["times smaller"]) for row in rows)}
    return {
        "times_smaller": min(float(row["times smaller"]) for row in rows),
        "times_faster": min(float(row["times faster"]) for row in rows),
        "drop_upper_points": max(float(row["at most"]) for row in rows),
        "seconds": max(float(row["s"]) for row in rows),
    }


def main(asked: Options) -> None:
    """Measure, print, write."""
    before, claims, tables = machine(), dict[str, float](), list[Row]()
    with tempfile.TemporaryDirectory() as scratch:
        for part in [each for each in PARTS if each in (asked.only or PARTS)]:
            rows, found = _measured(part, asked, Path(scratch))
            claims |= found
            tables += rows
    publish(asked, before, claims, tables)


def _measured(part: str, asked: Options, scratch: Path) -> tuple[list[Row], Mapping[str, float]]:
    if part == "federated":
        return measured(asked.data, quick=asked.quick)
    if part in ("signals", "text"):
        row = other_row(part, asked.data, scratch, asked.cache, SECONDS, quick=asked.quick)
        return [row], {f"{part}_times_smaller": float(row["times smaller"])}
    data = whole(asked.data, scratch)
    if part == "fixed":
        return fixed(setting_of(data, asked.cache, 0, "cnn", quick=asked.quick))
    rows = []
    for seed in SEEDS[:1] if asked.quick else SEEDS:
        setting = setting_of(data, asked.cache, seed, MODELS[part], quick=asked.quick)
        outcome, seconds = searched(setting, faster=FASTER if part == "autopilot" else None)
        rows.append(row_of(part, setting, outcome, seconds, central(setting)))
    return rows, claims_of(part, rows)


if __name__ == "__main__":
    main(options(__doc__ or "", parts=PARTS, cache=True, data=True))
