"""Closed windows on disk until the server has them, and the open one's counts; nothing else of any answer.

| file | holds |
|---|---|
| `open` | the window under way, without noise, as last kept |
| `SLOT.window` | a closed window, as it will travel |
| `spent` | the last slot, and how many windows with noise were closed |
| `parts/NAME` | answers that were counted while another process owned the folder: it takes them up |
| `lock` | held by whoever owns the folder; the system releases it when that process ends |

One process at a time **owns** the folder: it counts, closes and drops what is too much. Any process may send
closed windows and remove them (`Closed`), and leave a part (`leave`). Each file is whole or absent
(`fedge.files`). What the disk refuses is kept in memory until it takes it again; of too many the oldest are
dropped and counted.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from fedge.canonical import canonical
from fedge.errors import FormatError
from fedge.files import read_bounded, sole_holder, write_atomically
from fedge.telemetry.window import MAX_BYTES, Window

FOLDER: Final = "telemetry"  # of a home
MAX_KEPT: Final = 200  # closed windows: 8 days of hours, 3 MB at most
MAX_PARTS: Final = 64
_WRITING_S: Final = 60.0  # that no file takes to be written
_NAME = re.compile(r"(\d{1,13})\.window")
_OPEN, _SPENT, _LOCK, _PARTS = "open", "spent", "lock", "parts"


@contextmanager
def owned(folder: Path, *, patience_s: float = 0.0) -> Iterator[None]:
    """Own a folder of windows.

    Raises:
        OSError: another process owns it (BlockingIOError), or the disk refuses the lock.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with sole_holder(folder / _LOCK, patience_s=patience_s):
        yield


def leave(folder: Path, part: Window) -> None:
    """Leave what was counted for the process that owns the folder.

    Raises:
        OSError: the disk refuses it, or nobody has taken up what was left before.
    """
    parts = folder / _PARTS
    if parts.is_dir() and len(list(parts.iterdir())) >= MAX_PARTS:
        raise OSError(f"{parts}: {MAX_PARTS} parts wait already")
    write_atomically(parts / secrets.token_hex(8), part.to_bytes(), mode=0o600)


class Closed:
    """Closed windows of a folder, for whoever sends them; not to be shared by threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def waiting(self) -> list[int]:
        """Slots of closed windows, oldest first."""
        try:
            found = [_NAME.fullmatch(path.name) for path in self._folder.iterdir()]
        except OSError:
            return []
        return sorted(int(match[1]) for match in found if match)

    def read(self, slot: int) -> bytes | None:
        """A closed window as it travels; one that cannot be read any more is dropped."""
        try:
            data = read_bounded(self._path(slot), MAX_BYTES)
            Window.from_bytes(data)
        except FormatError:
            self.drop(slot)
            return None
        return data

    def drop(self, slot: int) -> None:
        """Forget a closed window: the server has it, or does not want it."""
        _remove(self._path(slot))

    def _path(self, slot: int) -> Path:
        return self._folder / f"{slot}.window"


class Outgoing(Closed):
    """The folder of windows, for the process that owns it.

    Args:
        folder: its own; made when absent.
        most: closed windows that are kept.
    """

    def __init__(self, folder: Path, most: int = MAX_KEPT) -> None:
        super().__init__(folder)
        self._most = most
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
        return sorted({*super().waiting(), *self._in_memory})

    def read(self, slot: int) -> bytes | None:
        """A closed window as it travels; one that cannot be read any more is dropped."""
        return self._in_memory[slot] if slot in self._in_memory else super().read(slot)

    def close(self, window: Window) -> None:
        """Keep a window for sending, in place of the open one."""
        self.last_slot = window.slot
        self.noised += window.epsilon > 0
        state = {"last_slot": self.last_slot, "noised": self.noised}
        # First what was spent: a kill in between loses a window, and never tells one twice.
        self._write(_SPENT, canonical(state, "telemetry"))
        self._in_memory[window.slot] = window.to_bytes()
        self.flush()
        self.forget_open()
        for slot in self.waiting()[: -self._most]:
            self.drop(slot)
            self.lost += 1

    def flush(self) -> None:
        """Write what the disk has refused so far: other processes send only what lies there."""
        for slot, data in list(self._in_memory.items()):
            if not self._write(self._path(slot).name, data):
                return
            del self._in_memory[slot]

    def drop(self, slot: int) -> None:
        """Forget a closed window: the server has it, or does not want it."""
        self._in_memory.pop(slot, None)
        super().drop(slot)

    def keep_open(self, window: Window) -> None:
        """Keep the counts of the window under way, in case this process is killed."""
        self._write(_OPEN, window.to_bytes())

    def opened(self) -> Window | None:
        """The window that was under way when the process before this one ended."""
        try:
            return Window.from_bytes(read_bounded(self._folder / _OPEN, MAX_BYTES))
        except FormatError:
            return None

    def parts(self) -> list[Window]:
        """What other processes have counted; each is given once, and lost where this process is killed."""
        try:
            found = sorted((self._folder / _PARTS).iterdir())
        except OSError:
            return []
        made = []
        for path in found:
            if path.name.startswith("."):  # being written, or left by one that was killed
                _remove_old(path)
                continue
            try:
                part = Window.from_bytes(read_bounded(path, MAX_BYTES))
            except FormatError:
                part = None
            if _remove(path) and part is not None:  # one that stays would be given again
                made.append(part)
        return made

    def forget_open(self) -> None:
        """The window under way is not kept any longer."""
        _remove(self._folder / _OPEN)

    def forget(self) -> None:
        """Remove every window and part; what was spent stays known."""
        self.forget_open()
        self.parts()
        for slot in self.waiting():
            self.drop(slot)

    def _spent(self) -> tuple[int, int]:
        newest = max(super().waiting(), default=-1)
        try:
            value = json.loads(read_bounded(self._folder / _SPENT, 1024))
            return max(int(value["last_slot"]), newest), int(value["noised"])
        except (FormatError, ValueError, KeyError, TypeError):
            return newest, 0

    def _write(self, name: str, data: bytes) -> bool:
        try:
            write_atomically(self._folder / name, data, mode=0o600)
        except OSError:
            return False
        return True


def _remove_old(path: Path) -> None:
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > _WRITING_S:
            path.unlink()


def _remove(path: Path) -> bool:
    """Whether it is gone; a disk that refuses even this does no harm: the server knows the window already."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
