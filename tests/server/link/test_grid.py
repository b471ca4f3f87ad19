"""LinkGrid against a small hub: what goes down, what comes back, and what breaks in between."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedge.errors import RoundError, SupersededError
from fedge.learning.messages import to_record
from fedge.wire.v1 import admin_pb2 as admin
from fedge_server.link.grid import LinkGrid

WEIGHTS = np.arange(6, dtype=np.float32).reshape(2, 3)


def double(message, context):
    value = message.content.array_records["arrays"]["w"].numpy() * 2
    metrics = MetricRecord({"node": context.node_id})
    return Message(RecordDict({"arrays": to_record({"w": value}), "m": metrics}), reply_to=message)


def fails(message, context):
    raise ValueError("out of battery")


def garbage(message, context):
    return b"\xff garbage"


class Slow:
    """Answers when it is let go."""

    def __init__(self):
        self.go = threading.Event()

    def __call__(self, message, context):
        self.go.wait(20)
        return double(message, context)


def messages(nodes, value=WEIGHTS):
    content = RecordDict({"arrays": to_record({"w": value}), "config": ConfigRecord({"round": 1})})
    return [Message(content, node, "train") for node in nodes]


def sources(replies):
    return sorted(reply.metadata.src_node_id for reply in replies)


def until(condition, seconds=10.0):
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.01)


@pytest.fixture
def slow():
    made = Slow()
    yield made
    made.go.set()


def test_replies_come_back_with_their_arrays_and_can_be_read_again(hub, grid):
    hub.devices |= dict.fromkeys((1, 2, 3), double)
    asked = messages(grid.get_node_ids())
    replies = grid.send_and_receive(asked)
    assert sources(replies) == sources(replies) == [1, 2, 3]
    for reply in replies:
        np.testing.assert_array_equal(reply.content.array_records["arrays"]["w"].numpy(), WEIGHTS * 2)
        assert reply.metadata.reply_to_message_id in {m.metadata.message_id for m in asked}


def test_a_content_that_goes_to_many_is_described_and_written_once(hub, home, grid):
    hub.devices |= dict.fromkeys(range(1, 6), double)
    list(grid.send_and_receive(messages(range(1, 6))))
    assert [len(push.contents) for push in hub.pushes] == [1]
    assert len(list(home.objects("run").iterdir())) == 1


def test_the_same_arrays_under_another_config_are_written_once(hub, home, grid):
    hub.devices |= dict.fromkeys((1, 2), double)
    arrays = to_record({"w": WEIGHTS})
    sent = [
        Message(RecordDict({"arrays": arrays, "config": ConfigRecord({"n": node})}), node, "train")
        for node in (1, 2)
    ]
    assert sources(grid.send_and_receive(sent)) == [1, 2]
    assert len(hub.pushes[0].contents) == 2
    assert len(list(home.objects("run").iterdir())) == 1


def test_files_of_a_call_are_removed_at_the_next_one(hub, home, grid):
    hub.devices |= dict.fromkeys((1, 2), double)
    list(grid.send_and_receive(messages((1, 2))))
    first = {path.name for path in home.objects("run").iterdir()}
    assert len(list(home.spool("run").iterdir())) == 2
    assert sources(grid.send_and_receive(messages((1,), WEIGHTS + 1))) == [1]
    assert first.isdisjoint(path.name for path in home.objects("run").iterdir())
    assert len(list(home.spool("run").iterdir())) == 1


def test_a_failure_and_garbage_are_error_replies(hub, grid):
    hub.devices |= {1: double, 2: fails, 3: garbage}
    by_node = {r.metadata.src_node_id: r for r in grid.send_and_receive(messages((1, 2, 3)))}
    assert by_node[1].has_content()
    assert by_node[2].error.reason == "ValueError: out of battery"
    assert "cannot be read" in by_node[3].error.reason


def test_who_stops_iterating_closes_what_is_open_and_a_late_answer_is_counted(hub, grid, slow):
    hub.devices |= {1: double, 2: slow}
    for reply in grid.send_and_receive(messages((1, 2))):
        assert reply.metadata.src_node_id == 1
        kept = reply
        break
    assert len(hub.closed) == 1
    slow.go.set()
    until(lambda: hub.late == 1)
    np.testing.assert_array_equal(kept.content.array_records["arrays"]["w"].numpy(), WEIGHTS * 2)
    list(grid.send_and_receive(messages((1,))))
    assert grid.late == 1


@pytest.mark.slow
def test_a_deadline_ends_the_iteration_and_closes_the_rest(hub, grid, slow):
    hub.devices |= {1: double, 2: slow}
    assert sources(grid.send_and_receive(messages((1, 2)), timeout=0.5)) == [1]
    assert len(hub.closed) == 1
    assert hub.pushes[0].deadline_s == 0.5


def test_traffic_is_what_the_hub_says(hub, grid):
    hub.devices |= dict.fromkeys((1, 2), double)
    list(grid.send_and_receive(messages((1, 2))))
    assert (grid.bytes_down, grid.bytes_up) == (2 * WEIGHTS.nbytes, 2 * WEIGHTS.nbytes)


def test_a_hub_that_restarts_costs_no_answer_and_no_second_one(hub, grid, slow):
    hub.devices |= {1: double, 2: slow}
    seen = []
    for reply in grid.send_and_receive(messages((1, 2))):
        seen.append(reply.metadata.src_node_id)
        if len(seen) == 1:
            hub.stop()
            hub.start()
            slow.go.set()
    assert seen == [1, 2]
    assert len(hub.pushes) == 1


@pytest.mark.slow
def test_a_hub_that_stays_away_ends_the_round(hub, slow):
    impatient = LinkGrid(hub.home, "run", admin.Selection(task="digits"), patience_s=0.3)
    hub.devices |= {1: slow}
    replies = iter(impatient.send_and_receive(messages((1,))))
    hub.stop()
    with pytest.raises(RoundError, match="away for"):
        next(replies)
    hub.start()


def test_a_newer_worker_ends_this_one(hub, grid):
    hub.devices |= {1: double}
    newer = LinkGrid(hub.home, "run", admin.Selection(task="digits"))
    with pytest.raises(SupersededError, match="newer worker"):
        grid.send_and_receive(messages((1,)))
    newer.close()
    hub.sessions = 1  # so that the fixture can close its own


def test_it_waits_until_devices_are_online(hub, grid):
    found = []
    waiting = threading.Thread(target=lambda: found.extend(grid.wait_for(2)))
    waiting.start()
    until(lambda: hub.asked)
    hub.join(1, double)
    hub.join(2, double)
    waiting.join(10)
    assert found == [1, 2]
    assert hub.asked[0].selection.task == "digits"


def test_push_and_pull_are_there_for_apps_that_want_them(hub, grid, slow):
    hub.devices |= {1: double, 2: slow}
    ids = grid.push_messages(messages((1, 2)))
    pulled = []
    until(lambda: pulled.extend(grid.pull_messages(ids)) or pulled)
    assert sources(pulled) == [1]
    slow.go.set()
    until(lambda: pulled.extend(grid.pull_messages(ids)) or len(pulled) == 2)
    assert grid.pull_messages(ids) == []
