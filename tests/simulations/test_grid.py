"""The Grid of simulations: simulated time, laziness, and clients that fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedge.learning.local import Trained
from fedge_simulations.course import Fate, Steady
from fedge_simulations.grid import VectorGrid
from fedge_simulations.lazy import Lazy
from fedge_simulations.trainers import OneByOne, hand_over

SECONDS = {1: 3.0, 2: 1.0, 3: 2.0}


class Timed(Steady):
    def fates(self, node_ids, **_):
        return [Fate(SECONDS[node_id]) for node_id in node_ids]


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


class Batches(OneByOne):
    """Does so many jobs at once, and writes down which."""

    def __init__(self, at_once: int, failing: int = 0) -> None:
        self.size, self.failing, self.done = at_once, failing, []

    def at_once(self, job):
        return self.size

    def train(self, jobs):
        self.done.append(list(jobs))
        return [ValueError("no more memory") if job == self.failing else trained(job) for job in jobs]


def trained(job):
    return Trained({"w": np.float32([job])}, loss=0.0, examples=1, steps=1)


def handing_over(jobs_each: int = 1) -> ClientApp:
    client = ClientApp()

    @client.train()
    def train(message, context):
        done = [hand_over(context.node_id) for _ in range(jobs_each)]
        values = [int(each.arrays["w"][0]) for each in done]
        return Message(RecordDict({"m": MetricRecord({"values": values})}), reply_to=message)

    return client


def values(replies) -> dict[int, list[int]]:
    return {r.metadata.src_node_id: r.content["m"]["values"] for r in replies if not r.has_error()}


@pytest.mark.parametrize(("at_once", "batches"), [(1, [[2], [3], [1]]), (2, [[2, 3], [1]]), (9, [[2, 3, 1]])])
def test_clients_train_together_in_the_order_of_arrival_and_each_gets_its_own_result(at_once, batches):
    trainers = Batches(at_once)
    grid = VectorGrid(handing_over(), [{}] * 3, {}, course=Timed(), trainers=trainers)
    replies = list(grid.send_and_receive(messages(grid)))
    assert sources(replies) == [2, 3, 1]
    assert values(replies) == {2: [2], 3: [3], 1: [1]}
    assert trainers.done == batches


def test_a_client_may_train_several_times_before_it_answers():
    trainers = Batches(3)
    grid = VectorGrid(handing_over(2), [{}] * 3, {}, course=Timed(), trainers=trainers)
    assert values(grid.send_and_receive(messages(grid))) == {1: [1, 1], 2: [2, 2], 3: [3, 3]}
    assert trainers.done == [[2, 3, 1], [2, 3, 1]]


def test_a_job_that_fails_is_the_error_of_its_own_client():
    grid = VectorGrid(handing_over(), [{}] * 3, {}, trainers=Batches(3, failing=2))
    replies = list(grid.send_and_receive(messages(grid)))
    assert values(replies) == {1: [1], 3: [3]}
    (failed,) = (reply for reply in replies if reply.has_error())
    assert (failed.metadata.src_node_id, failed.error.reason) == (2, "ValueError: no more memory")


def test_who_is_too_late_is_not_trained_beside_the_others():
    trainers = Batches(9)
    grid = VectorGrid(handing_over(), [{}] * 3, {}, course=Timed(), trainers=trainers)
    assert sources(grid.send_and_receive(messages(grid), timeout=2.5)) == [2, 3]
    assert trainers.done == [[2, 3]]


def test_pulled_replies_train_together_too():
    trainers = Batches(9)
    grid = VectorGrid(handing_over(), [{}] * 3, {}, trainers=trainers)
    assert sources(grid.pull_messages(grid.push_messages(messages(grid)))) == [1, 2, 3]
    assert trainers.done == [[1, 2, 3]]


def remembering() -> ClientApp:
    client = ClientApp()

    @client.train()
    def train(message, context):
        hand_over(context.node_id)
        known = context.state.get("known", MetricRecord({"times": 0}))
        context.state["known"] = MetricRecord({"times": known["times"] + 1})
        return Message(RecordDict({"m": MetricRecord({"values": [known["times"]]})}), reply_to=message)

    return client


def test_only_a_client_whose_answer_was_taken_remembers_that_it_worked():
    grid = VectorGrid(remembering(), [{}] * 3, {}, course=Timed(), trainers=Batches(9))
    for _ in grid.send_and_receive(messages(grid)):
        break
    assert values(grid.send_and_receive(messages(grid))) == {2: [1], 3: [0], 1: [0]}


class Losing(Steady):
    def fates(self, node_ids, **_):
        known = {1: Fate(2.0, lost="out of battery"), 2: Fate(math.inf), 3: Fate(1.0)}
        return [known[node_id] for node_id in node_ids]


def test_a_lost_client_is_an_error_at_its_time_and_one_that_is_gone_never_answers():
    grid = VectorGrid(handing_over(), [{}] * 3, {}, course=Losing(), trainers=Batches(9))
    replies = list(grid.send_and_receive(messages(grid)))
    assert sources(replies) == [3, 1]
    assert replies[1].error.reason == "out of battery"
    assert grid.clock_s == 2.0
    assert sources(grid.send_and_receive(messages(grid), timeout=9.0)) == [3, 1]
    assert grid.elapsed_s == 2.0 + 9.0


def test_the_clock_of_a_run_goes_on_where_it_is_set():
    grid = VectorGrid(handing_over(), [{}] * 3, {}, course=Timed(), trainers=Batches(9))
    grid.elapsed_s = 100.0
    list(grid.send_and_receive(messages(grid)))
    assert (grid.elapsed_s, grid.sent_s, grid.clock_s) == (103.0, 100.0, 3.0)


def test_a_million_nodes_are_not_listed():
    grid = VectorGrid(handing_over(), Lazy(10**6, lambda i: {"partition-id": i}), {}, trainers=Batches(9))
    assert grid.get_node_ids() == range(1, 10**6 + 1)
    (reply,) = grid.send_and_receive([Message(RecordDict(), 10**6, "train")])
    assert values([reply]) == {10**6: [10**6]}
