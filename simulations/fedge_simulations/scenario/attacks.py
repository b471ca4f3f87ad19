"""What attackers do to their updates and labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedge.learning.state import NamedArrays


def attacked(arrays: NamedArrays, state: NamedArrays, attack: str, seed: int) -> NamedArrays:
    """What an attacker sends instead of its honest answer; arrays of whole numbers stay as they are.

    Args:
        arrays: the honest answer.
        state: what it started from; zeros where clients send gradients. A name that is not in it counts
            from zero.
        attack: as in `scenario.attacks`: sign_flip and scale:FACTOR change the update (arrays - state),
            noise:STD adds to it, nan replaces it, free_rider sends the state back. label_flip and backdoor
            change nothing here: the client has trained with wrong examples.
        seed: of the noise.
    """
    kind, _, value = attack.partition(":")
    rng = np.random.default_rng(seed)
    found: NamedArrays = {}
    for name, array in arrays.items():
        if not np.issubdtype(array.dtype, np.floating) or kind in ("label_flip", "backdoor"):
            found[name] = array
            continue
        start = np.asarray(state.get(name, np.zeros_like(array)), array.dtype)
        found[name] = _one(array, start, kind, float(value or 0), rng)
    return found


def _one(
    array: npt.NDArray[Any],
    start: npt.NDArray[Any],
    kind: str,
    value: float,
    rng: np.random.Generator,
) -> npt.NDArray[Any]:
    dtype = array.dtype
    with np.errstate(over="ignore", invalid="ignore"):  # an attacker may well send infinity
        if kind == "nan":
            return np.full(array.shape, np.nan, dtype)
        if kind == "free_rider":
            return start.copy()
        if kind == "noise":
            return np.asarray(array + value * rng.standard_normal(array.shape), dtype)
        factor = -1.0 if kind == "sign_flip" else value
        return np.asarray(start + factor * (array - start), dtype)


def attacked_labels(labels: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.int64]:
    """Each class replaced by the one at the other end: class k by classes - 1 - k (Fang et al. 2020)."""
    return classes - 1 - labels
