"""Sign a change and put it where devices see it: all of it or nothing.

Versions are taken first, so that none is ever signed twice. Then everything is signed in memory; a refusal
leaves no trace. Then targets, roles of tiers, the targets role and the snapshot are written under names that
are new, and the timestamp, replaced last, makes devices see them.

A change of keys needs one file more, the next root, which devices see as soon as it lies there. So the role
is signed with the old and the new keys first, and the root comes after the timestamp: at every moment what
devices find is signed as their root wants it. Where the old keys are lost the root must come first; between
the two, devices refuse what they find and keep what they run, until the publication is done again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, Targets, Timestamp

from fedge.delivery import Kind, role_of, target_path
from fedge.errors import AbsentError, FedgeError, FormatError, RefusedError
from fedge_server.repository.content import TierContent
from fedge_server.repository.content_keys import ContentKeys
from fedge_server.repository.folder import Folder, Used, limit_of
from fedge_server.repository.lifetimes import Lifetimes
from fedge_server.repository.policy import Policy
from fedge_server.repository.signing import Evidence, Request, Sealed, Signing, sign
from fedge_server.repository.state import State


@dataclass(slots=True)
class Change:
    """What is to be different; what is not named stays."""

    targets: Targets | None = None  # the delegations; version and expiry are set when it is signed
    tiers: dict[str, TierContent] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)  # new targets by path
    release: int = 0  # the version that a new release takes; 0: there is none
    root: Root | None = None  # the next one
    snapshot: bool = True  # whether to sign it again; a change of any role but the timestamp needs it
    is_lost: bool = False  # whether the keys that the root replaces can no longer sign


@dataclass(frozen=True, slots=True)
class Terms:
    """How a repository signs."""

    lifetimes: Lifetimes
    policy: Policy
    now: datetime
    keys: ContentKeys | None = None  # of what is sealed


@dataclass(frozen=True, slots=True)
class SignedFile:
    """A signed file, ready to be written."""

    role: str
    version: int
    data: bytes

    @classmethod
    def of(cls, role: str, metadata: Metadata[Any]) -> SignedFile:
        """The file of signed metadata.

        Raises:
            FedgeError: a device would refuse its length.
        """
        data = metadata.to_bytes()
        if len(data) > limit_of(role):
            raise FedgeError(
                f"{role}: takes {len(data)} bytes, over the {limit_of(role)} it may have; "
                "use fewer tiers or keys"
            )
        return cls(role, metadata.signed.version, data)

    def to_meta(self) -> MetaFile:
        """How a snapshot or timestamp names it."""
        return MetaFile.from_data(self.version, self.data, ["sha256"])


def commit(
    folder: Folder, state: State | None, change: Change, signing: Sequence[Signing], terms: Terms
) -> None:
    """Sign a change and publish it.

    Args:
        folder: of the repository, whose lock is held.
        state: what is published; None: this creates it, and the change has a root and targets.
        change: what is to be different.
        signing: the keys at hand.
        terms: lifetimes, policy and time.

    Raises:
        RefusedError: the policy or a signer says no.
        UserError: too few keys are at hand.
        FedgeError: another publisher has published meanwhile.
    """
    work = _Work(folder, state, change, signing, terms)
    root = work.signed_root()
    files = work.signed_files()
    folder.prepare(sorted(path.partition("/")[0] for path in change.files))
    if root is not None and change.is_lost:
        folder.write("root", root.version, root.data)
    for path, data in change.files.items():
        folder.write_target(path, data)
    for file in files[:-1]:
        folder.write(file.role, file.version, file.data)
    if state is not None and folder.read("timestamp", 0) != state.timestamp_bytes:
        raise FedgeError("another publisher has published meanwhile; nothing has changed, try again")
    folder.write("timestamp", files[-1].version, files[-1].data)  # the commit point
    if root is not None and not change.is_lost:
        folder.write("root", root.version, root.data)


class _Work:
    """The signatures of one change."""

    def __init__(
        self, folder: Folder, state: State | None, change: Change, signing: Sequence[Signing], terms: Terms
    ) -> None:
        self.folder, self.state, self.change, self.signing, self.terms = folder, state, change, signing, terms
        old = () if state is None else state.roots[:1]
        new = () if change.root is None else (change.root,)
        self.roots = (*old, *new)  # all must accept a new root
        self.top = new if change.is_lost or not old else self.roots  # all must accept the other roles
        self.versions = self._take_versions()

    def _take_versions(self) -> Mapping[str, int]:
        used, taken = self.folder.used(), {}
        for role, committed in self._committed().items():
            taken[role] = used.next_of(role, committed)
        used = used.with_roles(taken)
        self.folder.write_used(Used(max(used.release, self.change.release), used.roles))
        return taken

    def _committed(self) -> dict[str, int]:
        """The published versions of all roles that are signed now."""
        state, change = self.state, self.change
        found = {"timestamp": 0 if state is None else state.timestamp.signed.version}
        if change.snapshot:
            found["snapshot"] = 0 if state is None else state.snapshot.signed.version
        if change.targets is not None:
            found["targets"] = 0 if state is None else state.targets.signed.version
        for tier in change.tiers:
            held = None if state is None else state.tiers.get(tier)
            found[role_of(tier)] = 0 if held is None else held.signed.version
        return found

    def signed_root(self) -> SignedFile | None:
        """The next root, which both the old and the new keys sign."""
        root = self.change.root
        if root is None:
            return None
        root.expires = self.terms.now + self.terms.lifetimes.root
        metadata = Metadata(root)
        sign(metadata, Request("root", metadata.signed_bytes), self.roots, self.signing)
        return SignedFile.of("root", metadata)

    def signed_files(self) -> list[SignedFile]:
        """All other roles, in the order of writing; the timestamp is the last."""
        files, targets = [], None if self.state is None else self.state.targets.signed
        if self.change.targets is not None:
            targets = self.change.targets
            files.append(self._signed("targets", targets, self.top))
        if targets is None:
            raise FormatError("a repository begins with a targets role")
        files += [self._signed_tier(tier, targets) for tier in sorted(self.change.tiers)]
        snapshot, meta = self._snapshot(files)
        if snapshot is not None:
            files.append(snapshot)
        timestamp = Timestamp(snapshot_meta=meta)
        files.append(self._signed("timestamp", timestamp, self.top))
        return files

    def _snapshot(self, files: Sequence[SignedFile]) -> tuple[SignedFile | None, MetaFile]:
        if not self.change.snapshot and self.state is not None:
            return None, self.state.timestamp.signed.snapshot_meta
        meta = {} if self.state is None else deepcopy(self.state.snapshot.signed.meta)
        meta.update({f"{file.role}.json": file.to_meta() for file in files})
        signed = self._signed("snapshot", Snapshot(meta=meta), self.top)
        return signed, signed.to_meta()

    def _signed_tier(self, tier: str, targets: Targets) -> SignedFile:
        """A tier's role, once the policy has no reason against it."""
        role, content = role_of(tier), self.change.tiers[tier]
        held = None if self.state is None else self.state.tiers.get(tier)
        return self._signed(
            role,
            Targets(targets=content.to_targets()),
            (targets,),
            previous=None if held is None else held.signed_bytes,
            evidence={version: self._evidence(tier, version, content) for version in content.releases},
        )

    def _evidence(self, tier: str, version: int, content: TierContent) -> Evidence:
        files = content.releases[version].files
        found = {}
        shown: tuple[Kind, ...] = ("manifest", "report", "golden", "reference")
        for kind in (kind for kind in shown if kind in files):
            path = target_path(tier, version, kind)
            data = self.change.files.get(path)
            found[kind] = self.folder.read_target(path, files[kind]) if data is None else data
        return Evidence(**found, sealed=self._sealed(tier, version, content))

    def _sealed(self, tier: str, version: int, content: TierContent) -> Sealed | None:
        """A sealed model and its key; a version that was signed before needs no longer be opened."""
        offered = content.releases[version]
        if offered.note.sealing is None or self.terms.keys is None:
            return None
        path = target_path(tier, version, "model")
        data = self.change.files.get(path)
        try:
            key = self.terms.keys.key(tier, version)
        except AbsentError:
            return None
        return Sealed(key, self.folder.read_target(path, offered.files["model"]) if data is None else data)

    def _signed(
        self,
        role: str,
        signed: Signed,
        delegators: Sequence[Root | Targets],
        *,
        previous: bytes | None = None,
        evidence: Mapping[int, Evidence] | None = None,
    ) -> SignedFile:
        signed.version = self.versions[role]
        signed.expires = self.terms.now + self.terms.lifetimes.of(role)
        metadata: Metadata[Any] = Metadata(signed)
        request = Request(role, metadata.signed_bytes, previous, evidence or {})
        if evidence is not None and (reasons := self.terms.policy(request)):
            raise RefusedError(f"{role}: not signed: {'; '.join(reasons)}", role)
        sign(metadata, request, delegators, self.signing)
        return SignedFile.of(role, metadata)
