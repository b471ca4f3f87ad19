"""Records as protobuf and raw bytes: what goes in comes out, and what comes from outside is bounded."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedge.errors import FormatError
from fedge.wire import MAX_OBJECT_BYTES
from fedge.wire.arrays import nbytes_of
from fedge.wire.records import DTYPES, FileArray, MemoryArray, pack, unpack, write_object
from fedge.wire.v1.records_pb2 import Content, Entry, Record, Tensor, Value, Values

names = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
tensors = st.sampled_from(sorted(DTYPES)).flatmap(lambda dtype: hnp.arrays(dtype, shapes))
integers = st.integers(-(2**63), 2**63 - 1)
scalars = [
    integers,
    st.floats(),
    st.booleans(),
    st.text(st.characters(exclude_categories=("Cs",))),
    st.binary(),
]
metrics = st.one_of(*(kind | st.lists(kind, max_size=3) for kind in scalars[:2]))
config = st.one_of(*(kind | st.lists(kind, max_size=3) for kind in scalars))


def record_of(arrays: dict[str, np.ndarray[Any, Any]], kind: type[Array] = MemoryArray) -> ArrayRecord:
    record = ArrayRecord()
    for name, value in arrays.items():
        record[name] = kind(value)
    return record


def tensor_content(tensor: Tensor, size: int) -> Content:
    content = Content(records=[Record(name="arrays", kind=Record.ARRAYS, tensors=[tensor])])
    content.object.size = size
    return content


def object_file(folder: Path, size: int) -> Path:
    path = folder / "object"
    path.write_bytes(bytes(size))
    return path


@pytest.mark.slow
@given(
    st.dictionaries(names, tensors, max_size=3),
    st.dictionaries(names, metrics, max_size=3),
    st.dictionaries(names, config, max_size=3),
    st.sampled_from([MemoryArray, Array]),
)
def test_what_is_packed_and_sent_as_bytes_comes_back_the_same(
    arrays: Any, numbers: Any, settings_: Any, kind: Any
) -> None:
    sent = RecordDict(
        {"a": record_of(arrays, kind), "m": MetricRecord(numbers), "c": ConfigRecord(settings_)}
    )
    with tempfile.TemporaryDirectory() as folder:
        packed = pack(sent)
        written = write_object(Path(folder), packed)
        content = Content.FromString(packed.content.SerializeToString())
        path = Path(folder) / written.sha256.hex() if written.size else None
        if path is not None:
            assert hashlib.sha256(path.read_bytes()).digest() == written.sha256
        found = unpack(content, path)
        assert list(found) == ["a", "m", "c"]
        assert list(found["a"]) == list(arrays)
        for name, value in arrays.items():
            back = found.array_records["a"][name].numpy()
            assert back.dtype == value.dtype
            np.testing.assert_array_equal(back, value)
            assert nbytes_of(found.array_records["a"][name]) == value.nbytes
    for name, before in (("m", numbers), ("c", settings_)):
        assert repr(dict(found[name])) == repr(before)  # NaN is not equal to itself; its text is


def test_strided_and_big_endian_arrays_travel_by_their_values(tmp_path: Path) -> None:
    arrays = {"t": np.arange(6.0).reshape(2, 3).T, "b": np.arange(4, dtype=">i4"), "s": np.arange(9)[::2]}
    packed = pack(RecordDict({"arrays": record_of(arrays)}))
    written = write_object(tmp_path, packed)
    found = unpack(packed.content, tmp_path / written.sha256.hex()).array_records["arrays"]
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name].numpy(), value)


def test_an_array_from_a_file_can_be_packed_again_without_being_kept(tmp_path: Path) -> None:
    packed = pack(RecordDict({"arrays": record_of({"w": np.arange(5, dtype=np.float32)})}))
    written = write_object(tmp_path, packed)
    lazy = unpack(packed.content, tmp_path / written.sha256.hex())
    again = pack(lazy)
    assert write_object(tmp_path, again).sha256 == written.sha256
    assert "value" not in lazy.array_records["arrays"]["w"].__dict__


def test_flower_reads_npy_bytes_from_a_lazy_array_and_names_it_as_its_own(tmp_path: Path) -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    array = MemoryArray(value)
    plain = ArrayRecord({"w": array})["w"]
    assert type(plain) is Array
    np.testing.assert_array_equal(plain.numpy(), value)
    assert array.deflate() == Array(value).deflate()
    with pytest.raises(ValueError, match="read-only"):
        array.numpy()[0, 0] = 1


def test_records_without_tensors_have_no_object(tmp_path: Path) -> None:
    packed = pack(RecordDict({"m": MetricRecord({"n": 1}), "a": record_of({"e": np.empty((0, 3))})}))
    assert write_object(tmp_path, packed).size == 0
    assert not list(tmp_path.iterdir())
    assert unpack(packed.content).array_records["a"]["e"].numpy().shape == (0, 3)


@pytest.mark.parametrize(
    ("tensor", "size", "reason"),
    [
        (Tensor(name="w", dtype="float32", shape=[2**40, 2**40]), 8, "over"),
        (Tensor(name="w", dtype="float32", shape=[2**62, 2**62, 0]), 0, "over"),
        (Tensor(name="w", dtype="float32", shape=[3]), 8, "12 bytes"),
        (Tensor(name="w", dtype="float32", shape=[1] * 33), 4, "dimensions"),
        (Tensor(name="w", dtype="bfloat16", shape=[2]), 4, "float32"),
        (Tensor(name="w", dtype="object", shape=[1]), 8, "cannot travel"),
        (Tensor(name="w", dtype=">f4", shape=[2]), 8, "cannot travel"),
        (Tensor(name="x" * 2000, dtype="float32", shape=[2]), 8, "characters"),
    ],
)
def test_a_tensor_that_lies_about_itself_is_refused(
    tmp_path: Path, tensor: Tensor, size: int, reason: str
) -> None:
    with pytest.raises(FormatError, match=reason):
        unpack(tensor_content(tensor, size), object_file(tmp_path, 8))


def test_a_file_of_another_size_than_declared_is_refused(tmp_path: Path) -> None:
    content = tensor_content(Tensor(name="w", dtype="float32", shape=[2]), 8)
    with pytest.raises(FormatError, match="holds 4 bytes instead of the 8"):
        unpack(content, object_file(tmp_path, 4))
    with pytest.raises(FormatError, match="none came"):
        unpack(content)
    with pytest.raises(FormatError, match="cannot be read"):
        unpack(content, tmp_path / "absent")


def test_a_file_that_shrinks_after_it_was_checked_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    path = object_file(tmp_path, 8)
    array = FileArray(path, 0, "float32", (2,))
    path.write_bytes(b"1234")
    with pytest.raises(FormatError, match="ends 4 bytes before"):
        array.numpy()


def test_a_bool_that_is_neither_0_nor_1_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "object"
    path.write_bytes(b"\x00\x02")
    with pytest.raises(FormatError, match="other values than 0 and 1"):
        FileArray(path, 0, "bool", (2,)).numpy()


def _entry(value: Value) -> Content:
    return Content(records=[Record(name="c", kind=Record.CONFIG, entries=[Entry(key="k", value=value)])])


INNER = Value(list=Values(items=[Value(integer=1)]))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (_entry(Value()), "no value"),
        (_entry(Value(list=Values(items=[INNER]))), "a list in a list"),
        (_entry(Value(list=Values(items=[Value(integer=1), Value(text="a")]))), "several kinds"),
        (_entry(Value(list=Values(items=[Value(flag=True)] * 70_000))), "70001 values"),
        (Content(records=[Record(name="r", kind=Record.CONFIG)] * 2), "twice"),
        (Content(records=[Record(name=str(i), kind=Record.CONFIG) for i in range(65)]), "65 records"),
        (Content(records=[Record(name="r")]), "kind 0"),
        (Content(records=[Record(name="r", kind=Record.METRICS, tensors=[Tensor(dtype="bool")])]), "1 bytes"),
        (Content(records=[Record(name="r", kind=Record.ARRAYS, entries=[Entry(key="k")])]), "has entries"),
        (
            Content(
                records=[
                    Record(
                        name="r", kind=Record.METRICS, entries=[Entry(key="k", value=Value(text="no metric"))]
                    )
                ]
            ),
            "r",
        ),
    ],
)
def test_malformed_records_are_refused_by_name(content: Content, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        unpack(content)


@given(st.binary(max_size=200))
@settings(max_examples=2 * settings().max_examples)
def test_no_bytes_make_the_reader_raise_anything_but_a_format_error(data: bytes) -> None:
    with contextlib.suppress(FormatError, DecodeError):
        unpack(Content.FromString(data))


def test_what_the_wire_does_not_have_is_refused_when_packing() -> None:
    with pytest.raises(FormatError, match="out of range"):
        pack(RecordDict({"m": MetricRecord({"n": 2**70})}))
    with pytest.raises(FormatError, match="cannot travel"):
        pack(RecordDict({"a": record_of({"c": np.zeros(1, np.complex64)})}))
    with pytest.raises(FormatError, match="over"):
        pack(RecordDict({"a": _declared((MAX_OBJECT_BYTES, 2))}))


def test_an_array_that_is_not_what_it_declares_is_refused_when_its_bytes_are_asked_for() -> None:
    record = ArrayRecord()
    record["w"] = Array("float32", (3,), "numpy.ndarray", Array(np.zeros(2)).data)
    with pytest.raises(FormatError, match="declared float32"):
        list(pack(RecordDict({"a": record})).buffers())
    record["w"] = Array("float32", (3,), "numpy.ndarray", b"garbage")
    with pytest.raises(FormatError, match="not an array"):
        list(pack(RecordDict({"a": record})).buffers())


def _declared(shape: tuple[int, ...]) -> ArrayRecord:
    record = ArrayRecord()
    record["w"] = Array("float32", shape, "numpy.ndarray", b"")
    return record


def test_pieces_of_an_array_in_a_file_are_its_values_and_never_the_whole(tmp_path, monkeypatch):
    from fedge.wire import arrays

    monkeypatch.setattr(arrays, "PIECE_BYTES", 40)  # ten float32
    value = np.arange(23, dtype=np.float32).reshape(23, 1)
    (tmp_path / "object").write_bytes(b"\0" * 8 + value.tobytes())
    found = list(arrays.pieces(arrays.FileArray(tmp_path / "object", 8, "float32", (23, 1))))
    assert [(start, piece.size) for start, piece in found] == [(0, 10), (10, 10), (20, 3)]
    assert np.array_equal(np.concatenate([piece for _, piece in found]), value.ravel())
    ((start, whole),) = arrays.pieces(arrays.MemoryArray(value))
    assert start == 0
    assert np.array_equal(whole, value.ravel())
