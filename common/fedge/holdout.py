"""Which of its own examples a client keeps back from training, to evaluate on.

An example's own bytes and the run's seed decide, and nothing else: neither its place in the file, nor who
holds it, nor how many there are. So an example stays on its side however the data grow, copies of it stand on
the same side on every client, and a simulation and a device divide alike.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Places = npt.NDArray[np.float64]
Part = Literal["selection", "gate"]
"""What examples that are kept back are for: to order the candidates of a tier, or to let one of them out."""


def places(x: npt.NDArray[Any], seed: int) -> Places:
    """(N,) where each example stands between 0 and 1, as if drawn evenly.

    Args:
        x: (N, ...) raw inputs; labels do not enter, so that equal inputs are never divided.
        seed: of the run.
    """
    key = seed.to_bytes(8, "little")
    rows = np.ascontiguousarray(x).reshape(len(x), -1)
    digests = b"".join(hashlib.blake2b(row.tobytes(), key=key, digest_size=8).digest() for row in rows)
    return (np.frombuffer(digests, dtype="<u8") >> 11) / 2.0**53


def kept_back(of: Places, share: float) -> npt.NDArray[np.bool_]:
    """(N,) whether a client keeps each of its examples back: about this share of them, never all.

    Where all would be, the one that stands last trains; a client with few examples may keep none back.
    """
    held: npt.NDArray[np.bool_] = of < share
    if len(of) and held.all():
        held[of.argmax()] = False
    return held


def judged_on(of: Places, share: float, part: Part, selection: float) -> npt.NDArray[np.bool_]:
    """(N,) whether an example is kept back for this part; one of either is never in the other, nor trained.

    Args:
        of: where the examples stand.
        share: that is kept back, as for `kept_back`.
        part: which one.
        selection: share of what is kept back that is for selection.
    """
    first = of < share * selection
    found: npt.NDArray[np.bool_] = kept_back(of, share) & (first if part == "selection" else ~first)
    return found
