"""Gradients of stacked clients against the device's own, and FedSGD with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedge.config import Simulation, Train
from fedge.dataset import Examples
from fedge.learning import local, models
from fedge.learning.local import Job
from fedge.learning.messages import Instructions
from fedge.learning.state import arrays_of
from fedge.spec import Spec
from fedge.task import Task
from fedge_simulations.engine import Engine
from fedge_simulations.engine.gradients import Gradients, choose, difference, in_batches
from fedge_simulations.engine.stack import Layout
from fedge_simulations.engine.steppers import Recipe
from fedge_simulations.trainers import Client

SPEC = Spec("image", (4, 4), "float32", ("a", "b", "c"))


class Everything(nn.Module):
    """A recurrent layer, batch normalisation, dropout and a frozen layer."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 5, batch_first=True)
        self.norm = nn.BatchNorm1d(5)
        self.dropout = nn.Dropout(0.4)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.out = nn.Linear(5, spec.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, _ = self.gru(x.flatten(1).view(-1, 4, 4))
        return self.out(self.frozen(self.dropout(self.norm(h[:, -1]))))


class Unused(nn.Module):
    """A layer that is not used has no gradient, and so no decay, on a device."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.out = nn.Linear(16, spec.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x.flatten(1))


class Tied(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.one = nn.Linear(16, 16)
        self.two = self.one
        self.out = nn.Linear(16, spec.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.two(self.one(x.flatten(1))))


MODELS: dict[str, Callable[[Spec], nn.Module]] = {
    "mlp": models.mlp(6),
    "small_cnn": models.small_cnn(4, 8),
    "everything": Everything,
    "unused": Unused,
    "tied": Tied,
}
TASK = Task(
    name="gradients",
    read=lambda source: None,
    models=MODELS,
    default_model="mlp",
    students={},  # type: ignore[arg-type, return-value]
)


def examples(n: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    return Examples(rng.normal(size=(n, 4, 4)).astype(np.float32), rng.integers(0, 3, n))


def job(model: str, own: Examples | None = None, seed: int = 1, **changes: Any) -> Job:
    instructions = Instructions(
        task="gradients", spec=SPEC, model=model, noise_filter="none", moments=None, train=Train(**changes),
        seed=0, update="gradient", round=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return Job(TASK, instructions, arrays_of(TASK.models[model](SPEC)), own or examples(10), seed)


def recipe_of(asked: Job) -> Recipe:
    model = TASK.models[asked.instructions.model](SPEC).train()
    return Recipe(model, Layout.of(asked.state), in_batches(asked.instructions.train))


PREPROCESS = TASK.preprocess(SPEC, None, "none")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.1},
        {"loss": "focal"},
        {"loss": "multi_margin"},
        {"label_smoothing": 0.1},
        {"augment": ("shift:1", "noise:0.1")},
    ],
)
@pytest.mark.parametrize("model", ["mlp", "small_cnn", "everything"])
def test_gradients_and_buffers_are_the_devices_in_float64(model: str, changes: dict[str, Any]) -> None:
    asked = job(model, **changes)
    assert difference(Gradients, recipe_of(asked), asked, PREPROCESS) == ""


def test_what_cannot_be_stacked_is_left_to_the_devices_code() -> None:
    asked = job("unused", weight_decay=0.1)
    assert "differ from a device's" in choose(recipe_of(asked), asked, PREPROCESS).why
    tied = job("tied")
    assert "two names" in choose(recipe_of(tied), tied, PREPROCESS).why


def test_convolutions_are_left_one_by_one_without_a_word() -> None:
    asked = job("small_cnn")
    way = choose(recipe_of(asked), asked, PREPROCESS)
    assert (way.stepper, way.why) == (None, "")


@pytest.mark.parametrize("model", ["mlp", "everything", "unused"])
def test_clients_get_the_gradients_that_each_would_get_alone(model: str) -> None:
    sizes = [3, 600, 257, 8, 258, 600]  # batches of 256: a last one of one example, where normalised it joins
    jobs = [job(model, examples(n, seed=i), seed=100 + i, weight_decay=0.1) for i, n in enumerate(sizes)]
    said: list[str] = []
    done = Engine(Simulation(), examples(10), say=said.append).train(jobs)
    assert len(said) == (model == "unused")
    for asked, trained in zip(jobs, done, strict=True):
        expected = local.fit(asked)
        assert not isinstance(trained, Exception)
        assert (trained.examples, trained.steps) == (expected.examples, 0)
        assert trained.loss == pytest.approx(expected.loss, rel=1e-5)
        for name, value in expected.arrays.items():
            np.testing.assert_allclose(trained.arrays[name], value, rtol=0, atol=1e-5)


def test_the_sum_is_the_gradient_of_all_examples_together() -> None:
    data = examples(30, seed=9)
    parts = np.split(np.arange(30), [4, 13, 18])
    clients = [Client(i, part, 7 * i) for i, part in enumerate(parts)]
    asked = job("mlp")
    total = Engine(Simulation(), data).sum(asked, clients)
    pooled = local.fit(replace(asked, examples=data))
    assert (total.examples, total.clients, total.failed) == (30, 4, {})
    assert total.loss == pytest.approx(pooled.loss, rel=1e-5)
    for name, value in pooled.arrays.items():
        np.testing.assert_allclose(total.mean[name], value, rtol=0, atol=1e-6)
