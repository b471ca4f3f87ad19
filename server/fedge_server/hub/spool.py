"""Answers' objects on their way into the spool: bounded, checked, and resumable after a break."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedge.errors import FormatError
from fedge_server.hub.disk import on_disk

_READ: Final = 1024 * 1024


@dataclass(slots=True)
class Upload:
    """One object that is arriving; a newer upload of the same message makes this one stale."""

    folder: Path
    message_id: str
    size: int  # bytes it must have
    sha256: bytes
    lock: asyncio.Lock  # of all uploads of the message: an older one must not write into a newer one's file
    stale: bool = False
    received: int = 0
    _file: io.FileIO | None = None
    _hash: hashlib._Hash = field(default_factory=hashlib.sha256)

    @property
    def part(self) -> Path:
        """Where it lies until it is whole."""
        return part_path(self.folder, self.message_id, self.sha256)

    @property
    def final(self) -> Path:
        """Where it lies then; another object for the same message has another name, and cannot replace it."""
        return self.folder / f"{self.message_id}.{self.sha256.hex()[:16]}"

    @property
    def complete(self) -> bool:
        """Whether all bytes are here."""
        return self.received == self.size

    async def begin(self, offset: int) -> None:
        """Go on at an offset, or from the start.

        Raises:
            FormatError: fewer bytes than the offset have arrived.
            OSError: the disk refuses it.
        """
        async with self.lock:
            await on_disk(self._begin, offset)

    def _begin(self, offset: int) -> None:
        self.part.parent.mkdir(parents=True, exist_ok=True)
        for other in self.part.parent.glob(f".{self.message_id}.*.part"):
            if other != self.part:  # another object was begun for the same message
                other.unlink(missing_ok=True)
        handle = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(handle, "r+b", buffering=0)
        there = os.fstat(self._file.fileno()).st_size
        if offset > min(there, self.size):
            raise FormatError(f"bytes from {offset} on, but {there} have arrived")
        while self.received < offset:
            data = self._file.read(min(_READ, offset - self.received))
            if not data:
                raise FormatError(f"bytes from {offset} on, but {self.received} have arrived")
            self._hash.update(data)
            self.received += len(data)
        self._file.seek(offset)
        self._file.truncate(offset)

    async def write(self, data: bytes) -> bool:
        """Append; False when a newer upload has taken over.

        Raises:
            FormatError: more bytes than were declared.
            OSError: the disk refuses it.
        """
        if self.received + len(data) > self.size:
            raise FormatError(f"more than the {self.size} bytes that were declared")
        async with self.lock:
            if self.stale or self._file is None:
                return False
            await on_disk(self._write, data)
        return True

    def _write(self, data: bytes) -> None:
        if self._file is None:
            raise AssertionError("begin comes first")
        view = memoryview(data)
        while view:  # a disk that is nearly full takes a part
            view = view[self._file.write(view) :]
        self._hash.update(data)
        self.received += len(data)

    def check(self) -> None:
        """The bytes are those that were declared.

        Raises:
            FormatError: they are others.
        """
        if self._hash.digest() != self.sha256:
            raise FormatError("the object's bytes do not have the SHA-256 that was declared")

    def keep(self) -> None:
        """Put the whole object where its run finds it."""
        # Not forced to the disk: after a power cut the run begins a new session and asks again.
        self.close()
        self.part.rename(self.final)

    def close(self) -> None:
        """Let go of the file; what has arrived stays for a later upload."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def drop(self) -> None:
        """Remove what has arrived."""
        self.close()
        self.part.unlink(missing_ok=True)


def part_path(folder: Path, message_id: str, sha256: bytes) -> Path:
    """Where an object lies until it is whole; its name tells it from another object for the same message."""
    return folder / f".{message_id}.{sha256.hex()[:16]}.part"


def arrived(folder: Path, message_id: str, sha256: bytes) -> int:
    """How many bytes of an object are here."""
    try:
        return part_path(folder, message_id, sha256).stat().st_size
    except FileNotFoundError:
        return 0


def remove(folder: Path, message_ids: Collection[str] | None = None) -> None:
    """Remove the files of these messages, or all of a run's; others stay."""
    if not folder.is_dir():
        return
    for entry in list(os.scandir(folder)):
        if message_ids is None or entry.name.lstrip(".").split(".")[0] in message_ids:
            Path(entry.path).unlink(missing_ok=True)
