"""Windows over the wire: unchanged, bounded, and refused with the reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedge.errors import FormatError
from fedge.telemetry.sketch import CELLS, CONFIDENCE_BINS, LATENCY_BINS, ROUTES, Sketch
from fedge.telemetry.window import MAX_BYTES, Window
from fedge.wire.v1.telemetry_pb2 import TelemetryWindow

noisy = st.integers(-(2**40), 2**40)


@st.composite
def sketches(draw: st.DrawFn) -> Sketch:
    features, classes = draw(st.integers(0, 64)), draw(st.integers(2, 256))
    shapes = ((features, CELLS), CONFIDENCE_BINS, classes, LATENCY_BINS, len(ROUTES))
    return Sketch(*(draw(arrays(np.int64, shape, elements=noisy)) for shape in shapes))


def window(sketch: Sketch, epsilon: float = 1.0) -> Window:
    reference = "ab" * 32 if len(sketch.inputs) else ""
    return Window(7, 3600, 3, sketch, reference, epsilon, 1.5, 2**30, 4)


@pytest.mark.slow
@given(sketches())
def test_a_window_travels_unchanged_within_its_bound(sketch: Sketch) -> None:
    sent = window(sketch)
    data = sent.to_bytes()
    assert len(data) <= MAX_BYTES
    found = Window.from_bytes(data)
    assert found.to_bytes() == data
    assert all(
        (a == b).all() for a, b in zip(found.sketch.parts().values(), sketch.parts().values(), strict=True)
    )
    assert (found.slot, found.period_s, found.version, found.reference) == (7, 3600, 3, sent.reference)
    assert (found.epsilon, found.cpu_s, found.memory_bytes, found.lost) == (1.0, 1.5, 2**30, 4)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        Window.from_bytes(data)


def exact() -> Sketch:
    sketch = Sketch.empty(1, 2)
    sketch.inputs[0, 3] = sketch.confidence[5] = sketch.answers[1] = sketch.routes[0] = 2
    return sketch


def test_counts_without_noise_must_add_up() -> None:
    assert Window(0, 60, 1, exact(), "0" * 64).sketch.count == 2
    for name in ("inputs", "confidence", "answers"):
        wrong = exact()
        wrong.parts()[name].flat[0] += 1
        with pytest.raises(FormatError, match="do not add up"):
            Window(0, 60, 1, wrong, "0" * 64)
    negative = exact()
    negative.latency[0] = -1
    with pytest.raises(FormatError, match="do not add up"):
        Window(0, 60, 1, negative, "0" * 64)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"slot": -1}, "slot"),
        ({"slot": 2**41}, "slot"),
        ({"period_s": 1}, "period_s"),
        ({"version": 0}, "version"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"cpu_s": float("inf")}, "cpu_s"),
        ({"memory_bytes": 2**60}, "memory_bytes"),
        ({"reference": ""}, "1 features"),
        ({"reference": "xyz"}, "SHA-256"),
    ],
)
def test_a_window_out_of_range_is_refused(fields: dict[str, object], reason: str) -> None:
    good = Window(0, 60, 1, exact(), "0" * 64)
    with pytest.raises(FormatError, match=reason):
        replace(good, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"format": 2}, "format 2"),
        ({"inputs": [1] * 12}, "telemetry"),
        ({"confidence": [1] * 19}, "confidence"),
        ({"answers": [1] * 300}, "answers"),
        ({"routes": [2**50, 0, 0, 0, 0]}, "counts more"),
    ],
)
def test_a_message_with_other_sizes_is_refused(fields: dict[str, object], reason: str) -> None:
    good = TelemetryWindow.FromString(window(exact()).to_bytes())
    for name in fields:
        good.ClearField(name)
    good.MergeFrom(TelemetryWindow(**fields))  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=reason):
        Window.from_bytes(good.SerializeToString())


def test_a_window_that_is_too_long_is_not_even_parsed() -> None:
    with pytest.raises(FormatError, match="longer than"):
        Window.from_bytes(b"\0" * (MAX_BYTES + 1))
