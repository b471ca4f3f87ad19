"""Releases that are open, each with its queue: loaded when first asked for, let go least recently used."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from fedge.errors import BusyError
from fedge.spec import Spec
from fedge_server.inference.batching import Batcher, Run
from fedge_server.inference.limits import Limits


@dataclass(frozen=True, slots=True)
class Loaded:
    """A release's global model, ready to answer."""

    version: int
    model: str  # SHA-256 of the global model's file
    task: str
    spec: Spec
    tiers: frozenset[str]  # whose devices may ask it: those that the release has a variant for
    run: Run = field(repr=False)
    size: int = 0  # bytes of its file


Loader = Callable[[int], Loaded]
"""Opens a release's global model, in a thread; raises AbsentError where there is none."""

Newest = Callable[[str], int]
"""The newest release for a tier, called in a thread; raises AbsentError where there is none."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What answers for a release."""

    loaded: Loaded
    batcher: Batcher


class Models:
    """What is open; of one event loop.

    Args:
        load: opens a release.
        newest: which is meant where none is named.
        limits: models, model_bytes, threads, and those of a queue.
    """

    def __init__(self, load: Loader, newest: Newest, limits: Limits) -> None:
        self._load, self.newest, self._limits = load, newest, limits
        self._open: OrderedDict[int, Entry] = OrderedDict()
        self._lock = asyncio.Lock()  # one is opened at a time: memory has room for one more, not for many
        self._executor = ThreadPoolExecutor(limits.threads, thread_name_prefix="inference")

    @property
    def versions(self) -> tuple[int, ...]:
        """Of the releases that are open."""
        return tuple(self._open)

    async def get(self, version: int) -> Entry:
        """What answers for a release.

        Raises:
            AbsentError: there is no such release, or no model of it.
            BusyError: all that is open is at work, and there is no room for another.
        """
        if version not in self._open:
            async with self._lock:
                if version not in self._open:
                    self._make_room(0, self._limits.models - 1)
                    loaded = await asyncio.to_thread(self._load, version)
                    self._make_room(loaded.size, self._limits.models - 1)
                    self._open[version] = Entry(loaded, Batcher(loaded.run, self._executor, self._limits))
        self._open.move_to_end(version)
        return self._open[version]

    def _make_room(self, size: int, count: int) -> None:
        """Let go of the least recently used that are idle."""
        while self._open and (len(self._open) > count or self._size() + size > self._limits.model_bytes):
            idle = next((version for version, entry in self._open.items() if entry.batcher.idle), None)
            if idle is None:
                raise BusyError("other releases are asked, and there is no room for another; ask again later")
            del self._open[idle]

    def _size(self) -> int:
        return sum(entry.loaded.size for entry in self._open.values())

    def close(self) -> None:
        """End the threads; what runs is waited for."""
        self._open.clear()
        self._executor.shutdown(cancel_futures=True)
