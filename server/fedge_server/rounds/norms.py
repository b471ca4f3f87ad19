"""How long a client's change is, and how long it may be.

Both from one pass: the sum of squares of `update - origin` is finite only where every value is. It is formed
row by row in float32, and the rows are added up in float64: so the result does not depend on how many threads
the BLAS has.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedge.config import Validate
from fedge_server.rounds.record import RoundRecord
from fedge_server.scratch import BLOCK, scratch_of

ROW: Final = 2**13  # OpenBLAS takes one thread below 10,000, whoever asks
LOOK_BACK: Final = 5  # rounds whose norms say what is usual

Values = npt.NDArray[Any]


def squares(value: Values, origin: Values | None) -> float:
    """The sum of squares of `value - origin`, both flat; NaN or infinite where a value is or is absurd.

    Args:
        value: floating point.
        origin: as long; None stands for zeros.
    """
    dtype = np.dtype(np.float32) if value.dtype == np.float16 else value.dtype  # its squares overflow at 256
    if origin is None and value.dtype == dtype:
        return _squares_of_rows(value)
    scratch, total = scratch_of(dtype), 0.0
    for at in range(0, value.size, BLOCK):
        part = value[at : at + BLOCK]
        start = 0.0 if origin is None else origin[at : at + BLOCK]
        total += _squares_of_rows(np.subtract(part, start, out=scratch[: part.size], dtype=dtype))
    return total


def _squares_of_rows(change: Values) -> float:
    whole = change.size // ROW * ROW
    rest = change[whole:]
    total = float(np.dot(rest, rest))
    if whole:
        rows = change[:whole].reshape(-1, ROW)
        total += sum(np.vecdot(rows, rows).tolist())
    return total


def norm_limit(validate: Validate, records: Sequence[RoundRecord]) -> float:
    """The longest change that the next round accepts; infinite where nothing bounds it.

    Args:
        validate: of the run.
        records: of the rounds before; what is usual is the median of the last five that counted.
    """
    limit = math.inf if validate.max_norm is None else validate.max_norm
    usual = [record.norm for record in records if record.counted and record.norm][-LOOK_BACK:]
    if validate.max_norm_ratio is not None and usual:
        limit = min(limit, validate.max_norm_ratio * statistics.median(usual))
    return limit
