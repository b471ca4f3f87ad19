"""Read users' files into checked data sets: .npz, .csv, .parquet, and folders of images by class.

Nothing is unpickled. Each error says what the file should hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedge.errors import DataError
from fedge.readers.arrays import load_npz, read_npz
from fedge.readers.assembling import assemble
from fedge.readers.images import read_image_folder
from fedge.readers.tables import read_table

if TYPE_CHECKING:
    from fedge.task import Source

__all__ = ["assemble", "load_npz", "read_image_folder", "read_npz", "read_table", "require"]


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
