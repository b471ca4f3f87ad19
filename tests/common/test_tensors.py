from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load as reference_load
from safetensors.numpy import save as reference_save

from fedge import tensors
from fedge.errors import FormatError

DTYPES = [
    np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64,
    np.float16, np.float32, np.float64,
]  # fmt: skip
ARRAYS = hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
TEXTS = st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=3)


def document(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@given(st.dictionaries(NAMES, ARRAYS, max_size=4), TEXTS)
def test_what_is_dumped_is_parsed_back_exactly(arrays: dict[str, Any], metadata: dict[str, str]) -> None:
    found, found_metadata = tensors.parse(tensors.dump(arrays, metadata))
    assert found_metadata == metadata
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
        assert found[name].flags.writeable


def test_the_bytes_are_those_worked_by_hand() -> None:
    header = b'{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},'
    header += b'"b":{"dtype":"U8","shape":[],"data_offsets":[4,5]}}'
    padded = header + b" " * (-len(header) % 8)
    data = tensors.dump({"b": np.array(7, np.uint8), "a": np.array([1.0, -2.0], np.float16)})
    assert data == struct.pack("<Q", len(padded)) + padded + b"\x00\x3c\x00\xc0" + b"\x07"


def test_equal_input_gives_equal_bytes_whatever_the_order_of_insertion() -> None:
    one, two = np.arange(3, dtype=np.int32), np.ones((2, 2))
    metadata = {str(i): str(i) for i in range(20)}
    backwards = dict(reversed(list(metadata.items())))
    assert tensors.dump({"one": one, "two": two}, metadata) == tensors.dump(
        {"two": two, "one": one}, backwards
    )


def test_arrays_come_back_in_the_same_order_each_time() -> None:
    data = tensors.dump({f"layer{i:02}": np.zeros(1, np.float32) for i in range(30)})
    assert list(tensors.parse(data)[0]) == [f"layer{i:02}" for i in range(30)]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.arange(10, dtype=np.int64)[::3],
        np.arange(4, dtype=">i4"),
        np.broadcast_to(np.float64(3), (2, 2)),
        np.zeros((0, 5), np.uint8),
        np.array(2.5, np.float16),
    ],
    ids=["transposed", "strided", "big-endian", "broadcast", "empty", "scalar"],
)
def test_memory_layout_does_not_change_the_values(array: Any) -> None:
    found = tensors.parse(tensors.dump({"x": array}))[0]["x"]
    np.testing.assert_array_equal(found, array)
    assert found.shape == array.shape


def test_the_reference_reader_and_writer_agree_with_ours() -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True, False])}
    np.testing.assert_array_equal(reference_load(tensors.dump(arrays))["a"], arrays["a"])
    np.testing.assert_array_equal(tensors.parse(reference_save(arrays))[0]["b"], arrays["b"])


@pytest.mark.parametrize("bad", [np.array(["text"]), np.array([None]), np.zeros(1, np.complex64)])
def test_an_array_that_is_no_number_is_not_written(bad: Any) -> None:
    with pytest.raises(FormatError, match="cannot be written"):
        tensors.dump({"x": bad})


def test_a_reserved_or_impossible_name_is_not_written() -> None:
    with pytest.raises(FormatError):
        tensors.dump({"__metadata__": np.zeros(1)})
    with pytest.raises(FormatError, match="Unicode"):
        tensors.dump({"\ud800": np.zeros(1)})
    with pytest.raises(FormatError, match="over"):
        tensors.dump({}, {"long": "x" * tensors.MAX_HEADER_BYTES})


HOSTILE = {
    "nothing": b"",
    "a header length beyond the file": struct.pack("<Q", 2**63) + b"{}",
    "a header over its maximum": struct.pack("<Q", tensors.MAX_HEADER_BYTES + 1)
    + bytes(tensors.MAX_HEADER_BYTES + 1),
    "no JSON": document(b"nonsense"),
    "deep nesting": document(b"[" * 100_000),
    "a list": document([]),
    "overlap": document({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"abc"),
    "a hole": document({"a": entry("U8", [1], 1, 2)}, b"ab"),
    "trailing bytes": document({"a": entry("U8", [1], 0, 1)}, b"ab"),
    "too few bytes": document({"a": entry("F32", [1], 0, 4)}, b"abc"),
    "a shape that overflows": document({"a": entry("U8", [2**62, 4], 0, 0)}),
    "an empty shape that overflows": document({"a": entry("F64", [0, 2**62], 0, 0)}),
    "too many dimensions": document({"a": entry("U8", [0] + [1] * 70, 0, 0)}),
    "a negative side": document({"a": entry("U8", [-1], 0, 1)}, b"a"),
    "backward offsets": document({"a": entry("U8", [1], 1, 0)}, b"a"),
    "a dtype numpy lacks": document({"a": entry("BF16", [1], 0, 2)}, b"ab"),
    "a bool of 7": document({"a": entry("BOOL", [1], 0, 1)}, b"\x07"),
    "numbers as metadata": document({"__metadata__": {"a": 1}}),
    "a name twice": document(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"a",
    ),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_documents_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        tensors.parse(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_document_over_its_maximum_is_refused_before_it_is_read() -> None:
    data = tensors.dump({"x": np.zeros(10)})
    assert tensors.parse(data, max_bytes=len(data))[0]["x"].shape == (10,)
    with pytest.raises(FormatError, match="over the"):
        tensors.parse(data, max_bytes=len(data) - 1)


def test_every_truncation_is_refused() -> None:
    data = tensors.dump({"w": np.ones((2, 3), np.float32), "b": np.array([True])}, {"k": "v"})
    for length in range(len(data)):
        with pytest.raises(FormatError):
            tensors.parse(data[:length])


@given(st.data())
def test_flipped_bits_give_arrays_or_our_error(data: st.DataObject) -> None:
    good = bytearray(tensors.dump({"w": np.ones((2, 3), np.float32), "b": np.array([True])}, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found, _ = tensors.parse(bytes(good))
    except FormatError:
        return
    assert sum(array.nbytes for array in found.values()) <= len(good)


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        tensors.parse(data)


@pytest.mark.slow
@given(st.dictionaries(NAMES, ARRAYS, max_size=4), TEXTS)
def test_a_file_is_loaded_as_its_bytes_are_parsed(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, Any], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "loaded"
    path.write_bytes(tensors.dump(arrays, metadata))
    found, found_metadata = tensors.load(path)
    expected, _ = tensors.parse(path.read_bytes())
    assert (list(found), found_metadata) == (list(expected), metadata)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
        assert found[name].flags.writeable


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2**40) + b"{}",
        document(b"[]"),
        document(b"nonsense"),
        document({"a": entry("F32", [2], 0, 8)}, bytes(7)),
        document({"a": entry("F32", [2], 0, 8)}, bytes(9)),
        document({"a": entry("BOOL", [2], 0, 2)}, b"\x01\x02"),
        document({"a": entry("BF16", [1], 0, 2)}, bytes(2)),
        document({"a": entry("U8", [2**63, 0], 0, 0)}),
        document(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                 b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_document_is_refused_as_its_bytes_are(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(FormatError):
        tensors.parse(data)
    with pytest.raises(FormatError):
        tensors.load(path)


def test_a_file_that_is_absent_or_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        tensors.load(tmp_path / "absent")
    path = tmp_path / "file"
    path.write_bytes(tensors.dump({"a": np.zeros(9)}))
    with pytest.raises(FormatError, match="over the 8"):
        tensors.load(path, max_bytes=8)


def test_chunks_are_the_document_and_show_contiguous_arrays_where_they_lie() -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(6, dtype=np.int16)[::2]}
    _, first, second = tensors.dump_chunks(arrays)
    assert np.shares_memory(np.frombuffer(first, np.float32), arrays["a"])
    assert bytes(second) == arrays["b"].tobytes()
    assert b"".join(tensors.dump_chunks(arrays, {"k": "v"})) == tensors.dump(arrays, {"k": "v"})


def test_chunks_of_what_cannot_be_written_are_refused_before_the_first() -> None:
    with pytest.raises(FormatError, match="cannot be written"):
        tensors.dump_chunks({"a": np.array([1j])})
