"""Client-level differential privacy on the server: clipped changes of equal weight, and noise on their sum.

McMahan et al. 2018, Learning Differentially Private Recurrent Language Models, with a fixed denominator:

    mean = (sum_k clip(change_k, S) + N(0, (z S)^2)) / W

W is the number of clients that was expected, not that of those who answered: one client moves the sum by S at
most, whoever is missing, and dividing by a fixed number leaves noise and sensitivity in the same ratio.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord

from fedge.learning.state import NamedArrays
from fedge.noise import Whole, clip_factor, noise_on_grid, on_grid, step_of
from fedge.wire.arrays import pieces

Arrays = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a round's sum is protected."""

    clip_norm: float  # S, above 0
    noise_multiplier: float  # z of the whole release, above 0
    expected: int  # W, from 1
    count_sigma: float | None = None  # noise on the count of unclipped clients; None: not counted

    @property
    def change_multiplier(self) -> float:
        """The noise on the changes alone, in clip_norm (Andrew et al. 2021, theorem 1).

        The count's bits b - 1/2 move it by 1/2; both together are one Gaussian mechanism with the multiplier
        z when 1/z^2 = 1/z_change^2 + 1/(2 sigma_b)^2. So the count is paid for by more noise here.

        Raises:
            ValueError: the count alone would cost more than the release may.
        """
        if self.count_sigma is None:
            return self.noise_multiplier
        rest = self.noise_multiplier**-2 - (2 * self.count_sigma) ** -2
        if rest <= 0:
            raise ValueError(
                f"the count's noise {self.count_sigma:g} must be above {self.noise_multiplier / 2:g}"
            )
        return float(rest**-0.5)


@dataclass(frozen=True, slots=True)
class Noised:
    """What may be seen of a round."""

    mean: NamedArrays  # reference plus the noised mean change, in the dtypes of the reference
    unclipped: float | None  # noised share of the clients that were not clipped; may lie outside [0, 1]


class ClippedSum:
    """The sum of clipped changes, each added as it comes: whole steps of a grid, exact in any order."""

    def __init__(self, reference: Arrays, settings: Settings) -> None:
        """Begin with nothing.

        Args:
            reference: what changes are measured from.
            settings: of the round.
        """
        self._reference, self._settings = reference, settings
        self._sigma = settings.change_multiplier * settings.clip_norm
        self._step = step_of(settings.clip_norm, self._sigma)
        self._total = {name: np.zeros(start.size) for name, start in reference.items()}
        self._norms: list[float] = []

    def add(self, update: ArrayRecord) -> None:
        """Clip the change of one client and add it; a piece of a tensor is read at a time, twice.

        Args:
            update: with the reference's names and shapes.
        """
        norm = _norm(update, self._reference)
        factor = clip_factor(norm, self._settings.clip_norm)
        for name, start in self._reference.items():
            _add(self._total[name], update, name, start.reshape(-1), factor, self._step)
        self._norms.append(norm)

    def noised(self, key: bytes) -> Noised:
        """The mean change with noise, added to the reference; the sum is over then.

        Args:
            key: secret, for this very call.
        """
        mean: NamedArrays = {}
        for name, start in self._reference.items():
            total = self._total.pop(name)
            total += noise_on_grid(key, f"array {name}", start.size, self._sigma, self._step)
            total *= self._step / self._settings.expected
            total += start.reshape(-1).astype(np.float64)
            mean[name] = total.astype(start.dtype).reshape(start.shape)
        return Noised(mean, _unclipped(self._norms, self._settings, key))


def next_clip_norm(clip_norm: float, unclipped: float, *, quantile: float, learning_rate: float) -> float:
    """The clipping norm of the next round (Andrew et al. 2021): geometric steps towards the quantile.

    Args:
        clip_norm: of this round.
        unclipped: noised share of the clients that were within it.
        quantile: share that should be.
        learning_rate: of the logarithm.
    """
    return clip_norm * math.exp(-learning_rate * (unclipped - quantile))


def _norm(update: ArrayRecord, reference: Arrays) -> float:
    total = 0.0
    for name, start in reference.items():
        flat = start.reshape(-1)
        for at, piece in pieces(update[name]):
            change = piece.astype(np.float64) - flat[at : at + piece.size].astype(np.float64)
            total += float(np.dot(change, change))
    return math.sqrt(total)


def _add(
    total: Whole, update: ArrayRecord, name: str, start: npt.NDArray[np.generic], factor: float, step: float
) -> None:
    for at, piece in pieces(update[name]):
        change = piece.astype(np.float64) - start[at : at + piece.size].astype(np.float64)
        total[at : at + piece.size] += on_grid(change, factor, step)


def _unclipped(norms: Sequence[float], settings: Settings, key: bytes) -> float | None:
    if settings.count_sigma is None:
        return None
    step = step_of(0.5, settings.count_sigma)
    bits = [0.5 if norm <= settings.clip_norm else -0.5 for norm in norms]
    noise = float(noise_on_grid(key, "count", 1, settings.count_sigma, step)[0]) * step
    return (math.fsum(bits) + noise) / settings.expected + 0.5
