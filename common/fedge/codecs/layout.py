"""Which values of a model a codec works on: the weights of its layers, laid out one after the other.

Everything else travels as it is: biases and the scales of norms, which are small and which a layer depends on
as a whole, and buffers, whose values are no sums of steps (a variance that overshoots may fall below 0).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NamedArrays = Mapping[str, npt.NDArray[np.generic]]
Change = npt.NDArray[np.float32]
"""(P,) all coded values of a model."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What is measured from where; the same for a client and for its server."""

    origin: NamedArrays  # what changes are measured from, all names in their order
    coded: frozenset[str]

    @classmethod
    def of(cls, origin: NamedArrays, parameters: Collection[str]) -> Layout:
        """Work on those of the model's parameters that have two dimensions or more.

        Args:
            origin: the global state, or zeros in place of what clients send gradients for.
            parameters: names of what is trained; the others are buffers.
        """
        coded = (n for n, v in origin.items() if n in parameters and v.ndim >= 2 and v.dtype.kind == "f")
        return cls(origin, frozenset(coded))

    @property
    def size(self) -> int:
        """P: coded values."""
        return sum(value.size for name, value in self.origin.items() if name in self.coded)

    @property
    def plain_bytes(self) -> int:
        """Bytes of what travels as it is."""
        return sum(value.nbytes for name, value in self.origin.items() if name not in self.coded)

    def change(self, arrays: NamedArrays) -> Change:
        """How the coded values differ from the origin."""
        found = np.empty(self.size, np.float32)
        for name, part in self._parts(found):
            start = self.origin[name].reshape(-1)
            np.subtract(arrays[name].reshape(-1), start, out=part, casting="same_kind")
        return found

    def plain(self, arrays: NamedArrays) -> bytes:
        """What travels as it is: little-endian values in the order of names."""
        parts = [v for name, v in arrays.items() if name not in self.coded]
        return b"".join(np.asarray(v, v.dtype.newbyteorder("<")).tobytes() for v in parts)

    def arrays(self, change: Change, plain: bytes) -> dict[str, npt.NDArray[np.generic]]:
        """The origin with a change added, and the rest as it came; names, shapes and dtypes of the origin.

        Args:
            change: of the coded values.
            plain: as many bytes as `plain_bytes`.
        """
        found: dict[str, npt.NDArray[np.generic]] = {}
        parts, at = dict(self._parts(change)), 0
        for name, start in self.origin.items():
            if name in parts:
                found[name] = np.add(start, parts[name].reshape(start.shape), dtype=start.dtype)
                continue
            raw = np.frombuffer(plain, start.dtype.newbyteorder("<"), start.size, at)
            found[name] = raw.astype(start.dtype).reshape(start.shape)
            at += start.nbytes
        return found

    def _parts(self, flat: Change) -> Iterator[tuple[str, Change]]:
        at = 0
        for name, value in self.origin.items():
            if name in self.coded:
                yield name, flat[at : at + value.size]
                at += value.size
