"""The repository's files as devices see them: which one a name means, and what the newest metadata says.

Nothing in here is checked against signatures: devices do that, and nobody else can for them.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from fedge.delivery import role_of, tier_of
from fedge.errors import AbsentError, FedgeError, ForbiddenError
from fedge_server.repository.content import TierContent
from fedge_server.repository.folder import TIMESTAMP, Folder, parse

_METADATA: Final = re.compile(r"(?:timestamp|[1-9][0-9]{0,9}\.([a-z][a-z0-9_-]{0,40}))\.json")
_TARGET: Final = re.compile(r"([a-z][a-z0-9_-]{0,31})/[0-9a-f]{64}\.[a-z0-9][a-z0-9.]{0,63}")
_FOR_ALL: Final = frozenset({"root", "snapshot", "targets"})


def place_of(name: str, tier: str) -> tuple[str, ...]:
    """Where a file lies below the repository, if a device of a tier may have it.

    Raises:
        AbsentError: no file of a repository is called so; nothing outside of it can be named.
        ForbiddenError: it is another tier's.
    """
    folder, _, rest = name.partition("/")
    if folder == "metadata" and (found := _METADATA.fullmatch(rest)):
        role = found[1]
        if role is not None and role not in _FOR_ALL and tier_of(role) != tier:
            raise _refused(role, tier_of(role) is not None)
        return folder, rest
    if folder == "targets" and (found := _TARGET.fullmatch(rest)):
        if found[1] != tier:
            raise ForbiddenError(f"targets of tier {found[1]} are not for devices of tier {tier}")
        return folder, *rest.split("/")
    raise AbsentError("no file of the repository has this name")


def _refused(role: str, is_tier: bool) -> FedgeError:
    if is_tier:
        return ForbiddenError(f"role {role} is another tier's")
    return AbsentError("no file of the repository has this name")


@dataclass(frozen=True, slots=True)
class TierView:
    """A tier in the newest metadata."""

    role: int  # version of its role
    content: TierContent


@dataclass(frozen=True, slots=True)
class View:
    """The newest metadata; versions are 0 where there is none."""

    root: int = 0
    timestamp: int = 0
    snapshot: int = 0
    tiers: Mapping[str, TierView] = field(default_factory=lambda: MappingProxyType({}))

    def newest(self, tier: str) -> int:
        """The newest version on offer for a tier; 0: none."""
        found = self.tiers.get(tier)
        return max(found.content.releases, default=0) if found else 0

    def offers(self, tier: str, version: int) -> bool:
        """Whether the tier's metadata lists a version."""
        return tier in self.tiers and version in self.tiers[tier].content.releases

    def floor(self, tier: str) -> int:
        """The lowest version that the tier's devices may run."""
        return self.tiers[tier].content.mark.floor if tier in self.tiers else 0


class Shelf:
    """One repository's folder, which another process may be writing to."""

    def __init__(self, path: Path) -> None:
        self._path, self._folder = path, Folder(path)
        self._seen: object = None  # what the view was read from
        self.view = View()

    def refresh(self) -> View:
        """Look whether the timestamp was replaced; the view stays what it was where that cannot be read.

        Raises:
            FedgeError: the metadata cannot be read; a publisher at work or a damaged repository.
        """
        try:
            state = (self._folder.metadata / TIMESTAMP).stat()
        except OSError:  # no repository yet
            self.view, self._seen = View(), None
            return self.view
        seen = (state.st_ino, state.st_size, state.st_mtime_ns)
        if seen != self._seen:
            self.view, self._seen = _read(self._folder), seen
        return self.view

    def root(self) -> bytes:
        """The newest root, for a device that has none; empty: there is no repository.

        Raises:
            FormatError: it cannot be read.
        """
        roots = self._folder.roots()
        return self._folder.read("root", roots[-1]) if roots else b""

    def open(self, name: str, tier: str) -> tuple[int, int]:
        """A file that a device of a tier may have: a descriptor, which the caller closes, and its length.

        Raises:
            AbsentError: there is no such file.
            ForbiddenError: it is another tier's.
        """
        path = self._path.joinpath(*place_of(name, tier))
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise AbsentError("there is no such file") from error
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            os.close(descriptor)
            raise AbsentError("there is no such file")
        return descriptor, state.st_size

    def target(self, path: str, tier: str, version: int, kind: Any) -> bytes:
        """A target of a version on offer, as it was signed.

        Raises:
            TrustError: it is damaged.
            AbsentError: the version is not on offer.
        """
        if not self.view.offers(tier, version):
            raise AbsentError(f"version {version} of tier {tier} is not on offer")
        entry = self.view.tiers[tier].content.releases[version].files[kind]
        return self._folder.read_target(path, entry)


def _read(folder: Folder) -> View:
    """What the files say. A publisher writes the timestamp last, so what it names is there."""
    timestamp = parse(folder.read("timestamp", 0), "timestamp.json").signed
    snapshot = parse(folder.read("snapshot", timestamp.snapshot_meta.version), "snapshot").signed
    tiers = {}
    for name, meta in snapshot.meta.items():
        if (tier := tier_of(name.removesuffix(".json"))) is not None:
            signed = parse(folder.read(role_of(tier), meta.version), name).signed
            tiers[tier] = TierView(meta.version, TierContent.from_targets(tier, signed))
    return View(max(folder.roots(), default=0), timestamp.version, snapshot.version, MappingProxyType(tiers))
