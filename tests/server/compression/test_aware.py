"""Training under simulated int8."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedge.config import Distil
from fedge.errors import CompressionError
from fedge.inference import CompactModel
from fedge.learning.whole import WholeModel
from fedge.spec import Spec
from fedge_server.compression.aware import frozen, prepared
from fedge_server.compression.distil import distil
from fedge_server.compression.export import export
from fedge_server.compression.quantise import quantise

SPEC = Spec("features", (8,), "float32", ("a", "b", "c"))


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def data(n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (n, 8)).astype(np.float32))
    return x, network(1)(x).argmax(1)


def states(module: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_what_was_prepared_rounds_and_the_argument_does_not_change() -> None:
    plain, (x, _) = network(), data()
    before = states(plain)
    made = prepared(plain)
    assert torch.equal(made.eval()(x), made(x))
    made.train()(x)  # sees the ranges
    rounded = made.eval()(x)
    assert not torch.equal(rounded, plain(x))
    assert (rounded - plain(x)).abs().max() < 0.1
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())
    weights = made[0].weight.detach()
    scale = plain[0].weight.detach().abs().amax(1, keepdim=True) / 64
    assert torch.allclose(weights / scale, (weights / scale).round(), atol=1e-4)
    assert (weights - plain[0].weight).abs().max() <= scale.max() / 2 + 1e-6


def test_a_range_follows_what_batches_span_and_holds_zero() -> None:
    made = prepared(network()).train()
    made(torch.full((4, 8), 3.0))
    seen = made[0].rounded_input
    assert (float(seen.lowest), float(seen.highest)) == (0.0, 3.0)
    made(torch.full((4, 8), -5.0))
    assert float(seen.lowest) == pytest.approx(-0.05)
    assert float(seen.highest) == pytest.approx(2.97)
    made.eval()(torch.full((4, 8), 100.0))
    assert float(seen.highest) == pytest.approx(2.97)


def test_a_gradient_goes_through_within_the_range_and_not_beyond_it() -> None:
    made = prepared(network()).train()
    made(torch.linspace(-1, 1, 32).reshape(4, 8))
    made.eval()
    x = torch.full((1, 8), 0.5)
    x[0, 0] = 9.0
    x.requires_grad_(True)
    made(x).sum().backward()
    assert x.grad is not None
    assert x.grad[0, 0] == 0
    assert (x.grad[0, 1:] != 0).any()
    made.zero_grad()
    made.train()(data()[0]).sum().backward()
    latent = made[0].parametrizations.weight.original
    assert latent.grad is not None
    assert latent.grad.abs().sum() > 0


@pytest.mark.slow
def test_a_trained_one_frozen_is_plain_and_int8_answers_as_it_did() -> None:
    x, y = data()
    settings = Distil(mode="hard", epochs=5, batch_size=50)
    trained = distil(network(1), prepared(network()), x, y, settings, seed=0)
    plain = frozen(trained)
    assert set(plain.state_dict()) == set(network().state_dict())
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert torch.equal(plain[0].weight, trained[0].weight)
    installed = quantise(export(WholeModel(nn.Identity(), plain), SPEC), x.numpy())
    _, answers = CompactModel(installed, SPEC).run(x.numpy())
    simulated = torch.softmax(trained(x), 1).detach().numpy()
    assert np.abs(answers - simulated).max() < 0.05
    again = frozen(distil(network(1), prepared(network()), x, y, settings, seed=0))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True))


def test_batch_normalisation_is_folded_first() -> None:
    plain = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    ).eval()
    x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    made = prepared(plain)
    made.train()(x)
    assert (frozen(made)(x) - plain(x)).abs().max() < 0.1
    assert not any(isinstance(module, nn.BatchNorm1d) for module in made.modules())


def test_what_cannot_be_prepared_or_frozen_is_refused() -> None:
    with pytest.raises(CompressionError, match="no linear or convolutional layer"):
        prepared(nn.Sequential(nn.ReLU()))
    with pytest.raises(CompressionError, match="parametrised before"):
        prepared(prepared(network()))
    with pytest.raises(CompressionError, match="was not prepared"):
        frozen(copy.deepcopy(network()))
