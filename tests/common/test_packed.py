from __future__ import annotations

import lzma
import struct
import tracemalloc
import zlib
from contextlib import suppress

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from fedge import grids, packed, varints
from fedge.errors import FormatError
from fedge.files import sha256
from fedge.onnx_layout import stored_tensors
from fedge.onnx_words import WORDS


def model(*tensors) -> bytes:
    """An ONNX file of these constants."""
    graph = onnx.GraphProto(name="g")
    graph.initializer.extend(numpy_helper.from_array(array, f"t{i}") for i, array in enumerate(tensors))
    return onnx.ModelProto(ir_version=10, graph=graph).SerializeToString(deterministic=True)


def on_grid(shape, levels, axis, *, seed=0, coarse=False):
    """Float32 values on a random grid, one scale for each place along the axis."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-levels, levels + 1, shape)
    scales = rng.uniform(0.001, 0.3, shape[axis]).astype(np.float16)
    if coarse:
        scales = (scales.view(np.uint16) & 0xFF80).view(np.float16)
    wide = scales.astype(np.float32).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return (codes * wide).astype(np.float32) + np.float32(0)


SMALL = model(on_grid((3, 5), 1, 0), np.array([1.5, 2.25], np.float32))
WIRE = packed.pack(SMALL)


def made(skeleton: bytes, stream: bytes = bytes(4), *, checksum: int = 0) -> bytes:
    """A wire with any skeleton, as an attacker would write it."""
    short = packed._deflated(skeleton)
    return packed._HEADER.pack(packed.MAGIC, checksum, len(short)) + short + stream


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=2000))
def test_any_bytes_come_back(data: bytes) -> None:
    assert packed.unpack(packed.pack(data), len(data)) == data


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_any_tensors_come_back(data) -> None:
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)
    dtypes = st.sampled_from([np.float32, np.float16, np.float64, np.int8, np.uint8, np.int64])
    arrays = data.draw(st.lists(hnp.arrays(dtypes, shapes), max_size=4))
    installed = model(*arrays)
    assert packed.unpack(packed.pack(installed), len(installed)) == installed


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(st.permutations(["plain", "ternary", "bytes", "short", "whole numbers"]), st.integers(0, 2**32 - 1))
def test_tensors_of_all_kinds_come_back_in_any_order(order, seed) -> None:
    rng = np.random.default_rng(seed)
    kinds = {
        "plain": rng.normal(size=(20, 30)).astype(np.float32),
        "ternary": on_grid((16, 9), 1, 0, seed=seed),
        "bytes": on_grid((4, 40), 127, 1, seed=seed, coarse=True),
        "short": rng.normal(size=3).astype(np.float32),
        "whole numbers": rng.integers(-128, 128, 700).astype(np.int8),
    }
    installed = model(*(kinds[name] for name in order))
    wire = packed.pack(installed)
    assert packed.unpack(wire, len(installed)) == installed
    assert len(wire) < 0.95 * len(installed)


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from([1, 7, 127]),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    st.integers(0, 2),
    st.integers(0, 2**32 - 1),
)
def test_a_tensor_on_a_grid_is_found_whatever_the_axis(levels, shape, axis, seed) -> None:
    values = on_grid(shape, levels, axis, seed=seed)
    installed = model(values)
    (stored,) = stored_tensors(installed)
    piece = packed._on_grid(stored, values.tobytes())
    if values.size >= packed._LEAST_GRID and values.size // shape[axis] >= grids._LEAST_CHANNEL:
        assert piece is not None
    if piece is not None:
        assert piece.how.levels <= levels
    assert packed.unpack(packed.pack(installed), len(installed)) == installed


@pytest.mark.parametrize(("levels", "bits"), [(1, np.log2(3)), (7, np.log2(15)), (127, np.log2(255))])
def test_weights_take_the_bits_of_their_codes(levels, bits) -> None:
    installed = model(on_grid((40, 500), levels, 0, coarse=True))
    expected = 20_000 * bits / 8 + 40 + 60  # codes, scales, the rest of the file
    assert len(packed.pack(installed)) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_transposed_weights_take_no_more() -> None:
    values = on_grid((40, 500), 1, 0)
    assert abs(len(packed.pack(model(values))) - len(packed.pack(model(np.ascontiguousarray(values.T))))) < 60


def test_scales_that_one_scale_divides_are_kept_apart_where_that_is_smaller() -> None:
    # 0.25 and 0.75 are one grid of three levels for all, and two of one level: 1.6 instead of 2.3 bits.
    codes = np.random.default_rng(0).integers(-1, 2, (2, 4000))
    installed = model((codes * np.array([[0.25], [0.75]])).astype(np.float32) + np.float32(0))
    (stored,) = stored_tensors(installed)
    piece = packed._on_grid(stored, installed[stored.offset : stored.offset + stored.length])
    assert (piece.how.shape, piece.how.levels) == ((1, 2, 4000), 1)
    assert len(packed.pack(installed)) < 8000 * np.log2(3) / 8 + 80


def test_the_scale_is_the_largest_that_does() -> None:
    # 0.75 = 3 * 0.25 and 0.5 = 2 * 0.25; 0.75 / 1 and 0.75 / 2 make 0.5 no whole number.
    codes, scales = grids.grid(np.array([[[0.75], [-0.5]], [[0.5], [-0.5]]], np.float32))
    assert scales.tolist() == [0.25, 0.5]
    assert codes.tolist() == [[[3], [-1]], [[2], [-1]]]


@pytest.mark.parametrize(
    "values",
    [
        np.full((4, 4), np.nan, np.float32),
        np.full((4, 4), np.inf, np.float32),
        np.full((4, 4), 1e-30, np.float32),
        np.full((4, 4), 1e30, np.float32),
        np.full((4, 4), -0.0, np.float32),
        np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4),
    ],
)
def test_what_lies_on_no_grid_stays_as_it_is(values) -> None:
    installed = model(values)
    (stored,) = stored_tensors(installed)
    assert packed._on_grid(stored, values.tobytes()) is None
    assert packed.unpack(packed.pack(installed), len(installed)) == installed


def test_zeros_and_subnormal_scales_are_on_a_grid() -> None:
    tiny = np.float32(np.float16(6e-8))  # the smallest float16
    for values in (np.zeros((4, 4), np.float32), np.full((4, 4), 5 * tiny, np.float32)):
        (stored,) = stored_tensors(model(values))
        assert packed._on_grid(stored, values.tobytes()) is not None


def test_float_weights_gain_by_planes_of_bytes() -> None:
    installed = model(np.random.default_rng(0).normal(0, 0.05, (100, 100)).astype(np.float32))
    wire = packed.pack(installed)
    assert len(wire) < 0.88 * len(installed)
    assert len(wire) < len(lzma.compress(installed, preset=9))


def test_the_bytes_are_those_worked_by_hand() -> None:
    # One tensor at byte 0 of 32: kind 0, shape (1, 1, 8), 1 level, scales of a byte; 0.5 is 0x3800, so 0x70.
    skeleton = b"\x01" + b"\x00\x00\x01\x01\x08\x01\x01"
    values = np.array([0.5, 0, -0.5, 0.5, 0.5, 0, 0, 0.5], "<f4").tobytes()
    codes = np.array([2, 1, 0, 2, 2, 1, 1, 2], np.uint8)
    stream = packed.encode([(np.array([0x70], np.uint8), 256), (codes[:0], 128), (codes, 3)])
    wire = made(skeleton, stream, checksum=zlib.crc32(values))
    assert wire[:12] == b"FPK\x01" + struct.pack("<II", zlib.crc32(values), len(wire) - 12 - len(stream))
    assert packed.unpack(wire, 32) == values


def test_every_truncation_is_refused() -> None:
    for length in range(len(WIRE)):
        with pytest.raises(FormatError):
            packed.unpack(WIRE[:length], len(SMALL))


def test_every_flipped_bit_is_refused_or_changes_nothing() -> None:
    for bit in range(8 * len(WIRE)):
        bad = bytearray(WIRE)
        bad[bit // 8] ^= 1 << bit % 8
        with suppress(FormatError):
            assert packed.unpack(bytes(bad), len(SMALL)) == SMALL


@pytest.mark.parametrize("declared", [0, 1, len(SMALL) - 1, len(SMALL) + 1, 10 * len(SMALL)])
def test_another_length_than_declared_is_refused(declared) -> None:
    with pytest.raises(FormatError):
        packed.unpack(WIRE, declared)


@pytest.mark.parametrize("wire", [b"", b"FPK", b"FPK\x02" + WIRE[4:], WIRE + b"x", WIRE + b"xy", WIRE + WIRE])
def test_other_bytes_are_refused(wire) -> None:
    with pytest.raises(FormatError):
        packed.unpack(wire, len(SMALL))


def test_the_dictionary_is_the_one_of_this_version() -> None:
    assert sha256(WORDS) == "86222bd6f1f7f25c0fdea304f050b5fb53dbbb6c69b4c087297a32fe11c25ec1"


BIG = varints.number(2**31)
TABLES = {
    "more tensors than a table may have": varints.number(packed.MAX_TENSORS + 1),
    "a count without an end": b"\xff" * 9,
    "a shape larger than the file": b"\x01\x00\x00" + BIG + b"\x01\x01" + b"\x01\x02",
    "a shape whose product is huge": b"\x01\x00\x00" + BIG + BIG + BIG + b"\x01\x02",
    "a shape without elements": b"\x01\x00\x00\x00\x01\x01\x01\x02",
    "too many levels": b"\x01\x00\x00\x01\x01\x08\x80\x01",
    "no such scale": b"\x01\x00\x00\x01\x01\x08\x01\x03",
    "planes larger than the file": b"\x01\x00\x01\x01" + BIG,
    "planes of no width": b"\x01\x00\x01\x00\x04",
    "planes of nine bytes": b"\x01\x00\x01\x09\x04",
    "a gap larger than the file": b"\x01" + BIG + b"\x01\x01\x04",
    "an unknown kind": b"\x01\x00\x02\x01\x04",
    "nothing at all": b"",
    "only a table": b"\x01\x00\x01\x01\x04",
    "more literal bytes than the file has": b"\x00" + bytes(1001),
    "fewer literal bytes than the file has": b"\x00" + bytes(999),
    "the tensors of a larger file": b"\x02" + 2 * b"\x00\x01\x04\x80\x01",
}


@pytest.mark.parametrize("skeleton", TABLES.values(), ids=TABLES)
def test_a_table_that_does_not_fit_is_refused_before_anything_is_made(skeleton) -> None:
    wire = made(skeleton)
    tracemalloc.start()
    with pytest.raises(FormatError):
        packed.unpack(wire, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_a_skeleton_that_inflates_beyond_the_file_is_refused() -> None:
    wire = made(b"\x00" + bytes(30_000_000))
    tracemalloc.start()
    with pytest.raises(FormatError, match="more than 1000 bytes"):
        packed.unpack(wire, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.slow
def test_unpacking_takes_four_times_the_file_in_memory_at_most() -> None:
    installed = model(
        on_grid((300, 1000), 7, 0), np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    )
    wire = packed.pack(installed)
    tracemalloc.start()
    packed.unpack(wire, len(installed))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(installed)


@pytest.mark.slow
def test_thousands_of_damaged_wires_are_refused_or_change_nothing() -> None:
    installed = model(on_grid((8, 60), 7, 0), on_grid((9, 5), 1, 1), np.arange(400, dtype=np.float32))
    wire = packed.pack(installed)
    skeleton = packed._inflated(wire[12 : 12 + packed._HEADER.unpack_from(wire)[2]], len(installed))
    stream = wire[12 + packed._HEADER.unpack_from(wire)[2] :]
    rng = np.random.default_rng(0)
    for trial in range(4000):
        source = bytearray(
            wire if trial % 2 else skeleton
        )  # half of them with a skeleton that still inflates
        for _ in range(rng.integers(1, 6)):
            at = int(rng.integers(0, len(source) if trial % 4 else 40))
            if rng.random() < 0.2:
                del source[at : at + int(rng.integers(1, 5))]
            elif rng.random() < 0.2:
                source[at:at] = rng.bytes(3)
            else:
                source[at] = rng.integers(0, 256)
        bad = bytes(source) if trial % 2 else made(bytes(source), stream)
        with suppress(FormatError):
            assert packed.unpack(bad, len(installed)) == installed
