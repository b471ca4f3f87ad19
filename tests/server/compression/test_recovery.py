from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from fedge.config import Compress, Distil, Prune
from fedge.errors import CompressionError, TimeUpError
from fedge.learning.models import gru
from fedge.spec import Spec
from fedge_server.compression.distil import preprocessed
from fedge_server.compression.prune import prune
from fedge_server.compression.recovery import Cut, epochs_of, pruned_and_recovered, schedule
from fedge_server.compression.sparsify import sparsify

SETTINGS = Compress(
    distil=Distil(), prune=Prune(schedule="gradual", steps=3, recovery_epochs=12, recovery_learning_rate=0.01)
)
ONE_SHOT = replace(SETTINGS, prune=replace(SETTINGS.prune, schedule="one_shot"))


@pytest.fixture
def data(teacher, digits):
    return preprocessed(teacher.preprocess, digits.proxy.x), torch.from_numpy(digits.proxy.y)


def test_the_schedule_is_cubic_and_ends_at_what_was_asked_for():
    # 0.8 (1 - (3/4)^3) = 0.4625, 0.8 (1 - 1/8) = 0.7, 0.8 (1 - 1/64) = 0.7875, 0.8.
    assert schedule(0.8, Prune(schedule="gradual", steps=4)) == pytest.approx((0.4625, 0.7, 0.7875, 0.8))
    assert schedule(0.8, Prune(schedule="one_shot", steps=4)) == (0.8,)


def test_half_of_the_epochs_lie_between_the_steps():
    assert epochs_of(20, 1) == (20,)
    assert epochs_of(20, 5) == (2, 2, 2, 2, 12)
    assert epochs_of(12, 3) == (3, 3, 6)
    assert epochs_of(2, 4) == (1, 1, 1, 1)  # each step has one


@pytest.mark.parametrize("settings", [SETTINGS, ONE_SHOT])
@pytest.mark.parametrize("cut", [Cut("structured", 0.75), Cut("unstructured", 0.9)])
def test_a_pruned_network_recovers_and_has_the_size_that_was_asked_for(
    cut, settings, teacher, data, digits, helpers
):
    kept, state = helpers.weights(teacher), torch.get_rng_state()
    recovered = pruned_and_recovered(teacher.network, *data, cut, settings, seed=0)
    if cut.kind == "structured":
        bare = prune(teacher.network, data[0][:2], cut.share, settings.prune, seed=0)
        assert [p.shape for p in recovered.network.parameters()] == [
            p.shape for p in bare.network.parameters()
        ]
    else:
        bare = sparsify(teacher.network, cut.share, settings.prune, seed=0)
        weights = [p for p in recovered.network.parameters() if p.dim() > 1]
        gone, total = sum(int((p == 0).sum()) for p in weights), sum(p.numel() for p in weights)
        assert gone == round(0.9 * total)
    assert (recovered.parameters, recovered.parameters_before) == (bare.parameters, bare.parameters_before)
    before = helpers.share_right(teacher.network, digits.gate)
    assert helpers.share_right(recovered.network, digits.gate) > before - 0.05
    assert helpers.share_right(bare.network, digits.gate) < before - 0.05
    assert helpers.same(kept, helpers.weights(teacher))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("cut", [Cut("structured", 0.5), Cut("unstructured", 0.8)])
def test_the_same_seed_gives_the_same_weights_even_of_a_random_choice(cut, teacher, data, helpers):
    settings = replace(SETTINGS, prune=replace(SETTINGS.prune, criterion="random", recovery_epochs=3))
    runs = [
        helpers.weights(pruned_and_recovered(teacher.network, *data, cut, settings, seed=s).network)
        for s in (0, 0, 1)
    ]
    assert helpers.same(runs[0], runs[1])
    assert not helpers.same(runs[0], runs[2])


def test_epochs_are_told_over_all_steps_and_the_deadline_holds_for_all(teacher, data):
    told = []
    cut = Cut("unstructured", 0.5)
    pruned_and_recovered(
        teacher.network, *data, cut, SETTINGS, seed=0, tell=lambda *each: told.append(each[:2])
    )
    assert told == [(epoch, 12) for epoch in range(1, 13)]
    with pytest.raises(TimeUpError):
        pruned_and_recovered(teacher.network, *data, cut, SETTINGS, seed=0, deadline=time.monotonic() - 1)


def test_recurrent_networks_lose_weights_but_no_channels():
    network = gru(8)(Spec("signal", (6, 2), "float32", ("a", "b")))
    x = torch.randn(16, 2, 6)
    settings = replace(SETTINGS, distil=Distil(mode="soft", batch_size=8))
    sparse = pruned_and_recovered(network, x, None, Cut("unstructured", 0.7), settings, seed=0)
    assert sparse.network(x).shape == (16, 2)
    with pytest.raises(CompressionError, match="unstructured"):
        pruned_and_recovered(network, x, None, Cut("structured", 0.5), settings, seed=0)
