"""A round's updates as a tall table that is read a block of values at a time, and never held as a whole.

Coordinate-wise rules work on each block by itself. What needs distances takes them from one Gram matrix,
which adds up over the blocks; so memory is one block of all updates, the result, and K x K numbers.

Values are changes from the state that clients started from, in float64: distances between weights themselves
would drown in the rounding of the weights' own squares.

Legend: K updates, n values of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord

from fedge.wire.arrays import FileArray, MemoryArray

Floats = npt.NDArray[np.float64]
Rule = Callable[[Floats], Floats]
"""From a block of changes (K, n) to one of results: (n,) for a model, (m, n) for a Gram matrix."""

BLOCK_VALUES: Final = 2**20  # of all updates together: 8 MB


class Updates:
    """K updates and the state that they started from."""

    def __init__(self, records: Sequence[ArrayRecord], origin: ArrayRecord | None = None) -> None:
        """Hold them; their arrays are read when they are needed, and not changed.

        Args:
            records: one per update, with the same names and shapes; their arrays may lie in files.
            origin: what changes are measured from; None: zero.
        """
        self.records, self.origin = records, origin

    def __len__(self) -> int:
        return len(self.records)

    def blocks(self, name: str) -> Iterator[tuple[int, Floats, Floats]]:
        """Of one tensor, flat in C order: where a block begins, the origin's values (n,), changes (K, n)."""
        arrays = [_Flat(record[name]) for record in self.records]
        start = None if self.origin is None else _Flat(self.origin[name])
        size, step = arrays[0].size, max(BLOCK_VALUES // len(arrays), 1)
        room = np.empty((len(arrays), min(step, size)))
        for at in range(0, size, step):
            count = min(step, size - at)
            changes = room[:, :count]
            for row, array in zip(changes, arrays, strict=True):
                row[:] = array.read(at, count)
            first = np.zeros(count) if start is None else start.read(at, count).astype(np.float64)
            changes -= first
            yield at, first, changes

    def gram(self, rule: Rule = lambda changes: changes) -> Floats:
        """(m, m) inner products of the whole vectors that the rule makes of the changes, or of these."""
        found: Any = 0.0
        for name in self.records[0]:
            for _, _, changes in self.blocks(name):
                rows = rule(changes)
                found = found + rows @ rows.T
        return np.asarray(found, np.float64)

    def each(self, rule: Rule) -> ArrayRecord:
        """The model that lies from the origin as far as the rule says, value by value."""
        made = ArrayRecord()
        for name, like in self.records[0].items():
            dtype = np.dtype(like.dtype)
            value = np.empty(math.prod(like.shape), dtype if dtype.kind == "f" else np.float64)
            with np.errstate(over="ignore"):  # the round loop looks whether the model is finite
                for at, first, changes in self.blocks(name):
                    value[at : at + len(first)] = first + rule(changes)
            made[name] = MemoryArray(value.reshape(like.shape), shared=False)
        return made

    def combined(self, weights: Floats) -> ArrayRecord:
        """The model from the changes' sum with these weights (K,); what weighs nothing is not read."""
        used = np.flatnonzero(weights).tolist()
        some = Updates([self.records[i] for i in used], self.origin)
        return some.each(lambda changes: np.asarray(weights[used] @ changes))


def squared_distances(gram: Floats) -> Floats:
    """(K, K) between the vectors of a Gram matrix; what rounding has made negative is 0."""
    squares = np.diagonal(gram)
    found: Floats = np.maximum(squares[:, None] + squares - 2 * gram, 0.0)
    np.fill_diagonal(found, 0.0)
    return found


def distances_to(gram: Floats, weights: Floats) -> Floats:
    """(K,) from each vector of a Gram matrix to their sum with these weights (K,)."""
    across = gram @ weights
    return np.sqrt(np.maximum(np.diagonal(gram) - 2 * across + weights @ across, 0.0))


def median(changes: Floats) -> Floats:
    """(n,) of (K, n), value by value: the middle one, or the mean of the two in the middle."""
    return trimmed_mean(changes, (len(changes) - 1) // 2)


def trimmed_mean(changes: Floats, cut: int) -> Floats:
    """(n,) of (K, n), value by value: the mean of those that stay when so many at either end are cut off."""
    ordered = np.sort(changes, axis=0)  # several times faster than numpy's partition along this axis
    found: Floats = ordered[cut : len(ordered) - cut].mean(axis=0)
    return found


class _Flat:
    """An array's values by position in C order; one in a file is read as far as is asked for."""

    def __init__(self, array: Array) -> None:
        self.size = math.prod(array.shape)
        self._file = array if isinstance(array, FileArray) else None
        self._value = None if isinstance(array, FileArray) else array.numpy().reshape(-1)

    def read(self, at: int, count: int) -> npt.NDArray[Any]:
        if self._value is not None:
            return self._value[at : at + count]
        assert self._file is not None  # noqa: S101 - one of the two is there
        return self._file.piece(at, count)
