"""What a client remembers of a session: one change for a round, and nothing for another session."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from fedge.errors import FormatError
from fedge.secagg import wire
from fedge.secagg.encoding import Encoding
from fedge.secagg.masks import Session
from fedge.secagg.wire import Fields
from fedge_client import masking

Server = Any


def session(number: int = 1, nonce: bytes = b"n" * 16) -> Session:
    return Session("run", number, nonce)


class Client:
    """A client whose context is kept as a device keeps it."""

    def __init__(self, node: int) -> None:
        self.context = Context(1, node, {}, RecordDict(), {})
        self.drawn = 0

    def root(self) -> bytes:
        self.drawn += 1
        return bytes([self.context.node_id, self.drawn]) * 16

    def ask(self, kind: str, record: Any) -> Fields:
        message = Message(RecordDict({wire.RECORD: record}), self.context.node_id, kind)
        answer = {
            wire.KEYS: lambda: masking.answer_keys(message, self.context, self.root, None),
            wire.SHARES: lambda: masking.answer_shares(message, self.context, None),
            wire.CHECK: lambda: masking.answer_check(message, self.context),
            "train": lambda: masking.answer_masked(
                message, self.context, lambda to: to.encode(np.full(3, 0.5), 10, 0.1)
            ),
            wire.UNMASK: lambda: masking.answer_unmask(message, self.context),
        }[kind]()
        return Fields(answer.content[wire.RECORD]) if wire.RECORD in answer.content else Fields(Any)  # type: ignore[arg-type]


def upto_masks(clients: dict[int, Client], at: Session) -> None:
    keys = {
        i: wire.keys_of(c.ask(wire.KEYS, wire.record_of(at)).read("keys", bytes)) for i, c in clients.items()
    }
    near = {i: {j: keys[j] for j in clients if j != i} for i in clients}
    dealt = {
        i: wire.dealt_of(c.ask(wire.SHARES, wire.for_shares(at, near[i], 3)), list(near[i]))
        for i, c in clients.items()
    }
    for i, client in clients.items():
        boxes = {j: dealt[j].boxes[i] for j in clients if j != i}
        assert client.ask(wire.CHECK, wire.for_check(at, boxes)).ids("good") == sorted(boxes)
    for i, client in clients.items():
        client.ask("train", wire.for_masking(at, [j for j in clients if j != i], Encoding(1.0, 10, 4)))


@pytest.fixture
def clients() -> dict[int, Client]:
    return {i: Client(i) for i in (1, 2, 3, 4)}


@pytest.fixture(autouse=True)
def identity() -> None:
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def test_a_session_survives_in_the_context_alone(clients: dict[int, Client]) -> None:
    upto_masks(clients, session())
    told = wire.for_unmasking(session(), [1, 2, 3], [4])
    first = clients[1].ask(wire.UNMASK, told)
    again = clients[1].ask(wire.UNMASK, told)
    assert first.parts("seeds", 32, 3) == again.parts("seeds", 32, 3)
    assert len(first.parts("keys", 32, 1)) == 1
    with pytest.raises(FormatError, match="told before"):
        clients[1].ask(wire.UNMASK, wire.for_unmasking(session(), [1, 2, 3, 4], []))


def test_a_round_that_is_begun_anew_goes_without_those_that_had_sent_their_change(
    clients: dict[int, Client],
) -> None:
    upto_masks(clients, session())
    with pytest.raises(FormatError, match="a change of round 1 was sent"):
        clients[1].ask(wire.KEYS, wire.record_of(session(nonce=b"m" * 16)))
    clients[1].ask(wire.KEYS, wire.record_of(session(2)))  # the next round begins


def test_keys_are_fresh_in_each_session_and_the_same_when_asked_again(clients: dict[int, Client]) -> None:
    client = clients[1]
    keys = [
        client.ask(wire.KEYS, wire.record_of(at)).read("keys", bytes)
        for at in (session(), session(), session(nonce=b"m" * 16), session(2))
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("kind", [wire.SHARES, wire.CHECK, "train", wire.UNMASK])
def test_a_session_that_the_client_is_not_in_is_refused(kind: str, clients: dict[int, Client]) -> None:
    clients[1].ask(wire.KEYS, wire.record_of(session()))
    with pytest.raises(FormatError, match="in no such session of round 2"):
        clients[1].ask(kind, wire.record_of(session(2)))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"nonce": b"short"}, "nonce is out of range"),
        ({"round": -1}, "round or nonce"),
        ({"run": 3}, "run is int, not str"),
    ],
)
def test_records_that_are_none_are_refused(
    values: dict[str, Any], says: str, clients: dict[int, Client]
) -> None:
    record = wire.record_of(session())
    for name, value in values.items():
        record[name] = value
    with pytest.raises(FormatError, match=says):
        clients[1].ask(wire.KEYS, record)
