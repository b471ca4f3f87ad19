"""Read a user's file into what a model takes: images, arrays, rows of tables, signals and text, all bounded.

Images are converted as the training reader converts them (scale, then grey or RGB), so that a device
sees what training saw.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import math
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedge.errors import DataError, FormatError
from fedge.files import read_bounded
from fedge.fitting import fit
from fedge.spec import Spec
from fedge.texts import encode

__all__ = ["decode", "fit", "read_input", "read_text"]

Array = npt.NDArray[Any]

MAX_FILE_BYTES: Final = 256 * 1024**2  # of an input file, and of an array inside an .npz
MAX_TEXT_BYTES: Final = 32 * 1024**2  # of a table: its cells take some ten times as much while they are read
MAX_PIXELS: Final = 50_000_000  # of an image before it is scaled
IMAGE_FORMATS: Final = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # none that runs a program
_TAKES: Final = {
    "image": "an image, .npy or .npz",
    "features": ".csv, .json, .npy or .npz",
    "signal": ".csv, .json, .npy or .npz",
    "text": ".txt, .npy or .npz",
}
_TEXTS: Final = (".csv", ".json", ".txt")
_IMAGES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")


def read_input(path: Path, spec: Spec) -> Array:
    """The examples in a file as a batch (B, *spec.shape) of the spec's dtype.

    Reads images (scaled to the spec's size), `.npy` and `.npz` (array `x`, or the only one), for tables
    `.csv` and `.json` rows, for signals such rows with one window after the other, and of a text file the
    last characters. Columns are found by name, and an empty cell is a missing value.

    Raises:
        DataError: unreadable, too large, of a kind that the model does not take, or out of range.
    """
    suffix = path.suffix.lower()
    try:
        data = read_bounded(path, MAX_TEXT_BYTES if suffix in _TEXTS else MAX_FILE_BYTES)
    except FormatError as error:
        raise DataError(f"input {error}") from error
    try:
        return decode(data, suffix, spec)
    except DataError as error:
        raise DataError(f"input {path}: {error}") from error


def decode(data: bytes, suffix: str, spec: Spec, *, max_pixels: int = MAX_PIXELS) -> Array:
    """The examples in a file's bytes, as `read_input` gives them.

    Args:
        data: the whole file; whoever read it has bounded its length.
        suffix: of its name, with the dot, in lower case: what kind of file it is.
        spec: of the model.
        max_pixels: of an image before it is scaled.

    Raises:
        DataError: unreadable, of a kind that the model does not take, or out of range.
    """
    if suffix in (".npy", ".npz"):
        return fit(_npy(data) if suffix == ".npy" else _npz(data), spec)
    if spec.kind == "image" and suffix in _IMAGES:
        return _image(data, spec, max_pixels)
    if spec.kind in ("features", "signal") and suffix in (".csv", ".json"):
        rows = _csv(data, spec) if suffix == ".csv" else _json(data, spec)
        return fit(_windows(rows, spec) if spec.kind == "signal" else rows, spec)
    if spec.kind == "text" and suffix == ".txt":
        return read_text(_decoded(data), spec)
    takes = _TAKES[spec.kind]
    raise DataError(f"this model takes {takes} files, not {suffix or 'files without a suffix'}")


def read_text(text: str, spec: Spec) -> Array:
    """The last characters of a text as one example (1, T).

    Raises:
        DataError: the model takes no text, or the text has fewer than T characters.
    """
    if spec.kind != "text":
        raise DataError(f"is text; this model takes {_TAKES[spec.kind]} files")
    length = spec.shape[0]
    if len(text) < length:
        raise DataError(f"has {len(text)} characters; this model looks at the last {length}")
    return encode(text[-length:], spec.labels)[np.newaxis]


def _decoded(data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text ({_brief(error)})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads a text file, and so training


def _windows(rows: Array, spec: Spec) -> Array:
    """Rows of channels (B * T, C) as windows (B, T, C)."""
    if len(rows) % spec.shape[0]:
        raise DataError(f"has {len(rows)} rows; a window of this model is {spec.shape[0]}")
    return rows.reshape(-1, *spec.shape)


def _image(data: bytes, spec: Spec, max_pixels: int) -> Array:
    from PIL import Image

    if spec.dtype != "uint8":
        raise DataError("this model was trained on float arrays, not on image files; give .npy or .npz")
    height, width = spec.shape[:2]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs that MAX_PIXELS refuses anyway
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise DataError(f"has {image.width} x {image.height} pixels, over {max_pixels}")
                if image.mode.startswith(("I", "F")):  # training refuses them too: they would be clipped
                    raise DataError(f"has more than 8 bits per pixel (mode {image.mode}); convert it first")
                scaled = image if image.size == (width, height) else image.resize((width, height))
                pixels = np.asarray(scaled.convert("RGB" if spec.channels == 3 else "L"))
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise DataError(f"cannot be read as an image ({_brief(error)})") from error
    return pixels.reshape(1, *spec.shape)  # (1, H, W) or (1, H, W, C)


def _npy(data: bytes) -> Array:
    """An .npy file whose header declares no more than the bytes that follow it."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")
        one = version == (1, 0)
        shape, fortran, dtype = (
            np.lib.format.read_array_header_1_0(file) if one else np.lib.format.read_array_header_2_0(file)
        )
        if dtype.hasobject or dtype.kind not in "uifb":
            raise ValueError(f"it holds {dtype}, not plain numbers")
        if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
            raise ValueError("its length is not the one that its header declares")
        flat = np.frombuffer(data, dtype, offset=file.tell())
        return flat.reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # numpy reads the header with Python's tokenizer, which raises many kinds
        raise DataError(f"is not an .npy file of plain numbers ({_brief(error)})") from error


def _npz(data: bytes) -> Array:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            chosen = "x.npy" if "x.npy" in names else names[0] if len(names) == 1 else None
            if chosen is None:
                raise DataError(f"holds arrays {sorted(names)[:5]}; name the input x")
            with archive.open(chosen) as member:
                content = member.read(MAX_FILE_BYTES + 1)  # stops a compression bomb
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
    ) as error:
        raise DataError(f"is not an .npz file ({_brief(error)})") from error
    if len(content) > MAX_FILE_BYTES:
        raise DataError(f"its array is longer than {MAX_FILE_BYTES} bytes")
    return _npy(content)


def _csv(data: bytes, spec: Spec) -> Array:
    try:
        rows = [
            row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True) if row
        ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"is not a CSV file ({_brief(error)})") from error
    if rows and not spec.features:
        start = 0 if _is_number(rows[0][0]) else 1  # without names a header line says nothing
        return _table(
            [_cells(row, range(len(row)), i) for i, row in enumerate(rows[start:], start + 1)], spec
        )
    positions = _positions(rows[0] if rows else [], spec)
    return _table([_cells(row, positions, i) for i, row in enumerate(rows[1:], 2)], spec)


def _positions(header: Sequence[str], spec: Spec) -> list[int]:
    names = [name.strip() for name in header]
    missing = [name for name in spec.features if names.count(name) != 1]
    if missing:
        raise DataError(
            f"its first line must name each feature once; "
            f"{missing[0]!r} occurs {names.count(missing[0])} times"
        )
    return [names.index(name) for name in spec.features]


def _cells(row: Sequence[str], positions: Sequence[int], line: int) -> list[float]:
    if len(row) <= max(positions, default=0):
        raise DataError(f"line {line} has {len(row)} columns, too few")
    return [_number(row[i], f"line {line}") for i in positions]


def _json(data: bytes, spec: Spec) -> Array:
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not a JSON file ({_brief(error)})") from error
    several = isinstance(value, list) and all(isinstance(row, dict | list) for row in value)
    return _table([_json_row(row, spec, i) for i, row in enumerate(value if several else [value], 1)], spec)


def _json_row(row: Any, spec: Spec, number: int) -> list[float]:
    if isinstance(row, dict) and spec.features:
        missing = [name for name in spec.features if name not in row]
        if missing:
            raise DataError(f"row {number} lacks {missing[0]!r}; write null for a missing value")
        row = [row[name] for name in spec.features]
    if not isinstance(row, list):
        raise DataError(f"row {number} must be {'an object or ' if spec.features else ''}a list of numbers")
    return [_number(cell, f"row {number}") for cell in row]


def _number(cell: Any, where: str) -> float:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return math.nan  # a missing value
    try:
        if isinstance(cell, bool | int | float | str):
            return float(cell)
    except (ValueError, OverflowError):
        pass
    raise DataError(f"{where}: {str(cell)[:40]!r} is not a number")


def _is_number(cell: str) -> bool:
    try:
        _number(cell, "")
    except DataError:
        return False
    return True


def _table(rows: list[list[float]], spec: Spec) -> Array:
    if not rows:
        raise DataError("holds no row")
    width = spec.channels
    wrong = next((i for i, row in enumerate(rows, 1) if len(row) != width), None)
    if wrong is not None:
        raise DataError(f"row {wrong} has {len(rows[wrong - 1])} values; this model takes {width}")
    return np.array(rows, np.float64).reshape(len(rows), width)  # (B, F), or (B * T, C)


def _brief(error: Exception) -> str:
    text = str(error).splitlines()
    return text[0][:160] if text else type(error).__name__
