"""Golden inputs: the same everywhere from a seed, and a file that is one spelling or refused."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge import golden
from fedge.errors import FormatError
from fedge.files import sha256
from fedge.golden import Golden
from fedge.spec import Spec

IMAGES = Spec("image", (2, 2), "uint8", ("no", "yes"))
SIGNALS = Spec("signal", (4, 1), "float32", ("no", "yes"))
TEXT = Spec("text", (5,), "uint8", ("a", "b", "c"))


def answers(spec: Spec, value: float = 0.5) -> np.ndarray:
    return np.full((golden.count_of(spec), spec.classes), value, np.float32)


def test_inputs_are_those_worked_out_by_hand_with_python_integers():
    """SplitMix64 of seed 0 begins e220a8397b1dcdaf, 6e789e6aa1b965f4, 06c45d188009454f, f88bb8a8724c81ec."""
    x = golden.inputs_of(IMAGES, 0)
    assert x.shape == (16, 2, 2)
    assert x[0].ravel().tolist() == [0xE2, 0x6E, 0x06, 0xF8]
    assert x[1].ravel().tolist() == [0, 64, 128, 192]  # one ramp over four elements
    assert x[2].ravel().tolist() == [0, 0, 0, 0]
    y = golden.inputs_of(SIGNALS, 0)
    assert y[1].ravel().tolist() == [-1.0, -0.5, 0.0, 0.5]
    assert y[0].ravel()[0] == np.float32(2 * (0xE220A8 / 2**24) - 1)
    assert np.abs(y).max() > 100  # the last ones are measured in larger units


def test_text_gets_characters_of_its_vocabulary():
    x = golden.inputs_of(TEXT, 7)
    assert set(x.ravel().tolist()) == {0, 1, 2}
    assert x.dtype == np.uint8


@pytest.mark.parametrize("spec", [IMAGES, SIGNALS, TEXT])
def test_another_seed_gives_other_inputs_and_the_same_seed_the_same(spec):
    one, again, other = (golden.inputs_of(spec, seed) for seed in (1, 1, 2**64 - 1))
    assert one.tobytes() == again.tobytes() != other.tobytes()


def test_large_inputs_and_many_classes_are_fewer_and_the_file_stays_within_its_bound():
    large = Spec("image", (2048, 1024), "uint8", ("no", "yes"))
    many = Spec("features", (3,), "float32", tuple(map(str, range(100_000))))
    assert golden.count_of(large) == 2
    assert golden.count_of(many) == 1
    data = golden.write(many, 1, answers(many, 1e-5))
    assert len(data) <= golden.MAX_BYTES
    assert Golden.from_bytes(data, many).probabilities.shape == (1, 100_000)


def test_what_is_written_is_read_to_a_step_of_the_grid():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1], 16).astype(np.float32)
    found = Golden.from_bytes(golden.write(IMAGES, 5, probabilities, latency_s=0.25), IMAGES)
    assert np.abs(found.probabilities - probabilities).max() <= 0.5 / 65535 + 1e-7
    assert found.x.tobytes() == golden.inputs_of(IMAGES, 5).tobytes()
    assert found.latency_s == 0.25
    assert math.isinf(Golden.from_bytes(golden.write(IMAGES, 5, probabilities), IMAGES).latency_s)


@pytest.mark.parametrize(
    ("probabilities", "why"),
    [
        (answers(IMAGES, float("nan")), "outside 0 to 1"),
        (answers(IMAGES, 1.5), "outside 0 to 1"),
        (answers(IMAGES)[:3], "probabilities \\(3, 2\\)"),
    ],
)
def test_answers_that_are_no_probabilities_are_not_written(probabilities, why):
    with pytest.raises(FormatError, match=why):
        golden.write(IMAGES, 0, probabilities)


GOOD = golden.write(IMAGES, 3, answers(IMAGES))


def changed(offset: int, data: bytes) -> bytes:
    return GOOD[:offset] + data + GOOD[offset + len(data) :]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "0 bytes"),
        (GOOD[:-1], "121 bytes, not 122"),
        (GOOD + b"\0", "123 bytes, not 122"),
        (bytes(golden.MAX_BYTES + 1), "it must have"),
        (changed(0, b"FGLX"), "update it"),
        (changed(4, b"\2"), "update it"),
        (changed(5, b"\1"), "1 inputs and 2 classes, not the 16"),
        (changed(10, b"\4"), "other inputs"),
        (changed(18, struct.pack("<d", -0.0)), "latency budget of -0.0"),
        (changed(18, struct.pack("<d", math.nan)), "latency budget of nan"),
        (changed(26, bytes(32)), "other inputs"),
    ],
)
def test_other_bytes_are_refused(data, why):
    assert len(GOOD) == 58 + 16 * 2 * 2
    with pytest.raises(FormatError, match=why):
        Golden.from_bytes(data, IMAGES)


@given(st.binary(max_size=400))
def test_no_bytes_do_more_than_be_refused(data):
    for candidate in (data, GOOD[:10] + data):
        with pytest.raises(FormatError):
            Golden.from_bytes(candidate, IMAGES)


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_file_that_is_read_is_the_one_spelling_of_what_it_says(position, change):
    data = changed(position, bytes([GOOD[position] ^ change]))
    try:
        found = Golden.from_bytes(data, IMAGES)
    except FormatError:
        return
    seed = int.from_bytes(data[10:18], "little")
    assert sha256(golden.write(IMAGES, seed, found.probabilities, latency_s=found.latency_s)) == sha256(data)
