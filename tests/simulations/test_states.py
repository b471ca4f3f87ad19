"""What clients remember: on disk, by round, and void when its round was not committed."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedge.errors import FormatError
from fedge.learning.messages import from_record, to_record
from fedge_simulations.states import States


def state(value: float) -> RecordDict:
    return RecordDict(
        {
            "c": to_record({"w": np.float32([[value]]), "n": np.int64([3])}),
            "m": MetricRecord({"loss": value, "many": [1, 2]}),
            "k": ConfigRecord({"text": "a", "raw": b"\0\1", "yes": True}),
        }
    )


def value_of(found: RecordDict) -> float | None:
    return found["m"]["loss"] if "m" in found else None


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_state_comes_back_as_it_was(on_disk, tmp_path):
    states = States(tmp_path if on_disk else None)
    states.save(5, state(0.25))
    found = states.load(5)
    assert list(found) == ["c", "m", "k"]
    assert found["c"]["w"].numpy().dtype == np.float32
    assert found["c"]["w"].numpy().tolist() == [[0.25]]
    assert dict(found["k"]) == {"text": "a", "raw": b"\0\1", "yes": True}
    assert list(states.load(6)) == []


def test_a_client_that_remembers_nothing_leaves_nothing_on_disk(tmp_path):
    states = States(tmp_path / "clients")
    states.begin_round(1)
    states.save(5, RecordDict())
    assert list(tmp_path.iterdir()) == []


def test_what_was_kept_in_a_round_that_was_not_committed_is_void(tmp_path):
    states = States(tmp_path)
    for number in (1, 2, 3):
        states.begin_round(number)
        states.save(5, state(number))
        states.save(7, state(number)) if number == 3 else None
    again = States(tmp_path)
    again.begin_round(3)  # the process died before round 3 was committed
    assert (value_of(again.load(5)), value_of(again.load(7))) == (2, None)
    committed = States(tmp_path)
    committed.begin_round(3)
    assert value_of(committed.load(5)) == 2


def test_of_a_client_at_most_two_rounds_lie_on_disk(tmp_path):
    states = States(tmp_path)
    for number in range(1, 6):
        states.begin_round(number)
        states.save(5, state(number))
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["5-4.safetensors", "5-5.safetensors"]


def test_a_state_that_was_emptied_stays_empty(tmp_path):
    states = States(tmp_path)
    states.save(5, state(1))
    states.begin_round(1)
    states.save(5, RecordDict())
    assert list(States(tmp_path).load(5)) == []


def test_a_changed_file_is_refused(tmp_path):
    states = States(tmp_path)
    states.save(5, state(1))
    (path,) = tmp_path.glob("*/*")
    path.write_bytes(b"\x80\x04nonsense" * 9)
    with pytest.raises(FormatError):
        states.load(5)


def drifting(honest):
    """A client that keeps part of its last update back and sends it with the next one."""

    def call(message, context):
        reply = honest(message, context)
        if message.metadata.message_type != "train":
            return reply
        held = context.state.get("held")
        arrays = from_record(reply.content["arrays"])
        sent = arrays if held is None else {k: v + 0.1 * held[k].numpy() for k, v in arrays.items()}
        context.state["held"] = to_record(arrays, shared=False)
        reply.content["arrays"] = to_record(sent, shared=False)
        return reply

    return call


@pytest.mark.slow
def test_clients_with_a_memory_resume_bit_for_bit(small, learn, tmp_path):
    config = small(rounds={"count": 5, "cohort": 3, "quorum": 0.5})
    whole = learn(config, tmp_path / "whole", around=drifting)
    forgetful = learn(config, tmp_path / "forgetful")
    with pytest.raises(Exception, match=r"^$"):
        learn(config, tmp_path / "cut", around=drifting, stop_after=2)
    # As if it had died in round 3: clients have trained, and the round was not committed.
    ahead = States(tmp_path / "cut" / "clients")
    ahead.begin_round(3)
    for node in range(1, 6):
        ahead.save(node, state(9.0))
    resumed = learn(config, tmp_path / "cut", around=drifting)
    assert resumed.model_sha256 == whole.model_sha256 != forgetful.model_sha256
    assert not (tmp_path / "forgetful" / "clients").exists()
