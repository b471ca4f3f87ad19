from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedge import artefact, tensors
from fedge.config import Prune
from fedge.errors import CompressionError
from fedge.learning.models import gru
from fedge.spec import Spec
from fedge_server.compression.sparsify import sparsify


def two_layers() -> nn.Module:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[0.1, -5.0], [0.2, 4.0]]))
        network[0].bias.copy_(torch.tensor([0.01, 0.02]))
        network[2].weight.copy_(torch.tensor([[3.0, -0.3], [2.0, 0.4]]))
    return network


def zeros(network: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in network.parameters() if p.dim() > 1)


@pytest.mark.parametrize("criterion", ["l1", "l2", "lp"])
def test_the_smallest_weights_of_the_whole_network_go_and_biases_stay(criterion):
    network = two_layers()
    pruned = sparsify(network, 0.5, Prune(criterion=criterion), seed=0)
    assert pruned.network[0].weight.tolist() == [[0.0, -5.0], [0.0, 4.0]]
    assert pruned.network[2].weight.tolist() == [[3.0, 0.0], [2.0, 0.0]]
    assert torch.equal(pruned.network[0].bias, network[0].bias)
    assert (pruned.parameters, pruned.parameters_before) == (6, 10)
    # Squares that went: .01 + .04 + .09 + .16 = .30 of 54.3005.
    assert pruned.energy_removed == pytest.approx(0.30 / 54.3005)
    assert zeros(network) == 0


def test_further_pruning_keeps_what_is_gone(helpers):
    for settings in (Prune(), Prune(criterion="random")):
        half = sparsify(helpers.mlp(16), 0.5, settings, seed=0).network
        more = sparsify(half, 0.75, settings, seed=1).network
        total = sum(p.numel() for p in half.parameters() if p.dim() > 1)
        assert (zeros(half), zeros(more)) == (total // 2, total * 3 // 4)
        for a, b in zip(half.parameters(), more.parameters(), strict=True):
            assert (b[a == 0] == 0).all()


def test_a_random_choice_is_decided_by_the_seed_and_leaves_the_global_state(helpers):
    network, state = helpers.mlp(16), torch.get_rng_state()
    settings = Prune(criterion="random")
    runs = [helpers.weights(sparsify(network, 0.5, settings, seed=s).network) for s in (0, 0, 1)]
    assert helpers.same(runs[0], runs[1])
    assert not helpers.same(runs[0], runs[2])
    assert torch.equal(state, torch.get_rng_state())


def test_equal_weights_go_in_their_order_so_that_the_number_is_exact():
    network = nn.Linear(4, 2)
    nn.init.ones_(network.weight)
    pruned = sparsify(network, 0.375, Prune(), seed=0).network
    assert pruned.weight.tolist() == [[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]


def test_recurrent_layers_and_embeddings_are_pruned_like_others():
    network = gru(16)(Spec("text", (5,), "uint8", tuple("abcdefgh")))
    pruned = sparsify(network, 0.6, Prune(), seed=0).network
    x = torch.randint(0, 8, (3, 5))
    assert pruned(x).shape == (3, 8)
    assert all((p == 0).any() for p in pruned.parameters() if p.dim() > 1)


def test_a_layer_that_would_lose_everything_is_named():
    network = two_layers()
    with torch.no_grad():
        network[2].weight.mul_(0.001)
    with pytest.raises(CompressionError, match=r"nothing is left of '2\.weight'"):
        sparsify(network, 0.5, Prune(), seed=0)


@pytest.mark.parametrize(
    ("network", "reason"), [(nn.BatchNorm1d(4), "two or more"), (nn.Linear(2, 2), "no weight goes")]
)
def test_what_cannot_lose_a_weight_is_refused(network, reason):
    with pytest.raises(CompressionError, match=reason):
        sparsify(network, 0.1, Prune(), seed=0)


def test_a_sparse_network_packs_small_and_keeps_its_shapes(teacher):
    def packed(network: nn.Module) -> int:
        return len(artefact.pack(tensors.dump({n: v.numpy() for n, v in network.state_dict().items()})))

    sparse = sparsify(teacher.network, 0.9, replace(Prune()), seed=0).network
    assert packed(sparse) < 0.2 * packed(teacher.network)
    shapes = [p.shape for p in teacher.network.parameters()]
    assert [p.shape for p in sparse.parameters()] == shapes
