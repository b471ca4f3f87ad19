"""Clients chosen by their data, or by when they were last asked: how often, with what weight."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedge.errors import RoundError
from fedge.learning.messages import METRICS
from fedge_server.rounds.choosing import Choice
from fedge_server.rounds.closing import Collected
from fedge_server.rounds.validation import Valid

TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0xFED, 1  # Message() reads it


class Awake:
    """A simulated Grid of whose nodes only some are online, from some time on."""

    def __init__(self, awake=lambda node: True, since: float = 0.0) -> None:
        self.awake, self.since, self.elapsed_s = awake, since, 0.0

    def begin_round(self, number: int) -> None:
        pass

    def online(self, node_ids):
        return [node for node in node_ids if self.awake(node) and self.elapsed_s >= self.since]


def draws(choice: Choice, nodes, wanted: int, rounds: int, *, grid=None, seed: int = 0) -> list[Counter[int]]:
    found = []
    for number in range(1, rounds + 1):
        asked = choice.draw(grid or Awake(), nodes, wanted, seed=seed, number=number)
        assert sorted(asked) == sorted(choice.drawn)
        found.append(choice.drawn)
    return found


def test_a_client_with_three_times_the_data_is_drawn_three_times_as_often():
    found = sum(draws(Choice("size", {1: 300, 2: 100}), range(1, 3), 2, 5000), Counter())
    assert found[1] + found[2] == 10_000
    assert found[1] / 10_000 == pytest.approx(0.75, abs=0.015)


def test_who_has_not_answered_counts_as_large_as_the_others_are_on_average():
    found = sum(draws(Choice("size", {1: 300, 2: 100}), range(1, 5), 4, 3000), Counter())  # 3, 4: 200 each
    assert [found[node] / 12_000 for node in range(1, 5)] == pytest.approx(
        [3 / 8, 1 / 8, 1 / 4, 1 / 4], abs=0.02
    )


def test_the_plain_mean_of_what_was_drawn_is_the_weighted_mean_on_average():
    rng = np.random.default_rng(0)
    sizes, values = rng.integers(1, 100, 20), rng.normal(size=20)
    choice = Choice("size", dict(enumerate(sizes.tolist())))
    means = [
        sum(times * values[node] for node, times in found.items()) / found.total()
        for found in draws(choice, range(20), 5, 4000)
    ]
    spread = np.std(means) / np.sqrt(len(means))
    assert abs(np.mean(means) - np.average(values, weights=sizes)) < 4 * spread


def test_an_answer_counts_as_often_as_its_client_was_drawn_and_tells_its_size():
    choice = Choice("size", {7: 10})
    choice.drawn = Counter({7: 3})
    reply = Message(RecordDict({METRICS: MetricRecord({"num-examples": 40})}), 1, "train")
    reply.metadata.__dict__["_src_node_id"] = 7
    choice.around(lambda *_: Valid({}, 40, 1, None))(reply, Collected())
    assert reply.content[METRICS]["num-examples"] == 3
    assert choice.known == {7: 40}


def test_in_turn_nobody_waits_longer_than_it_takes_to_ask_all():
    found = draws(Choice("round_robin"), range(1, 11), 4, 30)
    for at in range(28):
        assert len(set().union(*found[at : at + 3])) == 10
    fifths = draws(Choice("round_robin"), range(1, 11), 5, 20)
    assert set(sum(fifths, Counter()).values()) == {10}
    other = draws(Choice("round_robin"), range(1, 11), 4, 1, seed=1)
    assert other != found[:1]


def test_a_newcomer_is_asked_first():
    choice = Choice("round_robin")
    draws(choice, [3, 5, 8], 2, 4)
    asked = choice.draw(Awake(), [3, 5, 8, 2**63 + 9], 1, seed=0, number=5)
    assert asked == [2**63 + 9]
    assert choice.remembering(choice.memory()) == Choice("round_robin", choice.known)


@pytest.mark.parametrize("by", ["size", "round_robin"])
def test_a_population_of_a_million_millions_is_not_listed(by):
    choice = Choice(by, {10**9 * k: k for k in range(1, 1000)})
    found = draws(choice, range(1, 10**12), 100, 3)
    assert [counter.total() for counter in found] == [100] * 3


@pytest.mark.slow
@pytest.mark.parametrize("by", ["size", "round_robin"])
def test_those_offline_are_not_asked_and_time_goes_on_until_somebody_is_there(by):
    grid = Awake(lambda node: node % 2 == 0, since=1500.0)
    found = draws(Choice(by), range(1, 101), 10, 4, grid=grid)
    assert all(node % 2 == 0 for counter in found for node in counter)
    assert [counter.total() for counter in found] == [10] * 4
    assert grid.elapsed_s == 1800.0
    with pytest.raises(RoundError, match="no client is online"):
        draws(Choice(by), range(1, 101), 10, 1, grid=Awake(lambda _: False))
    with pytest.raises(RoundError, match="there are no clients"):
        draws(Choice(by), [], 10, 1)


@pytest.mark.parametrize("by", ["size", "round_robin"])
def test_the_same_seed_and_round_choose_the_same(by):
    known = {node: node for node in range(1, 50)}
    one, two = (Choice(by, dict(known)).draw(Awake(), range(1, 200), 20, seed=3, number=9) for _ in range(2))
    assert one == two
