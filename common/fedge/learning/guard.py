"""What a client does to its own update before it leaves: the server never sees it without the noise."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from fedge.noise import clip_factor, noise_on_grid, on_grid, share_sigma, step_of

Kind = Literal["local", "example", "distributed"]
KINDS: Final = get_args(Kind)
_COARSEST: Final = 64  # steps to a share's deviation, at least

NamedArrays = Mapping[str, npt.NDArray[np.generic]]
Arrays = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Guard:
    """How a client protects itself, or its examples."""

    kind: (
        Kind  # local: noise on the whole update; example: on every step (`dpsgd`); distributed: a share of it
    )
    clip_norm: float  # L2 norm of an update, or of one example's gradient; above 0
    noise_multiplier: float  # deviation of the noise, in clip_norm; above 0
    min_examples: int = 1  # with fewer a client takes no part
    least: int = 1  # distributed: honest clients in a sum that is opened, whose shares make the whole noise

    @property
    def share_step(self) -> float:
        """The grid of distributed shares: a power of two, the largest of which a share's deviation has 64."""
        sigma = share_sigma(self.clip_norm * self.noise_multiplier, self.least)
        return math.ldexp(1.0, math.frexp(sigma / _COARSEST)[1] - 1)

    @property
    def largest_share(self) -> float:
        """What no value of a distributed share exceeds, in steps: the noise reaches out to 8.6 deviations."""
        sigma = share_sigma(self.clip_norm * self.noise_multiplier, self.least)
        return (self.clip_norm + 9 * sigma) / self.share_step + 1


def reference(state: NamedArrays, gradients: Collection[str]) -> NamedArrays:
    """What a client's change is measured from: the state that it was sent, and 0 where it sends gradients.

    Args:
        state: the global one.
        gradients: entries in whose place it sends a gradient; none where it sends weights.
    """
    return {name: np.zeros_like(v) if name in gradients else v for name, v in state.items()}


def guarded(arrays: NamedArrays, origin: NamedArrays, guard: Guard, key: bytes) -> Arrays:
    """An update cut to the clipping norm, and Gaussian noise on every value (Dwork and Roth 2014).

    Args:
        arrays: what training gave.
        origin: what changes are measured from; the same names and shapes.
        guard: of kind local.
        key: secret, for this one update.
    """
    step = step_of(guard.clip_norm, guard.clip_norm * guard.noise_multiplier)
    found: Arrays = {}
    for name, whole in noised_share(arrays, origin, guard, key, least=1, step=step).items():
        noised = whole.reshape(-1) * step + _wide(origin[name])
        found[name] = noised.astype(arrays[name].dtype).reshape(whole.shape)
    return found


def noised_share(
    arrays: NamedArrays, origin: NamedArrays, guard: Guard, key: bytes, *, least: int, step: float
) -> dict[str, npt.NDArray[np.int64]]:
    """One client's clipped change with its share of the noise, as whole steps to be added up exactly.

    A sum over `least` clients or more holds noise of at least `noise_multiplier * clip_norm`, whoever drops
    out. Each share is rounded by itself, so the sum is not the rounding of one Gaussian; with 64 steps to a
    share's deviation the difference is below e^-80000 (Poisson summation), and rounding adds a little noise.

    Args:
        arrays: what training gave.
        origin: what changes are measured from; the same names and shapes.
        guard: norm and noise of the whole sum.
        key: secret, for this one update.
        least: honest clients in a sum that is opened: its threshold, less those that may tell their shares.
        step: of the grid; the same for all clients, a power of two.

    Raises:
        ValueError: the grid is too coarse for a share.
    """
    sigma = share_sigma(guard.clip_norm * guard.noise_multiplier, least)
    if step * _COARSEST > sigma and least > 1:
        raise ValueError(f"step {step:g}: a share's deviation {sigma:g} must be {_COARSEST} steps or more")
    changes = {name: _wide(value) - _wide(origin[name]) for name, value in arrays.items()}
    norm = math.sqrt(sum(float(np.dot(change, change)) for change in changes.values()))
    factor = clip_factor(norm, guard.clip_norm)
    return {
        name: (on_grid(change, factor, step) + noise_on_grid(key, f"array {name}", len(change), sigma, step))
        .astype(np.int64)
        .reshape(arrays[name].shape)
        for name, change in changes.items()
    }


def _wide(value: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    return value.reshape(-1).astype(np.float64)
