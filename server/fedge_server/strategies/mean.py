"""A weighted mean that is formed as updates come: sum_k n_k w_k / sum_k n_k with one accumulator.

Every array is read where it lies, or a piece at a time from its file, and added in place, a block at a time.
Weights are taken relative to the first one: equal ones are not multiplied with, and sums stay as large as the
values. Product and sum are BLAS's axpy, a third faster than numpy's two steps, in pieces for which OpenBLAS
takes one thread: given whole arrays it takes all cores, whose waiting threads spin, and on a busy machine
that was six times slower.

The order of arrival changes no more than this. With K updates, u = 2^-24 for float32 and 2^-53 for float64,
and g = (K + 4) u / (1 - (K + 4) u), each value of the mean is within

    g * sum_k n_k |w_k| / sum_k n_k  +  K 2^-149

of the exact one (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 4.2: any order of
additions; and a rounding each for factor, product, share and division), so two orders differ by twice that at
most. A float64 sum that goes back to float32 is the same to the bit but for ties: where the weights add up to
an even number N, about one mean in N lies between two float32 numbers, and there the order decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord
from scipy.linalg import blas

from fedge.wire.arrays import FileArray, MemoryArray, pieces, put, table_of
from fedge_server.scratch import BLOCK, scratch_of

Accumulate = Literal["float32", "float64"]
ACCUMULATE: Final = get_args(Accumulate)
_AXPY: Final = {np.dtype(np.float32): blas.saxpy, np.dtype(np.float64): blas.daxpy}
_ONE_THREAD: Final = 9_984  # values: OpenBLAS takes more threads above 10,000

Values = npt.NDArray[Any]


class Mean:
    """The weighted mean of the updates so far; of each, nothing but the sum is kept."""

    def __init__(self, accumulate: Accumulate = "float32") -> None:
        """Begin with nothing.

        Args:
            accumulate: precision of the sums, at least; values that are wider, or whole numbers, get float64.
        """
        self._least = np.dtype(accumulate)
        self._sums: dict[str, Values] = {}  # flat
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}  # of the mean
        self._first = 0.0  # the first weight
        self._weight = 0.0  # all of them

    def add(self, update: Mapping[str, Array], weight: float) -> None:
        """Take one more into account.

        Args:
            update: with the names, dtypes and shapes of the first one; it is only read.
            weight: above 0.
        """
        if not self._sums:
            self._begin(update, weight)
            return
        factor, update = weight / self._first, table_of(update)
        for name, flat in self._sums.items():
            array = update[name]
            if not isinstance(array, FileArray):
                _add(flat, array.numpy().reshape(-1), factor)
                continue
            for at, piece in pieces(array):
                _add(flat[at : at + piece.size], piece, factor)
        self._weight += weight

    def _begin(self, update: Mapping[str, Array], weight: float) -> None:
        for name, array in update.items():
            dtype = np.dtype(array.dtype)
            floating = dtype.kind == "f"
            self._dtypes[name] = dtype if floating else np.dtype(np.float64)
            wide = np.result_type(dtype, self._least) if floating else np.dtype(np.float64)
            self._shapes[name] = tuple(array.shape)
            self._sums[name] = flat = np.empty(math.prod(array.shape), wide)
            for at, piece in pieces(array):
                flat[at : at + piece.size] = piece
        self._first = self._weight = float(weight)

    def result(self) -> ArrayRecord:
        """The mean, without arrays where there was no update; the accumulator is over then."""
        mean, share = ArrayRecord(), self._first / self._weight if self._weight else 1.0
        for name, dtype in self._dtypes.items():
            total = self._sums.pop(name)
            total *= share
            value = total.astype(dtype, copy=False).reshape(self._shapes[name])
            put(mean, {name: MemoryArray(value, shared=False)})
        return mean


def _add(total: Values, values: Values, factor: float) -> None:
    """Add factor * values to the total, both flat; no new array as large as they are."""
    if factor == 1.0:
        total += values
        return
    axpy = _AXPY.get(values.dtype)
    if axpy is not None and values.dtype == total.dtype:
        for at in range(0, values.size, _ONE_THREAD):
            axpy(values[at : at + _ONE_THREAD], total[at : at + _ONE_THREAD], a=factor)
        return
    scratch = scratch_of(total.dtype)
    for at in range(0, values.size, BLOCK):
        part, into = values[at : at + BLOCK], total[at : at + BLOCK]
        into += np.multiply(part, factor, out=scratch[: part.size], dtype=total.dtype)
