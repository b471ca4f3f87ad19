"""Files that are either whole or absent, and reads that cannot be made to grow without bound."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedge.errors import FormatError


def sha256(data: bytes) -> str:
    """Lower-case hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut (POSIX: fsync of the directory itself)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644, replace: bool = True) -> None:
    """Put data at path so that a reader, or a power cut, sees the old file or the new one, never a part.

    Args:
        path: its folder is made.
        data: the whole file.
        mode: of the file.
        replace: whether there may be a file already.

    Raises:
        FileExistsError: there is one, and it may not be replaced.
        OSError: the disk refuses the write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(mode)
        if replace:
            Path(temporary).replace(path)
        else:
            path.hardlink_to(temporary)  # unlike a rename it fails where there is a file
            Path(temporary).unlink()
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_bounded(path: Path, maximum: int) -> bytes:
    """The whole file, which may hold at most `maximum` bytes.

    Raises:
        FormatError: it is absent, unreadable, longer, or no regular file.
    """
    try:
        if stat.S_ISFIFO(path.stat().st_mode):  # before open, which waits for a pipe's writer
            raise FormatError(f"{path}: is not a regular file")
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise FormatError(f"{path}: is not a regular file")
            # Python allocates what it is asked to read, so ask for what is there, not for the maximum.
            data = file.read(min(state.st_size, maximum) + 1)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > maximum:
        raise FormatError(f"{path}: longer than the {maximum} bytes it may have")
    return data


@contextmanager
def sole_holder(path: Path, *, patience_s: float = 1.0) -> Iterator[None]:
    """Hold a lock file alone; the system releases it when this process ends, however it ends.

    Whoever asks whether a lock is held takes it shared for an instant, so one failure means nothing: it
    is tried for `patience_s` seconds.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file cannot be made.
    """
    with _holding(path, fcntl.LOCK_EX, patience_s):
        yield


@contextmanager
def joint_holder(path: Path, *, patience_s: float = 1.0) -> Iterator[None]:
    """Hold a lock file together with others; a sole holder is waited for, and has to wait. Else as above.

    Raises:
        BlockingIOError: a process holds it alone.
        OSError: the file cannot be made.
    """
    with _holding(path, fcntl.LOCK_SH, patience_s):
        yield


@contextmanager
def _holding(path: Path, kind: int, patience_s: float) -> Iterator[None]:
    end = time.monotonic() + patience_s
    with path.open("a+", encoding="ascii") as lock:  # NFS: read to share it, write to hold it alone
        while True:
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)
        yield


def is_held(path: Path) -> bool:
    """Whether a process holds this lock file now."""
    try:
        with path.open(encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
