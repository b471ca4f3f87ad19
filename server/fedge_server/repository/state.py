"""What a repository says now: read from its files, every signature and digest checked again.

A publisher signs on top of what it reads. So it trusts its own disk no more than a device trusts a server,
except that expired metadata may be replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from fedge.delivery import role_of, tier_of
from fedge.errors import DigestError, FormatError, SignatureError, UserError
from fedge_server.repository.content import TierContent
from fedge_server.repository.folder import MAX_ROOTS, Folder, hashed_path, metadata_name, parse
from fedge_server.repository.signing import role_in, verify

HISTORY: Final = 8  # snapshots whose files are kept, for devices that have begun to read one


@dataclass(frozen=True, slots=True)
class State:
    """One consistent state of a repository."""

    roots: tuple[Root, ...]  # the newest first, then the one before, if any
    timestamp: Metadata[Timestamp]
    timestamp_bytes: bytes  # as they lie there, to see whether another publisher has replaced them
    snapshot: Metadata[Snapshot]
    targets: Metadata[Targets]
    tiers: Mapping[str, Metadata[Targets]]  # by tier

    @property
    def root(self) -> Root:
        """The newest root."""
        return self.roots[0]

    def is_signed(self, role: str) -> bool:
        """Whether the newest root accepts a role; it does not after half a change of lost keys."""
        try:
            if role in ("targets", "snapshot", "timestamp"):
                verify(getattr(self, role), role, (self.root,))
        except SignatureError:
            return False
        return True

    def content(self, tier: str) -> TierContent:
        """What a tier offers.

        Raises:
            UserError: there is no such tier.
        """
        if tier not in self.tiers:
            known = ", ".join(sorted(self.tiers)) or "none"
            raise UserError(f"tier {tier[:60]!r} is not in this repository; it has: {known}")
        return TierContent.from_targets(tier, self.tiers[tier].signed)

    @property
    def newest_release(self) -> int:
        """The highest version of any tier; 0: none."""
        return max((self.content(tier).mark.newest for tier in self.tiers), default=0)


def load(folder: Folder) -> State | None:
    """The state that devices see; None: there is no repository here.

    The timestamp, snapshot and targets may be signed for the root before the newest: a publisher that
    replaced lost keys may have been killed between the two.

    Raises:
        FormatError: a file is missing, malformed or too long.
        SignatureError: one is not signed by its role.
        DigestError: one is not what the snapshot or timestamp names.
    """
    versions = folder.roots()
    if not versions:
        return None
    roots = _roots(folder, versions)
    timestamp_bytes = folder.read("timestamp", 0)
    timestamp = parse(timestamp_bytes, "timestamp.json")
    _check(timestamp, Timestamp, "timestamp", roots)
    snapshot = _named(folder, Snapshot, "snapshot", timestamp.signed.snapshot_meta, roots)
    targets = _named(folder, Targets, "targets", _meta(snapshot.signed, "targets"), roots)
    tiers = {}
    for role in sorted(targets.signed.delegations.roles if targets.signed.delegations else ()):
        tier = tier_of(role)
        if tier is None:
            raise FormatError(f"targets: delegates to {role[:60]!r}, which is no role of a tier")
        delegators = (targets.signed,) if role_in(targets.signed, role).keyids else ()  # else: suspended
        tiers[tier] = _named(folder, Targets, role, _meta(snapshot.signed, role), delegators)
    return State(roots, timestamp, timestamp_bytes, snapshot, targets, tiers)


def kept(folder: Folder, state: State) -> tuple[set[str], set[str]]:
    """Names of the files in metadata/ and targets/ that the newest snapshots need."""
    metadata, targets = {metadata_name("timestamp", 0)}, set()
    newest = state.snapshot.signed.version
    numbered = folder.snapshots(newest)[-HISTORY:]
    for version in numbered:
        snapshot = parse(folder.read("snapshot", version), f"snapshot version {version}").signed
        metadata.add(metadata_name("snapshot", version))
        metadata |= {f"{meta.version}.{name}" for name, meta in snapshot.meta.items()}
    for name in metadata:
        number, _, rest = name.partition(".")
        tier = tier_of(rest.removesuffix(".json"))
        if tier is None or not (folder.metadata / name).exists():
            continue
        offered = parse(folder.read(role_of(tier), int(number)), name).signed.targets
        targets |= {hashed_path(path, entry.hashes["sha256"]) for path, entry in offered.items()}
    return metadata, targets


def _roots(folder: Folder, versions: list[int]) -> tuple[Root, ...]:
    """The newest two, once the whole chain has been walked as a device walks it."""
    if versions != list(range(1, len(versions) + 1)) or len(versions) > MAX_ROOTS:
        raise FormatError(f"{folder.path}: its roots must be 1 to N without a gap, at most {MAX_ROOTS}")
    chain: list[Root] = []
    for version in versions:
        found = parse(folder.read("root", version), f"root version {version}")
        for delegator in (found.signed, *chain[-1:]):
            _check(found, Root, "root", (delegator,))
        if found.signed.version != version or not found.signed.consistent_snapshot:
            raise FormatError(f"{folder.path}: {version}.root.json is of another version, or not consistent")
        chain.append(found.signed)
    return tuple(reversed(chain[-2:]))


def _meta(snapshot: Snapshot, role: str) -> MetaFile:
    try:
        return snapshot.meta[f"{role}.json"]
    except KeyError as error:
        raise FormatError(f"snapshot version {snapshot.version}: does not name {role}") from error


def _named(
    folder: Folder, kind: type[Any], role: str, meta: MetaFile, delegators: tuple[Any, ...]
) -> Metadata[Any]:
    """A file that another one names by version, length and digest."""
    data = folder.read(role, meta.version)
    try:
        meta.verify_length_and_hashes(data)
    except LengthOrHashMismatchError as error:
        raise DigestError(f"{role} version {meta.version}: is not what was signed; it is damaged") from error
    found = parse(data, f"{role} version {meta.version}")
    _check(found, kind, role, delegators)
    if found.signed.version != meta.version:
        raise FormatError(f"{role} version {meta.version}: holds version {found.signed.version}")
    return found


def _check(found: Metadata[Any], kind: type[Any], role: str, delegators: tuple[Any, ...]) -> None:
    if not isinstance(found.signed, kind):
        raise FormatError(f"{role}: holds metadata of kind {found.signed.type!r}")
    if delegators:
        verify(found, role, delegators)
