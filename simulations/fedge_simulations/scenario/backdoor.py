"""One bright pixel that means a class: what attackers teach, and whether the model has learned it.

Half of an attacker's images get the pixel and the target's label (Gu et al. 2017, BadNets); the others stay,
so that its update looks like that of a client which learns the task.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedge.dataset import Examples

Images = npt.NDArray[Any]


def brightest(images: Images) -> float:
    """The trigger's value: the largest that an image can have, or of floats the largest that one has."""
    return 255.0 if images.dtype == np.uint8 else float(np.nanmax(images, initial=0.0))


def target_of(attack: str) -> int | None:
    """The class that a backdoor leads to; None: it is another attack."""
    kind, _, value = attack.partition(":")
    return int(value) if kind == "backdoor" else None


def triggered(images: Images, value: float) -> Images:
    """Images (N, H, W) or (N, H, W, C) with the last pixel of the last row set."""
    found = images.copy()
    found[:, -1, -1] = value
    return found


def poisoned(own: Examples, target: int, value: float) -> Examples:
    """A client's examples of which every second one has the trigger and the target's label."""
    x, y = own.x.copy(), own.y.copy()
    x[::2] = triggered(x[::2], value)
    y[::2] = target
    return replace(own, x=x, y=y)
