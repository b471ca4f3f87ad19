"""Clients that draw their examples when they take part."""

from __future__ import annotations

import numpy as np
import pytest

from fedge.config import Clients
from fedge.dataset import Dataset
from fedge.errors import ConfigError
from fedge.spec import Spec
from fedge_simulations.partition import people
from fedge_simulations.population import Population, drawn

Y = np.arange(2000) % 10
TRAIN = np.arange(2000) + 7


def test_a_client_draws_the_same_examples_whenever_it_is_asked_and_another_client_others():
    clients = drawn(TRAIN, Y, 100, size=60, seed=3)
    assert (clients[5] == clients[5]).all()
    assert (clients[5] != clients[6]).any()
    assert (clients[5] != drawn(TRAIN, Y, 100, size=60, seed=4)[5]).any()
    assert len(np.unique(clients[5])) == clients.size(5) == 60
    assert set(clients[5]) <= set(TRAIN)


def test_a_client_does_not_depend_on_how_many_there_are_and_a_million_cost_nothing():
    many = drawn(TRAIN, Y, 10**6, size=60)
    assert (many[5] == drawn(TRAIN, Y, 10, size=60)[5]).all()
    assert len(many[10**6 - 1]) == 60
    assert "1000000 clients with 60 examples on average" in many.describe()


def test_sizes_are_log_normal_with_the_stated_median_and_known_without_drawing():
    clients = drawn(np.arange(10**5), np.zeros(10**5, np.int64), 3000, size=60, size_sigma=1.0)
    sizes = np.array([clients.size(i) for i in range(3000)])
    assert np.median(sizes) == pytest.approx(60, rel=0.05)
    assert np.log(sizes).std() == pytest.approx(1.0, rel=0.05)
    assert all(len(clients[i]) == sizes[i] for i in range(50))


def test_a_small_alpha_gives_a_client_few_classes():
    def most_frequent(alpha: float | None) -> float:
        clients = drawn(np.arange(2000), Y, 50, size=60, alpha=alpha)
        return float(np.mean([np.bincount(Y[part], minlength=10).max() / 60 for part in clients]))

    assert most_frequent(0.1) > 0.5 > 0.3 > most_frequent(100.0)
    assert all(len(part) == 60 for part in drawn(np.arange(2000), Y, 20, size=60, alpha=0.01))


def test_a_client_wants_no_more_than_there_is():
    assert len(drawn(TRAIN[:10], Y[:10], 3, size=60)[0]) == 10


def test_dealt_clients_are_what_was_dealt():
    clients = Population.dealt([np.array([1, 2]), np.array([3])])
    assert [clients.size(i) for i in range(2)] == [2, 1]
    assert [part.tolist() for part in clients[:5]] == [[1, 2], [3]]
    assert clients.describe() == "2 clients with 1 to 2 examples (3 in all"


def test_sizes_of_their_own_are_for_drawn_clients_only():
    data = Dataset(
        Spec("features", (1,), "float32", ("a", "b")), np.zeros((4, 1), np.float32), np.array([0, 1, 0, 1])
    )
    assert len(people(data, np.arange(4), Clients(count=9, partition="draw:2:0.5"), 0)) == 9
    with pytest.raises(ConfigError, match=r"size_sigma = 1: for clients.partition = 'draw:SIZE' only"):
        people(data, np.arange(4), Clients(count=2, size_sigma=1.0), 0)
