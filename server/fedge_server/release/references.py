"""What a release's inputs and answers look like where it is made: devices count by its edges.

It is made of the server's own data that trained nothing, and of what the variant that ships answers to it. A
server with too little of it has no reference: then devices count no inputs, and all else.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedge.errors import FormatError
from fedge.inference import CompactModel
from fedge.telemetry.reference import LEAST_EXAMPLES, Reference
from fedge_server.data import ServerData

MOST_EXAMPLES: Final = 2000  # each is answered by each variant, as the gate does it
_log = logging.getLogger("fedge.release")
NONE: Final = (
    f"telemetry: the server has fewer than {LEAST_EXAMPLES} examples of its own, so releases have no "
    "reference, and devices count no inputs"
)


def examples_of(server: ServerData) -> npt.NDArray[Any] | None:
    """Raw examples (N, *spec.shape) to make references of; None: there are too few.

    What trained nothing is enough where it can be: a variant is surer of what it has learned.
    """
    held = np.concatenate([server.test.x, server.gate.x])
    x = held if len(held) >= LEAST_EXAMPLES else np.concatenate([held, server.proxy.x])
    if len(x) < LEAST_EXAMPLES:
        return None
    return x[np.linspace(0, len(x) - 1, min(len(x), MOST_EXAMPLES)).astype(np.int64)]


def reference_of(model: CompactModel, examples: npt.NDArray[Any]) -> bytes:
    """The reference of a variant, as it travels; empty where its data allows none, which holds up nothing."""
    try:
        return Reference.of(examples, model.run_each(examples), model.spec).to_bytes()
    except FormatError as error:  # such as a column's name that is too long
        _log.warning("telemetry: the release has no reference: %s", error)
        return b""
