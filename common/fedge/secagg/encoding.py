"""Changes as whole numbers that add up exactly modulo 2^32, with a stated error and without overflow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedge.secagg.masks import Words

EXTRAS: Final = 4  # after the values: 1 for the client, its examples, whether it was cut, its loss
MAX_LOSS: Final = 16.0  # losses are cut to it; the loss of guessing among 65,536 classes is 11
MOST_BITS: Final = 31  # of a sum's magnitude: one is its sign
LEAST_BITS: Final = 8  # of a client's value: with fewer the sum would say little

NamedArrays = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Encoding:
    """How values become numbers: the same for all clients of a round.

    A client that has w examples sends w / most_examples times its change, in whole steps. So the mean's error
    is below half a step for each client, divided by the sum of the w / most_examples: `error`.
    """

    largest: float  # values of a change are cut to it, above 0
    most_examples: int  # a client with more counts as so many, from 1
    clients: int  # at most so many in a sum

    def __post_init__(self) -> None:
        if self.clients * self.most_examples >= 2**MOST_BITS:
            raise ValueError(
                f"{self.clients} clients of {self.most_examples} examples: their number must stay below 2^31"
            )
        if self.bits < LEAST_BITS:
            raise ValueError(
                f"{self.clients} clients: {self.bits} bits are left for each value, {LEAST_BITS} needed"
            )
        if not 0 < self.largest < math.inf:
            raise ValueError(f"largest = {self.largest}: must be above 0 and finite")

    @property
    def bits(self) -> int:
        """Of one client's value, without its sign: all that overflow leaves."""
        return MOST_BITS - math.ceil(math.log2(self.clients + 1))

    @property
    def step(self) -> float:
        """Between two neighbouring values."""
        return self.largest / float(2**self.bits - 1)

    def error(self, clients: int, examples: int) -> float:
        """The bound of the mean's error in each value, for a sum of these clients with these examples."""
        return 0.5 * self.step * clients * self.most_examples / max(examples, 1)

    def encode(self, change: npt.NDArray[np.float64], examples: int, loss: float) -> Words:
        """One client's change, its number of examples and its mean loss.

        Args:
            change: flat, finite.
            examples: from 1.
            loss: mean over the examples, finite.

        Raises:
            ValueError: a value is not finite.
        """
        if not (np.isfinite(change).all() and math.isfinite(loss)):
            raise ValueError("training gave values that are not finite; a sum would be lost with them")
        counted = min(examples, self.most_examples)
        weight = counted / self.most_examples
        cut = bool(np.abs(change).max(initial=0.0) > self.largest)
        whole = np.empty(len(change) + EXTRAS, np.int64)
        np.rint(np.clip(change, -self.largest, self.largest) * (weight / self.step), out=change)
        whole[: len(change)] = change
        lost = min(max(loss, 0.0), MAX_LOSS) / MAX_LOSS * weight * (2**self.bits - 1)
        whole[len(change) :] = 1, counted, cut, round(lost)
        return whole.astype(np.uint32)  # two's complement: the sum modulo 2^32 is that of the signed numbers

    def decode(self, total: Words) -> Sum:
        """What the sum of encoded changes says."""
        signed = total.view(np.int32)
        clients, examples, cut, lost = (int(value) for value in signed[-EXTRAS:])
        weight = examples / self.most_examples
        mean = signed[:-EXTRAS].astype(np.float64) * (self.step / weight if weight > 0 else 0.0)
        loss = lost * MAX_LOSS / (2**self.bits - 1) / weight if weight > 0 else 0.0
        return Sum(mean, clients, examples, cut, loss)


def encode_whole(values: Iterable[npt.NDArray[np.int64]]) -> Words:
    """One client's change in whole steps; all weigh the same, and nothing is said of examples or loss."""
    parts = [value.reshape(-1) for value in values]
    return np.concatenate([*parts, np.array([1, 1, 0, 0], np.int64)]).astype(np.uint32)


def decode_whole(total: Words, step: float, expected: int) -> Sum:
    """The sum of changes in whole steps, divided by a number that was fixed beforehand."""
    signed = total.view(np.int32)
    clients, counted, _, _ = (int(value) for value in signed[-EXTRAS:])
    return Sum(signed[:-EXTRAS].astype(np.float64) * (step / expected), clients, counted, 0, 0.0)


@dataclass(frozen=True, slots=True)
class Sum:
    """All that a server learns of a round's clients."""

    mean: npt.NDArray[np.float64]  # of the changes, weighted by examples, flat
    clients: int  # in the sum, by their own count
    examples: int  # of all of them
    cut: int  # clients of which some value was cut to `Encoding.largest`
    loss: float  # mean, weighted by examples


def flat(arrays: NamedArrays, origin: NamedArrays) -> npt.NDArray[np.float64]:
    """The change of all arrays in the order of their names in `origin`."""
    found = np.empty(sum(value.size for value in origin.values()))
    at = 0
    for name, start in origin.items():
        part = found[at : at + start.size]
        np.subtract(arrays[name].reshape(-1), start.reshape(-1), out=part, dtype=np.float64)
        at += start.size
    return found


def unflat(change: npt.NDArray[np.float64], origin: NamedArrays) -> dict[str, npt.NDArray[np.generic]]:
    """The origin with a flat change added, in its names, shapes and dtypes."""
    found: dict[str, npt.NDArray[np.generic]] = {}
    at = 0
    for name, start in origin.items():
        part = change[at : at + start.size] + start.reshape(-1).astype(np.float64)
        if start.dtype.kind in "iu":
            part = np.rint(part)
        found[name] = part.astype(start.dtype).reshape(start.shape)
        at += start.size
    return found
