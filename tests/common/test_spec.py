from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.errors import FormatError
from fedge.spec import Spec

GREY = Spec("image", (8, 6), "uint8", ("no", "yes"))
TABLE = Spec("features", (3,), "float32", ("a", "b", "c"), ("x", "y", "z"))
SIGNAL = Spec("signal", (50, 2), "float32", ("a", "b"), ("ax", "ay"))
TEXT = Spec("text", (16,), "uint8", tuple("\n ab"))


@pytest.mark.parametrize(
    "spec", [GREY, TABLE, SIGNAL, TEXT, Spec("image", (8, 6, 3), "float32", ("no", "yes"))]
)
def test_a_spec_survives_json(spec: Spec) -> None:
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_classes_channels_and_zeros_follow_from_the_fields() -> None:
    assert (GREY.classes, GREY.channels, TABLE.classes, TABLE.channels) == (2, 1, 3, 3)
    assert Spec("image", (8, 6, 3), "uint8", ("no", "yes")).channels == 3
    assert (SIGNAL.channels, SIGNAL.allows_missing, SIGNAL.numeric) == (2, True, True)
    assert (TEXT.channels, TEXT.allows_missing, TEXT.numeric) == (1, False, False)
    assert (GREY.zeros(2).shape, GREY.zeros(2).dtype) == ((2, 8, 6), np.uint8)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"kind": "sound"}, "kind 'sound'"),
        ({"kind": []}, "malformed"),
        ({"shape": [8]}, "does not fit kind"),
        ({"shape": [8, 0]}, "does not fit kind"),
        ({"shape": [8, 6, 2]}, "1 or 3 channels"),
        ({"shape": [8, 6, 1, 1]}, "malformed"),
        ({"shape": [True, 6]}, "malformed"),
        ({"shape": [8.0, 6]}, "malformed"),
        ({"shape": "86"}, "malformed"),
        ({"shape": [2**32, 2**32]}, "larger than"),
        ({"shape": [2**70, 1]}, "larger than"),
        ({"dtype": "int64"}, "dtype 'int64'"),
        ({"labels": ["only"]}, "1 labels"),
        ({"labels": ["a", "a"]}, "named once"),
        ({"labels": "ab"}, "malformed"),
        ({"labels": [1, 2]}, "malformed"),
        ({"labels": None}, "malformed"),
        ({"features": ["a"]}, "1 feature names for 8"),
    ],
)
def test_each_wrong_field_is_named(change: dict[str, Any], line: str) -> None:
    with pytest.raises(FormatError, match=line):
        Spec.from_json({**GREY.to_json(), **change})


@pytest.mark.parametrize(
    ("spec", "change", "line"),
    [
        (SIGNAL, {"shape": [50]}, "does not fit kind 'signal'"),
        (SIGNAL, {"dtype": "uint8"}, "kind 'signal' is float32, not uint8"),
        (SIGNAL, {"features": ["ax"]}, "1 feature names for 2"),
        (TEXT, {"shape": [16, 1]}, "does not fit kind 'text'"),
        (TEXT, {"dtype": "float32"}, "kind 'text' is uint8, not float32"),
        (TEXT, {"labels": ["a", "bc"]}, "each by itself"),
        (TEXT, {"labels": [chr(i) for i in range(257)]}, "at most 256"),
    ],
)
def test_each_wrong_field_of_signals_and_text_is_named(spec: Spec, change: dict[str, Any], line: str) -> None:
    with pytest.raises(FormatError, match=line):
        Spec.from_json({**spec.to_json(), **change})


@pytest.mark.slow
@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_any_json_value_is_a_spec_or_our_error(value: Any) -> None:
    with pytest.raises(FormatError):
        Spec.from_json(value)
