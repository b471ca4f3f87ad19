"""`images`: grey or colour images of one size, from an .npz or a folder of images by class."""

from __future__ import annotations

from fedge.dataset import Dataset
from fedge.learning import models
from fedge.readers import read_image_folder, read_npz, require
from fedge.task import Family, Source, Task


def read(source: Source) -> Dataset:
    """Read an .npz with x (N, H, W) or (N, H, W, C), or a folder of images by class.

    Raises:
        DataError: the file is absent, malformed, or holds values that cannot be used.
    """
    path = require(source, "images")
    return read_image_folder(path, source) if path.is_dir() else read_npz(path, "image", source.labels)


TASK = Task(
    name="images",
    read=read,
    models={
        "cnn": models.cnn,
        "cnn3": models.cnn3(64),
        "cnn-bn": models.small_cnn(16, 64, norm=True),
        "mlp": models.mlp(200, 200),
        "mlp-bn": models.mlp(200, 200, norm=True),
        "logistic": models.logistic,
    },
    default_model="cnn",
    students={
        "cnn-16-64": models.small_cnn(16, 64),
        "cnn-8-32": models.small_cnn(8, 32),
        "mlp-32": models.mlp(32),
    },
    families={
        "cnn3": Family(models.cnn3, (4, 6, 8, 12, 16, 24, 32)),
        "ds-cnn": Family(models.ds_cnn, (8, 12, 16, 24)),
    },
)
