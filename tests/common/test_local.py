"""The local step against numpy: logits are x @ W.T + b, so every gradient can be written down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedge.config import Train
from fedge.learning import objective
from fedge.learning.local import Pull, batch_sizes, gradient, logits, train
from fedge.learning.objective import losses

N, F, K = 12, 5, 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def data(n: int = N, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, F, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(F, K)


def settings(**changes: Any) -> Train:
    values = {"epochs": 1, "batch_size": N, "learning_rate": 0.1, "momentum": 0.0}
    return Train(**{**values, **changes})


def weights(model: nn.Module) -> np.ndarray[Any, Any]:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double().numpy()


def numpy_gradient(model: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> tuple[Any, Any, float]:
    """Gradient of the mean cross-entropy: (softmax - onehot).T @ x / N."""
    w, b = model.weight.detach().double().numpy(), model.bias.detach().double().numpy()
    z = x.double().numpy() @ w.T + b
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    n = len(y)
    loss = -np.log(p[np.arange(n), y.numpy()]).mean()
    error = p - np.eye(K)[y.numpy()]
    return error.T @ x.double().numpy() / n, error.mean(0), float(loss)


def test_one_step_of_sgd_is_the_step_that_numpy_makes() -> None:
    model, (x, y) = linear(), data()
    w, b = model.weight.detach().double().numpy().copy(), model.bias.detach().double().numpy().copy()
    dw, db, loss = numpy_gradient(model, x, y)
    result = train(model, x, y, settings(), seed=0)
    assert model.weight.detach().numpy() == pytest.approx(w - 0.1 * dw, abs=1e-6)
    assert model.bias.detach().numpy() == pytest.approx(b - 0.1 * db, abs=1e-6)
    assert (result.loss, result.examples, result.steps) == (pytest.approx(loss, abs=1e-6), N, 1)


def test_momentum_and_weight_decay_over_two_epochs_are_those_that_numpy_makes() -> None:
    model, (x, y) = linear(), data()
    by_hand = linear()
    velocity: list[Any] = [0.0, 0.0]
    for _ in range(2):
        dw, db, _ = numpy_gradient(by_hand, x, y)
        for i, (p, g) in enumerate(zip(by_hand.parameters(), (dw, db), strict=True)):
            velocity[i] = 0.9 * velocity[i] + g + 0.01 * p.detach().double().numpy()
            p.data -= torch.from_numpy(0.1 * velocity[i]).float()
    train(model, x, y, settings(epochs=2, momentum=0.9, weight_decay=0.01), seed=0)
    assert weights(model) == pytest.approx(weights(by_hand), abs=1e-6)


def test_an_epoch_is_every_example_once_in_batches_and_the_loss_is_their_mean() -> None:
    model, (x, y) = linear(), data()
    _, _, loss = numpy_gradient(model, x, y)
    result = train(model, x, y, settings(epochs=3, batch_size=5, learning_rate=1e-9), seed=0)
    assert (result.steps, result.examples) == (9, N)  # batches of 5, 5 and 2
    assert result.loss == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(("n", "size", "least", "sizes"), [
    (5, 2, 1, [2, 2, 1]),
    (5, 2, 2, [2, 3]),
    (4, 2, 2, [2, 2]),
    (1, 2, 2, [1]),
    (3, 10, 1, [3]),
])  # fmt: skip
def test_batches_cover_every_example_once(n: int, size: int, least: int, sizes: list[int]) -> None:
    assert batch_sizes(n, size, least=least) == sizes
    assert sum(sizes) == n


def probabilities(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def smoothed(z: Any, y: Any, smoothing: float) -> float:
    target = np.eye(K)[y] * (1 - smoothing) + smoothing / K
    return float(-(target * np.log(probabilities(z))).sum(1).mean())


def focal(z: Any, y: Any) -> float:
    p = probabilities(z)[np.arange(len(y)), y]
    return float(-((1 - p) ** 2 * np.log(p)).mean())


def margin(z: Any, y: Any) -> float:
    rows = []
    for row, label in zip(z, y, strict=True):
        rows.append(sum(max(0.0, 1 - row[label] + row[k]) for k in range(K) if k != label) / K)
    return float(np.mean(rows))


@pytest.mark.parametrize(
    ("changes", "formula"),
    [
        ({}, lambda z, y: smoothed(z, y, 0.0)),
        ({"label_smoothing": 0.1}, lambda z, y: smoothed(z, y, 0.1)),
        ({"loss": "focal"}, focal),
        ({"loss": "multi_margin"}, margin),
    ],
)
def test_each_loss_is_its_formula(changes: dict[str, Any], formula: Any) -> None:
    z = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * 3
    y = torch.arange(N) % K
    found = losses(settings(**changes))(z, y).mean().item()
    assert found == pytest.approx(formula(z.double().numpy(), y.numpy()), rel=1e-5)


def test_focal_loss_is_finite_where_the_answer_is_certain() -> None:
    z = torch.tensor([[200.0, 0, 0], [0, 200.0, 0]], requires_grad=True)
    loss = losses(settings(loss="focal"))(z, torch.tensor([0, 0])).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "multi_margin"])
def test_every_optimiser_reduces_every_loss(optimizer: str, loss: str) -> None:
    model, (x, y) = linear(), data(60)
    chosen = settings(optimizer=optimizer, loss=loss, learning_rate=0.02, batch_size=20)
    first = train(model, x, y, chosen, seed=0).loss
    for seed in range(20):
        last = train(model, x, y, chosen, seed=seed).loss
    assert last < 0.8 * first


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (settings(momentum=0.7), (torch.optim.SGD, {"momentum": 0.7, "weight_decay": 0.0})),
        (
            settings(optimizer="rmsprop", momentum=0.7, weight_decay=0.1),
            (torch.optim.RMSprop, {"momentum": 0.7}),
        ),
        (settings(optimizer="adam", weight_decay=0.1), (torch.optim.Adam, {"weight_decay": 0.1})),
        (settings(optimizer="adamw", weight_decay=0.1), (torch.optim.AdamW, {"weight_decay": 0.1})),
    ],
)
def test_settings_reach_the_optimiser(optimizer: Train, expected: tuple[Any, dict[str, float]]) -> None:
    kind, values = expected
    made = objective.optimizer(linear().parameters(), optimizer)
    assert type(made) is kind
    assert made.defaults["lr"] == 0.1
    assert {key: made.defaults[key] for key in values} == values


def test_the_proximal_term_pulls_towards_the_global_weights_as_worked_by_hand() -> None:
    mu, rate, (x, y) = 0.5, 0.1, data()
    model = linear()
    start = weights(model)
    train(model, x, y, settings(), seed=0, pull=Pull(mu))
    first = weights(model)
    plain = linear()
    train(plain, x, y, settings(), seed=0)
    assert first == pytest.approx(weights(plain), abs=1e-7)  # at the anchor itself the term has no gradient
    # The second step has the gradient of the loss there, plus mu * (w - anchor).
    dw, db, _ = numpy_gradient(model, x, y)
    expected = first - rate * (np.concatenate([dw.ravel(), db]) + mu * (first - start))
    twice = linear()
    train(twice, x, y, settings(epochs=2), seed=0, pull=Pull(mu))
    assert weights(twice) == pytest.approx(expected, abs=1e-6)


def test_a_pull_towards_other_weights_and_a_shift_are_added_to_each_step_as_worked_by_hand() -> None:
    """Ditto's and SCAFFOLD's terms, three steps over all examples in float64."""
    mu, rate, (x, y) = 0.5, 0.1, data()
    model = linear().double()
    rng = np.random.default_rng(3)
    named = {n: rng.normal(size=tuple(p.shape)) for n, p in model.named_parameters()}
    other = {n: rng.normal(size=v.shape) for n, v in named.items()}
    anchor, shift = (np.concatenate([v.ravel() for v in part.values()]) for part in (named, other))
    w = weights(model)
    twin = linear().double()
    for _ in range(3):
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(torch.tensor(w), twin.parameters())
        dw, db, _ = numpy_gradient(twin, x, y)
        w = w - rate * (np.concatenate([dw.ravel(), db]) + mu * (w - anchor) + shift)
    tensors = ({n: torch.tensor(v) for n, v in part.items()} for part in (named, other))
    train(model, x.double(), y, settings(epochs=3), seed=0, pull=Pull(mu, *tensors))
    assert weights(model) == pytest.approx(w, abs=1e-12)


@pytest.mark.slow
def test_a_strong_proximal_term_keeps_the_weights_near() -> None:
    x, y = data(60)
    moved = []
    for mu in (0.0, 1.0, 5.0):
        model = linear()
        start = weights(model)
        train(model, x, y, settings(epochs=30), seed=0, pull=Pull(mu))
        moved.append(float(np.linalg.norm(weights(model) - start)))
    assert moved[0] > 2 * moved[1] > 4 * moved[2]


def test_the_loss_that_is_reported_leaves_the_proximal_term_out() -> None:
    x, y = data()
    chosen = settings(epochs=2)
    plain, pulled = linear(), linear()
    losses = [
        train(plain, x, y, chosen, seed=0).loss,
        train(pulled, x, y, chosen, seed=0, pull=Pull(1e-9)).loss,
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-7)


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "multi_margin"])
def test_the_gradient_is_autograds_of_the_whole_batch_and_the_weights_stay(loss: str) -> None:
    model, (x, y) = linear(), data(600)  # three batches of 256
    chosen = settings(loss=loss)
    before = weights(model)
    found, result = gradient(model, x, y, chosen, seed=0)
    assert (weights(model) == before).all()
    whole = linear()
    value = losses(chosen)(whole(x), y).mean()
    value.backward()  # type: ignore[no-untyped-call]
    for name, p in whole.named_parameters():
        assert p.grad is not None
        assert found[name].numpy() == pytest.approx(p.grad.numpy(), abs=1e-6)
    assert (result.examples, result.steps) == (600, 0)
    assert result.loss == pytest.approx(value.item(), abs=1e-6)


def test_the_gradient_does_not_depend_on_what_was_there_before() -> None:
    model, (x, y) = linear(), data()
    first, _ = gradient(model, x, y, settings(), seed=0)
    again, _ = gradient(model, x, y, settings(), seed=0)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_weight_decay_is_part_of_the_gradient() -> None:
    model, (x, y) = linear(), data()
    plain, _ = gradient(model, x, y, settings(), seed=0)
    decayed, _ = gradient(model, x, y, settings(weight_decay=0.1), seed=0)
    for name, p in model.named_parameters():
        assert torch.allclose(decayed[name], plain[name] + 0.1 * p)


def test_what_is_frozen_gets_no_gradient_and_no_decay() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(F, 4), nn.Linear(4, K)), data()
    model[0].requires_grad_(False)
    found, _ = gradient(model, x, y, settings(weight_decay=0.1), seed=0)
    assert list(found) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert found["0.weight"].abs().sum() == 0
    assert found["1.weight"].abs().sum() > 0
    before = model[0].weight.clone()
    train(model, x, y, settings(weight_decay=0.1), seed=0, pull=Pull(0.1))
    assert torch.equal(model[0].weight, before)


def noisy(seed: int) -> np.ndarray[Any, Any]:
    """Weights after training where order, augmentation and dropout all draw."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(F, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, K))
    x, y = data(60)
    train(model, x, y, settings(batch_size=7, augment=("noise:0.1", "mask:0.1")), seed=seed)
    return weights(model)


def test_the_seed_decides_order_augmentation_and_dropout() -> None:
    torch.manual_seed(1)
    first = noisy(3)
    torch.rand(17)
    assert (noisy(3) == first).all()
    assert (noisy(4) != first).any()


def test_torchs_random_state_and_threads_are_put_back_also_after_an_error() -> None:
    x, y = data()
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(F, K))
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    train(model, x, y, settings(), seed=0)
    gradient(model, x, y, settings(), seed=0)
    logits(model, x)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        logits(linear(), x[:, 1:])
    wrong = nn.Sequential(nn.Linear(F - 1, K))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(wrong, x, y, settings(), seed=0)
    assert torch.get_num_threads() == 2
    torch.set_rng_state(state)
    expected = torch.rand(3)
    torch.set_rng_state(state)
    train(model, x, y, settings(), seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_batch_norm_trains_though_one_example_is_left_over() -> None:
    model = nn.Sequential(nn.Linear(F, 4), nn.BatchNorm1d(4), nn.Linear(4, K))
    x, y = data(13)
    assert train(model, x, y, settings(batch_size=4), seed=0).steps == 3  # 4, 4 and 5
    x, y = data(257)
    assert gradient(model, x, y, settings(), seed=0)[1].examples == 257


def test_logits_are_of_the_model_in_evaluation_and_its_mode_is_put_back() -> None:
    model, (x, _) = nn.Sequential(nn.Dropout(0.5), linear()), data(30)
    for mode in (True, False):
        model.train(mode)
        found = logits(model, x, batch_size=7)
        assert torch.allclose(found, model[1](x))
        assert not found.requires_grad
        assert model.training is mode


def test_the_input_is_left_as_it_is() -> None:
    (x, y), (same_x, same_y) = data(), data()
    train(linear(), x, y, settings(augment=("mask:0.5",)), seed=0)
    assert torch.equal(x, same_x)
    assert torch.equal(y, same_y)
