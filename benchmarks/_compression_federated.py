"""A student that clients have taught and calibrated against one made of as many of the server's own examples.

Fashion-MNIST, 20 clients without any skew or with classes dealt by Dirichlet(0.5). Teacher, first weights of
the student and the number of examples are the same on both sides; each trains with its own defaults.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedge.config import Config, Distil, Train
from fedge.dataset import Examples
from fedge.inference import CompactModel
from fedge.learning import local
from fedge.learning.whole import WholeModel
from fedge.statistics import Moments
from fedge_server import app as server_app
from fedge_server.compression.clients import Clients, Fleet
from fedge_server.compression.distil import distil, preprocessed
from fedge_server.compression.export import export
from fedge_server.compression.quantise import quantise
from fedge_server.rounds.scoring import probabilities_of
from fedge_simulations.world import World, prepare

CLIENTS, STUDENT, HELD_BACK = 20, "cnn-8-32", 0.2
CLAIMS = {"federated_minus_proxy_points": "accuracy_%", "federated_int8_minus_proxy_points": "int8_%"}
Row = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Setting:
    """What both sides have in common."""

    world: World
    teacher: nn.Module
    moments: Moments
    proxy: Examples  # as many as the clients train on
    student: nn.Module

    def accuracy(self, network: nn.Module) -> float:
        """On examples that nobody has trained on."""
        server = self.world.server
        whole = WholeModel(self.preprocess, copy.deepcopy(network).eval())
        right = [probabilities_of(whole, part).argmax(1) == part.y for part in (server.test, server.gate)]
        return float(np.concatenate(right).mean())

    def accuracy_of(self, installed: bytes) -> float:
        """The same of a graph, asked for one example at a time as a device does."""
        server = self.world.server
        model = CompactModel(installed, self.world.dataset.spec)
        right = [model.run_each(part.x).argmax(1) == part.y for part in (server.test, server.gate)]
        return float(np.concatenate(right).mean())

    def exported(self, network: nn.Module) -> bytes:
        """As ONNX in float32."""
        return export(WholeModel(self.preprocess, copy.deepcopy(network).eval()), self.world.dataset.spec)

    @property
    def preprocess(self) -> nn.Module:
        """Of teacher and student."""
        return self.world.task.preprocess(self.world.dataset.spec, self.moments, "none")


def measured(
    data: Path, *, quick: bool, distil_settings: Distil | None = None
) -> tuple[list[Row], dict[str, float]]:
    """Rows of a table, and the claim.

    Args:
        data: folder with fashion_mnist.npz.
        quick: fewer examples and rounds.
        distil_settings: of both sides; None: the defaults.
    """
    settings = Distil() if distil_settings is None else distil_settings
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fedge-bench-") as folder:
        for partition in ("iid", "dirichlet:0.5"):
            config = _config(_subset(data, Path(folder), 4000 if quick else 24_000), partition, quick)
            setting = _setting(config, 2 if quick else 4)
            rows += [side(setting, partition, settings, config) for side in (_proxy, _federated)]
    made = {(row["clients' classes"], row["student made"]): row for row in rows}
    mine, proxy = made["iid", "by clients"], made["iid", "on proxy data"]
    return rows, {
        claim: round(float(mine[figure]) - float(proxy[figure]), 2) for claim, figure in CLAIMS.items()
    }


def _subset(data: Path, folder: Path, train: int) -> Path:
    """So many training examples, and all that the file sets apart."""
    with np.load(data / "fashion_mnist.npz") as found:
        chosen = np.random.default_rng(0).permutation(len(found["x_train"]))[:train]
        arrays = {
            "x_train": found["x_train"][chosen],
            "y_train": found["y_train"][chosen],
            "x_test": found["x_test"],
            "y_test": found["y_test"],
        }
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


def _config(data: Path, partition: str, quick: bool) -> Config:
    values: dict[str, Any] = {
        "task": "images",
        "data": str(data),
        "clients": {"count": CLIENTS, "partition": partition},
        "evaluate": {"proxy_fraction": 0.5, "client_holdout": HELD_BACK},
        "compress": {"data": "clients", "clients": {"rounds": 6} if quick else {}},
    }
    return Config.from_mapping(values)


def _setting(config: Config, epochs: int) -> Setting:
    world = prepare(config)
    holders = world.holders(world.course(None))
    mine = np.concatenate([holders.trained_on(i + 1, 0, 0.0) for i in range(CLIENTS)])
    own, spec = world.dataset.examples.take(mine), world.dataset.spec
    moments = Moments.of(own.x, spec)
    preprocess = world.task.preprocess(spec, moments, "none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher, student = world.task.model("cnn")(spec), world.task.students[STUDENT](spec)
    train = Train(epochs=epochs, batch_size=64, learning_rate=0.001, optimizer="adam")
    local.train(teacher, preprocessed(preprocess, own.x), torch.from_numpy(own.y), train, seed=0)
    proxy = world.server.proxy.take(np.arange(min(len(own), len(world.server.proxy))))
    return Setting(world, teacher.eval(), moments, proxy, student)


def _row(
    setting: Setting, partition: str, how: str, network: nn.Module, int8: bytes, examples: int, seconds: float
) -> Row:
    return {
        "clients' classes": partition,
        "student made": how,
        "examples": examples,
        "accuracy_%": round(100 * setting.accuracy(network), 2),
        "int8_%": round(100 * setting.accuracy_of(int8), 2),
        "teacher_%": round(100 * setting.accuracy(setting.teacher), 2),
        "cpu_s": round(seconds, 1),
    }


def _proxy(setting: Setting, partition: str, settings: Distil, config: Config) -> Row:
    passes = replace(settings, epochs=10) if config.compress.clients.rounds < 10 else settings
    began = time.process_time()
    x = preprocessed(setting.preprocess, setting.proxy.x)
    student = distil(setting.teacher, setting.student, x, torch.from_numpy(setting.proxy.y), passes, seed=0)
    int8 = quantise(setting.exported(student), setting.proxy.x)
    spent = time.process_time() - began
    return _row(setting, partition, "on proxy data", student, int8, len(setting.proxy), spent)


def _federated(setting: Setting, partition: str, settings: Distil, config: Config) -> Row:
    def over(home: Path) -> Any:
        return closing(setting.world.grid(server_app.run_config(config, home, "bench")))

    began = time.process_time()
    with tempfile.TemporaryDirectory(prefix="fedge-bench-") as folder:
        model = WholeModel(setting.preprocess, setting.teacher)
        clients = Clients(
            config,
            setting.world.task,
            setting.world.server,
            Fleet(over, Path(folder)),
            model,
            setting.moments,
        )
        student = clients.teach(setting.student, settings, model=f"student:{STUDENT}", seed=config.seed)
        int8 = clients.calibrate(setting.exported(student))
    spent = time.process_time() - began
    return _row(setting, partition, "by clients", student, int8, len(setting.proxy), spent)
