from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedge.config import Distil, Prune
from fedge.errors import CompressionError
from fedge_server.compression.distil import distil, preprocessed
from fedge_server.compression.prune import prune


def test_half_of_the_hidden_channels_go_and_the_answers_stay(helpers):
    pruned = prune(helpers.mlp(64), torch.randn(2, 64), 0.5, Prune(), seed=0)
    shapes = [tuple(layer.weight.shape) for layer in pruned.network if isinstance(layer, nn.Linear)]
    assert shapes == [(32, 64), (32, 32), (10, 32)]
    assert pruned.parameters == 32 * 65 + 32 * 33 + 10 * 33
    assert pruned.parameters_before == 64 * 65 + 64 * 65 + 10 * 65


@pytest.mark.parametrize("criterion", ["l1", "l2", "lp"])
def test_the_smallest_channels_are_the_ones_that_go(criterion):
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([1.0, 9.0, 2.0, 8.0])[:, None].expand(4, 3))
        network[2].weight.fill_(1.0)
    pruned = prune(network, torch.ones(2, 3), 0.5, Prune(criterion=criterion), seed=0)
    assert pruned.network[0].weight[:, 0].tolist() == [9.0, 8.0]
    # Squares: 3 * (1 + 81 + 4 + 64) + 8 = 458 before, 3 * (81 + 64) + 4 = 439 after.
    assert pruned.energy_removed == pytest.approx(19 / 458)


def test_the_network_and_the_global_random_state_are_not_changed(teacher, helpers):
    before, state = helpers.weights(teacher), torch.get_rng_state()
    prune(teacher.network, torch.zeros(2, 64), 0.5, Prune(criterion="random"), seed=0)
    assert helpers.same(before, helpers.weights(teacher))
    assert torch.equal(state, torch.get_rng_state())


def test_a_random_choice_is_decided_by_the_seed(teacher, helpers):
    runs = [
        helpers.weights(
            prune(teacher.network, torch.zeros(2, 64), 0.5, Prune(criterion="random"), seed=s).network
        )
        for s in (0, 0, 1)
    ]
    assert helpers.same(runs[0], runs[1])
    assert not helpers.same(runs[0], runs[2])


def test_layers_that_are_added_lose_the_same_channels():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 16, 3, padding=1)
            self.norm = nn.BatchNorm2d(16)
            self.deep = nn.Conv2d(16, 16, 3, padding=1)
            self.last = nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.norm(self.first(x)))
            return self.last((x + self.deep(x)).mean((2, 3)))

    pruned = prune(Residual(), torch.randn(2, 1, 8, 8), 0.5, Prune(), seed=0).network
    assert pruned.first.out_channels == pruned.deep.out_channels == pruned.norm.num_features == 8
    assert pruned(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_a_network_with_nothing_to_remove_is_refused():
    with pytest.raises(CompressionError, match="too small"):
        prune(nn.Sequential(nn.Linear(64, 10)), torch.zeros(2, 64), 0.5, Prune(), seed=0)


def test_a_network_without_layers_is_refused():
    with pytest.raises(CompressionError, match="no linear or convolutional layer"):
        prune(nn.Flatten(), torch.zeros(2, 10), 0.5, Prune(), seed=0)


def test_a_network_that_breaks_when_pruned_is_refused():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(self.first(x)).view(-1, 32))

    with pytest.raises(CompressionError, match="prune:"):
        prune(Fixed(), torch.zeros(2, 64), 0.5, Prune(), seed=0)


def test_distillation_from_the_unpruned_network_recovers_what_pruning_lost(teacher, digits, helpers):
    x = preprocessed(teacher.preprocess, digits.proxy.x)
    y = torch.from_numpy(digits.proxy.y)
    settings = Distil(learning_rate=0.01)
    pruned = prune(teacher.network, x[:2], 0.75, Prune(), seed=0).network
    recovered = distil(teacher.network, pruned, x, y, replace(settings, epochs=20), seed=0)
    before = helpers.share_right(teacher.network, digits.gate)
    assert helpers.share_right(pruned, digits.gate) < before - 0.1
    assert helpers.share_right(recovered, digits.gate) > before - 0.04
