"""Work fitted to clients' speeds: what is measured, what they are told, and that rounds close on time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedge.errors import ConfigError
from fedge.learning.messages import CONFIG, METRICS, MOST_EXAMPLES
from fedge.learning.state import arrays_of, digest
from fedge.wire.arrays import records_of
from fedge_server.rounds.pace import Pace

TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0xFED, 1  # Message() reads it
UNEVEN = {"speed_sigma": 1.0, "seconds_per_example": 0.01}


def sent(*nodes):
    return [Message(RecordDict({CONFIG: ConfigRecord({"round": 1})}), node, "train") for node in nodes]


def answer(message, examples):
    return Message(RecordDict({METRICS: MetricRecord({"num-examples": examples})}), reply_to=message)


def told(pace, *nodes):
    found = pace.fitted(sent(*nodes))
    return [records_of(message.content, ConfigRecord)[CONFIG].get(MOST_EXAMPLES) for message in found]


def go_through(pace, replies, nodes):
    """Replies as (seconds, reply); the clock stands at the deadline afterwards."""
    clock = [0.0]

    def arriving():
        for seconds, reply in replies:
            clock[0] = seconds
            yield reply
        clock[0] = pace.deadline_s

    return list(pace.watched(arriving(), nodes, lambda: clock[0]))


def test_a_client_gets_as_many_examples_as_it_did_in_four_fifths_of_the_deadline():
    pace, (fast, slow) = Pace(60.0, least=10), sent(1, 2)
    assert told(pace, 1, 2) == [None, None]
    go_through(pace, [(20.0, answer(fast, 100)), (50.0, answer(slow, 100))], [1, 2])
    assert told(pace, 1, 2) == [240, 96]  # 48 s at 0.2 and at 0.5 s an example
    go_through(pace, [(40.0, answer(fast, 100))], [1])
    assert told(pace, 1) == [160]  # 0.3 s: the mean of 0.2 and 0.4


def test_who_misses_the_deadline_gets_a_part_of_what_is_typical_and_never_less_than_a_batch():
    pace, (first, _) = Pace(60.0, least=10), sent(1, 2)
    go_through(pace, [(20.0, answer(first, 100))], [1, 2])
    assert told(pace, 2) == [40]  # twice 60 s for 100 examples: 1.2 s each
    for _ in range(5):
        go_through(pace, [(20.0, answer(first, 100))], [1, 2])
    assert told(pace, 2) == [10]


def test_a_quorum_that_ends_a_round_early_says_nothing_of_those_who_were_not_waited_for():
    pace, (first, second) = Pace(60.0, least=10), sent(1, 2)
    replies = pace.watched([answer(first, 100), answer(second, 100)], [1, 2], lambda: 1.0)
    next(replies)
    replies.close()
    assert told(pace, 2) == [None]


@pytest.mark.parametrize("examples", [0, -5, 1.5])
def test_an_answer_that_counts_nothing_is_not_measured(examples):
    pace, (first,) = Pace(60.0, least=10), sent(1)
    go_through(pace, [(1.0, answer(first, examples))], [1])
    assert told(pace, 1) == [None]


def test_errors_and_strangers_are_not_measured():
    pace, (first, stranger) = Pace(60.0, least=10), sent(1, 9)
    go_through(pace, [(1.0, Message(Error(0, "broke"), reply_to=first)), (2.0, answer(stranger, 50))], [1])
    assert told(pace, 1, 9) == [None, None]


def test_speeds_survive_a_restart():
    pace, (first,) = Pace(60.0, least=10), sent(1)
    go_through(pace, [(20.0, answer(first, 100))], [1, 2])
    again = Pace(60.0, least=10).remembering(pace.memory())
    assert again == pace
    assert Pace(60.0, least=10).remembering({}) == Pace(60.0, least=10)


def test_it_needs_a_deadline_and_answers_of_single_clients(small):
    with pytest.raises(ConfigError, match="fit_work needs deadline_s"):
        small(rounds={"fit_work": True})
    from torch import nn

    from fedge_server import strategies

    masked = small(
        rounds={"fit_work": True, "deadline_s": 5.0}, privacy={"secure_aggregation": True},
        model={"standardise": False},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"rounds\.fit_work"):
        strategies.build(masked, network=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


@pytest.mark.quick_where(strategy=("fedavg",))
@pytest.mark.parametrize("strategy", ["fedavg", "fednova"])
def test_once_speeds_are_known_everybody_answers_in_time(strategy, small, learn, tmp_path):
    sections = {"clients": {"count": 10}, "scenario": UNEVEN, "strategy": {"name": strategy}}
    rounds = {"count": 6, "deadline_s": 1.5}
    fitted = learn(small(rounds={**rounds, "fit_work": True}, **sections), tmp_path / "fitted").records
    plain = learn(small(rounds=rounds, **sections), tmp_path / "plain").records
    assert plain[-1].clients < 9
    assert fitted[0].clients == plain[0].clients
    assert [record.clients for record in fitted[3:]] == [10] * 3
    assert fitted[-1].metrics["accuracy"] > 0.6


def test_a_client_trains_on_other_examples_each_round_and_counts_those_alone(small, learn, tmp_path):
    seen = {}

    def note(_, reply):
        seen.setdefault("examples", []).append(
            records_of(reply.content, MetricRecord)[METRICS]["num-examples"]
        )
        return reply

    config = small(
        clients={"count": 3},
        rounds={"count": 4, "deadline_s": 3.0, "fit_work": True},
        scenario={"seconds_per_example": 0.0125},
        train={"batch_size": 16},
    )
    learned = learn(config, tmp_path, tamper={1: note})
    assert [record.clients for record in learned.records] == [0, 3, 3, 3]  # 344 examples take 4.3 s
    assert set(seen["examples"]) == {16, 192}  # a batch, nothing being typical; then as the clock said
    assert all(np.isfinite(v).all() for v in arrays_of(learned.model.network).values())


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bits(small, learn, tmp_path):
    config = small(
        clients={"count": 6}, rounds={"count": 5, "deadline_s": 1.5, "fit_work": True}, scenario=UNEVEN
    )
    whole = learn(config, tmp_path / "whole")
    with pytest.raises(Exception, match=r"^$"):  # the fixture's Interrupted
        learn(config, tmp_path / "cut", stop_after=2)
    resumed = learn(config, tmp_path / "cut")
    assert digest(arrays_of(resumed.model.network)) == digest(arrays_of(whole.model.network))
    assert [_told(r) for r in resumed.records] == [_told(r) for r in whole.records]


def _told(record):
    return json.dumps({**record.to_json(), "seconds": 0}, sort_keys=True)
