"""A device's memory of a task as training data: what the device's own commands put there, by consent."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from fedge.dataset import Examples
from fedge.errors import FedgeError, UserError
from fedge.files import sole_holder
from fedge.spec import Spec
from fedge_client.memory.memory import Memory, Settings

FILE: Final = "memory.db"
_PATIENCE_S: Final = 20.0  # for a command, or a training, which are short
_log = logging.getLogger("fedge.memory")


@contextmanager
def opened(folder: Path, spec: Spec, settings: Settings | None = None) -> Iterator[Memory]:
    """The memory of a folder, for one process at a time.

    Raises:
        FedgeError: another process has it for too long, or it cannot be opened.
        UserError: it holds examples of another model.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with sole_holder(folder / "lock", patience_s=_PATIENCE_S):
            memory = Memory(folder, spec, settings)
            try:
                yield memory
            finally:
                memory.close()
    except BlockingIOError as error:
        raise FedgeError(f"memory {folder}: another process is at work on it; try again later") from error
    except OSError as error:
        raise FedgeError(f"memory {folder}: cannot be opened ({error.strerror or error})") from error


def with_memory(examples: Examples, folder: Path, spec: Spec) -> Examples:
    """The examples, and those of a memory after them; one of another model is left out.

    Args:
        examples: of the device's data.
        folder: of the memory; nothing is made of one that is not there.
        spec: of the run.

    Raises:
        FedgeError: it cannot be read.
    """
    if not (folder / FILE).exists():
        return examples
    try:
        with opened(folder, spec) as memory:
            kept = memory.examples() if memory.consent else None
    except UserError as error:
        _log.warning("%s; the training goes on without it", error)
        return examples
    if kept is None or not len(kept):
        return examples
    return Examples(np.concatenate([examples.x, kept.x]), np.concatenate([examples.y, kept.y]))
