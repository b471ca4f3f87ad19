"""Models on the device's disk, by the hash of their bytes: what has come once does not travel again."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Final

from fedge.errors import DigestError, FedgeError, FormatError
from fedge.files import sync_folder
from fedge.wire import MAX_OBJECT_BYTES
from fedge.wire.v1.records_pb2 import Object

Fetch = Callable[[int], AsyncGenerator[bytes, None]]
"""The object's bytes from an offset on; what it raises when the connection breaks goes through."""

_PART: Final = ".part"
_READ_BYTES: Final = 1024**2


class ObjectCache:
    """A folder of files named by their SHA-256, bounded: what was used longest ago goes first."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._in_use: Counter[str] = Counter()
        self._checked: set[str] = set()  # read and found whole since this process began
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    @asynccontextmanager
    async def held(self, wanted: Object, fetch: Fetch) -> AsyncIterator[Path | None]:
        """The object's file, fetched if it is not here; it stays as long as the context. None: no object.

        Raises:
            DigestError: the bytes that came are not the ones that were announced.
            FormatError: more or fewer bytes came than announced, or the announcement is not possible.
            FedgeError: the disk or the cache has no room.
        """
        if not wanted.size:
            yield None
            return
        if len(wanted.sha256) != 32 or wanted.size > MAX_OBJECT_BYTES:
            raise FormatError(f"object: {wanted.size} bytes with a digest of {len(wanted.sha256)}; refused")
        name = wanted.sha256.hex()
        self._in_use[name] += 1
        try:
            yield await self._get(name, wanted.size, fetch)
        finally:
            self._in_use[name] -= 1

    async def _get(self, name: str, size: int, fetch: Fetch) -> Path:
        path = self._folder / name
        if await self._is_whole(path, size):
            os.utime(path)
            return path
        part = self._folder / (name + _PART)
        try:
            self._make_room(name, size, part)
            await self._receive(part, name, size, fetch)
            part.replace(path)
            sync_folder(self._folder)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise FedgeError(f"object of {size} bytes: the disk refuses it ({error.strerror})") from error
        self._checked.add(name)
        return path

    async def _is_whole(self, path: Path, size: int) -> bool:
        """Whether the file is here; its bytes are read again once in the life of a process."""
        if not path.exists():
            return False
        if path.name not in self._checked:
            found = await asyncio.to_thread(_digest, path)
            if found.hexdigest() != path.name:
                path.unlink()
                return False
            self._checked.add(path.name)
        if path.stat().st_size != size:
            raise FormatError(f"object {path.name}: is announced with {size} bytes, but has others")
        return True

    async def _receive(self, part: Path, name: str, size: int, fetch: Fetch) -> None:
        """Fill the part file from where it ends."""
        sha = hashlib.sha256()
        received = part.stat().st_size if part.exists() else 0
        if received > size:
            part.unlink()
            received = 0
        if received:
            sha = await asyncio.to_thread(_digest, part)
        with part.open("ab") as file:
            if received < size:
                async with aclosing(fetch(received)) as chunks:
                    async for data in chunks:
                        received += len(data)
                        if received > size:
                            break
                        sha.update(data)
                        file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if received != size or sha.hexdigest() != name:
            part.unlink()
            if received != size:
                came = "more" if received > size else f"only {received}"
                raise FormatError(f"object: announced with {size} bytes, but {came} came")
            raise DigestError(f"object: its bytes do not have the digest {name} that was announced")

    def _make_room(self, name: str, size: int, part: Path) -> None:
        """Drop what was used longest ago, never what is in use.

        Raises:
            FedgeError: there is no room even then.
        """
        if size > self._max_bytes:
            raise FedgeError(
                f"object of {size} bytes: over link.max_cache_bytes = {self._max_bytes} of this device"
            )
        states = sorted(((path.stat(), path) for path in self._folder.iterdir()), key=_last_use)
        total = sum(state.st_size for state, _ in states) - (part.stat().st_size if part.exists() else 0)
        for state, path in states:
            stem = path.name.removesuffix(_PART)
            if total + size <= self._max_bytes and size < shutil.disk_usage(self._folder).free:
                return
            if stem != name and not self._in_use[stem]:
                path.unlink()
                total -= state.st_size
        here = part.stat().st_size if part.exists() else 0
        if total + size > self._max_bytes or size - here > shutil.disk_usage(self._folder).free:
            raise FedgeError(f"object of {size} bytes: no room on this device's disk or in its cache")


def _last_use(item: tuple[os.stat_result, Path]) -> float:
    return item[0].st_mtime


def _digest(path: Path) -> Any:  # hashlib's type has no public name
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            sha.update(data)
    return sha
