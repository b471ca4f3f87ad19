from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedge.dataset import Dataset
from fedge.errors import DataError
from fedge.readers import assemble, read_image_folder, read_npz, read_table
from fedge.task import Source, resolve

N = 6
X = (np.arange(N * 16) % 200).reshape(N, 4, 4).astype(np.uint8)
Y = np.array([0, 1, 0, 1, 0, 1])
ROWS = np.arange(N * 3, dtype=np.float64).reshape(N, 3)
TRAIN_TEST = {"x_train": X, "y_train": Y, "x_test": X[:2], "y_test": Y[:2]}


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., Dataset]:
    """Write arrays to a file and read it as a user's."""

    def go(kind: Any = "image", labels: tuple[str, ...] = (), **arrays: Any) -> Dataset:
        np.savez(tmp_path / "data.npz", **arrays)
        return read_npz(tmp_path / "data.npz", kind, labels)

    return go


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Dataset]:
    """Write a .csv text, or the columns of a .parquet, and read it as a user's."""

    def go(content: str | bytes | dict[str, Any], **source: Any) -> Dataset:
        if isinstance(content, dict):
            path = tmp_path / "data.parquet"
            pq.write_table(pa.table(content), path)
        else:
            path = tmp_path / "data.csv"
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_table(path, Source(path, **source))

    return go


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Dataset]:
    """Write images by relative name and read the folder as a user's."""

    def go(files: dict[str, Image.Image | bytes], size: tuple[int, int] | None = None) -> Dataset:
        root = tmp_path / "images"
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                (root / name).write_bytes(content)
            else:
                content.save(root / name)
        return read_image_folder(root, Source(root, size=size))

    return go


def one_line(read: Callable[[], Dataset]) -> str:
    with pytest.raises(DataError) as caught:
        read()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- .npz: both layouts ---


def test_x_and_y_are_read_with_natural_clients_and_a_split(npz: Callable[..., Dataset]) -> None:
    split = np.array(["train"] * 4 + ["test"] * 2)
    found = npz(x=X, y=Y, client=np.array(list("baabca")), split=split)
    assert (found.spec.kind, found.spec.shape, found.spec.dtype) == ("image", (4, 4), "uint8")
    assert (found.spec.labels, found.y.tolist(), found.x.tolist()) == (("0", "1"), Y.tolist(), X.tolist())
    assert found.client is not None
    assert found.test is not None
    assert (found.clients, found.client.tolist()) == (("a", "b", "c"), [1, 0, 0, 1, 2, 0])
    assert found.test.tolist() == [False] * 4 + [True] * 2


def test_train_and_test_arrays_become_one_data_set_with_its_own_split(npz: Callable[..., Dataset]) -> None:
    found = npz(**TRAIN_TEST, client_train=np.array([7, 7, 8, 8, 9, 9]))
    assert found.test is not None
    assert found.client is not None
    assert (len(found), found.test.tolist()) == (8, [False] * 6 + [True] * 2)
    assert (found.clients, found.client[:6].tolist()) == (("7", "8", "9"), [0, 0, 1, 1, 2, 2])


def test_a_table_in_an_npz_keeps_nan_for_missing_values(npz: Callable[..., Dataset]) -> None:
    x = ROWS.copy()
    x[2, 1] = np.nan
    found = npz("features", x=x, y=Y)
    assert (found.spec.shape, found.spec.dtype, found.x.dtype) == ((3,), "float32", np.float32)
    assert np.isnan(found.x[2, 1])


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (X, "uint8"),
        (X.astype(np.uint16), "uint8"),
        (X.astype(">i4"), "uint8"),
        (X.astype(np.uint16) * 300, "float32"),
        (X.astype(np.int16) - 100, "float32"),
        (X.astype(">f4"), "float32"),
        (X.astype(np.float16), "float32"),
        (X.astype(np.longdouble), "float32"),
        (X.astype(bool), "float32"),
        (np.asfortranarray(X.astype(np.float64)), "float32"),
        (X[:, ::-1], "uint8"),
    ],
)
def test_numbers_of_every_kind_and_layout_are_read_as_bytes_or_float32(
    npz: Callable[..., Dataset], x: Any, dtype: str
) -> None:
    found = npz(x=x, y=Y)
    assert (found.spec.dtype, found.x.dtype) == (dtype, np.dtype(dtype))
    assert found.x.astype(np.float64).tolist() == x.astype(np.float64).tolist()


@pytest.mark.parametrize("shape", [(N, 4, 4, 1), (N, 4, 4, 3)])
def test_colour_channels_come_last(npz: Callable[..., Dataset], shape: tuple[int, ...]) -> None:
    assert npz(x=np.zeros(shape, np.uint8), y=Y).spec.channels == shape[3]


@pytest.mark.parametrize(
    ("y", "labels", "codes"),
    [
        (Y.astype(np.float64), ("0", "1"), Y),
        (Y.astype(bool), ("0", "1"), Y),
        (Y.astype(np.uint64), ("0", "1"), Y),
        (Y[:, None], ("0", "1"), Y),
        (Y + 1, ("1", "2"), Y),  # counted from 1: no class 0 that nothing belongs to
        (np.array([2, 10, 2, 2, 10, 2]), ("2", "10"), [0, 1, 0, 0, 1, 0]),
        (np.array(["b", "a"] * 3), ("a", "b"), [1, 0] * 3),
        (np.array(["né".encode(), b"a"] * 3), ("a", "né"), [1, 0] * 3),
    ],
)
def test_each_distinct_label_is_a_class(
    npz: Callable[..., Dataset], y: Any, labels: tuple[str, ...], codes: Any
) -> None:
    found = npz(x=X, y=y)
    assert (found.spec.labels, found.y.tolist(), found.y.dtype) == (labels, list(codes), np.int64)


def test_a_device_that_knows_the_runs_labels_may_hold_only_one_of_them(npz: Callable[..., Dataset]) -> None:
    found = npz(labels=("cat", "dog", "cow"), x=X, y=np.array(["dog"] * N))
    assert (found.spec.labels, found.y.tolist()) == (("cat", "dog", "cow"), [1] * N)
    assert "label 'emu' is not among" in one_line(lambda: npz(labels=("cat", "dog"), x=X, y=["emu"] * N))


@pytest.mark.parametrize("client", [list("aabbcc"), [3, 3, 1, 1, 2, 2], [b"a"] * 6, [[1]] * 6, [True] * 6])
def test_clients_are_text_or_whole_numbers(npz: Callable[..., Dataset], client: list[Any]) -> None:
    assert npz(x=X, y=Y, client=np.array(client)).client is not None


# --- .npz: what is wrong with it ---


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"images": X, "targets": Y}, "holds ['images', 'targets']; it must hold x and y"),
        ({"X": X, "y": Y}, "holds ['X', 'y']"),
        ({"x_train": X, "y_train": Y}, "or x_train, y_train, x_test, y_test"),
        ({"x": X, "y": Y[:5]}, "lengths differ: x 6, y 5"),
        ({"x": X, "y": Y, "client": Y[:2]}, "lengths differ: x 6, y 6, client 2"),
        ({**TRAIN_TEST, "y_test": Y}, "lengths differ: x_test 2, y_test 6"),
        ({**TRAIN_TEST, "x_test": X[:2, :3]}, "x_train (6, 4, 4) and x_test (2, 3, 4) differ in shape"),
        ({**TRAIN_TEST, "client_train": Y[:3]}, "lengths differ: x_train 6, y_train 6, client_train 3"),
        ({"x": np.array(3), "y": Y}, "x is a single value"),
        ({"x": X, "y": np.array(3)}, "y is a single value"),
        ({"x": X, "y": np.array([0, 1, 7000, 1, 0, 1])}, "label 7000 is out of range: 6 examples"),
        ({"x": X, "y": Y.astype(np.uint64) * 2**63}, "label 9223372036854775808 is out of range"),
        ({"x": X, "y": Y * 1e300}, "label 1e+300 is out of range"),
        ({"x": X, "y": Y - 1}, "label -1 is out of range; labels start at 0"),
        ({"x": X, "y": Y + 0.5}, "label 0.5 is not a whole number"),
        ({"x": X, "y": np.array([0, 1, np.nan, 0, 1, 1])}, "label nan is not a whole number"),
        ({"x": X, "y": np.array([0, 1, np.inf, 0, 1, 1])}, "label inf is not a whole number"),
        ({"x": X, "y": np.eye(2)[Y]}, "y has shape (6, 2); it must be one label per example; turn one-hot"),
        ({"x": X, "y": Y.astype("M8[s]")}, "y is datetime64[s]; it must be whole numbers or text"),
        ({"x": X, "y": np.array([b"\xff", b"a"] * 3)}, "y holds bytes that are not UTF-8 text"),
        ({"x": X, "y": Y * 0}, "every example has the label '0'; there must be two classes"),
        ({"x": X, "y": Y * 0 + 7}, "every example has the label '7'"),
        ({"x": X, "y": Y, "client": np.arange(6.0)}, "client is float64; it must be whole numbers or text"),
        (
            {"x": X, "y": Y, "split": np.array(["val"] * 6)},
            "split holds 'val'; it may hold 'train' and 'test'",
        ),
        ({"x": X, "y": Y, "split": Y}, "split holds '0'"),
        ({"x": X, "y": Y, "split": np.array("train")}, "split is a single value"),
        ({"x": X * 1j, "y": Y}, "x is complex128; it must be numbers"),
        ({"x": np.array(list("abcdef")), "y": Y}, "x is <U1; it must be numbers"),
        ({"x": np.zeros(6, [("a", "f4")]), "y": Y}, "it must be numbers"),
        ({"x": X.astype(object), "y": Y}, "arrays of Python objects are not read"),
        ({"x": X, "y": Y.astype(object)}, "arrays of Python objects are not read"),
        ({"x": np.where(X == 5, np.nan, X), "y": Y}, "x[0, 1, 1] is nan; an image may hold"),
        ({"x": X * 1e300, "y": Y}, "x[0, 0, 1] is inf; an image may hold"),
        ({"x": X[:0], "y": Y[:0]}, "there is no example in it"),
        ({"x": np.zeros((6, 0, 4)), "y": Y}, "x has shape (6, 0, 4)"),
        (
            {"x": np.zeros(6), "y": Y},
            "x has shape (6,): spec: shape () does not fit kind 'image'; images are",
        ),
        ({"x": np.zeros((6, 3, 8, 8)), "y": Y}, "channels come last: x.transpose(0, 2, 3, 1)"),
        ({"x": np.zeros((6, 8, 8, 4)), "y": Y}, "an image has 1 or 3 channels, not 4"),
    ],
)
def test_each_fault_of_the_arrays_is_one_line(
    npz: Callable[..., Dataset], arrays: dict[str, Any], line: str
) -> None:
    assert line in one_line(lambda: npz(**arrays))


@pytest.mark.parametrize(
    ("x", "line"),
    [
        (np.full((N, 2), np.inf), "x[0, 0] is inf; infinite values"),
        (np.full((N, 2), 1e300), "or such beyond float32, cannot be used"),
        (np.zeros(N), "a table is (examples, columns)"),
        (np.zeros((N, 0)), "shape (0,) does not fit"),
    ],
)
def test_each_fault_of_a_table_in_an_npz_is_one_line(npz: Callable[..., Dataset], x: Any, line: str) -> None:
    assert line in one_line(lambda: npz("features", x=x, y=Y))


def saved(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


HUGE = b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999, 4, 4), }".ljust(117) + b"\n"
WHOLE = saved(x=X, y=Y)
DAMAGED = {
    "empty": b"",
    "no zip": b"hello",
    "a lone .npy": npy(X),
    "truncated": WHOLE[: len(WHOLE) // 2],
    "flipped bytes": WHOLE[:60] + bytes(30) + WHOLE[90:],
    "members that are no arrays": zipped(x=b"hello", y=b"hello"),
    "garbage in a member": zipped(**{"x.npy": b"garbage", "y.npy": npy(Y)}),
    "a header that ends early": zipped(**{"x.npy": b"\x93NUMPY\x01\x00\x08\x00{'descr'", "y.npy": npy(Y)}),
    "more than the memory": zipped(
        **{"x.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(HUGE)) + HUGE, "y.npy": npy(Y)}
    ),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_npz_is_one_line_and_is_closed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    line = one_line(lambda: read_npz(tmp_path / "bad.npz", "image"))
    assert str(tmp_path / "bad.npz") in line


@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_any_changed_byte_gives_the_same_data_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, position: int, change: int
) -> None:
    path = tmp_path_factory.mktemp("npz") / "bad.npz"
    path.write_bytes(WHOLE[:position] + bytes([WHOLE[position] ^ change]) + WHOLE[position + 1 :])
    try:
        found = read_npz(path, "image")
    except DataError as error:
        message = str(error)
    else:
        message = ""
        assert found.x.tolist() == X.tolist()  # a time stamp was changed, say
    assert len(message.splitlines()) <= 1


def test_the_suffix_may_be_in_capitals_and_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "A.NPZ").write_bytes(WHOLE)
    (tmp_path / "b.npz").mkdir()
    assert len(read_npz(tmp_path / "A.NPZ", "image")) == N
    assert "Is a directory" in one_line(lambda: read_npz(tmp_path / "b.npz", "image"))
    assert "reads .npz files, not .png" in one_line(lambda: read_npz(tmp_path / "c.png", "image"))


# --- tables ---


def test_a_csv_has_a_label_column_and_names_its_features(table: Callable[..., Dataset]) -> None:
    found = table("age,dose,y\n1,2.5,ok\n3,,bad\n", client=None)
    assert (found.spec.features, found.spec.labels, found.y.tolist()) == (
        ("age", "dose"),
        ("bad", "ok"),
        [1, 0],
    )
    assert found.x[0].tolist() == [1, 2.5]
    assert np.isnan(found.x[1, 1])


def test_label_client_and_split_columns_are_no_features(table: Callable[..., Dataset]) -> None:
    found = table("a,ward,split,died\n1,n,train,0\n3,s,test,1\n", label="died", client="ward")
    assert (found.spec.features, found.clients) == (("a",), ("n", "s"))
    assert found.test is not None
    assert found.test.tolist() == [False, True]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("\ufeffa,b,y\n1,2,0\n3,4,1\n", [[1, 2], [3, 4]]),  # a byte order mark
        ("a,b,y\r\n1,2,0\r\n3,4,1\r\n", [[1, 2], [3, 4]]),
        ('"a","b",y\n1,2,0\n\n3,4,1\n', [[1, 2], [3, 4]]),
        ("a,b,y\n1,true,0\n3,false,1\n", [[1, 1], [3, 0]]),
        ("a,b,y\n1,99999999999999999999,0\n3,4,1\n", [[1, 1e20], [3, 4]]),
    ],
)
def test_the_usual_ways_to_write_a_csv_are_read(
    table: Callable[..., Dataset], text: str, rows: list[list[float]]
) -> None:
    assert table(text).x.tolist() == np.float32(rows).tolist()


@pytest.mark.parametrize("cells", [("", ""), ("NaN", "nan"), ("NA", "null")])
def test_a_column_without_any_value_is_all_missing(
    table: Callable[..., Dataset], cells: tuple[str, str]
) -> None:
    found = table(f"a,b,y\n1,{cells[0]},0\n3,{cells[1]},1\n")
    assert np.isnan(found.x[:, 1]).all()


def test_booleans_with_gaps_are_numbers_too(table: Callable[..., Dataset]) -> None:
    assert np.isnan(table("a,b,y\n1,true,0\n3,,1\n").x[1, 1])


def test_decimals_after_a_megabyte_of_whole_numbers_are_read(table: Callable[..., Dataset]) -> None:
    # Types are inferred from the first block of the file, which is 1 MiB unless told otherwise.
    text = "a,y\n" + "1234567,0\n" * 120_000 + "0.5,1\n"
    assert table(text).x[-1, 0] == 0.5


@pytest.mark.parametrize(
    "columns",
    [
        {"a": pa.array([1, None], pa.int64()), "y": [0, 1]},
        {"a": pa.array([1, None], pa.float32()), "y": pa.array(["n", "s"]).dictionary_encode()},
        {"a": [Decimal("1"), None], "y": [Decimal(0), Decimal(1)]},
        {"a": pa.array([1, None]).dictionary_encode(), "y": [False, True]},
        {"a": pa.array([True, None]), "y": [b"n", b"s"]},
        {"a": pa.array(np.array([1, np.nan], np.float16)), "y": [0.0, 1.0]},
    ],
)
def test_a_parquet_column_with_nulls_is_numbers_with_missing_values(
    table: Callable[..., Dataset], columns: dict[str, Any]
) -> None:
    found = table(columns)
    assert (found.x[0, 0], np.isnan(found.x[1, 0]), found.y.tolist()) == (1, True, [0, 1])


def test_folder_names_like_columns_add_no_columns(tmp_path: Path) -> None:
    path = tmp_path / "site=3" / "t.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"a": [1, 2], "y": [0, 1]}), path)
    assert read_table(path, Source(path)).spec.features == ("a",)


@pytest.mark.parametrize(
    ("content", "source", "line"),
    [
        (
            "a,b,y\n1,red,0\n3,4,1\n",
            {},
            "column 'b' holds text; encode it as numbers, or name it as data_client",
        ),
        ("a,b,y\n1,?,0\n3,4,1\n", {}, "column 'b' holds text"),
        ("a,b,y\n1,2020-01-01,0\n3,,1\n", {}, "column 'b' holds date32[day] values"),
        ({"a": [[1], [2]], "y": [0, 1]}, {}, "column 'a' holds list<"),
        ("a,lable\n1,0\n", {"label": "label"}, "no column 'label' (data_label); did you mean 'lable'?"),
        ("a,b\n1,2\n", {}, "no column 'y' (data_label); valid: a, b"),
        ("a,y\n1,0\n2,1\n", {"client": "site"}, "no column 'site' (data_client)"),
        ("a,y\n1,ok\n2,\n", {}, "column 'y' (data_label) has an empty cell"),
        ("a,y\n1,0\n2,\n", {}, "column 'y' (data_label) has an empty cell"),
        ("a,y\n1,\n2,\n", {}, "column 'y' (data_label) has an empty cell"),
        ("a,c,y\n1,n,0\n2,,1\n", {"client": "c"}, "column 'c' (data_client) has an empty cell"),
        ({"a": [1, 2], "y": [0.0, float("nan")]}, {}, "column 'y' (data_label) has an empty cell"),
        ({"a": [1, 2], "y": pa.array([0, None])}, {}, "column 'y' (data_label) has an empty cell"),
        ("a,split,y\n1,train,0\n2,,1\n", {}, "column 'split' (split) has an empty cell"),
        ("a,split,y\n1,train,0\n2,val,1\n", {}, "split holds 'val'"),
        ("a,y\n1,2020-01-01\n2,2020-01-02\n", {}, "column 'y' (data_label) holds date32[day] values"),
        ({"a": [1, 2], "y": [{"b": 1}, {"b": 2}]}, {}, "column 'y' (data_label) holds struct<"),
        ("a,y\n1,1.5\n2,2.5\n", {}, "label 1.5 is not a whole number"),
        ("a,y\n1,-1\n2,1\n", {}, "label -1 is out of range"),
        ("a,y\n1,7\n2,7\n", {}, "every example has the label '7'"),
        ("a,y\ninf,0\n2,1\n", {}, "x[0, 0] (column 'a') is inf"),
        ("a,y\n1e300,0\n2,1\n", {}, "x[0, 0] (column 'a') is inf; infinite values, or such beyond float32"),
        ("a,a,y\n1,2,0\n3,4,1\n", {}, "a column name occurs twice in ['a', 'a', 'y']"),
        (",a,y\n0,2,0\n1,4,1\n", {}, "column 1 is named ''; name it, or leave a row index out"),
        (
            {"a": [1, 2], "y": [0, 1], "__index_level_0__": [0, 1]},
            {},
            "column 3 is named '__index_level_0__'",
        ),
        ("y\n0\n1\n", {}, "no column besides label, client and split"),
        ("a;b;y\n1;2;0\n", {}, "it seems to use semicolons: separate columns by commas"),
        ("a;b;y\n1,5;2;0\n", {}, "it seems to use semicolons: separate columns by commas"),
        ("a\ty\n1\t0\n", {}, "it seems to use tabs: separate columns by commas"),
        ("a,b,y\n1,2\n1,2,3,4\n", {}, "cannot be read as a table (CSV parse error"),
        ("", {}, "cannot be read as a table (Empty CSV file)"),
        ("a,y\n", {}, "there is no example in it"),
        ("a,y\n1,caf\xe9\n2,x\n".encode("latin-1"), {}, "column 'y' holds bytes that are not UTF-8 text"),
        ("caf\xe9,y\n1,0\n2,1\n".encode("latin-1"), {}, "cannot be read as a table"),
    ],
)
def test_each_fault_of_a_table_is_one_line(
    table: Callable[..., Dataset], content: Any, source: dict[str, str], line: str
) -> None:
    assert line in one_line(lambda: table(content, **source))


@pytest.mark.parametrize("content", [b"", b"PAR1garbagePAR1", b"hello"])
def test_a_damaged_parquet_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.parquet").write_bytes(content)
    line = one_line(lambda: read_table(tmp_path / "t.parquet", Source()))
    assert "cannot be read as a table" in line


def test_other_suffixes_are_no_tables(tmp_path: Path) -> None:
    assert ".csv, .parquet or .npz" in one_line(lambda: read_table(tmp_path / "t.xlsx", Source()))


@given(st.binary(max_size=60))
def test_any_bytes_are_a_table_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_bytes(b"a,y\n1,0\n2,1\n" + content)
    message = ""
    try:
        read_table(path, Source(path))
    except DataError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1


# --- folders of images ---


def grey(value: int = 7, size: tuple[int, int] = (5, 4)) -> Image.Image:
    return Image.new("L", size, value)


def colour(size: tuple[int, int] = (5, 4)) -> Image.Image:
    return Image.new("RGB", size, (1, 2, 3))


def test_folders_are_classes_in_the_order_of_their_names(folder: Callable[..., Dataset]) -> None:
    found = folder({"cat/2.png": grey(9), "cat/1.png": grey(7), "ant/1.PNG": grey(1), "ant/notes.txt": b"x"})
    assert (found.spec.labels, found.spec.shape, found.spec.dtype) == (("ant", "cat"), (4, 5), "uint8")
    assert (found.y.tolist(), found.x[:, 0, 0].tolist(), found.test) == ([0, 1, 1], [1, 7, 9], None)


def test_train_and_test_folders_are_the_files_own_split(folder: Callable[..., Dataset]) -> None:
    found = folder({"train/a/1.png": grey(), "train/b/1.png": grey(), "test/b/1.png": grey(), ".git/x": b""})
    assert found.test is not None
    assert (found.spec.labels, found.y.tolist()) == (("a", "b"), [0, 1, 1])
    assert found.test.tolist() == [False, False, True]


def test_one_colour_image_makes_all_of_them_colour(folder: Callable[..., Dataset]) -> None:
    found = folder({"a/1.png": grey(), "b/1.png": colour()})
    assert found.x[:, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]


@pytest.mark.parametrize(
    ("image", "name", "pixel"),
    [
        (Image.new("RGBA", (5, 4), (1, 2, 3, 0)), "1.png", [1, 2, 3]),
        (Image.new("LA", (5, 4), (9, 0)), "1.png", [9, 9, 9]),
        (grey().convert("P"), "1.gif", [7, 7, 7]),
        (Image.new("CMYK", (5, 4)), "1.tif", [255, 255, 255]),
    ],
)
def test_other_eight_bit_modes_are_converted(
    folder: Callable[..., Dataset], image: Image.Image, name: str, pixel: list[int]
) -> None:
    assert folder({f"a/{name}": image, "b/1.png": colour()}).x[0, 0, 0].tolist() == pixel


def test_a_black_and_white_image_is_grey(folder: Callable[..., Dataset]) -> None:
    assert folder({"a/1.png": Image.new("1", (5, 4), 1), "b/1.png": grey()}).x[:, 0, 0].tolist() == [255, 7]


def test_images_are_resized_to_height_and_width(folder: Callable[..., Dataset]) -> None:
    assert folder({"a/1.png": grey(), "b/1.png": grey(size=(9, 3))}, (8, 6)).spec.shape == (8, 6)


def test_what_file_managers_leave_behind_is_passed_over(folder: Callable[..., Dataset]) -> None:
    found = folder({"a/1.png": grey(), "b/1.png": grey(), ".cache/1.png": grey(), "a/._1.png": b"\0\5\x16"})
    assert (found.spec.labels, len(found)) == (("a", "b"), 2)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"a/1.png": grey(), "b/1.png": grey(size=(6, 4))}, "b/1.png is 6x4"),
        (
            {"a/1.png": grey(), "b/1.png": grey(size=(6, 4))},
            "a/1.png is 5x4; set data_size = [HEIGHT, WIDTH]",
        ),
        ({"a/1.png": b"hello", "b/1.png": grey()}, "a/1.png cannot be read as an image"),
        ({"a/1.png": b"", "b/1.png": grey()}, "a/1.png cannot be read as an image"),
        ({"a/1.png": png()[:400], "b/1.png": grey()}, "a/1.png cannot be read as an image"),
        ({"a/1.png": b"%!PS-Adobe-3.0 EPSF-3.0\n", "b/1.png": grey()}, "a/1.png cannot be read as an image"),
        (
            {"a/1.png": Image.fromarray(np.full((4, 5), 40_000, np.uint16)), "b/1.png": grey()},
            "more than 8 bits per pixel (mode I;16); convert it to 8 bits",
        ),
        (
            {"a/1.tif": Image.fromarray(np.full((4, 5), 0.5, np.float32)), "b/1.png": grey()},
            "more than 8 bits per pixel (mode F)",
        ),
        ({"a/1.png": grey(), "a/2.png": grey()}, "every example has the label 'a'"),
        ({"1.png": grey()}, "has no images in folders by class"),
        ({"a/notes.txt": b"x"}, "has no images in folders by class"),
    ],
)
def test_each_fault_of_an_image_folder_is_one_line(
    folder: Callable[..., Dataset], files: dict[str, Any], line: str
) -> None:
    assert line in one_line(lambda: folder(files))


# --- through the tasks ---


@pytest.mark.parametrize("task", ["images", "tables"])
def test_a_task_that_needs_a_file_says_so(task: str, tmp_path: Path) -> None:
    read = resolve(task).read
    assert 'set data = "PATH"' in one_line(lambda: read(Source()))
    assert "does not exist" in one_line(lambda: read(Source(tmp_path / "none.npz")))


def test_the_tasks_choose_the_reader_by_what_lies_there(tmp_path: Path) -> None:
    np.savez(tmp_path / "i.npz", x=X, y=Y)
    np.savez(tmp_path / "t.npz", x=ROWS, y=Y)
    (tmp_path / "t.csv").write_text("a,y\n1,0\n2,1\n")
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        grey().save(tmp_path / "images" / name / "1.png")
    assert resolve("images").read(Source(tmp_path / "i.npz")).spec.shape == (4, 4)
    assert resolve("images").read(Source(tmp_path / "images")).spec.shape == (4, 5)
    assert resolve("tables").read(Source(tmp_path / "t.npz")).spec.shape == (3,)
    assert resolve("tables").read(Source(tmp_path / "t.csv")).spec.features == ("a",)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read anything")
def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(WHOLE)
    (tmp_path / "x.npz").chmod(0)
    assert "Permission denied" in one_line(lambda: read_npz(tmp_path / "x.npz", "image"))


def test_digits_bring_their_own_data_and_a_device_names_its_share(tmp_path: Path) -> None:
    found = resolve("digits").read(Source())
    assert (len(found), found.spec.shape, found.spec.labels) == (1797, (8, 8), tuple("0123456789"))
    assert (found.x.min(), found.x.max()) == (0, 16)
    np.savez(tmp_path / "share.npz", x=found.x[:9].astype(np.uint8), y=found.y[:9] % 3)
    share = resolve("digits").read(Source(tmp_path / "share.npz"))
    assert (share.spec, share.x.tolist()) == (found.spec, found.x[:9].tolist())
    np.savez(tmp_path / "wide.npz", x=np.zeros((2, 8, 9), np.uint8), y=[0, 1])
    assert "digits are (8, 8)" in one_line(lambda: resolve("digits").read(Source(tmp_path / "wide.npz")))
    assert "x.npz does not exist" in one_line(lambda: resolve("digits").read(Source(Path("x.npz"))))


def test_read_only_arrays_are_enough() -> None:
    x, y = X.copy(), Y.copy()
    x.flags.writeable = y.flags.writeable = False
    assert len(assemble("image", x, y)) == N
