from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedge.config import Train
from fedge.errors import ConfigError
from fedge.learning import draws
from fedge_server.pretraining.sharing import SharedBatchNorm, check_shares, parts, shared_norms


def test_five_examples_in_batches_of_three_are_shared_between_two():
    order = torch.tensor([4, 2, 0, 3, 1])
    mine, theirs = (
        [(p.indices.tolist(), p.first, p.batch) for p in parts(order, 3, rank, 2)] for rank in (0, 1)
    )
    assert mine == [([4, 2], 0, 3), ([3], 0, 2)]
    assert theirs == [([0], 2, 3), ([1], 1, 2)]


@given(n=st.integers(1, 60), size=st.integers(1, 20), processes=st.integers(1, 5))
def test_the_parts_of_all_processes_are_the_same_batches_whatever_their_number(n, size, processes):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    whole = [part.indices.tolist() for part in parts(order, size, 0, 1)]
    shared = [list(parts(order, size, rank, processes)) for rank in range(processes)]
    for number, batch in enumerate(whole):
        own = [each[number] for each in shared]
        assert [i for part in own for i in part.indices.tolist()] == batch
        assert {part.batch for part in own} == {len(batch)}
        assert [part.first for part in own] == [
            sum(len(p.indices) for p in own[:k]) for k in range(processes)
        ]
        assert len(batch) <= size
    assert sorted(i for batch in whole for i in batch) == list(range(n))


def test_batches_that_leave_a_process_without_an_example_are_refused():
    plain, normed = nn.Linear(2, 2), nn.BatchNorm1d(2)
    check_shares(plain, 65, Train(batch_size=64), 32)  # batches of 33 and 32
    with pytest.raises(ConfigError, match=r"train\.batch_size = 64.*batches of 32.*33 processes"):
        check_shares(plain, 65, Train(batch_size=64), 33)
    check_shares(plain, 5, Train(batch_size=1), 1)
    with pytest.raises(ConfigError, match="at least 2"):
        check_shares(normed, 5, Train(batch_size=1), 1)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("own", "shape"), [(nn.BatchNorm1d, (6, 3)), (nn.BatchNorm2d, (6, 3, 4, 4))])
def test_shared_batch_normalisation_is_torchs_where_the_batch_is_whole(own, shape, momentum, alone):
    torch.manual_seed(0)
    plain = own(3, momentum=momentum).double()
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    shared = shared_norms(nn.Sequential(own(3, momentum=momentum).double()))
    shared[0].load_state_dict(plain.state_dict())
    assert isinstance(shared[0], SharedBatchNorm)
    for _ in range(3):
        x, weights = torch.randn(shape, dtype=torch.float64) * 3 + 5, torch.randn(shape, dtype=torch.float64)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        one, two = plain(a), shared(b)
        assert torch.allclose(one, two, atol=1e-12)
        (one * weights).sum().backward()
        (two * weights).sum().backward()
        assert torch.allclose(a.grad, b.grad, atol=1e-12)
    for name, value in plain.state_dict().items():
        assert torch.allclose(value.double(), shared[0].state_dict()[name].double(), atol=1e-12)
    plain.eval()
    shared.eval()
    assert torch.allclose(plain(x), shared(x), atol=1e-12)


def test_nested_normalisation_is_found_and_its_names_stay():
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()))
    names = list(network.state_dict())
    weight = network[1][0].weight
    shared = shared_norms(network)
    assert isinstance(shared[1][0], SharedBatchNorm)
    assert shared[1][0].weight is weight
    assert list(shared.state_dict()) == names


@pytest.mark.parametrize("drop", [nn.Dropout(0.5), nn.Dropout2d(0.5)])
def test_a_part_of_a_batch_drops_what_the_whole_would(drop):
    network, key = nn.Sequential(drop, drop).train(), draws.key(7)
    x = torch.ones(5, 4, 3, 3)
    with draws.keyed_dropout(network, key):
        whole = network(x)
    found = []
    for first, last in ((0, 3), (3, 5)):
        with draws.keyed_dropout(network, key, first=first):
            found.append(network(x[first:last]))
    assert torch.equal(torch.cat(found), whole)
    assert not torch.equal(whole, F.relu(x))
