"""The files of a repository: their names, whole or absent, and what killed publishers left.

metadata/  what devices read first        targets/  what the metadata names, by digest
state/     the publisher's own: its lock, and the versions that are used up
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tuf.api.metadata import Metadata
from tuf.api.serialization import DeserializationError

from fedge.delivery import MAX_ROOT_BYTES, MAX_SNAPSHOT_BYTES, MAX_TARGETS_BYTES, MAX_TIMESTAMP_BYTES
from fedge.errors import DigestError, FedgeError, FormatError
from fedge.files import read_bounded, sha256, sole_holder, sync_folder, write_atomically
from fedge.manifest import MAX_VERSION
from fedge_server.repository.content import FileEntry

MAX_ROOTS: Final = 256  # that a device walks in one go
TIMESTAMP: Final = "timestamp.json"
_MAX_USED_BYTES = 64 * 1024
_LIMITS = {"root": MAX_ROOT_BYTES, "timestamp": MAX_TIMESTAMP_BYTES, "snapshot": MAX_SNAPSHOT_BYTES}


def metadata_name(role: str, version: int) -> str:
    """The name of a role's file."""
    return TIMESTAMP if role == "timestamp" else f"{version}.{role}.json"


def hashed_path(path: str, digest: str) -> str:
    """Where a target lies: its digest stands before its name, so that it is never overwritten."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{digest}.{name}"


@dataclass(frozen=True, slots=True)
class Used:
    """The highest versions that any publication has taken, finished or not: they are never taken again."""

    release: int = 0
    roles: Mapping[str, int] = field(default_factory=dict)

    def next_of(self, role: str, committed: int) -> int:
        """The version of a role's next metadata."""
        return 1 + max(committed, self.roles.get(role, 0))

    def with_roles(self, versions: Mapping[str, int]) -> Used:
        """With versions that are taken now."""
        return Used(self.release, {**self.roles, **versions})


class Folder:
    """One repository's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata, self.targets, self.state = path / "metadata", path / "targets", path / "state"

    @contextmanager
    def locked(self, patience_s: float) -> Iterator[None]:
        """One publisher at a time; the lock goes with the process that held it.

        Raises:
            FedgeError: another one is at work for all this time.
        """
        self.state.mkdir(parents=True, exist_ok=True)
        try:
            with sole_holder(self.state / "lock", patience_s=patience_s):
                yield
        except BlockingIOError as error:
            raise FedgeError(f"{self.path}: another publisher is at work; try again later") from error

    def roots(self) -> list[int]:
        """The versions of the roots that are there."""
        return sorted(version for role, version in self._numbered() if role == "root")

    def snapshots(self, newest: int) -> list[int]:
        """The versions of the snapshots that were published and are still there."""
        found = (version for role, version in self._numbered() if role == "snapshot")
        return sorted(version for version in found if version <= newest)

    def read(self, role: str, version: int) -> bytes:
        """A role's file.

        Raises:
            FormatError: absent, unreadable, or longer than it may be.
        """
        return read_bounded(self.metadata / metadata_name(role, version), limit_of(role))

    def write(self, role: str, version: int, data: bytes) -> None:
        """A role's new file; only the timestamp replaces one.

        Raises:
            FedgeError: there is a file of this version, so another publisher is at work.
        """
        try:
            path = self.metadata / metadata_name(role, version)
            write_atomically(path, data, replace=role == "timestamp")
        except FileExistsError as error:
            raise FedgeError(
                f"{role} version {version} was published meanwhile; nothing has changed, try again"
            ) from error

    def write_target(self, path: str, data: bytes) -> None:
        """A target, unless it is there and whole."""
        place = self.targets / hashed_path(path, sha256(data))
        if place.exists() and place.stat().st_size == len(data) and place.read_bytes() == data:
            return
        write_atomically(place, data)

    def read_target(self, path: str, entry: FileEntry) -> bytes:
        """A target as it was signed.

        Raises:
            FormatError: absent or longer.
            DigestError: damaged.
        """
        data = read_bounded(self.targets / hashed_path(path, entry.sha256), entry.length)
        if FileEntry.of(data) != entry:
            raise DigestError(f"target {path} in {self.path} is damaged; restore it from a backup")
        return data

    def used(self) -> Used:
        """The versions that are used up.

        Raises:
            FormatError: the file is damaged.
        """
        path = self.state / "used.json"
        if not path.exists():
            return Used()
        try:
            value: Any = json.loads(read_bounded(path, _MAX_USED_BYTES))
            numbers = [value["release"], *value["roles"].values()]
            if not all(type(number) is int and 0 <= number <= MAX_VERSION for number in numbers):
                raise ValueError("a version is no integer")
            return Used(value["release"], value["roles"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path}: damaged ({error}); restore it from a backup") from error

    def write_used(self, used: Used) -> None:
        """Take versions, before anything is signed with them."""
        data = json.dumps({"release": used.release, "roles": dict(used.roles)}, sort_keys=True).encode()
        write_atomically(self.state / "used.json", data, mode=0o600)

    def prepare(self, tiers: Iterable[str]) -> None:
        """Make the folders, and make them last."""
        for folder in (self.path, self.metadata, self.targets, *(self.targets / tier for tier in tiers)):
            if not folder.exists():
                folder.mkdir(parents=True, exist_ok=True)
                sync_folder(folder.parent)

    def remove_all_but(self, metadata: set[str], targets: set[str]) -> None:
        """Remove what killed publishers left, and what is too old; roots stay for ever."""
        for path in list(self.metadata.glob("*")):
            if path.name not in metadata and not path.name.endswith(".root.json"):
                path.unlink()
        for folder in (self.metadata, self.state):
            for path in folder.glob(".*"):  # half-written files
                path.unlink()
        for path in list(self.targets.glob("*/*")):
            if f"{path.parent.name}/{path.name}" not in targets:
                path.unlink()

    def _numbered(self) -> Iterator[tuple[str, int]]:
        for path in self.metadata.glob("*.json"):
            number, _, role = path.name.removesuffix(".json").partition(".")
            if number.isascii() and number.isdecimal() and role:
                yield role, int(number)


def limit_of(role: str) -> int:
    """The most bytes that a role's file may have."""
    return _LIMITS.get(role, MAX_TARGETS_BYTES)


def parse(data: bytes, where: str) -> Metadata[Any]:
    """Metadata from its file.

    Raises:
        FormatError: it is none.
    """
    try:
        return Metadata.from_bytes(data)
    except (DeserializationError, RecursionError) as error:
        raise FormatError(f"{where}: no TUF metadata ({str(error)[:120]})") from error
