from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fedge.config import Config
from fedge.dataset import Examples
from fedge.errors import FormatError, RoundError
from fedge.learning import local
from fedge.learning.state import arrays_of
from fedge_server.pretraining.training import Trainer

RNG = np.random.default_rng(0)
EXAMPLES = Examples(RNG.standard_normal((48, 6), dtype=np.float32), RNG.integers(0, 3, 48))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def config(optimizer: str = "adam", **train: object) -> Config:
    settings = {"optimizer": optimizer, "batch_size": 16, "epochs": 2, "augment": ["noise:0.1"], **train}
    return Config.from_mapping({"train": settings, "seed": 3})


def trainer(settings: Config) -> Trainer:
    return Trainer(settings, network(), nn.Identity(), EXAMPLES)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop", "adamw"])
def test_alone_a_round_is_what_a_client_with_the_same_data_does_to_the_bit(optimizer, alone):
    settings, expected = config(optimizer), network()
    result = local.train(
        expected, torch.from_numpy(EXAMPLES.x), torch.from_numpy(EXAMPLES.y), settings.train, seed=3
    )
    ours = trainer(settings)
    loss = ours.round(1)
    assert same(arrays_of(expected), ours.arrays())
    assert loss == pytest.approx(result.loss, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_what_goes_on_from_a_saved_round_equals_what_never_stopped(optimizer, alone):
    settings = config(optimizer)
    whole = trainer(settings)
    for number in (1, 2, 3):
        whole.round(number)
        if number == 1:
            saved = whole.arrays(), whole.state()
    onward = trainer(settings)
    onward.load(*saved)
    for number in (2, 3):
        onward.round(number)
    assert same(whole.arrays(), onward.arrays())
    assert whole.state() == onward.state()


def test_each_round_has_an_order_of_its_own_and_the_optimiser_lasts(alone):
    settings = config("sgd", augment=[], momentum=0.9)
    lasting, anew = trainer(settings), trainer(settings)
    for each in (lasting, anew):
        each.round(1)
    fresh = trainer(settings)
    fresh.load(anew.arrays(), b"")  # the weights alone
    lasting.round(2)
    fresh.round(2)
    assert not same(lasting.arrays(), fresh.arrays())


def test_frozen_parts_stay(alone):
    before = arrays_of(network())
    ours = trainer(config(freeze=["0.*", "1.*"]))
    ours.round(1)
    after = ours.arrays()
    assert [n for n in before if np.array_equal(before[n], after[n])] == [
        "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var",
    ]  # fmt: skip


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_learning_rate(alone):
    ours = trainer(config("sgd", learning_rate=1e30, augment=[]))
    with pytest.raises(RoundError, match=r"round 1: the loss became .*train\.learning_rate \(1e\+30\)"):
        ours.round(1)


def test_answers_are_probabilities_of_each_example_in_evaluation_mode(alone):
    ours = trainer(config())
    answers = ours.answers(EXAMPLES.x)
    with torch.no_grad():
        expected = copy.deepcopy(ours.network).eval()(torch.from_numpy(EXAMPLES.x)).softmax(1)
    assert answers.shape == (48, 3)
    assert np.allclose(answers, expected.numpy(), atol=1e-6)


def test_a_state_of_somebody_else_is_refused(alone):
    from fedge import tensors

    with pytest.raises(FormatError, match="another strategy's"):
        trainer(config()).load(arrays_of(network()), tensors.dump({"x": np.zeros(1)}))
