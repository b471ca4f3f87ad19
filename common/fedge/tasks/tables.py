"""`tables`: rows of numbers with missing values, from .csv, .parquet or .npz.

Columns are standardised by moments that the clients compute and the server adds up: no row is pooled.
A missing value becomes its column's federated mean.
"""

from __future__ import annotations

from fedge.dataset import Dataset
from fedge.learning import models
from fedge.readers import read_npz, read_table, require
from fedge.task import Source, Task


def read(source: Source) -> Dataset:
    """Read a table; in an .npz, x is (N, F) with NaN for missing values.

    Raises:
        DataError: the file is absent, malformed, or holds values that cannot be used.
    """
    path = require(source, "tables")
    if path.suffix.lower() == ".npz":
        return read_npz(path, "features", source.labels)
    return read_table(path, source)


TASK = Task(
    name="tables",
    read=read,
    models={"logistic": models.logistic, "mlp": models.mlp(200, 200)},
    default_model="logistic",
    students={"mlp-16": models.mlp(16), "logistic": models.logistic},
)
