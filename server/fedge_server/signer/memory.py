"""What a signer signed last for its role: on the disk before a signature leaves the process.

The publisher says what was signed before, and may lie, or may have been restored from a backup. So the signer
goes by its own memory. A reply that was lost is given again, for the same bytes alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedge.delivery import MAX_TARGETS_BYTES
from fedge.errors import FedgeError, FormatError
from fedge.files import read_bounded, write_atomically


class Memory:
    """One role's memory in a folder of the signer's."""

    def __init__(self, folder: Path, role: str) -> None:
        self._path = folder / f"{role}.json"

    def last(self) -> bytes | None:
        """The payload that was signed last; None: nothing was.

        Raises:
            FormatError: it cannot be read; a signer that does not know what it signed signs nothing.
        """
        if not self._path.exists():
            return None
        data = read_bounded(self._path, MAX_TARGETS_BYTES)
        version_of(data)
        return data

    def keep(self, payload: bytes) -> None:
        """Remember a payload, before its signature leaves.

        Raises:
            FedgeError: the disk refuses it.
        """
        try:
            write_atomically(self._path, payload, mode=0o600)
        except OSError as error:
            raise FedgeError(
                f"{self._path}: cannot be written ({error.strerror}); nothing is signed"
            ) from error


def version_of(payload: bytes) -> int:
    """The version of a role's metadata.

    Raises:
        FormatError: it states none.
    """
    try:
        version = json.loads(payload)["version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError("signer: metadata without a version") from error
    if type(version) is not int:
        raise FormatError(f"signer: metadata of version {repr(version)[:40]}")
    return version
