"""Read .npz files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from fedge.dataset import Dataset
from fedge.errors import DataError
from fedge.readers.assembling import Array, assemble, column_vector, first_line, split_column, text_of
from fedge.spec import Kind


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
        test = split_column(marks) if marks is not None else None
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
        y = np.concatenate([column_vector(arrays["y_train"]), column_vector(arrays["y_test"])])
        test = np.arange(len(y)) >= len(arrays["y_train"])
        client = _pad_client(arrays.get("client_train"), len(y))
    else:
        raise DataError(
            f"data: {path} holds {sorted(arrays) or 'no arrays'}; it must hold x and y "
            "(and may hold client, split), or x_train, y_train, x_test, y_test (and may hold client_train)"
        )
    overlap = _overlap(arrays.get("overlap"))
    named = arrays["channels"].ravel() if kind == "signal" and "channels" in arrays else np.array([], "U1")
    names = tuple(str(name) for name in text_of(named, "channels"))
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
            f"data: {path} is not a readable .npz of plain arrays ({first_line(error)}{hint})"
        ) from error
    return arrays


def _same_length(path: Path, **arrays: Array | None) -> None:
    lengths = {}
    for name, array in arrays.items():
        if array is not None and array.ndim == 0:
            raise DataError(f"data: {path}: {name} is a single value; it must hold one entry per example")
        if array is not None:
            lengths[name] = len(array)
    if len(set(lengths.values())) > 1:
        raise DataError(f"data: {path}: lengths differ: {', '.join(f'{k} {v}' for k, v in lengths.items())}")


def _pad_client(client: Array | None, n: int) -> Array | None:
    """Test examples of a pre-split file belong to no client; any number serves, they are never dealt out."""
    if client is None or len(client) == 0:
        return None
    client = column_vector(client)
    return np.concatenate([client, np.repeat(client[:1], n - len(client))])
