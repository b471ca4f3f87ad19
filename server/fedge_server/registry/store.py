"""Big bytes by their SHA-256: written once, whole or not at all, and checked each time they are read."""

from __future__ import annotations

import re
from pathlib import Path

from fedge.artefact import MAX_INSTALLED_BYTES
from fedge.errors import DigestError, FedgeError, FormatError
from fedge.files import read_bounded, sha256, write_atomically

_DIGEST = re.compile(r"[0-9a-f]{64}")


class ContentStore:
    """A folder of objects at `ab/cdef...`: the first two digits of the digest, then the other 62."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, data: bytes) -> str:
        """Keep data and return its digest; what is there and whole already is left alone.

        Raises:
            FedgeError: the disk refuses it.
        """
        digest = sha256(data)
        path = self.path(digest)
        try:
            if not path.is_file() or path.read_bytes() != data:  # a damaged object is mended
                write_atomically(path, data)
        except OSError as error:
            raise FedgeError(f"store {self.folder}: cannot write {digest[:8]} ({error.strerror})") from error
        return digest

    def get(self, digest: str, max_bytes: int | None = None) -> bytes:
        """The bytes of a digest, at most `max_bytes` of them.

        Raises:
            FormatError: no digest, absent, or longer than it may be.
            DigestError: what the disk holds is not what was put there.
        """
        data = read_bounded(self.path(digest), MAX_INSTALLED_BYTES if max_bytes is None else max_bytes)
        if sha256(data) != digest:
            raise DigestError(
                f"store {self.folder}: object {digest[:8]} is damaged; restore it from a backup"
            )
        return data

    def has(self, digest: str) -> bool:
        """Whether an object of this digest is there (its bytes are checked when they are read)."""
        return self.path(digest).is_file()

    def remove(self, digest: str) -> None:
        """Let go of an object that nothing names any more; an absent one is no error.

        Raises:
            FedgeError: the disk refuses it.
        """
        try:
            self.path(digest).unlink(missing_ok=True)
        except OSError as error:
            raise FedgeError(f"store {self.folder}: cannot remove {digest[:8]} ({error.strerror})") from error

    def path(self, digest: str) -> Path:
        """Where an object lies or would lie.

        Raises:
            FormatError: no SHA-256; this stops a digest that names a path outside the folder.
        """
        if not _DIGEST.fullmatch(digest):
            raise FormatError(
                f"store: {digest[:80]!r} is no SHA-256: it has 64 lower-case hexadecimal digits"
            )
        return self.folder / digest[:2] / digest[2:]
