"""Closed windows on disk until the server has them, and the open one's counts; nothing else of any answer.

| file | holds |
|---|---|
| `open` | the window under way, without noise, as last kept |
| `SLOT.window` | a closed window, as it will travel |
| `spent` | the last slot, and how many windows with noise were closed |

Each file is whole or absent (`fedge.files`). What the disk refuses is kept in memory until it takes it again;
of too many the oldest are dropped and counted.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

from fedge.canonical import canonical
from fedge.errors import FormatError
from fedge.files import read_bounded, write_atomically
from fedge.telemetry.window import MAX_BYTES, Window

MAX_KEPT: Final = 200  # closed windows: 8 days of hours, 3 MB at most
_NAME = re.compile(r"(\d{1,13})\.window")
_OPEN, _SPENT = "open", "spent"


class Outgoing:
    """The folder of windows; not to be shared by threads.

    Args:
        folder: its own; made when absent.
        most: closed windows that are kept.
    """

    def __init__(self, folder: Path, most: int = MAX_KEPT) -> None:
        self._folder, self._most = folder, most
        self._in_memory: dict[int, bytes] = {}
        self.lost = 0  # windows that had to be dropped, and that no window has told yet
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for path in folder.glob(".*"):  # what a kill left half written
                path.unlink(missing_ok=True)
        except OSError:
            return  # a full or absent disk: memory has to do
        self.last_slot, self.noised = self._spent()

    last_slot: int = -1  # of the windows closed so far
    noised: int = 0  # windows with noise that were closed

    def waiting(self) -> list[int]:
        """Slots of closed windows, oldest first."""
        return sorted({*self._on_disk(), *self._in_memory})

    def read(self, slot: int) -> bytes | None:
        """A closed window as it travels; one that cannot be read any more is dropped."""
        if slot in self._in_memory:
            return self._in_memory[slot]
        try:
            data = read_bounded(self._path(slot), MAX_BYTES)
            Window.from_bytes(data)
        except FormatError:
            self.drop(slot)
            return None
        return data

    def close(self, window: Window) -> None:
        """Keep a window for sending, in place of the open one."""
        self.last_slot = window.slot
        self.noised += window.epsilon > 0
        state = {"last_slot": self.last_slot, "noised": self.noised}
        # First what was spent: a kill in between loses a window, and never tells one twice.
        self._write(_SPENT, canonical(state, "telemetry"))
        data = window.to_bytes()
        if not self._write(self._path(window.slot).name, data):
            self._in_memory[window.slot] = data
        self.forget_open()
        for slot in self.waiting()[: -self._most]:
            self.drop(slot)
            self.lost += 1

    def drop(self, slot: int) -> None:
        """Forget a closed window: the server has it, or does not want it."""
        self._in_memory.pop(slot, None)
        self._remove(self._path(slot))

    def keep_open(self, window: Window) -> None:
        """Keep the counts of the window under way, in case this process is killed."""
        self._write(_OPEN, window.to_bytes())

    def opened(self) -> Window | None:
        """The window that was under way when the process before this one ended."""
        try:
            return Window.from_bytes(read_bounded(self._folder / _OPEN, MAX_BYTES))
        except FormatError:
            return None

    def forget_open(self) -> None:
        """The window under way is not kept any longer."""
        self._remove(self._folder / _OPEN)

    def forget(self) -> None:
        """Remove every window; what was spent stays known."""
        self.forget_open()
        for slot in self.waiting():
            self.drop(slot)

    def _spent(self) -> tuple[int, int]:
        newest = max(self._on_disk(), default=-1)
        try:
            value = json.loads(read_bounded(self._folder / _SPENT, 1024))
            return max(int(value["last_slot"]), newest), int(value["noised"])
        except (FormatError, ValueError, KeyError, TypeError):
            return newest, 0

    def _on_disk(self) -> list[int]:
        try:
            found = [_NAME.fullmatch(path.name) for path in self._folder.iterdir()]
        except OSError:
            return []
        return [int(match[1]) for match in found if match]

    def _path(self, slot: int) -> Path:
        return self._folder / f"{slot}.window"

    def _write(self, name: str, data: bytes) -> bool:
        try:
            write_atomically(self._folder / name, data, mode=0o600)
        except OSError:
            return False
        return True

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            return  # a disk that refuses even this; the server knows the window already
