"""`digits`: 1,797 handwritten digits, 8x8 grey, bundled with scikit-learn; the embedded default.

Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI).
"""

from __future__ import annotations

import numpy as np

from fedge.dataset import Dataset
from fedge.errors import DataError
from fedge.learning import models
from fedge.readers import assemble
from fedge.task import Source, Task


def read(source: Source) -> Dataset:
    """All digits as float32 (1797, 8, 8), values 0..16; there is no file to give.

    Raises:
        DataError: a file was given all the same.
    """
    from sklearn.datasets import load_digits

    if source.path is not None:
        raise DataError(
            f"data = {str(source.path)!r}: task 'digits' brings its own data; use task 'images' for yours"
        )
    bunch = load_digits()
    return assemble("image", bunch.images.astype(np.float32), bunch.target)


TASK = Task(
    name="digits",
    read=read,
    models={"mlp": models.mlp(200, 200), "cnn": models.cnn, "logistic": models.logistic},
    default_model="mlp",
    students={"mlp-64": models.mlp(64), "mlp-32": models.mlp(32)},
)
