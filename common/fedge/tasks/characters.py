"""`characters`: the next character of a text, each client with a text of its own.

One example is a window of characters and the one that follows it (Caldas et al. 2018, LEAF).
"""

from __future__ import annotations

from fedge.dataset import Dataset
from fedge.errors import DataError
from fedge.learning import models
from fedge.readers import load_npz, require
from fedge.task import Family, Source, Task
from fedge.texts import of_arrays, read_text_files

WINDOW = 16  # characters that the model sees


def task(window: int = WINDOW) -> Task:
    """Predict what follows so many characters; a module of yours may hold another, with `task(80)`."""

    def read(source: Source) -> Dataset:
        """Read a folder of .txt files, each a client; one .txt file; or an .npz of codes.

        Raises:
            DataError: absent, malformed, or too short for a window.
        """
        path = require(source, "characters")
        if path.is_dir() or path.suffix.lower() == ".txt":
            return read_text_files(path, window, source.labels)
        if path.suffix.lower() != ".npz":
            raise DataError(f"data: {path}: text is read from .txt files, a folder of them, or an .npz")
        return of_arrays(load_npz(path), window, source.labels)

    return Task(
        name="characters",
        read=read,
        models={"gru": models.gru(128), "lstm": models.lstm(128)},
        default_model="gru",
        students={"gru-64": models.gru(64, embedding=16), "gru-32": models.gru(32, embedding=16)},
        families={"gru": Family(lambda width: models.gru(width, embedding=16), (16, 24, 48, 96))},
    )


TASK = task()
