from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedge.errors import DataError, UserError
from fedge.spec import Spec
from fedge_client import inputs
from fedge_client.device import Device
from fedge_client.inputs import fit, read_input, read_text
from fedge_client.installing import install
from fedge_client.runtime import Runtime
from fedge_client.updater import folder

GREY = Spec("image", (8, 8), "uint8", ("no", "yes"))
COLOUR = Spec("image", (4, 6, 3), "uint8", ("no", "yes"))
FLOATS = Spec("image", (8, 8), "float32", ("no", "yes"))
TABLE = Spec("features", (3,), "float32", ("no", "yes"), ("age", "mass", "dose"))
NAMELESS = Spec("features", (3,), "float32", ("no", "yes"))


def installed(tmp_path: Path, publisher: Any) -> Path:
    device = Device.create(tmp_path / "home", "micro", publisher.root)
    install(device, folder(publisher.folder))
    return device.home


# Answers


def test_an_answer_has_label_confidence_and_every_probability(tmp_path: Path, publisher: Any) -> None:
    release = publisher.offer(1, answer=2)
    runtime = Runtime.open(installed(tmp_path, publisher))
    (prediction,) = runtime.infer(np.zeros((8, 8), np.uint8))
    certain, rest = math.exp(4) / (math.exp(4) + 2), 1 / (math.exp(4) + 2)
    assert prediction.label == "two"
    assert prediction.confidence == pytest.approx(certain)
    assert prediction.probabilities == pytest.approx({"zero": rest, "one": rest, "two": certain})
    assert (runtime.release, runtime.lineage, runtime.spec) == (release, release.lineage, release.spec)


def test_a_batch_is_answered_one_by_one_and_an_empty_one_with_nothing(tmp_path: Path, publisher: Any) -> None:
    publisher.offer(1, answer=0)
    runtime = Runtime.open(installed(tmp_path, publisher))
    assert [p.label for p in runtime.infer(np.zeros((3, 8, 8), np.uint8))] == ["zero"] * 3
    assert runtime.infer(np.zeros((0, 8, 8), np.uint8)) == []
    with pytest.raises(DataError, match="has shape"):
        runtime.infer(np.zeros((7, 8), np.uint8))


def test_without_an_installation_there_is_one_clear_line(tmp_path: Path, publisher: Any) -> None:
    with pytest.raises(UserError, match="no device at"):
        Runtime.open(tmp_path / "home")
    Device.create(tmp_path / "home", "micro", publisher.root)
    with pytest.raises(UserError, match="nothing is installed"):
        Runtime.open(tmp_path / "home")


# Arrays


def test_whole_numbers_in_range_are_cast_and_others_refused() -> None:
    assert fit(np.full((8, 8), 255, np.int64), GREY).dtype == np.uint8
    assert fit(np.full((8, 8), 255, ">u2"), GREY).tolist() == [[[255] * 8] * 8]
    for x, line in (
        (np.full((8, 8), 256), "values 256 .. 256; this model takes 0 .. 255"),
        (np.full((8, 8), -1), "values -1"),
        (np.full((8, 8), 0.5), "whole numbers"),
        (np.full((8, 8), "a"), "must hold numbers"),
        (np.full((8, 8), 1j), "must hold numbers"),
        (np.zeros((8, 9), np.uint8), r"has shape \(8, 9\)"),
        (np.zeros((1, 1, 8, 8), np.uint8), "has shape"),
        (np.zeros((), np.uint8), "has shape"),
    ):
        with pytest.raises(DataError, match=line):
            fit(x, GREY)


def test_a_table_may_lack_values_and_an_image_may_not() -> None:
    np.testing.assert_array_equal(
        fit(np.array([1, np.nan, 3]), TABLE), np.array([[1, np.nan, 3]], np.float32)
    )
    for x, spec in (
        (np.array([1, np.inf, 3]), TABLE),
        (np.array([1, 1e39, 3]), TABLE),  # beyond float32
        (np.full((8, 8), np.nan), FLOATS),
    ):
        with pytest.raises(DataError, match="finite"):
            fit(x, spec)


@pytest.mark.parametrize("save", ["npy", "npz", "npz compressed", "npz x", "fortran"])
def test_arrays_are_read_back_as_saved(tmp_path: Path, save: str) -> None:
    x = np.arange(2 * 64, dtype=np.uint8).reshape(2, 8, 8)
    path = tmp_path / ("x.npz" if "npz" in save else "x.npy")
    match save:
        case "npy":
            np.save(path, x)
        case "npz":
            np.savez(path, images=x)
        case "npz compressed":
            np.savez_compressed(path, x)
        case "npz x":
            np.savez(path, x=x, y=np.zeros(2))
        case _:
            np.save(path, np.asfortranarray(x))
    np.testing.assert_array_equal(read_input(path, GREY), x)


def npy(header: str) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


HOSTILE_NPY = {
    "nothing": b"",
    "no magic": b"text",
    "a huge shape": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,), }"),
    "a negative shape": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -64), }") + bytes(64),
    "objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }") + bytes(8),
    "records": npy("{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (1,), }") + bytes(4),
    "no header": npy("__import__('os').system('true')"),
    "a broken header": npy("{'descr': "),
    "a later version": b"\x93NUMPY\x09\x00\x00\x00",
}


@pytest.mark.parametrize("data", HOSTILE_NPY.values(), ids=HOSTILE_NPY.keys())
def test_hostile_arrays_are_the_users_file_not_our_traceback(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.npy: is not an \.npy file") as caught:
        read_input(path, GREY)
    assert "\n" not in str(caught.value)


def test_an_array_that_would_be_unpickled_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / "x.npz"
    np.savez(path, np.array([Trap()], object))
    with pytest.raises(DataError, match="not plain numbers"):
        read_input(path, GREY)
    assert not (tmp_path / "sprung").exists()


def test_a_compression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_FILE_BYTES", 100_000)
    path = tmp_path / "x.npz"
    np.savez_compressed(path, np.zeros(1_000_000, np.uint8))
    with pytest.raises(DataError, match="longer than 100000"):
        read_input(path, GREY)


def test_an_archive_of_several_arrays_must_name_the_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(1), b=np.zeros(1))
    with pytest.raises(DataError, match="name the input x"):
        read_input(tmp_path / "x.npz", GREY)


@pytest.mark.slow
@given(st.data())
def test_flipped_bits_in_an_archive_give_an_array_or_our_error(
    tmp_path_factory: Any, data: st.DataObject
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(
        buffer, "w", data.draw(st.sampled_from([zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED]))
    ) as archive:
        member = io.BytesIO()
        np.save(member, np.zeros((8, 8), np.uint8))
        archive.writestr("x.npy", member.getvalue())
    bad = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 3))):
        bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.getbasetemp() / "flipped.npz"
    path.write_bytes(bad[: data.draw(st.integers(0, len(bad)))] if data.draw(st.booleans()) else bad)
    with suppress(DataError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_input(path, GREY).shape[1:] == (8, 8)


# Images


SIGNAL = Spec("signal", (3, 2), "float32", ("a", "b"), ("ax", "ay"))
TEXT = Spec("text", (4,), "uint8", tuple("\n abc"))


def test_a_signal_is_read_as_windows_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("ay,time,ax\n2,0,1\n4,1,3\n,2,5\n8,3,7\n10,4,9\n12,5,11\n")
    wanted = np.arange(1, 13, dtype=np.float32).reshape(2, 3, 2)
    wanted[0, 2, 1] = np.nan
    np.testing.assert_array_equal(read_input(tmp_path / "x.csv", SIGNAL), wanted)
    (tmp_path / "x.json").write_text("[[1, 2], [3, 4], [5, 6]]")
    assert read_input(tmp_path / "x.json", SIGNAL).shape == (1, 3, 2)
    np.save(tmp_path / "x.npy", wanted[0].astype(np.float16))
    np.testing.assert_array_equal(read_input(tmp_path / "x.npy", SIGNAL), wanted[:1])
    (tmp_path / "x.json").write_text("[[1, 2], [3, 4]]")
    with pytest.raises(DataError, match="has 2 rows; a window of this model is 3"):
        read_input(tmp_path / "x.json", SIGNAL)
    with pytest.raises(DataError, match=r"\.csv, \.json, \.npy or \.npz files, not \.txt"):
        read_input(_written(tmp_path / "x.txt", b"abc"), SIGNAL)


def test_of_a_text_the_last_characters_count(tmp_path: Path) -> None:
    path = _written(tmp_path / "x.txt", "\ufeffcab\r\nbäa".encode())
    assert read_input(path, TEXT).tolist() == read_text("cab\nbäa", TEXT).tolist() == [[0, 3, 1, 2]]
    np.save(tmp_path / "x.npy", np.array([0, 3, 1, 5]))
    with pytest.raises(DataError, match=r"holds values 0 \.\. 5; this model takes 0 \.\. 4"):
        read_input(tmp_path / "x.npy", TEXT)
    with pytest.raises(DataError, match="has 3 characters; this model looks at the last 4"):
        read_text("abc", TEXT)
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_input(_written(tmp_path / "x.txt", b"ab\xffc"), TEXT)
    with pytest.raises(DataError, match="is text; this model takes an image"):
        read_text("abcd", GREY)


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_an_image_is_scaled_and_turned_grey_as_the_training_reader_does(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    expected = np.asarray(Image.fromarray(pixels).resize((8, 8)).convert("L"))
    np.testing.assert_array_equal(read_input(tmp_path / "x.png", GREY), expected[None])
    colour = read_input(tmp_path / "x.png", COLOUR)
    assert (colour.shape, colour.dtype) == ((1, 4, 6, 3), np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".gif", ".tif", ".pgm", ".PNG"])
def test_a_grey_image_of_the_right_size_keeps_its_pixels(tmp_path: Path, suffix: str) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    Image.fromarray(pixels).save(tmp_path / f"x{suffix}")
    np.testing.assert_array_equal(read_input(tmp_path / f"x{suffix}", GREY), pixels[None])


@pytest.mark.slow
def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    Image.new("1", (14_000, 14_000)).save(tmp_path / "x.png")  # 196 million pixels in 24 kB
    with pytest.raises(DataError, match="cannot be read as an image"):
        read_input(tmp_path / "x.png", GREY)
    Image.new("1", (8_000, 8_000)).save(tmp_path / "y.png")
    with pytest.raises(DataError, match="8000 x 8000 pixels, over 50000000"):
        read_input(tmp_path / "y.png", GREY)


@pytest.mark.slow
@given(st.data())
def test_damaged_images_give_pixels_or_our_error(tmp_path_factory: Any, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP"]))
    Image.new("L", (8, 8), 100).save(buffer, kind)
    bad = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 4))):
        bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(bad[: data.draw(st.integers(0, len(bad)))])
    with suppress(DataError):
        assert read_input(path, GREY).shape == (1, 8, 8)


# Tables


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", "dose,name,age,mass\n3,Ann,1,\n6,Bob,4,5\n"),
        ("x.csv", "\ufeffage,mass,dose\r\n1, ,3\r\n4,5,6\r\n"),
        ("x.json", '[{"dose": 3, "age": 1, "mass": null}, {"age": 4, "mass": 5, "dose": 6, "name": "Bob"}]'),
        ("x.json", "[[1, null, 3], [4, 5, 6]]"),
    ],
)
def test_columns_are_found_by_name_and_empty_cells_are_missing(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    np.testing.assert_array_equal(
        read_input(tmp_path / name, TABLE), np.array([[1, np.nan, 3], [4, 5, 6]], np.float32)
    )


@pytest.mark.parametrize(
    ("name", "text"), [("x.csv", "1,2,3\n"), ("x.csv", "a,b,c\n1,2,3\n"), ("x.json", "[1, 2, 3]")]
)
def test_a_model_without_feature_names_takes_columns_in_order(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_input(tmp_path / name, NAMELESS).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("x.csv", "", "first line must name each feature once; 'age' occurs 0 times"),
        ("x.csv", "age,mass,dose\n", "holds no row"),
        ("x.csv", "age,mass,dose,age\n1,2,3,4\n", "'age' occurs 2 times"),
        ("x.csv", "age,mass\n1,2\n", "'dose' occurs 0 times"),
        ("x.csv", "age,mass,dose\n1,2\n", "line 2 has 2 columns, too few"),
        ("x.csv", "age,mass,dose\n1,two,3\n", "line 2: 'two' is not a number"),
        ("x.csv", "age,mass,dose\n1,inf,3\n", "finite"),
        ("x.csv", 'age,mass,dose\n1,"2,3\n', "is not a CSV file"),
        ("x.json", "", "is not a JSON file"),
        ("x.json", "[" * 100_000, "is not a JSON file"),
        ("x.json", "[]", "holds no row"),
        ("x.json", "5", "row 1 must be"),
        ("x.json", '{"age": 1, "mass": 2}', "row 1 lacks 'dose'; write null"),
        ("x.json", '{"age": 1, "mass": 2, "dose": [3]}', "row 1: '\\[3\\]' is not a number"),
        ("x.json", '{"age": 1, "mass": 2, "dose": 1' + "0" * 400 + "}", "is not a number"),
        ("x.json", "[[1, 2], [3, 4]]", "row 1 has 2 values; this model takes 3"),
    ],
)
def test_each_mistake_in_a_table_is_named(tmp_path: Path, name: str, text: str, line: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=line):
        read_input(tmp_path / name, TABLE)


@pytest.mark.parametrize(
    ("name", "spec", "line"),
    [
        ("x.csv", GREY, r"takes an image, \.npy or \.npz files, not \.csv"),
        ("x.png", TABLE, r"takes \.csv, \.json"),
        ("x", GREY, "files without a suffix"),
        ("x.png", FLOATS, "trained on float arrays"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str, spec: Spec, line: str) -> None:
    (tmp_path / name).write_bytes(b"text")
    with pytest.raises(DataError, match=line):
        read_input(tmp_path / name, spec)


def test_a_file_that_is_absent_or_a_folder_or_too_long_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "long.csv").write_text("age,mass,dose\n1,2,3\n")
    monkeypatch.setattr(inputs, "MAX_TEXT_BYTES", 10)
    for name in ("absent.png", "folder.png", "long.csv"):
        with pytest.raises(DataError, match=name):
            read_input(tmp_path / name, TABLE if name.endswith("csv") else GREY)


# What it costs


ALONE = """
import sys
import fedge_client.runtime, fedge_client.updater, fedge_client.cli
from fedge_client.device import Device
from fedge_client.installing import install
from pathlib import Path
home, published, picture = map(Path, sys.argv[1:])
install(Device.open(home), fedge_client.updater.folder(published))
runtime = fedge_client.runtime.Runtime.open(home)
print(runtime.infer(fedge_client.runtime.read_input(picture, runtime.spec))[0].label)
heavy = {"torch", "flwr", "sklearn", "scipy", "pydantic", "pandas", "pyarrow", "safetensors", "sqlalchemy",
         "onnx", "matplotlib", "fedge.config", "fedge.task", "fedge.learning"}
print(sorted(heavy & set(sys.modules)))
"""


@pytest.mark.slow
def test_installing_and_answering_import_nothing_of_the_training_side(tmp_path: Path, publisher: Any) -> None:
    publisher.offer(1, answer=1)
    home = Device.create(tmp_path / "home", "micro", publisher.root).home
    Image.new("L", (30, 30)).save(tmp_path / "x.png")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ALONE, home, publisher.folder, tmp_path / "x.png"],
        env={**os.environ, "PYTHONPATH": f"{root / 'common'}:{root / 'client'}"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("one\n[]\n", "")


def test_a_prediction_can_be_written_as_json(tmp_path: Path, publisher: Any) -> None:
    publisher.offer(1, answer=1)
    (prediction,) = Runtime.open(installed(tmp_path, publisher)).infer(np.zeros((8, 8), np.uint8))
    assert json.loads(json.dumps(dict(prediction.probabilities)))["one"] == prediction.confidence
