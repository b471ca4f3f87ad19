"""From arrays to a checked data set: labels and clients are named, dtypes settled, nonsense refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedge.dataset import Dataset
from fedge.errors import DataError, FormatError
from fedge.spec import DType, Kind, Spec

Array = npt.NDArray[Any]

SPLIT_WORDS = {"train": False, "test": True}


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
    y = column_vector(y)
    if labels is None:
        labels, y = _label_names(y)
        labels, y = _among(run_labels, labels, y) if run_labels else (labels, y)
        if len(labels) == 1:
            raise DataError(f"data: every example has the label {labels[0]!r}; there must be two classes")
    names, codes = _codes(column_vector(client)) if client is not None else ((), None)
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
        values, codes = np.unique(text_of(y, "y"), return_inverse=True)
        return tuple(str(value) for value in values), codes
    raise DataError(f"data: y is {y.dtype}; it must be whole numbers or text")


def _codes(client: Array) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    if client.dtype.kind not in "uibUS":
        raise DataError(f"data: client is {client.dtype}; it must be whole numbers or text")
    values, codes = np.unique(text_of(client, "client"), return_inverse=True)
    return tuple(str(value) for value in values), codes.astype(np.int64)


def column_vector(array: Array) -> Array:
    """(N, 1), as pandas and scikit-learn often write it, means (N,)."""
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def text_of(array: Array, name: str) -> Array:
    """Bytes as text; everything else as it is."""
    if array.dtype.kind != "S":
        return array
    try:
        return np.char.decode(array, "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"data: {name} holds bytes that are not UTF-8 text ({error})") from error


def split_column(split: Array) -> npt.NDArray[np.bool_]:
    """(N,) whether an example is held out, from the words `train` and `test`."""
    words = [str(value) for value in text_of(column_vector(split), "split").tolist()]
    wrong = next((word for word in words if word not in SPLIT_WORDS), None)
    if wrong is not None:
        raise DataError(f"data: split holds {wrong!r}; it may hold 'train' and 'test'")
    return np.array([SPLIT_WORDS[word] for word in words])


def first_line(error: Exception) -> str:
    """What a library says went wrong, without the lines that follow."""
    return next(iter(str(error).splitlines()), type(error).__name__)
