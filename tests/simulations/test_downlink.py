"""The global state's way down as changes: all hold the same, and who does not is sent the whole."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedge.codecs.chain import Codec
from fedge.codecs.update import checksum
from fedge.config import Config
from fedge.errors import ConfigError
from fedge.learning.messages import ARRAYS, CODED, CONFIG, Instructions, from_record, to_record
from fedge.learning.state import arrays_of, digest
from fedge_client.receiving import HELD
from fedge_server.rounds.downlink import Downlink

BOTH = {"codec": ["topk:0.1", "int8"], "downlink": ["topk:0.1", "int8"]}
WHOLE = 650 * 4  # bytes of the logistic model


def without_time(records):
    return [json.dumps({**record.to_json(), "seconds": 0}, sort_keys=True) for record in records]


def watching(seen):
    """Around a ClientApp: notes (round, node, whether a change was sent, checksum of what is held then)."""

    def around(app):
        def call(message, context):
            reply = app(message, context)
            if message.metadata.message_type == "train":
                told = Instructions.of(message)
                held = checksum(from_record(context.state[HELD]))
                seen.append((told.round, context.node_id, told.change is not None, held))
            return reply

        return call

    return around


@pytest.mark.quick_where(down=(["topk:0.1", "int8"],))
@pytest.mark.parametrize("down", [["int8"], ["topk:0.1", "int8"], ["randomk:0.3"]], ids="+".join)
def test_all_clients_of_a_round_hold_the_servers_own_state_and_get_it_in_fewer_bytes(
    down, small, learn, tmp_path
):
    seen = []
    config = small(rounds={"count": 10}, communication={"codec": ["topk:0.1", "int8"], "downlink": down})
    learned = learn(config, tmp_path, around=watching(seen))
    assert learned.records[-1].metrics["accuracy"] > 0.8
    for number in range(1, 11):
        states = {held for at, _, _, held in seen if at == number}
        assert len(states) == 1
    assert {change for at, _, change, _ in seen if at == 1} == {False}
    assert {change for at, _, change, _ in seen if at > 1} == {True}
    assert learned.records[0].bytes_down == 5 * WHOLE
    assert all(record.bytes_down < 5 * WHOLE / 2.5 for record in learned.records[1:])


@pytest.mark.slow
def test_who_took_no_part_in_the_last_round_is_sent_the_whole(small, learn, tmp_path):
    seen = []
    config = small(rounds={"count": 6, "fraction": 0.6}, communication=BOTH)
    records = learn(config, tmp_path, around=watching(seen)).records
    for number in range(1, 7):
        now = {node: (change, held) for at, node, change, held in seen if at == number}
        last = {node for at, node, _, _ in seen if at == number - 1}
        assert {node for node, (change, _) in now.items() if change} == set(now) & last
        assert len({held for _, held in now.values()}) == 1
    assert all(record.clients == 3 and not record.rejected for record in records)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "fedsgd", "fedadam", "fedmedian", "fedbn"])
def test_a_run_resumes_bit_for_bit_with_the_same_bytes(strategy, small, learn, tmp_path):
    model = {"model": {"name": "mlp-bn"}} if strategy == "fedbn" else {}
    config = small(
        strategy={"name": strategy}, rounds={"count": 4, "fraction": 0.8}, communication=BOTH, **model
    )
    whole = learn(config, tmp_path / "whole")
    with pytest.raises(Exception, match=r"^$"):  # the fixture's Interrupted
        learn(config, tmp_path / "cut", stop_after=2)
    resumed = learn(config, tmp_path / "cut")
    assert without_time(resumed.records) == without_time(whole.records)
    assert digest(arrays_of(resumed.model.network)) == digest(arrays_of(whole.model.network))


@pytest.mark.slow
def test_a_client_that_has_lost_its_state_misses_one_round_and_is_sent_the_whole_then(small, learn, tmp_path):
    def forgetful(app):
        def call(message, context):
            train = message.metadata.message_type == "train"
            if train and context.node_id == 2 and Instructions.of(message).round == 3:
                context.state = RecordDict()
            return app(message, context)

        return call

    records = learn(small(rounds={"count": 5}, communication=BOTH), tmp_path, around=forgetful).records
    assert [record.clients for record in records] == [5, 5, 4, 5, 5]
    (rejected,) = records[2].rejected
    assert rejected.client == 2
    assert "does not hold; it needs the whole" in rejected.reason
    assert records[3].bytes_down > records[4].bytes_down + WHOLE / 2


def test_a_device_of_an_older_release_is_always_sent_the_whole(small, learn, tmp_path):
    asked = []

    def old(sent, reply):
        asked.append(list(sent.content[ARRAYS]))
        state = from_record(sent.content[ARRAYS])
        reply.content[ARRAYS] = to_record({n: v + np.float32(0.01) for n, v in state.items()}, shared=False)
        return reply

    records = learn(small(rounds={"count": 3}, communication=BOTH), tmp_path, tamper={2: old}).records
    assert [(record.clients, record.rejected) for record in records] == [(5, ())] * 3
    assert [CODED] not in asked


def test_a_slow_downlink_takes_less_simulated_time_from_the_second_round_on(small, learn, tmp_path):
    scenario = {"down_bytes_per_s": 100.0, "seconds_per_example": 1e-9}
    records = learn(
        small(rounds={"count": 3}, scenario=scenario, communication=BOTH, model={"standardise": False}),
        tmp_path,
    ).records
    assert records[0].simulated_s == pytest.approx(26, abs=0.5)
    assert records[1].simulated_s - records[0].simulated_s < 6
    assert records[2].simulated_s - records[1].simulated_s < 6


def test_what_the_server_leaves_out_comes_later() -> None:
    """All changes of the clients' state and the residual add up to all changes of the server's."""
    codec = Codec.of(["topk:0.1", "int8"])
    rng = np.random.default_rng(0)
    state = {"w": np.zeros((10, 10), np.float32), "b": np.zeros(10, np.float32)}
    downlink, wanted = Downlink(codec, frozenset(state), 0), np.zeros((10, 10))
    for _ in range(5):
        change = rng.standard_normal((10, 10)).astype(np.float32)
        wanted += change
        downlink, state = downlink.settled(state, {"w": state["w"] + change, "b": state["b"] + 1})
    assert downlink.residual is not None
    assert state["w"] + downlink.residual.reshape(10, 10) == pytest.approx(wanted, abs=1e-5)
    assert state["b"].tolist() == [5] * 10


def test_after_a_round_that_did_not_count_nothing_is_sent_to_those_who_hold_the_state() -> None:
    state = {"w": np.ones((10, 10), np.float32)}
    downlink = Downlink(Codec.of(["int8"]), frozenset(state), 0).stayed(state).held_by([7])
    told = Message(RecordDict({ARRAYS: to_record(state), CONFIG: to_config()}), 7, "train")
    other = Message(told.content, 8, "train")
    seven, eight = downlink.dressed([told, other], 400)
    assert seven.content[ARRAYS][CODED].numpy().nbytes == 0
    assert seven.content[CONFIG]["change-from"] == seven.content[CONFIG]["change-to"] == checksum(state)
    assert list(eight.content[ARRAYS]) == ["w"]


def to_config():
    from flwr.app import ConfigRecord
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    return ConfigRecord({"round": 1})


def test_memory_gives_the_same_back() -> None:
    state = {"w": np.zeros((10, 10), np.float32)}
    fresh = Downlink(Codec.of(["topk:0.1"]), frozenset(state), 0)
    made, _ = fresh.settled(state, {"w": np.ones((10, 10), np.float32)})
    made = made.held_by([2**63 + 5, 1])
    back = fresh.remembering(made.memory())
    assert (back.base, back.state, back.holders) == (made.base, made.state, made.holders)
    assert back.data == made.data
    assert np.array_equal(back.residual, made.residual)


def test_changes_down_need_a_codec_up_and_a_strategy_that_starts_from_what_was_sent(small, learn, tmp_path):
    with pytest.raises(ConfigError, match="downlink needs a codec too"):
        Config.from_mapping({"communication": {"downlink": ["int8"]}})
    with pytest.raises(ConfigError, match=r"communication\.downlink: strategy\.name = 'fedavgm'"):
        learn(small(strategy={"name": "fedavgm"}, communication=BOTH), tmp_path)


@pytest.mark.slow
def test_after_a_round_that_asked_nobody_all_are_sent_the_whole(small, learn, tmp_path):
    rounds = {"count": 8, "fraction": 0.25, "sampling": "poisson"}
    records = learn(small(rounds=rounds, communication=BOTH, seed=3), tmp_path).records
    asked = [record.asked for record in records]
    assert 0 in asked[:-1]  # the seed makes it so
    assert all(not record.rejected for record in records)
    after = records[asked.index(0) + 1]
    assert after.bytes_down == after.asked * WHOLE
