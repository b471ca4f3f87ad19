"""A server's home in one file, also while its hub is up.

    fedge.db or fedge.pgdump   the database: one consistent state, copied first
    store/...                  the objects that this state needs to go on
    repository/...             releases as devices see them, while nobody publishes
    everything else            keys, certificates, settings, folders of runs
    backup.json                names, sizes and digests, last: a file without it was cut off

Left out is what lives no longer than a round (queue, objects, spool) or than a process (sockets, locks).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

import fedge
from fedge.errors import DigestError, FedgeError, FormatError, UserError
from fedge.files import sync_folder
from fedge_server.registry.database import Registry
from fedge_server.registry.dump import copy_database
from fedge_server.registry.engine import DATABASE
from fedge_server.release.place import REPOSITORY
from fedge_server.repository import Repository

MANIFEST: Final = "backup.json"
FORMAT: Final = 1
_FOLDERS_LEFT_OUT: Final = {
    "objects",
    "spool",
    "store",
    "lost+found",
    "repository",
}  # what is needed of the store is added, and the repository as a whole
_LEFT_OUT: Final = (".lock", ".sock", "-wal", "-shm", "-journal")  # endings
_ATTEMPTS: Final = 5
_FILES_OPEN: Final = 64  # objects held open from the start: two for each run that goes on meanwhile


@dataclass(frozen=True, slots=True)
class Saved:
    """What a backup holds."""

    files: int
    objects: int  # of the content store, among the files
    size: int  # bytes of the archive


def backup(home: Path, url: str | None, target: Path) -> Saved:
    """Write a home and its database to a new file, mode 0600, whole or not at all.

    Args:
        home: of a server, or of simulations.
        url: of its database; None: SQLite in the home.
        target: the archive, a gzipped tar.

    Raises:
        UserError: no home, the file is there already, or lies in the home itself.
        DigestError: an object of the store is damaged; the backup would not be one.
        FedgeError: database or disk refuse.
    """
    home, target = home.resolve(), target.absolute()
    _check(home, url, target)
    with Registry.open(home, url) as registry:
        for attempt in range(_ATTEMPTS):
            try:
                return _write(registry, home, target)
            except _Outrun as error:
                if attempt == _ATTEMPTS - 1:
                    raise FedgeError(f"backup: {error}; stop the runs, or try again") from error
            except OSError as error:
                raise FedgeError(f"backup {target}: cannot be written ({error.strerror or error})") from error
    raise AssertionError("unreachable")


class _Outrun(Exception):  # noqa: N818 - not an error yet: the next attempt begins with a newer state
    """Something that the copied state needs changed before it could be read."""


@dataclass(slots=True)
class _Archive:
    """An archive that is being written, and the digests of what is in it."""

    tar: tarfile.TarFile
    entries: dict[str, dict[str, object]] = field(default_factory=dict)

    def add(self, name: str, file: BinaryIO) -> str:
        """Add what is in a file now (a log may grow meanwhile); returns its digest."""
        state = os.fstat(file.fileno())
        member = tarfile.TarInfo(name)
        member.size, member.mode = state.st_size, stat.S_IMODE(state.st_mode)
        member.mtime = int(state.st_mtime)  # a fraction would stand in an extended header, without a checksum
        reader = _Hashing(file)
        try:
            self.tar.addfile(member, reader)
        except OSError as error:
            if error.errno is None:  # tarfile's own: the file has become shorter
                raise _Outrun(f"{name} was cut while it was read") from error
            raise
        digest = reader.hashed.hexdigest()
        self.entries[name] = {"sha256": digest, "size": member.size}
        return digest

    def add_folder(self, name: str, path: Path) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.mode = tarfile.DIRTYPE, stat.S_IMODE(path.stat().st_mode)
        self.tar.addfile(member)

    def finish(self) -> None:
        manifest = {
            "format": FORMAT,
            "fedge": fedge.__version__,
            "created": time.time(),
            "files": self.entries,
        }
        data = json.dumps(manifest, indent=1).encode()
        member = tarfile.TarInfo(MANIFEST)
        member.size, member.mode = len(data), 0o600
        self.tar.addfile(member, io.BytesIO(data))


class _Hashing(io.RawIOBase):
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hashed = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.hashed.update(data)
        return data


def _check(home: Path, url: str | None, target: Path) -> None:
    if not (home / "server.toml").exists() and not (home / DATABASE).exists():
        raise UserError(f"{home} is no home of fedge: it holds neither server.toml nor {DATABASE}")
    if url is None and not (home / DATABASE).exists():
        raise UserError(f"{home}: its database {DATABASE} is missing; there is nothing to go on from")
    if target.exists():
        raise UserError(f"{target}: is there already; a backup replaces nothing, choose another name")
    if target.resolve().is_relative_to(home):
        raise UserError(f"{target}: lies in the home itself; choose a place outside, better another disk")
    if not target.parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.parent}")


def _write(registry: Registry, home: Path, target: Path) -> Saved:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            # Level 1: weights hardly shrink, and the disk should be what takes the time.
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=1) as packed:
                files, objects = _fill(registry, home, packed, target.parent)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if target.exists():
            raise UserError(f"{target}: has appeared meanwhile; a backup replaces nothing")
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(target.parent)
    return Saved(files, objects, size)


def _fill(registry: Registry, home: Path, packed: gzip.GzipFile, beside: Path) -> tuple[int, int]:
    with (
        tempfile.TemporaryDirectory(dir=beside, prefix=".backup.") as scratch,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ExitStack() as held,
    ):
        archive = _Archive(tar)
        objects: dict[str, BinaryIO | None] = {}

        def hold(needed: Sequence[str]) -> None:
            objects.update(dict.fromkeys(needed))
            for digest in needed[:_FILES_OPEN]:  # what is open stays readable when its run drops it
                objects[digest] = held.enter_context(_object(registry, digest))

        database = copy_database(registry.engine, Path(scratch), hold)
        with database.open("rb") as file:
            archive.add(database.name, file)
        _add_objects(archive, registry, home, objects)
        for path in _walk(home):
            _add_path(archive, path, str(path.relative_to(home)))
        _add_repository(archive, home)
        archive.finish()
        return len(archive.entries), len(objects)


def _add_repository(archive: _Archive, home: Path) -> None:
    """The repository of releases while nobody publishes: its timestamp names files that are copied too."""
    folder = home / REPOSITORY
    if folder.is_dir():
        with Repository(folder).still():
            for path in (folder, *_walk(folder)):
                _add_path(archive, path, str(path.relative_to(home)))


def _add_objects(
    archive: _Archive, registry: Registry, home: Path, objects: Mapping[str, BinaryIO | None]
) -> None:
    folders = {registry.store.path(digest).parent for digest in objects}
    for folder in [registry.store.folder, *sorted(folders)] if objects else []:
        archive.add_folder(str(folder.relative_to(home)), folder)
    for digest, opened in objects.items():
        name = str(registry.store.path(digest).relative_to(home))
        with opened or _object(registry, digest) as file:
            if archive.add(name, file) != digest:
                raise DigestError(
                    f"store {registry.store.folder}: object {digest[:8]} is damaged; "
                    "keep earlier backups, this one would not bring its run back"
                )


def _object(registry: Registry, digest: str) -> BinaryIO:
    try:
        return registry.store.path(digest).open("rb")
    except FileNotFoundError as error:
        raise _Outrun(
            f"object {digest[:8]} of the store has gone, or runs go on faster than it is read"
        ) from error
    except FormatError as error:
        raise DigestError(f"database: names {digest[:60]!r}, which is no digest") from error


def _walk(home: Path) -> Iterator[Path]:
    """Every file and folder of a home that belongs into a backup; links are followed, each folder once."""
    visited = {_identity(home)}
    for folder, folders, files in os.walk(home, followlinks=True, onerror=_unreadable):
        here = Path(folder)
        top = here == home
        keep = []
        for name in sorted(folders):
            identity = _identity(here / name)
            left_out = name.startswith(".") or (top and name in _FOLDERS_LEFT_OUT)
            if identity and identity not in visited and not left_out:
                visited.add(identity)
                keep.append(name)
                yield here / name
        folders[:] = keep
        for name in sorted(files):
            gone_with_process = name.endswith(_LEFT_OUT) or (
                top and name in (DATABASE, "ports.json", MANIFEST)
            )
            if not name.startswith(".") and not gone_with_process:
                yield here / name


def _unreadable(error: OSError) -> None:
    if not isinstance(
        error, FileNotFoundError
    ):  # a folder may go; one that cannot be read must not be missed
        raise error


def _identity(folder: Path) -> tuple[int, ...]:
    """What tells a folder from every other; empty when it has gone since it was listed."""
    try:
        state = folder.stat()
    except FileNotFoundError:
        return ()
    return state.st_dev, state.st_ino


def _add_path(archive: _Archive, path: Path, name: str) -> None:
    with suppress(FileNotFoundError):  # it was removed since it was listed
        if path.is_dir():
            archive.add_folder(name, path)
        elif path.is_file():  # no sockets, no pipes
            with path.open("rb") as file:
                archive.add(name, file)
