"""Big bytes by their SHA-256: written once, whole or not at all, and checked each time they are read."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Final

from fedge.artefact import MAX_INSTALLED_BYTES
from fedge.errors import DigestError, FedgeError, FormatError
from fedge.files import joint_holder, read_bounded, sha256, sole_holder, sync_folder, write_atomically

Buffer = bytes | bytearray | memoryview

ADDING_PATIENCE_S: Final = 60.0  # for whoever removes: it holds the lock for a moment at a time
_PARTIAL: Final = ".partial."  # begins the name of an object that is being written
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Lying:
    """A file of the store as it lies there."""

    path: Path
    digest: str  # empty: the rest of one that was being written
    size: int  # bytes
    written: float  # Unix seconds


class ContentStore:
    """A folder of objects at `ab/cdef...`: the first two digits of the digest, then the other 62.

    An object is put before the row that names it is written. In between nothing tells it from one that nobody
    needs any more: so whoever puts holds `adding` until the row is committed, and whoever removes holds
    `removing` while looking at the rows. The two exclude each other, and their lock ends with its process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = folder.with_name(f"{folder.name}.lock")  # beside: backups leave out `*.lock`

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Nothing is removed meanwhile: from the first `put` until the row that names it is committed.

        Raises:
            FedgeError: another process has been removing for all the time that one waits, or the file of the
                lock cannot be used.
        """
        with ExitStack() as held:
            try:
                self._lock.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(joint_holder(self._lock, patience_s=ADDING_PATIENCE_S))
            except BlockingIOError as error:
                raise FedgeError(
                    f"store {self.folder}: another process removes from it; is it hanging? try again later"
                ) from error
            except OSError as error:
                raise self._no_lock(error) from error
            yield

    @contextmanager
    def removing(self, *, patience_s: float = 0.0) -> Iterator[None]:
        """Nothing is put meanwhile, and whatever was put is named by a row.

        Raises:
            BlockingIOError: something is being put.
            FedgeError: the file of the lock cannot be used.
        """
        with ExitStack() as held:
            try:
                self._lock.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(sole_holder(self._lock, patience_s=patience_s))
            except BlockingIOError:
                raise
            except OSError as error:
                raise self._no_lock(error) from error
            yield

    def _no_lock(self, error: OSError) -> FedgeError:
        return FedgeError(
            f"{self._lock}: cannot be locked ({error.strerror}); give it to the user that runs fedge, or "
            "remove it while no fedge is up: it is made anew"
        )

    def lying(self) -> Iterator[Lying]:
        """All that lies in the store: objects, and rests of those whose writer was killed."""
        for folder in sorted(self.folder.glob("[0-9a-f][0-9a-f]")):
            for path in folder.iterdir():
                digest = folder.name + path.name
                is_rest = path.name.startswith(".")
                if not is_rest and not _DIGEST.fullmatch(digest):
                    continue  # nothing of ours
                with suppress(FileNotFoundError):  # removed since it was listed
                    state = path.stat()
                    yield Lying(path, "" if is_rest else digest, state.st_size, state.st_mtime)

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

    def put_stream(self, chunks: Iterable[Buffer]) -> str:
        """Keep the chunks, one after the other, as one object and return its digest.

        Memory holds one chunk at a time. Killed at any point, the object is there whole or not at all.

        Raises:
            FedgeError: the disk refuses it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            with self._partial() as file:
                try:
                    return self._keep(file, chunks)
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise FedgeError(f"store {self.folder}: cannot write an object ({error.strerror})") from error

    def _partial(self) -> IO[bytes]:
        """A file to write to; its lock says that it is being written, see `_remove_leftovers`."""
        while True:
            file = tempfile.NamedTemporaryFile(dir=self.folder, prefix=_PARTIAL, delete=False)  # noqa: SIM115
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:  # another process may have removed it before the lock
                return file
            file.close()

    def _keep(self, file: IO[bytes], chunks: Iterable[Buffer]) -> str:
        hashed = hashlib.sha256()
        for chunk in chunks:
            hashed.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        path = self.path(hashed.hexdigest())
        path.parent.mkdir(exist_ok=True)
        Path(file.name).chmod(0o644)
        Path(file.name).replace(path)
        sync_folder(path.parent)
        sync_folder(self.folder)
        return hashed.hexdigest()

    def _remove_leftovers(self) -> None:
        """Parts of objects whose writer was killed: nobody holds their lock."""
        for path in self.folder.glob(f"{_PARTIAL}*"):
            with suppress(OSError), path.open("r+b") as file:  # NFS: write to hold it alone
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)

    def open(self, digest: str) -> BinaryIO:
        """The object of a digest as a file to read from its beginning, checked, and not held in memory.

        Raises:
            FormatError: no digest, or absent.
            DigestError: what the disk holds is not what was put there.
        """
        try:
            file = self.path(digest).open("rb")
        except OSError as error:
            raise FormatError(f"{self.path(digest)}: cannot be read ({error.strerror})") from error
        try:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise self._damaged(digest)
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file

    def get(self, digest: str, max_bytes: int | None = None) -> bytes:
        """The bytes of a digest, at most `max_bytes` of them.

        Raises:
            FormatError: no digest, absent, or longer than it may be.
            DigestError: what the disk holds is not what was put there.
        """
        data = read_bounded(self.path(digest), MAX_INSTALLED_BYTES if max_bytes is None else max_bytes)
        if sha256(data) != digest:
            raise self._damaged(digest)
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

    def _damaged(self, digest: str) -> DigestError:
        return DigestError(f"store {self.folder}: object {digest[:8]} is damaged; restore it from a backup")
