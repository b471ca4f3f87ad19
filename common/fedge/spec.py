"""What goes into a model and what comes out: the contract between data, model, variant and device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from fedge.errors import FormatError

Kind = Literal["image", "features", "signal", "text"]
DType = Literal["uint8", "float32"]

MAX_LABELS = 100_000
MAX_ELEMENTS = 64 * 1024 * 1024  # of one input: bounds what a manifest can make a device allocate
MAX_CHARACTERS = 256  # of a text's vocabulary: a character is one byte, its position among the labels

_RANKS: Final = {"image": (2, 3), "features": (1,), "signal": (2,), "text": (1,)}
_DTYPES: Final[dict[Kind, tuple[DType, ...]]] = {
    "image": ("uint8", "float32"),
    "features": ("uint8", "float32"),
    "signal": ("float32",),
    "text": ("uint8",),
}


@dataclass(frozen=True, slots=True)
class Spec:
    """The raw input of a model, before any pre-processing, and the names of its outputs."""

    kind: Kind
    shape: tuple[int, ...]  # one example: (H, W) or (H, W, C) image, (F,) features, (T, C) signal, (T,) text
    dtype: DType  # images: uint8 0..255, or float32; features, signals: float32, NaN = missing; text: uint8
    labels: tuple[str, ...]  # name of each class, in the order of the model's outputs; text: its characters
    features: tuple[str, ...] = ()  # name of each column of a table (F) or channel of a signal (C), or empty

    def __post_init__(self) -> None:
        """Refuse nonsense on construction.

        Raises:
            FormatError: a field is outside its range.
        """
        if self.kind not in _RANKS:
            known = ", ".join(map(repr, _RANKS))
            raise FormatError(f"spec: kind {self.kind!r} is unknown; it must be one of {known}")
        if len(self.shape) not in _RANKS[self.kind] or any(side < 1 for side in self.shape):
            raise FormatError(f"spec: shape {self.shape} does not fit kind {self.kind!r}")
        if math.prod(self.shape) > MAX_ELEMENTS:  # exact: numpy's product would wrap around
            raise FormatError(f"spec: shape {self.shape} is larger than {MAX_ELEMENTS} elements")
        if self.kind == "image" and len(self.shape) == 3 and self.shape[2] not in (1, 3):
            raise FormatError(f"spec: an image has 1 or 3 channels, not {self.shape[2]}")
        if self.dtype not in ("uint8", "float32"):
            raise FormatError(f"spec: dtype {self.dtype!r} is unknown; it must be 'uint8' or 'float32'")
        if self.dtype not in _DTYPES[self.kind]:
            raise FormatError(f"spec: kind {self.kind!r} is {_DTYPES[self.kind][0]}, not {self.dtype}")
        if not 2 <= len(self.labels) <= MAX_LABELS or len(set(self.labels)) != len(self.labels):
            raise FormatError(
                f"spec: {len(self.labels)} labels; there must be 2 or more, each named once "
                "(a task with a single class has nothing to learn)"
            )
        if self.kind == "text" and (self.classes > MAX_CHARACTERS or any(len(c) != 1 for c in self.labels)):
            raise FormatError(
                f"spec: the labels of a text are its characters, at most {MAX_CHARACTERS} and each by itself"
            )
        width = self.shape[-1] if self.kind == "signal" else self.shape[0]
        if self.features and len(self.features) != width:
            raise FormatError(f"spec: {len(self.features)} feature names for {width} features")

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.labels)

    @property
    def channels(self) -> int:
        """Channels of an image or signal; the number of columns of a table; 1 for text."""
        if self.kind in ("features", "signal"):
            return self.shape[-1]
        return self.shape[2] if len(self.shape) == 3 else 1

    @property
    def numeric(self) -> bool:
        """Whether inputs are quantities, which have moments; text is not."""
        return self.kind != "text"

    @property
    def allows_missing(self) -> bool:
        """Whether NaN stands for a missing value."""
        return self.kind in ("features", "signal")

    def zeros(self, batch: int) -> npt.NDArray[Any]:
        """A batch of zeros in the raw input's shape (B, *shape) and dtype."""
        return np.zeros((batch, *self.shape), dtype=self.dtype)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "labels": list(self.labels),
            "features": list(self.features),
        }

    @classmethod
    def from_json(cls, value: Any) -> Spec:
        """Rebuild from `to_json`'s value, which may come from outside.

        Raises:
            FormatError: a field is absent, of another type, or outside its range.
        """
        try:
            labels, features, shape = value["labels"], value.get("features", []), value["shape"]
            if not all(isinstance(part, list) for part in (labels, features, shape)) or len(shape) > 3:
                raise TypeError("labels, features and shape must be lists, shape of 3 numbers at most")
            if not all(isinstance(name, str) for name in [*labels, *features]):
                raise TypeError("names must be strings")
            if not all(type(side) is int for side in shape):
                raise TypeError("shape must hold integers")
            return cls(value["kind"], tuple(shape), value["dtype"], tuple(labels), tuple(features))
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"spec: malformed ({type(error).__name__}: {error})") from error
