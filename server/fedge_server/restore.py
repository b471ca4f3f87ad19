"""From a backup back to a home: nothing appears before every byte has been checked."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tarfile
import tomllib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from fedge.errors import DigestError, FedgeError, FormatError, UserError
from fedge.files import read_bounded, sync_folder, write_atomically
from fedge_server.backup import FORMAT, MANIFEST
from fedge_server.registry.dump import DUMP, load_database
from fedge_server.registry.engine import connect

MAX_FILES: Final = 1_000_000
MAX_MANIFEST_BYTES: Final = 512 * 1024**2
MAX_SETTINGS_BYTES: Final = 1024**2
_BUILD: Final = ".restore"  # in the new home: the folder may be a disk of its own, which cannot be renamed
_IGNORED: Final = {"lost+found", _BUILD}
_SETTINGS: Final = "server.toml"  # moved last: with it the folder is a home


@dataclass(frozen=True, slots=True)
class Restored:
    """What came back."""

    files: int
    fedge: str  # version that wrote the backup
    created: float  # Unix seconds


def restore(archive: Path, home: Path, database_url: str | None = None) -> Restored:
    """Make a home from a backup, with the modes that its files had.

    Args:
        archive: what `backup` wrote.
        home: the new home: absent or empty.
        database_url: of an empty PostgreSQL database, instead of the one that the settings name.

    Raises:
        UserError: the folder is not empty, the database is not, or a URL is given to a home with SQLite.
        FormatError: the archive is damaged, cut off, or holds what no backup holds; nothing is left behind.
        DigestError: a file is not the one that was backed up; nothing is left behind.
        FedgeError: disk or database refuse.
    """
    if not archive.is_file():
        raise UserError(f"{archive}: there is no such backup")
    home = home.absolute()
    existed = home.is_dir()
    if home.exists() and (not existed or {path.name for path in home.iterdir()} - _IGNORED):
        raise UserError(f"{home}: is not an empty folder; restore into a new one, or empty it first")
    build, moved = home / _BUILD, []
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)  # as init makes it: models are for its user
        shutil.rmtree(build, ignore_errors=True)  # of a restore that was killed
        build.mkdir(mode=0o700)
        modes = _extract(archive, build)
        restored = _verify(build)
        _fill_database(build, database_url)
        _restore_modes(build, modes)
        os.sync()  # thousands of files: once for all
        for path in sorted(build.iterdir(), key=lambda path: path.name == _SETTINGS):
            path.rename(home / path.name)
            moved.append(home / path.name)
        build.rmdir()
    except BaseException as error:
        _remove([*moved, build] if existed else [home])
        if isinstance(error, OSError):
            raise FedgeError(f"restore {home}: the disk refuses ({error.strerror or error})") from error
        raise
    sync_folder(home)
    return restored


def _extract(archive: Path, folder: Path) -> dict[str, int]:
    """Unpack regular files and folders; returns the modes they had."""
    modes: dict[str, int] = {}
    seen: set[str] = set()
    room = shutil.disk_usage(folder).free
    try:
        with tarfile.open(archive, mode="r|gz") as tar:
            for member in tar:
                _check_member(member, seen)
                room -= member.size
                if room < 0 or len(seen) > MAX_FILES:
                    raise FormatError(f"backup {archive}: holds more than there is room for at {folder}")
                tar.extract(member, folder, filter="data")
                modes[member.name] = member.mode & 0o777
    except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:
        raise FormatError(f"backup {archive}: is damaged or cut off ({error})") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise FormatError(f"backup {archive}: is damaged or cut off ({error})") from error  # gzip's own
    return modes


def _check_member(member: tarfile.TarInfo, seen: set[str]) -> None:
    """Refuse whatever could reach outside the folder, or lie over something else."""
    path = PurePosixPath(member.name)
    if not (member.isreg() or member.isdir()) or path.is_absolute() or ".." in path.parts:
        raise FormatError(f"backup: {member.name[:100]!r} is neither a file nor a folder inside it")
    if str(path) in seen:
        raise FormatError(f"backup: {member.name[:100]!r} is there twice")
    seen.add(str(path))


def _verify(folder: Path) -> Restored:
    """Hold every file to the manifest, and the manifest to the files."""
    manifest = _manifest(folder / MANIFEST)
    (folder / MANIFEST).unlink()
    entries: Mapping[str, Any] = manifest["files"]
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    if different := set(found) ^ set(entries):
        raise FormatError(f"backup: {min(different)[:100]!r} is listed and absent, or there and not listed")
    for name, path in found.items():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entries[name]["sha256"]:
            raise DigestError(f"backup: {name[:100]!r} is not the file that was backed up")
        parts = PurePosixPath(name).parts
        if parts[0] == "store" and "".join(parts[1:]) != digest:
            raise DigestError(f"backup: object {name[:100]!r} has another digest than its name")
    return Restored(len(found), str(manifest["fedge"]), float(manifest["created"]))


def _manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FormatError(f"backup: it has no {MANIFEST}: it was cut off, or is no backup of fedge")
    try:
        manifest: dict[str, Any] = json.loads(read_bounded(path, MAX_MANIFEST_BYTES))
        known = manifest["format"]
        {name: entry["sha256"] for name, entry in manifest["files"].items()}
        manifest["fedge"], float(manifest["created"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"backup: its {MANIFEST} is malformed ({error})") from error
    if known != FORMAT:
        raise FormatError(f"backup: has format {known!r}, but this fedge reads {FORMAT}; use a newer fedge")
    return manifest


def _fill_database(build: Path, url: str | None) -> None:
    """Bring a PostgreSQL database back; SQLite's is a file of the home."""
    dump, settings = build / DUMP, build / _SETTINGS
    if not dump.exists():
        if url:
            raise UserError("--database: this backup holds SQLite's database; restore it without the option")
        return
    text = read_bounded(settings, MAX_SETTINGS_BYTES).decode("utf-8-sig")
    if url:
        text = _with_url(text, url)
        write_atomically(settings, text.encode(), mode=stat.S_IMODE(settings.stat().st_mode))
    url = tomllib.loads(text).get("database", {}).get("url", "")
    engine = connect(build, url)
    try:
        if not url or engine.dialect.name != "postgresql":
            raise UserError("this backup holds a PostgreSQL database; name an empty one with --database URL")
        load_database(engine, dump)
    finally:
        engine.dispose()
    dump.unlink()


def _with_url(text: str, url: str) -> str:
    """The settings with another database URL."""
    changed = re.sub(
        r"^(\[database\][^\[]*?^url\s*=\s*)(\"[^\"\n]*\"|'[^'\n]*')",
        lambda match: match[1] + json.dumps(url),
        text,
        count=1,
        flags=re.MULTILINE | re.DOTALL,
    )
    if tomllib.loads(changed).get("database", {}).get("url") != url:
        raise UserError(f"{_SETTINGS}: its [database] url cannot be replaced; restore into the one it names")
    return changed


def _restore_modes(folder: Path, modes: Mapping[str, int]) -> None:
    for name in sorted(modes, reverse=True):  # inner ones first: an outer one may forbid to enter
        path = folder / name
        if path.exists():  # the manifest and the dump have done their work
            path.chmod(modes[name])


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
