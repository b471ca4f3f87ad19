"""Ascending positions in few bytes: the gaps between them, seven bits to a byte (LEB128).

Where large values lie in a layer is not random: they stand together in the rows of units that learn. A
compressor finds such patterns in whole bytes: zlib makes 4.3 bits of a position out of the largest hundredth,
where the best code for random ones (Rice's) has 8.4, and 5.2 behind zlib.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from fedge.errors import FormatError

Positions = npt.NDArray[np.int64]
MOST: Final = 5  # bytes of a gap: 35 bits


def pack(positions: Positions) -> bytes:
    """Write positions.

    Args:
        positions: ascending, each once, from 0 to below 2^35.
    """
    gaps = np.diff(positions, prepend=-1) - 1
    lengths = 1 + (gaps[:, None] >= 1 << 7 * np.arange(1, MOST)).sum(1)
    starts = np.cumsum(lengths) - lengths
    found = np.zeros(int(lengths.sum()), np.uint8)
    for i in range(MOST):
        there = lengths > i
        more = np.where(lengths[there] > i + 1, 128, 0)
        found[starts[there] + i] = (gaps[there] >> 7 * i & 127) | more
    return found.tobytes()


def unpack(data: bytes, count: int, size: int) -> Positions:
    """Read positions again.

    Args:
        data: anything.
        count: how many positions there are.
        size: they lie below it, at most 2^31.

    Raises:
        FormatError: the bytes do not give so many positions below the size.
    """
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 128)
    if len(ends) != count or (len(raw) and raw[-1] >= 128):
        raise FormatError(f"codec: {len(ends)} positions instead of {count}")
    lengths = np.diff(ends, prepend=-1)
    if not count:
        return ends
    if lengths.max() > MOST:
        raise FormatError(f"codec: a gap of {lengths.max()} bytes, over {MOST}")
    starts = ends - lengths + 1
    places = np.arange(len(raw)) - np.repeat(starts, lengths)
    gaps = np.add.reduceat((raw & 127).astype(np.int64) << 7 * places, starts)
    if gaps.max() >= size or (positions := np.cumsum(gaps + 1) - 1)[-1] >= size:
        raise FormatError(f"codec: a position is not below {size}")
    return positions
