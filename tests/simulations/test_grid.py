"""The Grid of simulations: simulated time, laziness, and clients that fail."""

from __future__ import annotations

import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedge_simulations.course import Fate, Steady
from fedge_simulations.grid import VectorGrid

SECONDS = {1: 3.0, 2: 1.0, 3: 2.0}


class Timed(Steady):
    def fate(self, node_id, **_):
        return Fate(SECONDS[node_id])


@pytest.fixture
def ran() -> list[int]:
    return []


@pytest.fixture
def grid(ran: list[int]) -> VectorGrid:
    client = ClientApp()

    @client.train()
    def train(message, context):
        ran.append(context.node_id)
        if context.node_config.get("fails"):
            raise ValueError("out of battery")
        return Message(RecordDict({"metrics": MetricRecord({"node": context.node_id})}), reply_to=message)

    nodes = [{}, {}, {"fails": True}]
    return VectorGrid(client, nodes, {}, course=Timed())


def messages(grid: VectorGrid) -> list[Message]:
    return [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]


def sources(replies) -> list[int]:
    return [reply.metadata.src_node_id for reply in replies]


def test_replies_come_in_the_order_of_simulated_time(grid):
    assert sources(grid.send_and_receive(messages(grid))) == [2, 3, 1]
    assert grid.clock_s == 3.0


def test_a_deadline_cuts_off_the_slow_and_they_never_run(grid, ran):
    assert sources(grid.send_and_receive(messages(grid), timeout=2.5)) == [2, 3]
    assert ran == [2, 3]
    assert grid.clock_s == 2.5


def test_who_stops_iterating_leaves_the_rest_unrun(grid, ran):
    for _ in grid.send_and_receive(messages(grid)):
        break
    assert ran == [2]


def test_replies_can_be_iterated_again(grid, ran):
    replies = grid.send_and_receive(messages(grid))
    assert sources(replies) == sources(replies) == [2, 3, 1]
    assert ran == [2, 3, 1]


def test_what_a_client_raises_is_its_error_reply(grid):
    by_node = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(messages(grid))}
    assert by_node[3].has_error()
    assert by_node[3].error.reason == "ValueError: out of battery"
    assert by_node[1].content.metric_records["metrics"]["node"] == 1


def test_push_and_pull_move_the_clock_to_the_next_arrival(grid):
    ids = grid.push_messages(messages(grid))
    assert sources(grid.pull_messages(ids)) == [2]
    assert grid.clock_s == 1.0
    late = grid.push_messages([Message(RecordDict(), 2, "train")])  # sent at 1 s, arrives at 2 s
    assert sources(grid.pull_messages([*ids, *late])) == [3, 2]
    assert sources(grid.pull_messages([*ids, *late])) == [1]
    assert grid.pull_messages([*ids, *late]) == []


def test_a_reply_names_the_message_it_answers(grid):
    ids = list(grid.push_messages(messages(grid)))
    assert [r.metadata.reply_to_message_id for r in grid.pull_messages(ids)] == [ids[1]]


def test_a_later_round_drops_what_an_earlier_one_had_under_way(grid, ran):
    next(iter(grid.send_and_receive(messages(grid))))
    list(grid.send_and_receive(messages(grid)[:1]))
    assert ran == [2, 1]
