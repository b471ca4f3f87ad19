from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fedge.errors import ConfigError
from fedge.learning import models
from fedge.spec import Spec
from fedge.task import resolve

TEN = tuple("0123456789")
MNIST = Spec("image", (28, 28), "uint8", TEN)
COLOUR = Spec("image", (13, 10, 3), "uint8", TEN)
TABLE = Spec("features", (7,), "float32", ("a", "b", "c"))
SIGNAL = Spec("signal", (20, 3), "float32", ("a", "b", "c"))
TEXT = Spec("text", (9,), "uint8", tuple("abcd"))


@pytest.mark.parametrize(
    ("build", "spec", "count"),
    [
        (models.mlp(200, 200), MNIST, 199_210),  # McMahan et al. 2017, the 2NN
        (models.cnn, MNIST, 1_663_370),  # McMahan et al. 2017, the CNN
        (models.logistic, MNIST, 784 * 10 + 10),
        (models.logistic, TABLE, 7 * 3 + 3),
        (models.mlp(), TABLE, 7 * 3 + 3),
        (models.mlp(16), TABLE, 7 * 16 + 16 + 16 * 3 + 3),
        # 3 channels -> 8 -> 16, each with its mean and maximum -> 5 -> 3
        (models.cnn1d(8, 5), SIGNAL, 5 * 3 * 8 + 8 + 5 * 8 * 16 + 16 + 32 * 5 + 5 + 5 * 3 + 3),
        (models.gru(6), SIGNAL, 3 * 6 * (3 + 6 + 2) + 6 * 3 + 3),
        (models.gru(6, embedding=5), TEXT, 4 * 5 + 3 * 6 * (5 + 6 + 2) + 6 * 4 + 4),
        (models.lstm(6, embedding=5), TEXT, 4 * 5 + 4 * 6 * (5 + 6 + 2) + 6 * 4 + 4),
        # 1x28x28 -> 8x14x14 -> 16x7x7 -> 32 -> 10
        (models.small_cnn(8, 32), MNIST, 9 * 8 + 8 + 9 * 8 * 16 + 16 + 16 * 49 * 32 + 32 + 32 * 10 + 10),
    ],
)
def test_the_number_of_parameters_is_the_papers_or_worked_by_hand(
    build: models.Builder, spec: Spec, count: int
) -> None:
    assert models.parameters(build(spec)) == count


@pytest.mark.parametrize("name", ["digits", "images", "tables"])
@pytest.mark.parametrize("spec", [MNIST, COLOUR, TABLE])
def test_every_built_in_model_and_student_gives_a_logit_per_class(name: str, spec: Spec) -> None:
    task = resolve(name)
    shape = (2, 7) if spec.kind == "features" else (2, spec.channels, *spec.shape[:2])
    for model_name, build in {**task.models, **task.students}.items():
        if spec.kind == "features" and "cnn" in model_name:
            continue
        assert build(spec)(torch.zeros(shape)).shape == (2, spec.classes), model_name


def inputs(spec: Spec, *batch: int) -> torch.Tensor:
    """What a network gets of random inputs of this kind."""
    generator = torch.Generator().manual_seed(0)
    if spec.kind == "text":
        return torch.randint(0, spec.classes, (*batch, *spec.shape), generator=generator)
    return torch.randn((*batch, spec.shape[1], spec.shape[0]), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("task", "spec"), [("signals", SIGNAL), ("characters", TEXT)])
def test_clients_of_networks_over_time_can_be_batched_and_learn_what_each_would(
    task: str, spec: Spec
) -> None:
    for name, build in {**resolve(task).models, **resolve(task).students}.items():
        network = build(spec).double()
        weights = {k: torch.stack([p, 2 * p, -p]).detach() for k, p in network.named_parameters()}
        x, y = inputs(spec, 3, 4), torch.arange(12).reshape(3, 4) % 3

        def loss(weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, of: nn.Module = network
                 ) -> torch.Tensor:  # fmt: skip
            return cross_entropy(functional_call(of, weights, (x,)), y)

        together = vmap(grad(loss))(weights, x, y)
        for i in range(3):
            alone = grad(loss)({k: v[i] for k, v in weights.items()}, x[i], y[i])
            for key, value in alone.items():
                torch.testing.assert_close(together[key][i], value, msg=f"{name} {key}")


@pytest.mark.parametrize("build", [models.cnn1d(8, 8), models.gru(4), models.lstm(4)])
def test_a_network_over_time_needs_signals_or_text(build: models.Builder) -> None:
    with pytest.raises(ConfigError, match="needs signals"):
        build(TABLE)
    with pytest.raises(ConfigError, match="4 or more in time"):
        models.cnn1d(8, 8)(Spec("signal", (3, 2), "float32", ("a", "b")))


@pytest.mark.parametrize("build", [models.cnn, models.small_cnn(8, 32)])
@pytest.mark.parametrize("spec", [Spec("image", (3, 28), "uint8", TEN), TABLE])
def test_a_convolutional_network_needs_an_image_of_four_by_four(build: models.Builder, spec: Spec) -> None:
    with pytest.raises(ConfigError, match="needs images of at least 4x4"):
        build(spec)
    assert models.cnn(Spec("image", (4, 4), "uint8", TEN))(torch.zeros(1, 1, 4, 4)).shape == (1, 10)


def test_a_builder_gives_a_fresh_model_each_time() -> None:
    build = models.mlp(4)
    first, second = build(TABLE), build(TABLE)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert not any(a.data_ptr() == b.data_ptr() for a, b in pairs)


def test_the_cnn_pools_before_the_relu_and_is_still_mcmahans():
    torch.manual_seed(0)
    network = models.cnn(MNIST).double()
    as_published = nn.Sequential(*[network[i] for i in (0, 2, 1, 3, 5, 4, 6, 7, 8, 9)])  # ReLU, then pooling
    x, y = torch.rand(4, 1, 28, 28, dtype=torch.float64), torch.tensor([1, 2, 3, 4])
    found, expected = network(x), as_published(x)
    gradients = torch.autograd.grad(cross_entropy(found, y), list(network.parameters()))
    wanted = torch.autograd.grad(cross_entropy(expected, y), list(network.parameters()))
    assert torch.equal(found, expected)
    assert all(torch.equal(one, other) for one, other in zip(gradients, wanted, strict=True))
