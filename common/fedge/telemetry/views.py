"""A few numbers of each raw input, in whose distributions a change of the world shows: its *features*.

| kind | features |
|---|---|
| features | the columns themselves |
| signal | of each channel: mean, deviation and mean step over time |
| image | mean of each of 4 x 4 cells, deviation, mean step across and down, of the grey image |
| text | share of each of 16 groups of the vocabulary |

They are looked at on the device and only counted there (`fedge.telemetry.sketch`). An image turned by a
quarter keeps its brightness, not its cells.

Legend: N examples, F features, T time, C channels.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedge.spec import Spec

MAX_FEATURES: Final = 64
_CELLS: Final = 4  # on each side of an image
_GROUPS: Final = 16  # of a text's characters
_OF_CHANNEL: Final = ("mean", "deviation", "step")
_OF_IMAGE: Final = ("deviation", "across", "down")

Features = npt.NDArray[np.float64]  # (N, F); NaN: missing


def names_of(spec: Spec) -> tuple[str, ...]:
    """The names of the features, in their order."""
    if spec.kind == "features":
        return tuple(_channel(spec, i) for i in _some(spec.channels, MAX_FEATURES))
    if spec.kind == "signal":
        chosen = _some(spec.channels, MAX_FEATURES // len(_OF_CHANNEL))
        return tuple(f"{_channel(spec, i)} {name}" for name in _OF_CHANNEL for i in chosen)
    if spec.kind == "image":
        rows, columns = (min(_CELLS, side) for side in spec.shape[:2])
        return (*(f"cell {i},{j}" for i in range(rows) for j in range(columns)), *_OF_IMAGE)
    return tuple(f"characters {group}" for group in range(min(_GROUPS, spec.classes)))


def features_of(x: npt.NDArray[Any], spec: Spec) -> Features:
    """The features (N, F) of raw examples (N, *spec.shape)."""
    if spec.kind == "text":
        return _of_text(x, spec)
    values = x.astype(np.float64)
    if spec.kind == "features":
        return values[:, _some(spec.channels, MAX_FEATURES)]
    if spec.kind == "signal":
        return _of_signal(values[:, :, _some(spec.channels, MAX_FEATURES // len(_OF_CHANNEL))])
    return _of_image(values if values.ndim == 3 else values.mean(3))


def _of_signal(values: Features) -> Features:
    """(N, T, C) to (N, 3 C); what is missing is left out."""
    present = ~np.isnan(values)
    count = present.sum(1)  # (N, C)
    safe = np.maximum(count, 1)
    mean = np.where(present, values, 0.0).sum(1) / safe
    around = np.where(present, values - mean[:, None, :], 0.0)
    deviation = np.sqrt(np.square(around).sum(1) / safe)
    steps = np.abs(np.diff(values, axis=1))  # (N, T - 1, C)
    whole = ~np.isnan(steps)
    step = np.where(whole, steps, 0.0).sum(1) / np.maximum(whole.sum(1), 1)
    found = np.concatenate([mean, deviation, step], axis=1)
    found[np.tile(count == 0, 3)] = np.nan
    return found


def _of_image(grey: Features) -> Features:
    """(N, H, W) to (N, cells + 3)."""
    rows = np.array_split(grey, min(_CELLS, grey.shape[1]), axis=1)
    cells = [
        part.mean((1, 2)) for row in rows for part in np.array_split(row, min(_CELLS, row.shape[2]), axis=2)
    ]
    across = np.abs(np.diff(grey, axis=2)).mean((1, 2)) if grey.shape[2] > 1 else np.zeros(len(grey))
    down = np.abs(np.diff(grey, axis=1)).mean((1, 2)) if grey.shape[1] > 1 else np.zeros(len(grey))
    return np.stack([*cells, grey.std((1, 2)), across, down], axis=1)


def _of_text(x: npt.NDArray[Any], spec: Spec) -> Features:
    """(N, T) codes to (N, groups)."""
    groups = min(_GROUPS, spec.classes)
    of_code = x.astype(np.int64) * groups // spec.classes  # (N, T)
    return np.stack([(of_code == group).mean(1) for group in range(groups)], axis=1)


def _some(count: int, most: int) -> list[int]:
    """All positions, or so many of them evenly spaced."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


def _channel(spec: Spec, index: int) -> str:
    return spec.features[index] if spec.features else str(index)
