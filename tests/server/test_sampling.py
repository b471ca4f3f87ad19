"""Which clients a round asks."""

from __future__ import annotations

from collections import Counter

import pytest

from fedge.config import Rounds
from fedge.errors import RoundError
from fedge_server.rounds import grids
from fedge_server.rounds.sampling import Cohort, cohort_size, draw


class Nodes:
    """A Grid that only lists."""

    def __init__(self, nodes) -> None:
        self.nodes = nodes

    def get_node_ids(self):
        return self.nodes


class Sleeping(Nodes):
    """Of whose nodes only some are online, from some time on."""

    def __init__(self, nodes, awake, since: float = 0.0) -> None:
        super().__init__(nodes)
        self.awake, self.since, self.elapsed_s, self.looked = awake, since, 0.0, 0

    def begin_round(self, number: int) -> None:
        pass

    def online(self, node_ids):
        self.looked += len(node_ids)
        return [node for node in node_ids if self.awake(node) and self.elapsed_s >= self.since]


def drawn(grid, wanted: int, *, seed: int = 0, number: int = 1) -> list[int]:
    return draw(grid, grid.get_node_ids(), wanted, seed=seed, number=number, purpose="train")


@pytest.mark.parametrize(
    ("population", "rounds", "size"),
    [
        (10, Rounds(), 10),
        (10, Rounds(fraction=0.25), 2),
        (10, Rounds(fraction=0.01), 1),
        (10, Rounds(cohort=4, fraction=0.5), 4),
        (3, Rounds(cohort=4), 3),
    ],
)
def test_a_cohort_is_a_number_or_a_share(population, rounds, size):
    assert cohort_size(population, rounds) == size


def test_seed_and_round_decide():
    grid = Nodes(range(1, 10**6 + 1))
    first = drawn(grid, 100)
    assert first == drawn(grid, 100)
    assert len(set(first)) == 100
    assert first != drawn(grid, 100, number=2)
    assert first != drawn(grid, 100, seed=1)


def test_a_list_of_the_same_nodes_gives_the_same_cohort():
    assert drawn(Nodes(range(1, 51)), 7) == drawn(Nodes(list(range(1, 51))), 7)


def test_every_client_is_drawn_about_equally_often():
    counts = Counter(node for number in range(2000) for node in drawn(Nodes(range(1, 11)), 3, number=number))
    assert all(500 < counts[node] < 700 for node in range(1, 11))


def test_only_those_online_are_asked_and_few_are_looked_at():
    grid = Sleeping(range(1, 10**6 + 1), lambda node: node % 2 == 0)
    found = drawn(grid, 100)
    assert len(found) == 100
    assert all(node % 2 == 0 for node in found)
    assert grid.looked < 1000


def test_where_hardly_anybody_is_online_those_are_taken_and_the_population_is_not_listed():
    grid = Sleeping(range(1, 10**6 + 1), lambda node: node % 1000 == 0)
    assert 0 < len(drawn(grid, 100)) < 100
    assert grid.looked < 30_000


def test_simulated_time_goes_on_until_somebody_is_online():
    grid = Sleeping(range(1, 11), lambda _: True, since=3000.0)
    assert len(drawn(grid, 10)) == 10
    assert grid.elapsed_s == 3000.0


def test_nobody_in_two_weeks_is_an_error():
    with pytest.raises(RoundError, match="no client is online"):
        drawn(Sleeping(range(1, 11), lambda _: False), 3)
    with pytest.raises(RoundError, match="there are no clients"):
        drawn(Nodes([]), 3)


def test_a_strategy_sees_the_cohort_alone():
    assert Cohort(Nodes(range(1, 10**6)), [4, 2]).get_node_ids() == [4, 2]


def test_where_nobody_is_connected_yet_it_is_waited_for_somebody(monkeypatch):
    grid = Nodes([])
    monkeypatch.setattr(grids.time, "sleep", lambda _: setattr(grid, "nodes", [8, 3]))
    assert grids.nodes_of(grid) == [3, 8]
