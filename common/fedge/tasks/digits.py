"""`digits`: 1,797 handwritten digits, 8x8 grey, bundled with scikit-learn; the embedded default.

A device names an .npz with its own share of such digits.

Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fedge.dataset import Dataset
from fedge.errors import DataError
from fedge.learning import models
from fedge.readers import assemble, read_npz, require
from fedge.task import Source, Task

if TYPE_CHECKING:
    import numpy.typing as npt

LABELS: Final = tuple("0123456789")


def read(source: Source) -> Dataset:
    """All digits as float32 (1797, 8, 8), values 0..16; or those of an .npz, such as one device's share.

    Raises:
        DataError: the file is absent, malformed, or holds other than digits of 8x8.
    """
    if source.path is None:
        images, labels = _bundled()
        return assemble("image", images.copy(), labels.copy())
    found = read_npz(require(source, "digits"), "image", source.labels or LABELS)
    if found.spec.shape != (8, 8):
        raise DataError(f"data: {source.path} holds images of {found.spec.shape}; digits are (8, 8)")
    return replace(found, spec=replace(found.spec, dtype="float32"), x=found.x.astype(np.float32))


@cache
def _bundled() -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """(1797, 8, 8) and (1797,): parsed once in a process, since they come as text."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images.astype(np.float32), found.target


TASK = Task(
    name="digits",
    read=read,
    models={
        "mlp": models.mlp(200, 200),
        "mlp-bn": models.mlp(200, 200, norm=True),
        "cnn": models.cnn,
        "logistic": models.logistic,
    },
    default_model="mlp",
    students={"mlp-64": models.mlp(64), "mlp-32": models.mlp(32)},
)
