"""The vector engine against the device's own local training, step for step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
from fedge.learning.terms import Terms
from fedge.spec import Spec
from fedge.task import Task
from fedge_simulations.engine import Engine
from fedge_simulations.engine.choice import Way, choose, difference
from fedge_simulations.engine.stack import Layout
from fedge_simulations.engine.steppers import Linears, Recipe, Single, linear_layers
from fedge_simulations.engine.vmapped import Vmapped
from fedge_simulations.trainers import Client

SPEC = Spec("image", (8, 8), "float32", ("a", "b", "c"))
OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop")


class WithEverything(nn.Module):
    """Embedding, a recurrent layer, dropout and batch normalisation."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.gru = nn.GRU(6, 7, batch_first=True)
        self.lstm = nn.LSTM(7, 4, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(4, spec.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = (x.flatten(1)[:, :6].abs() * 3).long().clamp(max=4)
        h, _ = self.gru(self.embedding(codes))
        h, _ = self.lstm(h)
        return self.out(self.dropout(self.norm(h[:, -1])))


class WithDropout(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.channels = nn.Dropout2d(0.5)
        self.values = nn.Dropout(0.2)
        self.out = nn.Linear(4 * 36, spec.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.values(self.channels(self.conv(x)).flatten(1)))


class Peeking(nn.Module):
    """Asks for a value while it computes, which nothing can batch."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.out = nn.Linear(64, spec.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.out(x.flatten(1))
        return z if z.sum().item() > 1e9 else z * 2


class Looking(nn.Module):
    """Looks values up in a table that has no row for large ones."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.table = nn.Embedding(16, spec.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x.flatten(1).abs().long()).mean(1)


BUILT_IN: dict[str, Callable[[Spec], nn.Module]] = {
    "logistic": models.logistic,
    "mlp": models.mlp(12, 9),
    "cnn": models.cnn,
    "small_cnn": models.small_cnn(4, 8),
}
OWN: dict[str, Callable[[Spec], nn.Module]] = {
    "everything": WithEverything,
    "dropout": WithDropout,
    "peeking": Peeking,
    "looking": Looking,
    "twice": lambda spec: Sharing(spec, twice=True),
    "weight too": lambda spec: Sharing(spec, twice=False),
    "over time": lambda spec: OverTime(spec),
}
FUSED = partial(Vmapped, fused=True)
TASK = Task(
    name="engine",
    read=lambda source: None,
    models={**BUILT_IN, **OWN},
    default_model="mlp",
    students={},  # type: ignore[arg-type, return-value]
)


def examples(n: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    return Examples(rng.normal(size=(n, 8, 8)).astype(np.float32), rng.integers(0, 3, n))


def job(model: str, own: Examples | None = None, seed: int = 1, **changes: Any) -> Job:
    mu = changes.pop("mu", 0.0)
    train = Train(**{"epochs": 2, "batch_size": 4, "learning_rate": 0.05, "momentum": 0.0, **changes})
    instructions = Instructions(
        task="engine", spec=SPEC, model=model, noise_filter="none", moments=None, train=train, seed=0,
        update="weights", round=1, proximal_mu=mu,
    )  # fmt: skip
    torch.manual_seed(0)
    state = arrays_of(TASK.models[model](SPEC))
    return Job(TASK, instructions, state, own or examples(10), seed)


def found(make: Any, asked: Job, *, single: bool = False, shifted: bool = False) -> str:
    instructions = asked.instructions
    model = TASK.models[instructions.model](SPEC).train()
    recipe = Recipe(model, Layout.of(asked.state), instructions.train, instructions.proximal_mu, shifted)
    preprocess = TASK.preprocess(SPEC, None, "none")
    return difference(make, recipe, asked, preprocess, single=single)


def chosen(asked: Job) -> Way:
    instructions = asked.instructions
    recipe = Recipe(TASK.models[instructions.model](SPEC).train(), Layout.of(asked.state), instructions.train)
    return choose(recipe, asked, TASK.preprocess(SPEC, None, "none"))


@pytest.mark.quick_where(optimizer=("sgd", "adam"))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", BUILT_IN)
def test_every_step_of_a_built_in_model_is_the_devices_in_float64(model: str, optimizer: str) -> None:
    asked = job(model, optimizer=optimizer, momentum=0.9, weight_decay=0.01)
    assert found(Vmapped, asked) == ""
    if model in ("logistic", "mlp"):
        assert found(Linears, asked) == ""
    else:
        assert found(Single, asked, single=True) == ""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"momentum": 0.9},
        {"mu": 0.1},
        {"loss": "focal"},
        {"loss": "multi_margin"},
        {"label_smoothing": 0.1},
        {"weight_decay": 0.1},
        {"augment": ("flip", "shift:1", "noise:0.1", "mask:0.2")},
    ],
)
def test_every_setting_of_a_step_is_the_devices_too(changes: dict[str, Any]) -> None:
    assert found(Vmapped, job("mlp", **changes)) == ""
    assert found(Linears, job("mlp", **changes)) == ""
    assert found(Single, job("small_cnn", **changes), single=True) == ""


@pytest.mark.parametrize("changes", [{}, {"momentum": 0.9}, {"mu": 0.1, "weight_decay": 0.1}])
def test_what_is_added_to_each_clients_gradients_is_the_devices_too(changes: dict[str, Any]) -> None:
    """SCAFFOLD's correction, and a proximal term around other weights than those at the start."""
    assert found(Vmapped, job("mlp", **changes), shifted=True) == ""
    assert found(Vmapped, job("everything", **changes), shifted=True) == ""
    assert found(Linears, job("mlp", **changes), shifted=True) == ""
    assert found(Single, job("small_cnn", **changes), single=True, shifted=True) == ""


@pytest.mark.parametrize("model", ["mlp", "small_cnn", "peeking"])
def test_clients_with_pulls_of_their_own_get_what_each_would_get_alone(model: str) -> None:
    jobs = []
    for i in range(4):
        asked = job(model, examples(7 + 3 * (i % 2), seed=i), seed=i, mu=0.1)
        asked = replace(asked, instructions=replace(asked.instructions, terms=Terms(control=True)))
        rng = np.random.default_rng(i)
        noise = {n: rng.normal(size=v.shape).astype(np.float32) for n, v in asked.state.items()}
        jobs.append(replace(asked, anchor=noise, shift=noise))
    together = Engine(Simulation(workers=1), examples(30), say=lambda _: None).train(jobs)
    for asked, done in zip(jobs, together, strict=True):
        alone = local.fit(asked)
        plain = local.fit(replace(asked, anchor=None, shift=None))
        for name, value in alone.arrays.items():
            np.testing.assert_allclose(done.arrays[name], value, rtol=0, atol=1e-5)
        assert any(np.abs(plain.arrays[n] - v).max() > 0.01 for n, v in alone.arrays.items())


@pytest.mark.parametrize("model", ["everything", "dropout"])
def test_recurrent_layers_embeddings_dropout_and_batch_normalisation_are_batched(model: str) -> None:
    assert found(Vmapped, job(model, optimizer="adam")) == ""


class Sharing(nn.Module):
    """Uses a linear layer twice, or its weight by itself too."""

    def __init__(self, spec: Spec, *, twice: bool) -> None:
        super().__init__()
        self.twice = twice
        self.first, self.out = nn.Linear(64, 64), nn.Linear(64, spec.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x.flatten(1)).tanh()
        return self.out(self.first(h) if self.twice else h * self.first.weight.sum(0))


class OverTime(nn.Module):
    """A linear layer over each row of an image, one without bias, and weights that are no layer's."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 0.5))
        self.each, self.out = nn.Linear(8, 5, bias=False), nn.Linear(40, spec.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.each(x.squeeze(1) * self.scale).tanh().flatten(1))


def test_layers_that_step_inside_the_backward_pass_give_the_devices_steps() -> None:
    assert found(FUSED, job("over time")) == ""
    assert found(FUSED, job("dropout")) == ""
    assert found(FUSED, job("small_cnn")) == ""
    assert found(FUSED, job("mlp", loss="focal")) == ""


@pytest.mark.slow
def test_a_layer_that_cannot_step_by_itself_is_batched_without() -> None:
    with pytest.raises(NotImplementedError, match="used twice"):
        found(FUSED, job("twice"))
    assert "differ" in found(FUSED, job("weight too"))
    for model in ("twice", "weight too"):
        assert found(Vmapped, job(model)) == ""
        way = chosen(job(model))
        assert isinstance(way.stepper, Vmapped)
        assert way.why == ""


def test_nothing_steps_by_itself_where_a_step_is_more_than_plain_descent() -> None:
    for changes in ({"momentum": 0.9}, {"optimizer": "adam"}, {"mu": 0.1}, {"weight_decay": 0.1}):
        with pytest.raises(NotImplementedError, match="no linear layer"):
            found(FUSED, job("mlp", **changes))


def test_a_module_that_cannot_be_batched_is_trained_one_by_one_and_named_once() -> None:
    said: list[str] = []
    engine = Engine(Simulation(), examples(10), say=said.append)
    asked = job("peeking")
    (first,), (again,) = engine.train([asked]), engine.train([asked])
    expected = local.fit(asked)
    for trained in (first, again):
        assert not isinstance(trained, Exception)
        assert all(np.array_equal(trained.arrays[name], expected.arrays[name]) for name in expected.arrays)
    assert len(said) == 1
    assert "peeking" in said[0]
    assert "item()" in said[0]


@pytest.mark.parametrize("model", ["mlp", "small_cnn", "everything"])
def test_clients_of_unequal_size_get_what_each_would_get_alone(model: str) -> None:
    sizes = [3, 11, 7, 8, 2, 11]
    jobs = [job(model, examples(n, seed=i), seed=100 + i) for i, n in enumerate(sizes)]
    done = Engine(Simulation(), examples(10)).train(jobs)
    for asked, trained in zip(jobs, done, strict=True):
        expected = local.fit(asked)
        assert not isinstance(trained, Exception)
        assert (trained.examples, trained.steps) == (expected.examples, expected.steps)
        assert trained.loss == pytest.approx(expected.loss, rel=1e-5)
        for name, value in expected.arrays.items():
            np.testing.assert_allclose(trained.arrays[name], value, rtol=0, atol=2e-5)


def cohort(sizes: list[int]) -> tuple[Examples, list[Client]]:
    data = examples(sum(sizes), seed=9)
    stops = np.cumsum(sizes)
    return data, [
        Client(i, np.arange(stop - n, stop), 7 * i)
        for i, (n, stop) in enumerate(zip(sizes, stops, strict=True))
    ]


@pytest.mark.parametrize("model", ["mlp", "small_cnn", "peeking"])
def test_the_sum_is_the_mean_of_single_updates_weighted_by_examples(model: str) -> None:
    data, clients = cohort([4, 9, 5, 12])
    asked = job(model)
    total = Engine(Simulation(), data).sum(asked, clients)
    single = [local.fit(replace(asked, examples=data.take(c.indices), seed=c.seed)) for c in clients]
    assert (total.examples, total.clients, total.failed) == (30, 4, {})
    assert total.loss == pytest.approx(sum(s.loss * s.examples for s in single) / 30, rel=1e-5)
    for name in asked.state:
        mean = sum(s.arrays[name].astype(float) * s.examples for s in single) / 30
        assert total.mean[name] == pytest.approx(mean, abs=2e-5)
        assert total.mean[name].dtype == asked.state[name].dtype


def test_how_many_are_batched_together_does_not_change_the_sum() -> None:
    data, clients = cohort([5, 9, 5, 12, 9, 1])
    sums = [Engine(Simulation(clients_at_once=k), data).sum(job("mlp"), clients) for k in (1, 2, 6)]
    for other in sums[1:]:
        for name, value in sums[0].mean.items():
            # float32: some roundings of one step
            np.testing.assert_allclose(other.mean[name], value, rtol=0, atol=1e-6)


def test_a_large_data_set_is_pre_processed_stack_by_stack_to_the_same_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, clients = cohort([300, 9, 250])
    once = Engine(Simulation(), data).sum(job("mlp", mu=0.1), clients)
    monkeypatch.setattr("fedge_simulations.engine.prepared.WHOLE_BYTES", 4 * data.x.size - 1)
    again = Engine(Simulation(), data).sum(job("mlp", mu=0.1), clients)
    assert once.loss == again.loss
    assert all(np.array_equal(value, again.mean[name]) for name, value in once.mean.items())


def test_a_client_that_diverges_is_left_out_of_the_sum_with_the_reason() -> None:
    data, clients = cohort([4, 4])
    data.x[:4] = 1e30
    total = Engine(Simulation(), data).sum(job("mlp", learning_rate=10.0), clients)
    assert total.clients == 1
    assert list(total.failed) == [0]
    assert "not finite" in total.failed[0]


def test_only_a_flat_stack_of_linear_layers_is_taken_for_one() -> None:
    assert linear_layers(models.mlp(4)(SPEC)) == [("1.weight", "1.bias", True), ("3.weight", "3.bias", False)]
    assert linear_layers(models.cnn(SPEC)) is None
    assert linear_layers(nn.Sequential(nn.Linear(3, 3), nn.Tanh())) is None


def test_a_client_whose_data_cannot_be_trained_on_spoils_no_other() -> None:
    data, clients = cohort([4, 4, 6])
    data.x[:4] = 99
    asked = job("looking")
    said: list[str] = []
    engine = Engine(Simulation(), Examples(data.x[4:], data.y[4:]), say=said.append)
    bad, good = replace(asked, examples=data.take(clients[0].indices)), replace(asked, examples=examples(5))
    failed, done = engine.train([bad, good])
    assert isinstance(failed, IndexError)
    assert not isinstance(done, Exception)
    moved = Examples(
        np.roll(data.x, -4, axis=0), data.y
    )  # the bad one last: the first are what models are tried with
    places = [Client(c.node_id, (c.indices - 4) % len(data), c.seed) for c in clients]
    total = Engine(Simulation(), moved, say=said.append).sum(asked, places)
    assert said == []
    assert (total.clients, total.examples) == (2, 10)
    assert "IndexError" in total.failed[0]


def test_a_client_that_the_model_refuses_does_not_end_the_run_when_stacks_are_measured() -> None:
    data, clients = cohort([4] * 7)
    data.x[clients[3].indices] = (
        99  # in the middle, whose examples are measured with; the first ones are fine
    )
    said: list[str] = []
    engine = Engine(Simulation(workers=1), data, rounds=10**9, say=said.append)
    for _ in range(2):
        total = engine.sum(job("looking"), clients)
        assert sorted(total.failed) == [clients[3].node_id]
        assert total.clients == 6
    assert said == []


def test_clients_with_states_of_their_own_start_from_those() -> None:
    asked = job("mlp")
    same = replace(asked, state=dict(asked.state))  # the same arrays
    other = replace(asked, state={name: value + 1 for name, value in asked.state.items()})
    done = Engine(Simulation(), examples(10)).train([asked, same, other])
    for own, trained in zip((asked, same, other), done, strict=True):
        assert not isinstance(trained, Exception)
        expected = local.fit(own)
        for name, value in expected.arrays.items():
            np.testing.assert_allclose(trained.arrays[name], value, rtol=0, atol=2e-5)
