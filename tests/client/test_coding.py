"""An update in a codec as a device sends it: what stays behind, and rounds that are asked for again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedge.codecs.chain import Codec
from fedge.codecs.layout import Layout
from fedge.config import Train
from fedge.errors import FormatError
from fedge.learning import local
from fedge.learning.guard import Guard
from fedge.learning.messages import ARRAYS, CODED, CONFIG, METRICS, Instructions, from_record, to_record
from fedge.learning.state import arrays_of
from fedge.spec import Spec
from fedge.task import resolve
from fedge_client import app, coding
from fedge_server.rounds.decoding import Decoder

SPEC = Spec("features", (2,), "float32", ("a", "b"), ())
NODE = 7


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1


class Device:
    """A device with ten rows, and the server's side of what it is asked."""

    def __init__(self, folder: Path) -> None:
        x = np.arange(20, dtype=np.float32).reshape(10, 2) / 20
        np.savez(folder / "rows.npz", x=x, y=np.array(["a", "b"] * 5))
        node = {"task": "tables", "data": str(folder / "rows.npz")}
        self.context = Context(1, NODE, node, RecordDict(), {})
        torch.manual_seed(0)
        self.network = resolve("tables").model("mlp")(SPEC)
        self.state = arrays_of(self.network)

    def ask(self, codec: Codec | None, number: int, **changes: Any) -> Message:
        told = Instructions(
            "tables", SPEC, "mlp", "none", None, Train(learning_rate=0.5), 0, "weights", number, codec=codec,
            **changes,
        )  # fmt: skip
        content = RecordDict({ARRAYS: to_record(self.state), CONFIG: told.to_config()})
        return app.app(Message(content, NODE, "train"), self.context)

    def decoded(self, reply: Message, codec: Codec, number: int) -> dict[str, Any]:
        layout = Layout.of(self.state, local.parameters_of(self.network))
        reply.metadata.__dict__["_src_node_id"] = NODE
        Decoder(codec, layout, 0, number)(reply)
        return from_record(reply.content[ARRAYS])

    def residual(self) -> Any:
        return self.context.state[coding.RECORD]["residual"].numpy().copy()

    def change(self, arrays: dict[str, Any]) -> Any:
        return Layout.of(self.state, local.parameters_of(self.network)).change(arrays)


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def coded(reply: Message) -> bytes:
    return bytes(reply.content[ARRAYS][CODED].numpy())


@pytest.mark.slow
def test_all_values_in_a_codec_are_the_plain_update(device: Device) -> None:
    codec = Codec.of(["topk:1"])
    plain = from_record(device.ask(None, 1).content[ARRAYS])
    reply = device.ask(codec, 1)
    assert list(reply.content[ARRAYS]) == [CODED]
    found = device.decoded(reply, codec, 1)
    assert list(found) == list(plain)
    for name, value in plain.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6)
    assert dict(reply.content[METRICS]) == dict(device.ask(None, 1).content[METRICS])


@pytest.mark.parametrize("chain", [["topk:0.01", "int8"], ["sign"], ["randomk:0.05"]])
def test_over_rounds_what_was_sent_and_what_is_left_add_up_to_all_changes(
    chain: list[str], device: Device
) -> None:
    codec, sent, true = Codec.of(chain), 0, 0
    for number in (1, 2, 3):
        true = true + device.change(from_record(device.ask(None, number).content[ARRAYS]))
        sent = sent + device.change(device.decoded(device.ask(codec, number), codec, number))
    np.testing.assert_allclose(sent + device.residual(), true, rtol=0, atol=1e-5)
    assert np.abs(device.residual()).max() > 1e-3


def test_a_round_that_is_begun_anew_gets_the_same_answer_and_keeps_nothing_twice(device: Device) -> None:
    codec = Codec.of(["topk:0.01"])
    device.ask(codec, 1)
    first, kept = device.ask(codec, 2), device.residual()
    again = device.ask(codec, 2)  # the server died in round 2, and asks in other words
    assert coded(again) == coded(first)
    assert dict(again.content[METRICS]) == dict(first.content[METRICS])
    assert np.array_equal(device.residual(), kept)
    assert coded(device.ask(codec, 3)) != coded(first)


def test_the_same_round_from_another_state_is_another_round(device: Device) -> None:
    codec = Codec.of(["topk:0.01"])
    first = device.ask(codec, 1)
    device.state = {name: value + np.float32(0.5) for name, value in device.state.items()}
    assert coded(device.ask(codec, 1)) != coded(first)


def test_an_answer_that_was_lost_with_the_state_after_it_is_computed_again(device: Device) -> None:
    """The agent and a simulation both go back to the state before (two generations, or the last round's)."""
    codec = Codec.of(["topk:0.01"])
    device.ask(codec, 1)
    before = RecordDict(dict(device.context.state))
    lost = device.ask(codec, 2)
    device.context.state = before
    assert coded(device.ask(codec, 2)) == coded(lost)


def test_bytes_alone_leave_nothing_on_the_device(device: Device) -> None:
    device.ask(Codec.of(["int8"]), 1)
    device.ask(Codec.of(["topk:0.1"], feedback=False), 2)
    assert len(device.context.state) == 0


def test_a_residual_of_another_model_is_forgotten(device: Device) -> None:
    codec = Codec.of(["topk:0.01"])
    fresh = coded(device.ask(codec, 1))
    device.context.state = RecordDict(
        {coding.RECORD: to_record({"residual": np.ones(3, np.float32), "sent": np.zeros(1, np.uint8)})}
    )
    assert coded(device.ask(codec, 1)) == fresh


def test_noise_comes_first_and_the_codec_after(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, guard = Codec.of(["topk:1"]), Guard("local", 1.0, 0.5)
    fixed = app.build(app.own_share, secret=lambda *_: b"s" * 32)
    monkeypatch.setattr(app, "app", fixed)
    plain = device.ask(None, 1, guard=guard)
    reply = device.ask(codec, 1, guard=guard)
    assert dict(reply.content[METRICS]) == dict(plain.content[METRICS])
    noised = from_record(plain.content[ARRAYS])
    found = device.decoded(reply, codec, 1)
    for name, value in noised.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5)


def test_training_that_diverges_is_an_error_and_spoils_no_residual(device: Device) -> None:
    codec = Codec.of(["topk:0.01"])
    device.ask(codec, 1)
    kept, sound = device.residual(), device.state
    device.state = {name: np.full_like(value, np.inf) for name, value in sound.items()}
    with pytest.raises(ValueError, match="not finite"):
        device.ask(codec, 2)
    assert np.array_equal(device.residual(), kept)


@pytest.mark.parametrize("name", ["zip", "topk:7", "x" * 100])
def test_a_codec_of_a_later_release_is_named_in_the_refusal(name: str, device: Device) -> None:
    told = Instructions(
        "tables", SPEC, "mlp", "none", None, Train(), 0, "weights", 1, codec=Codec.of(["int8"])
    )
    record = told.to_config()
    record["codec"] = name
    content = RecordDict({ARRAYS: to_record(device.state), CONFIG: record})
    with pytest.raises(FormatError, match=r"codec '.*' is not known here"):
        app.app(Message(content, NODE, "train"), device.context)
