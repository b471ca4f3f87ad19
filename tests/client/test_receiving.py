"""The global state as a change, as a device receives it: checked, and kept only when it is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from fedge.codecs.chain import Codec
from fedge.config import Train
from fedge.errors import FormatError
from fedge.learning import local
from fedge.learning.messages import ARRAYS, CODED, CONFIG, Instructions, from_record, to_record
from fedge.learning.state import arrays_of
from fedge.spec import Spec
from fedge.task import resolve
from fedge_client.receiving import HELD, travelled
from fedge_server.rounds.downlink import Downlink

SPEC = Spec("features", (2,), "float32", ("a", "b"), ())
DOWN = Codec.of(["topk:0.1", "int8"])
NODE = 7


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1


class Federation:
    """A server that has sent a first state to one device, and then has a change of it."""

    def __init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1
        torch.manual_seed(0)
        self.model = resolve("tables").model("mlp")(SPEC)
        self.first = arrays_of(self.model)
        self.context = Context(1, NODE, {}, RecordDict(), {})
        fresh = Downlink(DOWN, local.parameters_of(self.model), 0)
        after = {name: value + np.float32(0.1) for name, value in self.first.items()}
        downlink, self.second = fresh.settled(self.first, after)
        self.downlink = downlink.held_by([NODE])

    def whole(self, state: dict[str, Any], number: int = 1) -> Message:
        told = Instructions(
            "tables", SPEC, "mlp", "none", None, Train(), 0, "weights", number, codec=DOWN, downlink=DOWN
        )
        return Message(RecordDict({ARRAYS: to_record(state), CONFIG: told.to_config()}), NODE, "train")

    def change(self) -> Message:
        (message,) = self.downlink.dressed([self.whole(self.second, 2)], 1000)
        return message

    def receive(self, message: Message) -> dict[str, Any]:
        return travelled(message, self.context, Instructions.of(message), self.model)

    def held(self) -> dict[str, Any]:
        return from_record(self.context.state[HELD])


@pytest.fixture
def federation() -> Federation:
    return Federation()


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(np.array_equal(one[name], other[name]) for name in one)


def test_a_change_gives_the_servers_own_state_to_the_bit(federation: Federation) -> None:
    assert same(federation.receive(federation.whole(federation.first)), federation.first)
    change = federation.change()
    assert list(change.content[ARRAYS]) == [CODED]
    assert same(federation.receive(change), federation.second)
    assert same(federation.held(), federation.second)


def test_the_same_change_again_is_no_second_change(federation: Federation) -> None:
    federation.receive(federation.whole(federation.first))
    federation.receive(federation.change())
    assert same(federation.receive(federation.change()), federation.second)


def test_a_device_that_holds_nothing_or_another_state_says_so_and_keeps_what_it_has(
    federation: Federation,
) -> None:
    with pytest.raises(FormatError, match="does not hold; it needs the whole"):
        federation.receive(federation.change())
    assert HELD not in federation.context.state
    other = {name: value + np.float32(1) for name, value in federation.first.items()}
    federation.receive(federation.whole(other))
    with pytest.raises(FormatError, match="does not hold"):
        federation.receive(federation.change())
    assert same(federation.held(), other)


def test_evaluation_brings_the_whole_and_changes_nothing(federation: Federation) -> None:
    federation.receive(federation.whole(federation.first))
    asked = federation.whole(federation.second)
    asked.metadata.message_type = "evaluate"
    assert same(federation.receive(asked), federation.second)
    assert same(federation.held(), federation.first)


@pytest.mark.slow
@given(st.integers(0, 10**9), st.integers(0, 7))
def test_a_change_that_was_damaged_is_refused_or_right(at: int, bit: int) -> None:
    federation = Federation()
    federation.receive(federation.whole(federation.first))
    change = federation.change()
    data = change.content[ARRAYS][CODED].numpy().copy()
    data[at % len(data)] ^= 1 << bit
    change.content[ARRAYS] = to_record({CODED: data})
    try:
        found = federation.receive(change)
    except FormatError:
        assert same(federation.held(), federation.first)
    else:
        assert same(found, federation.second)


def test_a_change_that_gives_another_state_than_it_says_is_refused(federation: Federation) -> None:
    federation.receive(federation.whole(federation.first))
    change = federation.change()
    config = dict(change.content[CONFIG])
    change.content[CONFIG] = ConfigRecord({**config, "change-to": config["change-to"] ^ 1})
    with pytest.raises(FormatError, match="does not give the state"):
        federation.receive(change)
    assert same(federation.held(), federation.first)


@pytest.mark.parametrize(("key", "value"), [("change-to", -1), ("change-from", "x"), ("downlink", "zip")])
def test_what_is_said_of_a_change_is_checked(key: str, value: Any, federation: Federation) -> None:
    change = federation.change()
    change.content[CONFIG] = ConfigRecord({**dict(change.content[CONFIG]), key: value})
    with pytest.raises(FormatError, match="config is malformed"):
        federation.receive(change)
