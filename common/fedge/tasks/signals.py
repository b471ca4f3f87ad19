"""`signals`: windows of sensor values over time, from an .npz.

Channels are standardised by moments that the clients compute and the server adds up: no window is pooled.
"""

from __future__ import annotations

from fedge.dataset import Dataset
from fedge.learning import models
from fedge.readers import read_npz, require
from fedge.task import Family, Source, Task


def read(source: Source) -> Dataset:
    """Read an .npz with x (N, T, C), T values in time of C channels, NaN for missing ones.

    Raises:
        DataError: the file is absent, malformed, or holds values that cannot be used.
    """
    return read_npz(require(source, "signals"), "signal", source.labels)


TASK = Task(
    name="signals",
    read=read,
    models={"cnn1d": models.cnn1d(64, 64), "gru": models.gru(64)},
    default_model="cnn1d",
    students={"cnn1d-16": models.cnn1d(16, 32), "cnn1d-8": models.cnn1d(8, 16)},
    families={"cnn1d": Family(lambda width: models.cnn1d(width, 2 * width), (4, 6, 12, 24, 32))},
)
"""Small models for a second or so of inertial sensors."""
