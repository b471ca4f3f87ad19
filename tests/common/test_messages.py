"""Every message through Flower's own serialisation, and everything that may be wrong with one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from fedge.config import Train
from fedge.errors import ConfigError, FormatError
from fedge.learning import messages, replies
from fedge.learning.messages import Instructions
from fedge.learning.terms import Terms
from fedge.spec import Spec
from fedge.statistics import Moments

SPEC = Spec("features", (2,), "float32", ("no", "yes"), ("age", "dose"))
MOMENTS = Moments(np.array([3.0, 2.0]), np.array([0.1, -4.0]), np.array([5.0, 1e30]))


@pytest.fixture(autouse=True)
def identity() -> None:
    """A Message asks the process who it is."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1


def instructions(**changes: Any) -> Instructions:
    values: dict[str, Any] = {
        "task": "tables",
        "spec": SPEC,
        "model": "mlp",
        "noise_filter": "clip",
        "moments": MOMENTS,
        "train": Train(epochs=3, learning_rate=1 / 3, augment=("noise:0.1",)),
        "seed": 2**31 - 1,
        "update": "gradient",
        "round": 7,
    }
    return Instructions(**{**values, **changes})


def sent(content: RecordDict, kind: str = "train") -> Message:
    """A message whose content has been bytes, as on a network."""
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

    return Message(recorddict_from_proto(recorddict_to_proto(content)), 3, kind)


def config_of(**changes: Any) -> RecordDict:
    record = instructions().to_config()
    for name, value in changes.items():
        key = name.replace("_", "-") if name.startswith(("moments", "server", "proximal")) else name
        if value is None:
            del record[key]
        else:
            record[key] = value
    return RecordDict({messages.CONFIG: record})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"task_digest": "ab" * 32},
        {"moments": None},
        {"round": 0, "update": "weights", "noise_filter": "none", "model": ""},
    ],
)
def test_instructions_survive_a_message(changes: dict[str, Any]) -> None:
    original = instructions(**changes)
    found = Instructions.of(sent(RecordDict({messages.CONFIG: original.to_config()})))
    if original.moments is not None:
        assert found.moments is not None
        for name in ("count", "total", "squares"):
            assert getattr(found.moments, name).tolist() == getattr(original.moments, name).tolist()
    else:
        assert found.moments is None
    plain = [name for name in Instructions.__slots__ if name != "moments"]
    assert all(getattr(found, name) == getattr(original, name) for name in plain)


def test_a_record_that_is_changed_in_place_is_read_again() -> None:
    record = instructions().to_config()
    message = Message(RecordDict({messages.CONFIG: record}), 3, "train")
    first = Instructions.of(message)
    assert Instructions.of(message) is first
    record["moments-count"][0] = 4.0  # type: ignore[index]
    found = Instructions.of(message).moments
    assert found is not None
    assert found.count.tolist() == [4.0, 2.0]
    record["seed"] = 1
    assert Instructions.of(message).seed == 1
    record["seed"] = True
    with pytest.raises(FormatError, match="seed is a bool"):
        Instructions.of(message)


def test_the_proximal_term_that_flowers_fedprox_adds_is_read() -> None:
    assert Instructions.of(sent(config_of())).proximal_mu == 0.0
    assert Instructions.of(sent(config_of(proximal_mu=0.25))).proximal_mu == 0.25


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        *(
            ({key: None}, "malformed")
            for key in ("task", "spec", "model", "filter", "train", "seed", "update")
        ),
        ({"server_round": None}, "server-round"),
        ({"task": 5}, "task is a int, not text"),
        ({"model": b"mlp"}, "model is a bytes, not text"),
        ({"update": "deltas"}, "update 'deltas'"),
        ({"update": ["weights"]}, "update"),
        ({"filter": "clop"}, "filter 'clop'"),
        ({"spec": "{"}, "malformed"),
        ({"spec": "[" * 100_000}, "malformed"),
        ({"spec": "[]"}, "spec: malformed"),
        ({"spec": json.dumps({**SPEC.to_json(), "labels": ["one"]})}, "spec: 1 labels"),
        ({"seed": "0"}, "seed is a str, not a number"),
        ({"seed": True}, "seed is a bool, not a number"),
        ({"seed": -1}, "seed = -1 is out of range"),
        ({"seed": float("nan")}, "seed = nan is out of range"),
        ({"seed": float("inf")}, "seed = inf is out of range"),
        ({"server_round": -3}, "server-round = -3 is out of range"),
        ({"proximal_mu": -0.5}, "proximal-mu = -0.5 is out of range"),
        ({"proximal_mu": float("nan")}, "proximal-mu = nan is out of range"),
        ({"proximal_mu": "big"}, "proximal-mu is a str"),
        ({"moments_total": None}, "moments-total"),
        ({"moments_count": [1.0]}, "moments are not 2 finite numbers"),
        ({"moments_total": [1.0, float("inf")]}, "moments are not 2 finite numbers"),
        ({"moments_squares": ["a", "b"]}, "malformed"),
        ({"moments_squares": 5.0}, "moments are not 2 finite numbers"),
    ],
)
def test_each_malformed_key_is_refused_by_name(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(FormatError, match=line):
        Instructions.of(sent(config_of(**changes)))


@pytest.mark.parametrize("train", ["{", "[]", '{"epochs": 0}', '{"batch_size": "many"}', '{"new": 1}'])
def test_train_settings_out_of_range_are_refused(train: str) -> None:
    with pytest.raises(ConfigError, match="train settings in the message"):
        Instructions.of(sent(config_of(train=train)))


def test_a_message_without_a_config_is_refused() -> None:
    with pytest.raises(FormatError, match="KeyError"):
        Instructions.of(sent(RecordDict()))


@given(
    st.sampled_from(
        ["task", "spec", "model", "filter", "train", "seed", "update", "server-round", "moments-count"]
    ),
    st.text(max_size=9) | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.lists(st.floats(), max_size=3),
)
def test_any_value_is_read_or_refused(key: str, value: Any) -> None:
    content = config_of()
    content.config_records[messages.CONFIG][key] = value
    try:
        found = Instructions.of(sent(content))
    except (FormatError, ConfigError):
        return
    assert found.seed >= 0


def reply(arrays: dict[str, Any]) -> Message:
    message = sent(RecordDict(), messages.QUERY_MOMENTS)
    metrics = MetricRecord({messages.EXAMPLES: 4})
    content = RecordDict({messages.MOMENTS: messages.to_record(arrays), messages.METRICS: metrics})
    return sent(Message(content, reply_to=message).content)


PAIR = Spec("features", (2,), "float32", ("a", "b"))


def good(**changes: Any) -> dict[str, Any]:
    arrays: dict[str, Any] = {name: getattr(MOMENTS, name) for name in ("count", "total", "squares")}
    return {name: value for name, value in {**arrays, **changes}.items() if value is not None}


def test_moments_survive_a_reply() -> None:
    made = replies.moments_reply(sent(RecordDict(), messages.QUERY_MOMENTS), MOMENTS, 4)
    found = replies.moments_of(sent(made.content), PAIR)
    assert [found.count.tolist(), found.total.tolist()] == [MOMENTS.count.tolist(), MOMENTS.total.tolist()]
    assert found.squares.tolist() == MOMENTS.squares.tolist()
    assert made.content.metric_records[messages.METRICS][messages.EXAMPLES] == 4


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"count": None}, "malformed"),
        ({"count": np.zeros(3)}, "three float64 vectors of width 2"),
        ({"count": np.zeros(2, np.float32)}, "three float64 vectors"),
        ({"total": np.zeros((2, 1))}, "three float64 vectors"),
        ({"total": np.array(["a", "b"])}, "three float64 vectors"),
        ({"count": np.array([-1.0, 1])}, "no data can give"),
        ({"squares": np.array([-1.0, 1])}, "no data can give"),
        ({"total": np.array([np.nan, 1])}, "no data can give"),
        ({"squares": np.array([np.inf, 1])}, "no data can give"),
        ({"count": np.array([5.0, 1])}, "no data can give"),  # more values than examples
        ({"total": np.array([1e20, 0])}, "no data can give"),  # Cauchy and Schwarz
        ({"squares": np.array([1.7e308, 1])}, "no data can give"),  # beyond float32 squared
    ],
)
def test_moments_that_no_data_can_give_are_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(FormatError, match=line):
        replies.moments_of(reply(good(**changes)), PAIR)


@pytest.mark.parametrize(
    ("data", "stype"),
    [
        (b"", "numpy.ndarray"),
        (b"garbage", "numpy.ndarray"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f8',", "numpy.ndarray"),
        (b"abc", "another"),
    ],
)
def test_bytes_that_are_no_array_are_refused(data: bytes, stype: str) -> None:
    record = messages.to_record(good())
    record["count"] = Array(dtype="float64", shape=(2,), stype=stype, data=data)
    with pytest.raises(ValueError, match="not an array"):
        messages.from_record(record)
    with pytest.raises(FormatError, match="moments: malformed"):
        replies.moments_of(sent(RecordDict({messages.MOMENTS: record})), PAIR)


def test_a_reply_without_moments_is_refused() -> None:
    with pytest.raises(FormatError, match="no arrays named 'moments'"):
        replies.moments_of(sent(RecordDict()), PAIR)


def test_objects_are_never_unpickled() -> None:
    import io

    file = io.BytesIO()
    np.save(file, np.array([print], object), allow_pickle=True)
    record = ArrayRecord(
        {"x": Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=file.getvalue())}
    )
    with pytest.raises(ValueError, match="pickle"):
        messages.from_record(record)


def test_arrays_keep_names_order_types_and_scalars() -> None:
    arrays = {"w": np.float32([[1, 2]]), "a": np.array(3, np.int64), "h": np.float16([0.5])}
    found = messages.from_record(
        sent(RecordDict({"x": messages.to_record(arrays)})).content.array_records["x"]
    )
    assert list(found) == ["w", "a", "h"]
    for name, value in arrays.items():
        assert (found[name].dtype, found[name].tolist()) == (value.dtype, value.tolist())


@pytest.mark.parametrize(
    ("make", "metrics"),
    [
        (
            lambda m: replies.train_reply(m, {"w": np.zeros(2)}, examples=5, loss=0.25),
            {"num-examples": 5, "train_loss": 0.25},
        ),
        (
            lambda m: replies.evaluate_reply(m, examples=5, loss=0.25, accuracy=0.5),
            {"num-examples": 5, "loss": 0.25, "accuracy": 0.5},
        ),
    ],
)
def test_replies_carry_the_metrics_under_flowers_names(
    make: Callable[[Message], Message], metrics: dict[str, float]
) -> None:
    made = make(sent(RecordDict({messages.CONFIG: ConfigRecord()})))
    assert dict(sent(made.content).content.metric_records[messages.METRICS]) == metrics
    assert made.metadata.dst_node_id == 9


def test_all_who_read_a_shared_record_get_the_same_arrays_and_none_can_write_to_them() -> None:
    record = messages.to_record({"w": np.zeros(3, np.float32)})
    one, two = messages.from_record(record)["w"], messages.from_record(record)["w"]
    assert one is two
    with pytest.raises(ValueError, match="read-only"):
        one[0] = 1
    own = messages.to_record({"w": np.zeros(3, np.float32)}, shared=False)
    messages.from_record(own)["w"][0] = 1
    assert messages.from_record(own)["w"].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    "terms",
    [Terms(), Terms(steps=True), Terms(control=True), Terms(own=("a.weight", "b")), Terms(pull=0.25)],
)
def test_terms_come_back_and_only_what_is_asked_for_is_said(terms: Terms) -> None:
    assert Instructions.of(sent(config_of(**terms.said()))).terms == terms
    assert len(terms.said()) == (terms != Terms())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("terms-pull", -1.0),
        ("terms-pull", "1"),
        ("terms-pull", math.nan),
        ("terms-own", [1]),
        ("terms-own", "w"),
    ],
)
def test_terms_that_are_none_are_refused(key: str, value: Any) -> None:
    with pytest.raises(FormatError, match="config is malformed"):
        Instructions.of(sent(config_of(**{key: value})))
