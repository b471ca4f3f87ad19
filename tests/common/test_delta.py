"""Deltas between model files: whatever the files, the same bytes come out, and a bad delta harms nobody."""

from __future__ import annotations

import tracemalloc
from contextlib import suppress

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from fedge import delta
from fedge.artefact import pack
from fedge.errors import FormatError
from fedge.grids import grid

RNG = np.random.default_rng(0)


def graph(*arrays: np.ndarray, name: str = "g") -> bytes:
    made = onnx.GraphProto(name=name)
    made.initializer.extend(numpy_helper.from_array(array, f"t{i}") for i, array in enumerate(arrays))
    return onnx.ModelProto(ir_version=10, graph=made).SerializeToString(deterministic=True)


def on_grid(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return (codes * scales.astype(np.float16).astype(np.float32)).astype(np.float32) + np.float32(0)


CODES = RNG.integers(-7, 8, (16, 100))
CODES[:, 0] = 7
SCALES = RNG.uniform(0.01, 0.02, (16, 1))
EIGHT = np.clip(RNG.normal(0, 16, (128, 300)).round(), -64, 64).astype(np.int8)
PLAIN = RNG.normal(size=(20, 30)).astype(np.float32)
BASE = graph(on_grid(CODES, SCALES), EIGHT[:9], PLAIN, np.arange(40, dtype=np.int64))


def moved(codes: np.ndarray, share: float, most: int) -> np.ndarray:
    """The same with a share of the codes one step up or down."""
    steps = RNG.choice([-1, 0, 1], p=[share / 2, 1 - share, share / 2], size=codes.shape)
    return np.clip(codes + steps, -most, most).astype(codes.dtype)


NEXT = graph(
    on_grid(moved(CODES, 0.05, 7), SCALES * 1.001),
    moved(EIGHT[:9], 0.05, 64),
    PLAIN * np.float32(1.0001),
    np.arange(40, dtype=np.int64),
)


@pytest.mark.slow
def test_a_round_later_the_delta_is_a_tenth_of_the_whole() -> None:
    made = delta.make(BASE, NEXT)
    assert delta.apply(BASE, made, len(NEXT)) == NEXT
    weights = graph(EIGHT), graph(moved(EIGHT, 0.05, 64))
    # 38,400 codes of which one in twenty moved: H(.05) + .05 bits = .336 each, 1,615 bytes, and some to learn
    assert 1500 < len(delta.make(*weights)) < 1800
    assert len(pack(weights[1])) > 15 * len(delta.make(*weights))


def test_equal_tensors_take_a_few_bytes_each() -> None:
    assert len(delta.make(BASE, BASE)) < 60


def test_codes_are_predicted_from_the_values_under_new_scales() -> None:
    codes = np.round(RNG.normal(0, 30, (16, 400))).clip(-126, 126).astype(np.int64)
    codes[:, 0] = 127
    wider = np.round(codes / 1.25)  # the same values on a grid whose steps are a quarter wider
    wider[:, 0] = 102
    before, after = on_grid(codes, np.full((16, 1), 0.0625)), on_grid(wider, np.full((16, 1), 0.078125))
    assert grid(after.reshape(1, 16, 400)) is not None
    assert len(delta.make(graph(before), graph(after))) < 300  # of 6,400 codes nearly all as predicted


def tensors() -> st.SearchStrategy[np.ndarray]:
    kinds = st.sampled_from([np.int8, np.float32, np.float16, np.int64, np.uint8, np.float64])
    return st.builds(
        lambda kind, seed, size: np.frombuffer(
            np.random.default_rng(seed).bytes(size * np.dtype(kind).itemsize), kind
        ),
        kinds,
        st.integers(0, 9),
        st.integers(1, 90),
    )


@pytest.mark.slow
@given(st.lists(tensors(), max_size=4), st.lists(tensors(), max_size=4))
def test_any_two_graphs_and_any_bits_in_their_tensors(old: list[np.ndarray], new: list[np.ndarray]) -> None:
    base, after = graph(*old), graph(*new, name="h")
    assert delta.apply(base, delta.make(base, after), len(after)) == after


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_any_two_files(base: bytes, after: bytes) -> None:
    assert delta.apply(base, delta.make(base, after), len(after)) == after


MADE = delta.make(BASE, NEXT)


@pytest.mark.slow
@given(st.data())
def test_a_damaged_delta_is_refused_or_gives_so_many_bytes(data: st.DataObject) -> None:
    damaged = bytearray(MADE)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(MADE) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(MADE)))
    for tried in (bytes(damaged), bytes(damaged)[:cut], bytes(damaged) + b"x"):
        with suppress(FormatError):
            assert len(delta.apply(BASE, tried, len(NEXT))) == len(NEXT)


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_a_forged_table_allocates_no_more_than_declared(skeleton: bytes, stream: bytes) -> None:
    short = delta._deflated(skeleton, delta._rest(BASE))
    tried = delta._HEADER.pack(delta.MAGIC, len(short)) + short + stream
    with suppress(FormatError):
        delta.apply(BASE, tried, 5000)


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**31 - 1])
def test_another_declared_length_is_refused_before_it_is_allocated(length: int) -> None:
    tracemalloc.start()
    with pytest.raises(FormatError):
        delta.apply(BASE, MADE, length)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


def test_a_delta_for_another_base_gives_other_bytes_or_is_refused() -> None:
    other = graph(on_grid(CODES, SCALES * 2), EIGHT[9:18], PLAIN, np.arange(40, dtype=np.int64))
    with suppress(FormatError):
        assert delta.apply(other, MADE, len(NEXT)) != NEXT


def test_other_bytes_are_no_delta() -> None:
    for wrong in (b"", b"FDL", b"FDL\x02aaaa", b"FPK\x01aaaaaaaa", MADE[:8]):
        with pytest.raises(FormatError, match="delta"):
            delta.apply(BASE, wrong, len(NEXT))
