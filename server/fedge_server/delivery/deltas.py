"""Deltas between versions of a tier: made once, in a process of its own, and kept for the next who asks.

Making one takes a second or two of a processor, which the hub's own process does not have. What is kept is
bounded; what was used longest ago goes first.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedge.delivery import target_path
from fedge.delta_process import framed
from fedge.errors import FedgeError
from fedge.files import sha256, write_atomically
from fedge.manifest import Release
from fedge_server.delivery.shelf import Shelf
from fedge_server.hub.disk import on_disk

Content = Callable[[str, int], tuple[bytes, int]]
"""A version of a tier as it travels, not sealed, and the length that it unpacks to."""

Seal = Callable[[str, int, bytes], bytes]
"""Seal a delta of a tier to a version as that version is sealed."""

MOST_BYTES: Final = 256 * 1024**2  # of all deltas that are kept
LEAST_WIRE_BYTES: Final = 10_000  # of a version that a delta is made to: less is not worth a second request
WORTH: Final = 0.9  # of the whole, at most: else the whole is fetched
MAKE_S: Final = 120.0
_log = logging.getLogger("fedge.hub")


def as_published(shelf: Shelf) -> Content:
    """Versions as they lie in the repository, where tiers are not sealed."""

    def content(tier: str, version: int) -> tuple[bytes, int]:
        manifest = shelf.target(target_path(tier, version, "manifest"), tier, version, "manifest")
        wire = shelf.target(target_path(tier, version, "model"), tier, version, "model")
        return wire, Release.from_bytes(manifest).variant(tier).installed_bytes

    return content


def as_it_is(tier: str, version: int, made: bytes) -> bytes:
    """Where tiers are not sealed."""
    return made


class Deltas:
    """The deltas of a repository.

    Args:
        shelf: says which versions are on offer.
        folder: where they are kept; None: there are none.
        content: of versions.
        seal: what is kept and sent.
    """

    def __init__(
        self,
        shelf: Shelf,
        folder: Path | None = None,
        *,
        content: Content | None = None,
        seal: Seal = as_it_is,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._shelf, self._folder, self._most_bytes = shelf, folder, most_bytes
        self._content, self._seal = content or as_published(shelf), seal
        self._making: dict[str, asyncio.Task[None]] = {}
        self._one = asyncio.Lock()  # process at a time

    async def open(self, tier: str, base: int, version: int) -> tuple[int, int] | None:
        """A delta's file, which the caller closes, and its length; None: fetch the whole.

        Raises:
            FedgeError: it cannot be made.
        """
        view = self._shelf.view
        if (
            self._folder is None
            or not base < version
            or not all(view.offers(tier, v) for v in (base, version))
        ):
            return None
        files = [view.tiers[tier].content.releases[v].files["model"] for v in (base, version)]
        if files[1].length < LEAST_WIRE_BYTES:
            return None
        # Versions are never used twice, but a folder may be restored: digests name what it is made of.
        path = (
            self._folder / f"{tier}-{base}-{version}-{sha256(''.join(f.sha256 for f in files).encode())[:32]}"
        )
        if not path.exists():
            await self._made(path, tier, base, version)
        return await on_disk(_opened, path)

    async def _made(self, path: Path, tier: str, base: int, version: int) -> None:
        """Wait until it is made, by whoever asked first."""
        task = self._making.get(path.name)
        if task is None:
            task = self._making[path.name] = asyncio.create_task(self._make(path, tier, base, version))
            task.add_done_callback(lambda _: self._making.pop(path.name, None))
        await asyncio.shield(task)

    async def _make(self, path: Path, tier: str, base: int, version: int) -> None:
        async with self._one:
            old, new = [await on_disk(self._content, tier, v) for v in (base, version)]
            made = await _in_process(old, new)
            if len(made) > WORTH * len(new[0]):
                made = b""  # remembered as not worth it
            elif made:
                made = await on_disk(self._seal, tier, version, made)
            await on_disk(self._keep, path, made)
        _log.info(
            "delta of tier %s from %d to %d: %d for %d bytes", tier, base, version, len(made), len(new[0])
        )

    def _keep(self, path: Path, made: bytes) -> None:
        try:
            write_atomically(path, made, mode=0o600)
            states = sorted(((p.stat(), p) for p in path.parent.iterdir()), key=lambda item: item[0].st_mtime)
            total = sum(state.st_size for state, _ in states)
            for state, old in states:
                if total <= self._most_bytes:
                    break
                if old != path:
                    old.unlink(missing_ok=True)
                    total -= state.st_size
        except OSError as error:
            raise FedgeError(f"{path}: cannot be kept ({error.strerror})") from error


def _opened(path: Path) -> tuple[int, int] | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # removed meanwhile, to make room
        return None
    size = os.fstat(descriptor).st_size
    if not size:
        os.close(descriptor)
        return None
    os.utime(descriptor)  # used now
    return descriptor, size


async def _in_process(old: tuple[bytes, int], new: tuple[bytes, int]) -> bytes:
    """Make a delta where it keeps nobody waiting.

    Raises:
        FedgeError: the process failed, or took too long.
    """
    sent = b"".join(framed(*each) for each in (old, new))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fedge.delta_process",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        async with asyncio.timeout(MAKE_S):
            made, said = await process.communicate(sent)
    except TimeoutError as error:
        raise FedgeError(f"delta: not made within {MAKE_S:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise FedgeError(f"delta: {said.decode(errors='replace').strip()[-200:]}")
    return made
