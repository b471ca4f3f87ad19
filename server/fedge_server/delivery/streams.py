"""How many streams there are at once, and how much of them is in memory: bounds that no device can raise.

A stream keeps one chunk in memory until its device has room for it. So chunks shrink as streams become many,
begin small, and grow only for a device that takes them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from fedge_server.hub.disk import on_disk

FIRST_CHUNK_BYTES: Final = 64 * 1024
# Larger ones are a little faster and hold more; over 128 KiB malloc maps each buffer anew, at twice the
# processor time.
MAX_CHUNK_BYTES: Final = 80 * 1024
BUDGET_BYTES: Final = 32 * 1024**2  # of chunks in memory, while streams are fewer than 512
MAX_STREAMS: Final = 1024  # at once; each keeps 64 KiB at least
PER_DEVICE: Final = 4
STILL_S: Final = 30.0  # that one chunk may take: who takes none any more is cut off


@dataclass(slots=True)
class Stream:
    """One stream's chunks."""

    _streams: Streams
    _grown: int = FIRST_CHUNK_BYTES

    def next_bytes(self) -> int:
        """How long the next chunk may be: twice the one before, within the share that all have now."""
        size = min(self._grown, self._streams.share)
        self._grown = min(2 * self._grown, MAX_CHUNK_BYTES)
        return size


class Streams:
    """All that are open."""

    def __init__(self, most: int = MAX_STREAMS, per_device: int = PER_DEVICE) -> None:
        self._most, self._per_device = most, per_device
        self._of: Counter[str] = Counter()
        self.open = 0

    @property
    def share(self) -> int:
        """Bytes of a chunk that every stream may keep in memory."""
        return max(min(BUDGET_BYTES // max(self.open, 1), MAX_CHUNK_BYTES), FIRST_CHUNK_BYTES)

    @contextmanager
    def one(self, device: str) -> Iterator[Stream | None]:
        """One more for a device, until the block ends; None: it, or all together, have too many."""
        if self.open >= self._most or self._of[device] >= self._per_device:
            yield None
            return
        self.open += 1
        self._of[device] += 1
        try:
            yield Stream(self)
        finally:
            self.open -= 1
            self._of[device] -= 1
            if not self._of[device]:
                del self._of[device]


async def read(descriptor: int, length: int, offset: int) -> bytes:
    """A part of a file: at once where the system has it in memory, else in a thread.

    What all devices want is read from the disk once, so nearly always it is there, and a thread costs more.
    """
    buffer = bytearray(length)
    with suppress(OSError):  # BlockingIOError: it is not in memory; others: the file system cannot tell
        if os.preadv(descriptor, [buffer], offset, os.RWF_NOWAIT) == length:
            return bytes(buffer)
    return await on_disk(os.pread, descriptor, length, offset)
