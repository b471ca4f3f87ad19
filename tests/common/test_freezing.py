"""What patterns freeze, and what training then leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedge.config import Train
from fedge.errors import ConfigError
from fedge.learning import local
from fedge.learning.freezing import entries, freeze, training
from fedge.learning.state import arrays_of


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def test_patterns_name_parameters_in_the_models_order():
    assert entries(small(), ["3.*", "0.weight"]) == ("0.weight", "3.weight", "3.bias")
    assert entries(small(), ["*.bias"]) == ("0.bias", "1.bias", "3.bias")
    assert entries(small(), []) == ()


def test_batch_normalisation_that_is_wholly_frozen_keeps_its_means():
    assert entries(small(), ["1.*"]) == ("1.weight", "1.bias", "1.running_mean", "1.running_var")
    assert entries(small(), ["1.weight"]) == ("1.weight",)  # its shift still trains, so its means still move


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (["conv*"], "'conv\\*' matches no parameter of this model; valid: 0.bias"),
        (["3.weigth"], "did you mean '3.weight'"),
        (["0.*", "1.*", "3.*"], "nothing is left to train"),
        (["1.running_mean"], "matches no parameter"),
    ],
)
def test_what_freezes_nothing_or_all_is_refused(patterns, says):
    with pytest.raises(ConfigError, match=says):
        entries(small(), patterns)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_training_leaves_frozen_parts_alone_and_moves_the_others(optimizer):
    network = small()
    frozen = entries(network, ["0.*", "1.*"])
    before = arrays_of(freeze(network, frozen))
    settings = Train(optimizer=optimizer, weight_decay=0.1, batch_size=8)
    x, y = torch.randn(40, 4), torch.arange(40) % 3
    local.train(network, x, y, settings, seed=0, pull=local.Pull(mu=0.5))
    after = arrays_of(network)
    assert [name for name in before if (before[name] == after[name]).all()] == list(frozen)


def test_an_evaluation_puts_each_parts_own_mode_back():
    network = training(freeze(small(), ["1.weight", "1.bias"]))
    assert (network[0].training, network[1].training) == (True, False)
    local.logits(network, torch.randn(5, 4))
    assert (network[0].training, network[1].training) == (True, False)
