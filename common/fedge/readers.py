"""Read users' files into checked data sets: .npz, .csv, .parquet, and folders of images by class.

Nothing is unpickled. Each error says what the file should hold.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedge.dataset import Dataset
from fedge.errors import DataError, FormatError
from fedge.spec import DType, Kind, Spec

if TYPE_CHECKING:
    from fedge.task import Source

Array = npt.NDArray[Any]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
SPLIT_WORDS = {"train": False, "test": True}


def require(source: Source, task: str) -> Path:
    """The source's path, which must be there.

    Raises:
        DataError: none was given, or nothing lies there.
    """
    if source.path is None:
        raise DataError(f'data: task {task!r} needs a file or folder of yours; set data = "PATH"')
    if not source.path.exists():
        raise DataError(f"data: {source.path} does not exist")
    return source.path


def read_npz(path: Path, kind: Kind) -> Dataset:
    """Read `x y [client] [split]`, or `x_train y_train [client_train] x_test y_test`.

    Raises:
        DataError: not an .npz, arrays absent, of wrong lengths or types, or values that cannot be used.
    """
    arrays = _load_npz(path)
    if "x" in arrays and "y" in arrays:
        x, y, client = arrays["x"], arrays["y"], arrays.get("client")
        test = _split_column(arrays["split"]) if "split" in arrays else None
        _same_length(path, x=x, y=y, client=client, split=test)
    elif all(name in arrays for name in ("x_train", "y_train", "x_test", "y_test")):
        _same_length(path, x_train=arrays["x_train"], y_train=arrays["y_train"], client_train=arrays.get("client_train"))
        _same_length(path, x_test=arrays["x_test"], y_test=arrays["y_test"])
        if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
            raise DataError(
                f"data: {path}: x_train {arrays['x_train'].shape} and x_test {arrays['x_test'].shape} differ in shape"
            )
        x = np.concatenate([arrays["x_train"], arrays["x_test"]])
        y = np.concatenate([arrays["y_train"], arrays["y_test"]])
        test = np.arange(len(y)) >= len(arrays["y_train"])
        client = _pad_client(arrays.get("client_train"), len(y))
    else:
        raise DataError(
            f"data: {path} holds {sorted(arrays) or 'nothing'}; it must hold x and y (and may hold client, split), "
            "or x_train, y_train, x_test, y_test (and may hold client_train)"
        )
    return assemble(kind, x, y, client=client, test=test)


def _load_npz(path: Path) -> dict[str, Array]:
    if path.suffix != ".npz":
        raise DataError(f"data: {path}: this task reads .npz files, not {path.suffix or 'files without a suffix'}")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        hint = "; arrays of Python objects are not read" if "pickle" in str(error) else ""
        raise DataError(f"data: {path} is not a readable .npz of plain arrays ({error}{hint})") from error


def _same_length(path: Path, **arrays: Array | None) -> None:
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items() if array is not None}
    if len(set(lengths.values())) > 1:
        raise DataError(f"data: {path}: lengths differ: {', '.join(f'{k} {v}' for k, v in lengths.items())}")


def _split_column(split: Array) -> npt.NDArray[np.bool_]:
    words = [str(value) for value in split.tolist()]
    wrong = next((word for word in words if word not in SPLIT_WORDS), None)
    if wrong is not None:
        raise DataError(f"data: split holds {wrong!r}; it may hold 'train' and 'test'")
    return np.array([SPLIT_WORDS[word] for word in words])


def _pad_client(client: Array | None, n: int) -> Array | None:
    """Test examples of a pre-split file belong to no client; any number serves, they are never dealt out."""
    if client is None:
        return None
    return np.concatenate([client, np.repeat(client[:1], n - len(client))])


def assemble(
    kind: Kind,
    x: Array,
    y: Array,
    *,
    client: Array | None = None,
    test: npt.NDArray[np.bool_] | None = None,
    features: tuple[str, ...] = (),
    labels: tuple[str, ...] | None = None,
) -> Dataset:
    """Name labels and clients, settle dtypes, and check everything.

    Args:
        kind: of the raw input.
        x: (N, ...) numbers.
        y: (N,) integers, booleans or text; whole numbers keep their order, text is sorted.
        client: (N,) any scalar; every distinct value is one natural client.
        test: (N,) held-out examples.
        features: names of a table's columns.
        labels: names of the classes where y is already 0 .. K-1.

    Raises:
        DataError: something cannot be used.
    """
    x, dtype = _numbers(x, kind)
    if labels is None:
        labels, y = _label_names(y)
    names, codes = _codes(client) if client is not None else ((), None)
    try:
        spec = Spec(kind, x.shape[1:], dtype, labels, features)
    except FormatError as error:
        raise DataError(f"data: {error}") from error
    return Dataset(spec, x, y.astype(np.int64), codes, names, test)


def _numbers(x: Array, kind: Kind) -> tuple[Array, DType]:
    if x.dtype.kind not in "uifb":
        raise DataError(f"data: x is {x.dtype}; it must be numbers")
    if kind == "image" and x.dtype == np.uint8:
        return x, "uint8"
    if kind == "image" and x.dtype.kind in "ui" and x.size and 0 <= x.min() and x.max() <= 255:
        return x.astype(np.uint8), "uint8"
    with np.errstate(over="ignore"):  # a value beyond float32 becomes inf, which is refused by name
        return x.astype(np.float32), "float32"


def _label_names(y: Array) -> tuple[tuple[str, ...], Array]:
    if y.ndim != 1:
        raise DataError(f"data: y has shape {y.shape}; it must be one label per example")
    if y.dtype.kind == "f":
        if not np.isfinite(y).all() or (y != np.round(y)).any():
            wrong = y[~np.isfinite(y) | (y != np.round(y))][0]
            raise DataError(f"data: label {wrong} is not a whole number; labels name classes")
        y = y.astype(np.int64)
    if y.dtype.kind in "uib":
        y = y.astype(np.int64)
        if len(y) and y.min() < 0:
            raise DataError(f"data: label {y.min()} is out of range; labels start at 0")
        top = int(y.max()) if len(y) else 0
        if top >= max(1000, 2 * len(y)):
            raise DataError(f"data: label {top} is out of range: {len(y)} examples cannot need so many classes")
        return tuple(str(i) for i in range(top + 1)), y
    if y.dtype.kind in "US":
        values, codes = np.unique(y.astype(str), return_inverse=True)
        return tuple(str(value) for value in values), codes
    raise DataError(f"data: y is {y.dtype}; it must be whole numbers or text")


def _codes(client: Array) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    if client.dtype.kind not in "uibUS":
        raise DataError(f"data: client is {client.dtype}; it must be whole numbers or text")
    values, codes = np.unique(client, return_inverse=True)
    return tuple(str(value) for value in values), codes.astype(np.int64)


def read_table(path: Path, source: Source) -> Dataset:
    """Read a .csv or .parquet table: one column is the label, all others but the client are features.

    Empty cells are missing values. A column of text is refused by name: encode it as numbers first.

    Raises:
        DataError: unreadable, no such column, a feature that is not a number, or a label that is missing.
    """
    columns = _load_columns(path)
    label, client = _column(columns, source.label, "data_label", path), None
    if source.client is not None:
        client = _column(columns, source.client, "data_client", path)
    test = _split_column(columns["split"]) if "split" in columns else None
    names = tuple(name for name in columns if name not in (source.label, source.client, "split"))
    if not names:
        raise DataError(f"data: {path} has no column besides the label and the client")
    for name in names:
        if columns[name].dtype.kind not in "uifb":
            raise DataError(
                f"data: {path}: column {name!r} holds text; encode it as numbers, or name it as data_client"
            )
    x = np.column_stack([columns[name].astype(np.float64) for name in names])
    return assemble("features", x, label, client=client, test=test, features=names)


def _load_columns(path: Path) -> Mapping[str, Array]:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    readers = {".csv": pyarrow.csv.read_csv, ".parquet": pyarrow.parquet.read_table, ".pq": pyarrow.parquet.read_table}
    if path.suffix not in readers:
        raise DataError(f"data: {path}: tables are read from .csv, .parquet or .npz files")
    try:
        table = readers[path.suffix](path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"data: {path} cannot be read as a table ({str(error).splitlines()[0]})") from error
    if len(set(table.column_names)) != len(table.column_names):
        raise DataError(f"data: {path}: a column name occurs twice in {table.column_names}")
    return {name: np.asarray(table.column(name).to_numpy()) for name in table.column_names}


def _column(columns: Mapping[str, Array], name: str, key: str, path: Path) -> Array:
    from fedge.config import suggestion

    if name not in columns:
        raise DataError(f"data: {path} has no column {name!r} ({key}); {suggestion(name, list(columns))}")
    column = columns[name]
    if column.dtype == object:
        if any(value is None for value in column):
            raise DataError(f"data: {path}: column {name!r} ({key}) has an empty cell")
        column = column.astype(str)
    elif column.dtype.kind == "f" and np.isnan(column).any():
        raise DataError(f"data: {path}: column {name!r} ({key}) has an empty cell")
    return column


def read_image_folder(path: Path, source: Source) -> Dataset:
    """Read FOLDER/CLASS/*.png, or FOLDER/train/CLASS and FOLDER/test/CLASS; all in one size and mode.

    Raises:
        DataError: no class folders, a file that is no image, or sizes that differ and no data_size.
    """
    folders = {child.name: child for child in sorted(path.iterdir()) if child.is_dir()}
    parts = {"train": folders["train"], "test": folders["test"]} if {"train", "test"} == set(folders) else {"": path}
    files = [
        (file, child.name, part == "test")
        for part, root in parts.items()
        for child in sorted(root.iterdir())
        if child.is_dir()
        for file in sorted(child.iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise DataError(f"data: {path} has no images in folders by class (such as {path}/cat/1.png)")
    images = _load_images([file for file, _, _ in files], source.size)
    labels = np.array([label for _, label, _ in files])
    test = np.array([held for _, _, held in files]) if len(parts) == 2 else None
    return assemble("image", images, labels, test=test)


def _load_images(files: list[Path], size: tuple[int, int] | None) -> Array:
    """(N, H, W) when every file is grey, else (N, H, W, 3)."""
    from PIL import Image, UnidentifiedImageError

    loaded = []
    for file in files:
        try:
            with Image.open(file) as image:
                grey = image.mode in ("L", "1", "I;16")
                resized = image if size is None else image.resize((size[1], size[0]))
                loaded.append((np.asarray(resized.convert("L" if grey else "RGB")), grey))
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise DataError(f"data: {file} cannot be read as an image ({error})") from error
    grey = all(is_grey for _, is_grey in loaded)
    arrays = [a if grey or a.ndim == 3 else np.repeat(a[..., None], 3, axis=2) for a, _ in loaded]
    for file, array in zip(files, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise DataError(
                f"data: {file} is {array.shape[1]}x{array.shape[0]}, {files[0]} is "
                f"{arrays[0].shape[1]}x{arrays[0].shape[0]}; set data_size = [HEIGHT, WIDTH] to resize them"
            )
    return np.stack(arrays)
