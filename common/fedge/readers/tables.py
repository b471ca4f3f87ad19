"""Read .csv and .parquet tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedge.dataset import Dataset
from fedge.errors import DataError
from fedge.readers.assembling import Array, assemble, first_line, split_column, text_of

if TYPE_CHECKING:
    from pyarrow import ChunkedArray

    from fedge.task import Source


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
        test = split_column(_column(columns, "split", "split", path))
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
            f"data: {path} cannot be read as a table ({first_line(error)}){_separator_hint(path)}"
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
        array = text_of(array.astype("S"), f"{path}: column {name!r}")
    elif pa.types.is_decimal(kind):
        array = array.astype(np.float64)
    elif array.dtype == object:
        array = array.astype(str)
    if array.dtype.kind == "U" and (array == "").any():
        raise DataError(f"data: {path}: column {name!r} ({key}) has an empty cell")
    return array
