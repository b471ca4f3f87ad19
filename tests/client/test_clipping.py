"""Clipping of updates before they leave the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.supercore.task_identity import TaskIdentity

from fedge.errors import FormatError
from fedge.learning import messages
from fedge_client.clipping import clip, clip_when_asked

BEFORE = {"w": np.array([[1.0, 2.0]], np.float32), "b": np.array([5.0], np.float32)}
AFTER = {"w": np.array([[4.0, 2.0]], np.float32), "b": np.array([9.0], np.float32)}  # 3, 0, 4: 5 long


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1


def asked(**config: Any) -> Message:
    content = RecordDict({"arrays": messages.to_record(BEFORE), "config": ConfigRecord(config)})
    return Message(content, 7, "train")


def context() -> Context:
    return Context(1, 7, {}, RecordDict(), {})


def trained(message: Message, _: Context) -> Message:
    return messages.train_reply(message, AFTER, examples=3, loss=0.5)


def test_an_update_is_cut_to_the_norm() -> None:
    found = clip(AFTER, BEFORE, 2.5)
    assert found is not None
    assert found["w"].tolist() == [[2.5, 2.0]]
    assert found["b"].tolist() == [7.0]
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("norm", [5.0, 6.0])
def test_an_update_within_the_norm_stays_as_it_is(norm: float) -> None:
    assert clip(AFTER, BEFORE, norm) is None


def test_an_update_of_zero_is_left_alone() -> None:
    assert clip(BEFORE, BEFORE, 1.0) is None


def test_an_update_that_is_no_number_does_not_become_one() -> None:
    found = clip({**AFTER, "b": np.array([np.nan], np.float32)}, BEFORE, 1.0)
    assert found is not None
    assert np.isnan(found["b"]).all()


@pytest.mark.parametrize("norm", [0.5, 50.0])
@pytest.mark.parametrize(
    ("kind", "flowers"), [({}, fixedclipping_mod), ({"clipping": "adaptive"}, adaptiveclipping_mod)]
)
def test_a_clipped_answer_is_the_one_of_flowers_mod(norm: float, kind: dict[str, str], flowers: Any) -> None:
    message = asked(clipping_norm=norm, **kind)
    ours, theirs = clip_when_asked(message, context(), trained), flowers(message, context(), trained)
    assert dict(ours.content["metrics"]) == dict(theirs.content["metrics"])
    assert list(ours.content) == list(theirs.content)
    for name, value in messages.from_record(theirs.content["arrays"]).items():
        np.testing.assert_allclose(messages.from_record(ours.content["arrays"])[name], value, rtol=1e-6)


def test_nothing_is_clipped_unasked() -> None:
    reply = clip_when_asked(asked(), context(), trained)
    assert messages.from_record(reply.content["arrays"])["b"].tolist() == [9.0]


def test_an_error_passes_through() -> None:
    def fails(message: Message, _: Context) -> Message:
        return Message(Error(2, "no data"), reply_to=message)

    assert clip_when_asked(asked(clipping_norm=1.0), context(), fails).error.reason == "no data"


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf"), "1"])
def test_a_norm_that_is_none_is_refused(norm: Any) -> None:
    with pytest.raises(FormatError, match="clipping_norm is"):
        clip_when_asked(asked(clipping_norm=norm), context(), trained)
