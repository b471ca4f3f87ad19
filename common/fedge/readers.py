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
    from pyarrow import ChunkedArray

    from fedge.task import Source

Array = npt.NDArray[Any]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")  # by content; none that runs a program
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


def read_npz(path: Path, kind: Kind, labels: tuple[str, ...] = ()) -> Dataset:
    """Read `x y [client] [split]`, or `x_train y_train [client_train] x_test y_test`; `overlap` with either.

    Args:
        path: of the file.
        kind: of the raw input.
        labels: the run's classes where they are known; else those that occur.

    Raises:
        DataError: not an .npz, arrays absent, of wrong lengths or types, or values that cannot be used.
    """
    arrays = load_npz(path)
    if "x" in arrays and "y" in arrays:
        x, y, client, marks = arrays["x"], arrays["y"], arrays.get("client"), arrays.get("split")
        _same_length(path, x=x, y=y, client=client, split=marks)
        test = _split_column(marks) if marks is not None else None
    elif all(name in arrays for name in ("x_train", "y_train", "x_test", "y_test")):
        _same_length(
            path,
            x_train=arrays["x_train"],
            y_train=arrays["y_train"],
            client_train=arrays.get("client_train"),
        )
        _same_length(path, x_test=arrays["x_test"], y_test=arrays["y_test"])
        if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
            raise DataError(
                f"data: {path}: x_train {arrays['x_train'].shape} and x_test {arrays['x_test'].shape} "
                "differ in shape"
            )
        x = np.concatenate([arrays["x_train"], arrays["x_test"]])
        y = np.concatenate([_column_vector(arrays["y_train"]), _column_vector(arrays["y_test"])])
        test = np.arange(len(y)) >= len(arrays["y_train"])
        client = _pad_client(arrays.get("client_train"), len(y))
    else:
        raise DataError(
            f"data: {path} holds {sorted(arrays) or 'no arrays'}; it must hold x and y "
            "(and may hold client, split), or x_train, y_train, x_test, y_test (and may hold client_train)"
        )
    overlap = _overlap(arrays.get("overlap"))
    named = arrays["channels"].ravel() if kind == "signal" and "channels" in arrays else np.array([], "U1")
    names = tuple(str(name) for name in _text(named, "channels"))
    return assemble(kind, x, y, client=client, test=test, features=names, run_labels=labels, overlap=overlap)


def _overlap(found: Array | None) -> int:
    """How many next rows share values with each: one whole number, such as 1 for windows of a half."""
    if found is None:
        return 0
    if found.size != 1 or found.dtype.kind not in "ui" or not 0 <= found.item() < 2**31:
        raise DataError(
            "data: overlap must be one whole number: how many next windows share values with each"
        )
    return int(found.item())


def load_npz(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file.

    Raises:
        DataError: it is none, or holds arrays of objects.
    """
    if path.suffix.lower() != ".npz":
        raise DataError(
            f"data: {path}: this task reads .npz files, not {path.suffix or 'files without a suffix'}"
        )
    try:
        # Opened here: numpy leaves a file open that is no zip.
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
        with np.load(path, allow_pickle=False) as file:
            arrays = {name.removesuffix(".npy"): file[name.removesuffix(".npy")] for name in names}
        if broken := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{broken[0]}.npy is no array")  # numpy hands its bytes back
    except Exception as error:  # a damaged zip or .npy header raises many kinds
        hint = "; arrays of Python objects are not read" if "pickle" in str(error) else ""
        raise DataError(
            f"data: {path} is not a readable .npz of plain arrays ({_first_line(error)}{hint})"
        ) from error
    return arrays


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _same_length(path: Path, **arrays: Array | None) -> None:
    lengths = {}
    for name, array in arrays.items():
        if array is not None and array.ndim == 0:
            raise DataError(f"data: {path}: {name} is a single value; it must hold one entry per example")
        if array is not None:
            lengths[name] = len(array)
    if len(set(lengths.values())) > 1:
        raise DataError(f"data: {path}: lengths differ: {', '.join(f'{k} {v}' for k, v in lengths.items())}")


def _column_vector(array: Array) -> Array:
    """(N, 1), as pandas and scikit-learn often write it, means (N,)."""
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def _text(array: Array, name: str) -> Array:
    """Bytes as text; everything else as it is."""
    if array.dtype.kind != "S":
        return array
    try:
        return np.char.decode(array, "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"data: {name} holds bytes that are not UTF-8 text ({error})") from error


def _split_column(split: Array) -> npt.NDArray[np.bool_]:
    words = [str(value) for value in _text(_column_vector(split), "split").tolist()]
    wrong = next((word for word in words if word not in SPLIT_WORDS), None)
    if wrong is not None:
        raise DataError(f"data: split holds {wrong!r}; it may hold 'train' and 'test'")
    return np.array([SPLIT_WORDS[word] for word in words])


def _pad_client(client: Array | None, n: int) -> Array | None:
    """Test examples of a pre-split file belong to no client; any number serves, they are never dealt out."""
    if client is None or len(client) == 0:
        return None
    client = _column_vector(client)
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
    run_labels: tuple[str, ...] = (),
    overlap: int = 0,
) -> Dataset:
    """Name labels and clients, settle dtypes, and check everything.

    Args:
        kind: of the raw input.
        x: (N, ...) numbers.
        y: (N,) or (N, 1) integers, booleans or text. Each distinct value is a class; whole numbers keep
            their order, text is sorted.
        client: (N,) or (N, 1) whole numbers or text; every distinct value is one natural client.
        test: (N,) held-out examples.
        features: names of a table's columns or a signal's channels.
        labels: names of the classes where y is already 0 .. K-1.
        run_labels: the run's classes where they are known: their order is taken, and y may lack some.
        overlap: so many next examples of a client share raw values with each.

    Raises:
        DataError: something cannot be used.
    """
    if x.ndim == 0 or len(x) == 0:
        raise DataError("data: there is no example in it")
    x, dtype = _numbers(x, kind)
    y = _column_vector(y)
    if labels is None:
        labels, y = _label_names(y)
        labels, y = _among(run_labels, labels, y) if run_labels else (labels, y)
        if len(labels) == 1:
            raise DataError(f"data: every example has the label {labels[0]!r}; there must be two classes")
    names, codes = _codes(_column_vector(client)) if client is not None else ((), None)
    try:
        spec = Spec(kind, x.shape[1:], dtype, labels, features)
    except FormatError as error:
        raise DataError(f"data: x has shape {x.shape}: {error}{_shape_hint(kind, x)}") from error
    return Dataset(spec, x, y.astype(np.int64), codes, names, test, overlap)


def _shape_hint(kind: Kind, x: Array) -> str:
    if kind == "features":
        return "; a table is (examples, columns)" if x.ndim != 2 else ""
    if kind == "signal":
        return "; signals are (examples, time, channels)" if x.ndim != 3 else ""
    if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
        return "; channels come last: x.transpose(0, 2, 3, 1)"
    return "; images are (examples, height, width) or (examples, height, width, channels)"


def _among(run_labels: tuple[str, ...], labels: tuple[str, ...], y: Array) -> tuple[tuple[str, ...], Array]:
    unknown = [label for label in labels if label not in run_labels]
    if unknown:
        raise DataError(f"data: label {unknown[0]!r} is not among the run's labels {list(run_labels)}")
    return run_labels, np.array([run_labels.index(label) for label in labels])[y]


def _numbers(x: Array, kind: Kind) -> tuple[Array, DType]:
    if x.dtype.kind not in "uifb":
        raise DataError(f"data: x is {x.dtype}; it must be numbers")
    if kind == "image" and x.dtype == np.uint8:
        return x, "uint8"
    if kind == "image" and x.dtype.kind in "ui" and x.size and x.min() >= 0 and x.max() <= 255:
        return x.astype(np.uint8), "uint8"
    with np.errstate(over="ignore"):  # a value beyond float32 becomes inf, which is refused by name
        return x.astype(np.float32), "float32"


def _label_names(y: Array) -> tuple[tuple[str, ...], Array]:
    if y.ndim != 1:
        hint = "; turn one-hot rows into classes with y.argmax(1)" if y.ndim == 2 else ""
        raise DataError(f"data: y has shape {y.shape}; it must be one label per example{hint}")
    if y.dtype.kind == "f" and (broken := ~np.isfinite(y) | (y != np.round(y))).any():
        raise DataError(f"data: label {y[broken][0]} is not a whole number; labels name classes")
    if y.dtype.kind in "uifb":
        if y.min() < 0:
            raise DataError(f"data: label {y.min()} is out of range; labels start at 0")
        if y.max() >= max(1000, 2 * len(y)):
            raise DataError(
                f"data: label {y.max()} is out of range: {len(y)} examples cannot need so many classes"
            )
        # Only values that occur: counted from 1, labels would give a class 0 that nothing belongs to.
        values, codes = np.unique(y.astype(np.int64), return_inverse=True)
        return tuple(str(value) for value in values), codes
    if y.dtype.kind in "US":
        values, codes = np.unique(_text(y, "y"), return_inverse=True)
        return tuple(str(value) for value in values), codes
    raise DataError(f"data: y is {y.dtype}; it must be whole numbers or text")


def _codes(client: Array) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    if client.dtype.kind not in "uibUS":
        raise DataError(f"data: client is {client.dtype}; it must be whole numbers or text")
    values, codes = np.unique(_text(client, "client"), return_inverse=True)
    return tuple(str(value) for value in values), codes.astype(np.int64)


def read_table(path: Path, source: Source) -> Dataset:
    """Read a .csv or .parquet table: one column is the label, all others but client and split are features.

    Empty cells are missing values, in a whole column too. A column of text is refused by name: encode it as
    numbers first.

    Raises:
        DataError: unreadable, no such column, a feature that is not a number, or a label that is missing.
    """
    columns = _load_columns(path)
    label, client = _column(columns, source.label, "data_label", path), None
    if source.client is not None:
        client = _column(columns, source.client, "data_client", path)
    test, taken = None, {source.label, source.client}
    if "split" in columns and "split" not in taken:
        test = _split_column(_column(columns, "split", "split", path))
    names = tuple(name for name in columns if name not in {*taken, "split"})
    if not names:
        raise DataError(f"data: {path} has no column besides label, client and split")
    x = np.column_stack([_feature(columns[name], name, path) for name in names])
    return assemble("features", x, label, client=client, test=test, features=names, run_labels=source.labels)


def _load_columns(path: Path) -> Mapping[str, ChunkedArray]:
    import pyarrow.csv
    import pyarrow.parquet

    suffix = path.suffix.lower()
    if suffix not in (".csv", ".parquet", ".pq"):
        raise DataError(f"data: {path}: tables are read from .csv, .parquet or .npz files")
    try:
        if suffix == ".csv":
            # In one block: types are inferred from the first, and a later decimal would be an error.
            block = min(max(path.stat().st_size, 1), 2**31 - 1)
            table = pyarrow.csv.read_csv(path, pyarrow.csv.ReadOptions(block_size=block))
        else:
            with pyarrow.parquet.ParquetFile(path) as file:  # read_table would add columns from folder names
                table = file.read()
        names = list(table.column_names)
    except Exception as error:  # a damaged file raises many kinds
        raise DataError(
            f"data: {path} cannot be read as a table ({_first_line(error)}){_separator_hint(path)}"
        ) from error
    for i, name in enumerate(names, start=1):
        if not name.strip() or name.startswith("__index_level_"):  # a row index would be learned from
            raise DataError(
                f"data: {path}: column {i} is named {name!r}; name it, or leave a row index out "
                "(pandas: index=False)"
            )
    if len(set(names)) != len(names):
        raise DataError(f"data: {path}: a column name occurs twice in {names}")
    return {name: table.column(name) for name in names}


def _separator_hint(path: Path) -> str:
    """What to say of a CSV from a spreadsheet that separates by other characters."""
    if path.suffix.lower() != ".csv" or not path.is_file():
        return ""
    with path.open("rb") as file:
        head = file.readline(64 * 1024)
    other = next((name for mark, name in ((b";", "semicolons"), (b"\t", "tabs")) if mark in head), None)
    return f"; it seems to use {other}: separate columns by commas" if other and b"," not in head else ""


def _feature(column: ChunkedArray, name: str, path: Path) -> Array:
    """A column of numbers as float64, missing values as NaN."""
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    numeric = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
    if not (pa.types.is_null(kind) or any(test(kind) for test in numeric)):
        what = "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else f"{kind} values"
        raise DataError(
            f"data: {path}: column {name!r} holds {what}; encode it as numbers, or name it as data_client"
        )
    numbers = column.cast(kind).cast(pa.float64(), safe=False)
    return np.asarray(numbers.to_numpy())


def _column(columns: Mapping[str, ChunkedArray], name: str, key: str, path: Path) -> Array:
    """A column of whole numbers, booleans or text in which every cell is filled."""
    import pyarrow as pa

    from fedge.config import suggestion

    if name not in columns:
        raise DataError(
            f"data: {path} has no column {name!r} ({key}); {suggestion(name, list(columns))}"
            f"{_separator_hint(path)}"
        )
    column = columns[name]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_nested(kind) or pa.types.is_temporal(kind):
        raise DataError(f"data: {path}: column {name!r} ({key}) holds {kind} values; use numbers or text")
    array = np.asarray(column.cast(kind).to_numpy())
    if column.null_count or (array.dtype.kind == "f" and np.isnan(array).any()):
        raise DataError(f"data: {path}: column {name!r} ({key}) has an empty cell")
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        array = _text(array.astype("S"), f"{path}: column {name!r}")
    elif pa.types.is_decimal(kind):
        array = array.astype(np.float64)
    elif array.dtype == object:
        array = array.astype(str)
    if array.dtype.kind == "U" and (array == "").any():
        raise DataError(f"data: {path}: column {name!r} ({key}) has an empty cell")
    return array


def read_image_folder(path: Path, source: Source) -> Dataset:
    """Read FOLDER/CLASS/*.png, or FOLDER/train/CLASS and FOLDER/test/CLASS; all in one size and mode.

    Names that start with a dot are passed over: file managers and notebooks leave such behind.

    Raises:
        DataError: no class folders, a file that is no image, or sizes that differ and no data_size.
    """
    folders = {child.name: child for child in _visible(path) if child.is_dir()}
    parts = (
        {"train": folders["train"], "test": folders["test"]}
        if {"train", "test"} == set(folders)
        else {"": path}
    )
    files = [
        (file, child.name, part == "test")
        for part, root in parts.items()
        for child in _visible(root)
        if child.is_dir()
        for file in _visible(child)
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise DataError(f"data: {path} has no images in folders by class (such as {path}/cat/1.png)")
    images = _load_images([file for file, _, _ in files], source.size)
    labels = np.array([label for _, label, _ in files])
    test = np.array([held for _, _, held in files]) if len(parts) == 2 else None
    return assemble("image", images, labels, test=test, run_labels=source.labels)


def _visible(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if not child.name.startswith("."))


def _load_images(files: list[Path], size: tuple[int, int] | None) -> Array:
    """(N, H, W) when every file is grey, else (N, H, W, 3)."""
    from PIL import Image

    loaded = []
    for file in files:
        try:
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                if image.mode.startswith(("I", "F")):
                    # Pillow would clip these to 255, so that most of a 16-bit image turned white.
                    raise DataError(
                        f"data: {file} has more than 8 bits per pixel (mode {image.mode}); "
                        "convert it to 8 bits, or bring the arrays as an .npz"
                    )
                grey = image.mode in ("L", "1")
                resized = image if size is None else image.resize((size[1], size[0]))
                loaded.append((np.asarray(resized.convert("L" if grey else "RGB")), grey))
        except DataError:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds for damaged files
            raise DataError(f"data: {file} cannot be read as an image ({_first_line(error)})") from error
    grey = all(is_grey for _, is_grey in loaded)
    arrays = [a if grey or a.ndim == 3 else np.repeat(a[..., None], 3, axis=2) for a, _ in loaded]
    for file, array in zip(files, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise DataError(
                f"data: {file} is {array.shape[1]}x{array.shape[0]}, {files[0]} is "
                f"{arrays[0].shape[1]}x{arrays[0].shape[0]}; set data_size = [HEIGHT, WIDTH] to resize them"
            )
    return np.stack(arrays)
