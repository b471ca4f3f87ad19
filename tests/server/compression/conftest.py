"""Scikit-learn's digits, a teacher trained for a second, and tiny students, shared by these tests."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from fedge.dataset import Dataset, Examples
from fedge.learning.whole import WholeModel
from fedge.spec import Spec
from fedge.task import Task

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEC = Spec("image", (8, 8), "uint8", LABELS)


class Scale(nn.Module):
    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        return (raw.float() / 8 - 1).flatten(1)


def mlp(hidden: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    )


def task(**students: int) -> Task:
    return Task(
        name="tiny",
        read=lambda _source: Dataset(SPEC, SPEC.zeros(1), np.zeros(1, np.int64)),
        models={"mlp": lambda _spec: mlp(64)},
        default_model="mlp",
        students={name: lambda _spec, hidden=hidden: mlp(hidden) for name, hidden in students.items()},
        preprocess=lambda _spec, _moments, _filter: Scale(),
    )


@dataclass(frozen=True)
class Digits:
    spec: Spec
    train: Examples  # 700
    proxy: Examples  # 500
    gate: Examples  # 597


@pytest.fixture(scope="session")
def digits() -> Digits:
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    every = Examples(bunch.images.astype(np.uint8)[order], bunch.target.astype(np.int64)[order])
    cut = [every.take(part) for part in np.split(np.arange(len(every)), [700, 1200])]
    return Digits(SPEC, *cut)


@pytest.fixture(scope="session")
def trained(digits: Digits) -> WholeModel:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WholeModel(Scale(), mlp(64))
        optimizer = torch.optim.Adam(model.parameters(), 0.005, fused=True)
        x, y = torch.from_numpy(digits.train.x), torch.from_numpy(digits.train.y)
        for _ in range(30):
            for part in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[part]), y[part]).backward()
                optimizer.step()
    torch.set_num_threads(threads)
    return model.eval()


@pytest.fixture(scope="session")
def exported(trained: WholeModel, digits: Digits) -> bytes:
    """The teacher's graph."""
    from fedge_server.compression.export import export

    return export(trained, digits.spec)


@pytest.fixture
def teacher(trained: WholeModel) -> WholeModel:
    return copy.deepcopy(trained)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def share_right(network: nn.Module, examples: Examples) -> float:
    with torch.no_grad():
        answers = network(Scale()(torch.from_numpy(examples.x))).argmax(1).numpy()
    return float((answers == examples.y).mean())


@pytest.fixture
def helpers():
    """Functions that tests call; test modules cannot import one another in importlib mode."""
    return _Helpers


class _Helpers:
    Scale = Scale
    mlp = staticmethod(mlp)
    task = staticmethod(task)
    weights = staticmethod(weights)
    same = staticmethod(same)
    share_right = staticmethod(share_right)
