"""What a tier's metadata says, as values: its mark, and the releases that it offers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Self

from tuf.api.metadata import TargetFile, Targets

from fedge.delivery import KINDS, OPTIONAL, Kind, ReleaseNote, TierMark, mark_path, target_path
from fedge.errors import FormatError
from fedge.files import sha256

MAX_KEPT: Final = 16  # releases that a tier may offer at a time


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Length and digest of a target."""

    length: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> Self:
        """The entry of these bytes."""
        return cls(len(data), sha256(data))

    @classmethod
    def from_target(cls, target: TargetFile) -> Self:
        """Read a target's entry.

        Raises:
            FormatError: it has other digests than SHA-256, or other fields.
        """
        if set(target.hashes) != {"sha256"} or set(target.unrecognized_fields) != {"custom"}:
            raise FormatError(f"target {target.path[:80]!r}: must have a SHA-256, `custom`, and no more")
        return cls(target.length, target.hashes["sha256"])


@dataclass(frozen=True, slots=True)
class Offered:
    """One release as a tier offers it."""

    note: ReleaseNote
    files: Mapping[Kind, FileEntry]  # of each kind that the release has


@dataclass(frozen=True, slots=True)
class TierContent:
    """All that a tier's metadata says."""

    mark: TierMark
    releases: Mapping[int, Offered]  # by version, rising

    @classmethod
    def empty(cls, tier: str, floor: int = 0) -> Self:
        """Of a tier that has no release yet."""
        return cls(TierMark(tier, floor, 0), MappingProxyType({}))

    @classmethod
    def from_targets(cls, tier: str, targets: Targets) -> Self:
        """Read a tier's metadata; nothing is skipped.

        Raises:
            FormatError: it has delegations, or targets other than those of its tier's mark and releases.
        """
        if targets.delegations is not None or targets.unrecognized_fields:
            raise FormatError(f"tier {tier!r}: its role may delegate nothing, and has no further fields")
        left = dict(targets.targets)
        if foreign := [path for path in left if not path.startswith(f"{tier}/")]:
            raise FormatError(f"tier {tier!r}: offers {foreign[0][:80]!r}, which is none of its paths")
        mark = TierMark.from_json(_take(left, mark_path(tier)).custom)
        if mark.tier != tier or FileEntry.from_target(targets.targets[mark_path(tier)]) != FileEntry.of(
            mark.to_bytes()
        ):
            raise FormatError(f"tier {tier!r}: {mark_path(tier)} is not the file of its own mark")
        releases = {}
        for version in sorted({_version_of(path) for path in left}):
            there = [kind for kind in OPTIONAL if target_path(tier, version, kind) in left]
            entries = {kind: _take(left, target_path(tier, version, kind)) for kind in (*KINDS, *there)}
            notes = [ReleaseNote.from_json(entry.custom) for entry in entries.values()]
            if any(note != notes[0] or note.version != version for note in notes):
                raise FormatError(f"tier {tier!r}: the files of version {version} belong to several releases")
            files = {kind: FileEntry.from_target(entry) for kind, entry in entries.items()}
            releases[version] = Offered(notes[0], MappingProxyType(files))
        if left:
            raise FormatError(f"tier {tier!r}: offers {min(left)[:80]!r}, which is none of its paths")
        return cls(mark, MappingProxyType(releases))

    def to_targets(self) -> dict[str, TargetFile]:
        """The entries of the metadata."""
        path = mark_path(self.mark.tier)
        found = {path: _target(path, FileEntry.of(self.mark.to_bytes()), self.mark.to_json())}
        for version, offered in self.releases.items():
            for kind, entry in offered.files.items():
                path = target_path(self.mark.tier, version, kind)
                found[path] = _target(path, entry, offered.note.to_json())
        return found

    def with_release(
        self, offered: Offered, *, floor: int | None, keep: int, needed: Collection[int] = ()
    ) -> Self:
        """With one release more, the newest; those below the floor go, and the oldest over `keep`.

        Those that are `needed` stay, however old, as far as a tier may offer so many.
        """
        version = offered.note.version
        return self.with_floor(
            self.mark.floor if floor is None else floor,
            newest=max(version, self.mark.newest),
            releases={**self.releases, version: offered},
            keep=keep,
            needed=needed,
        )

    def with_floor(
        self,
        floor: int,
        *,
        newest: int | None = None,
        releases: Mapping[int, Offered] | None = None,
        keep: int = MAX_KEPT,
        needed: Collection[int] = (),
    ) -> Self:
        """With another floor, without what lies below it; see `with_release` for the rest."""
        mark = TierMark(self.mark.tier, floor, self.mark.newest if newest is None else newest)
        offered = self.releases if releases is None else releases
        may = sorted(version for version in offered if version >= floor)
        older = [version for version in reversed(may[:-keep]) if version in needed]
        recent = sorted(may[-keep:], key=lambda version: (version not in needed, -version))
        kept = list(dict.fromkeys([*may[-1:], *older, *recent]))[:MAX_KEPT]
        return replace(
            self,
            mark=mark,
            releases=MappingProxyType({version: offered[version] for version in sorted(kept)}),
        )


def _target(path: str, entry: FileEntry, custom: dict[str, object]) -> TargetFile:
    return TargetFile(entry.length, {"sha256": entry.sha256}, path, {"custom": custom})


def _take(left: dict[str, TargetFile], path: str) -> TargetFile:
    try:
        return left.pop(path)
    except KeyError as error:
        raise FormatError(f"metadata of a tier: {path} is missing") from error


def _version_of(path: str) -> int:
    """The version that a path of a release states; what is no such path is found as left over, or missing."""
    number = path.rpartition("/")[2].partition(".")[0]
    if not number.isascii() or not number.isdecimal() or len(number) > 16 or number.startswith("0"):
        raise FormatError(f"target {path[:80]!r}: is no file of a release")
    return int(number)
