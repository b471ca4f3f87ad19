"""A repository of releases that devices can trust: TUF metadata (https://theupdateframework.github.io/specification/v1.0.31).

Each method is one publication: it takes the lock, reads and checks what is there, removes what a killed
publisher left, and commits. Killed at any point, devices see the state before or the one after.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from datetime import UTC
from pathlib import Path
from typing import Final

from fedge.artefact import unpack
from fedge.delivery import Kind, ReleaseNote, lineage_digest, mark_path, target_path, tier_of
from fedge.errors import FedgeError, FormatError, UserError
from fedge.files import sha256
from fedge.manifest import Release, VariantEntry
from fedge_server.repository import edits
from fedge_server.repository.commit import Change, Terms, commit
from fedge_server.repository.content import MAX_KEPT, FileEntry, Offered, TierContent
from fedge_server.repository.content_keys import ContentKeys
from fedge_server.repository.edits import TopRole
from fedge_server.repository.folder import Folder
from fedge_server.repository.lifetimes import Clock, Lifetimes, utc_now
from fedge_server.repository.policy import Policy, reasons_against
from fedge_server.repository.signing import RoleKeys, Signing
from fedge_server.repository.state import State, kept, load
from fedge_server.repository.status import RoleStatus, statuses

Draft = Callable[[int], Release]
"""Make the release of a given version; it is called once the version is known."""

MAX_REPORT_BYTES: Final = 16 * 1024**2  # of one gate report


class Repository:
    """The publisher's side of one repository."""

    def __init__(
        self,
        path: Path,
        *,
        lifetimes: Lifetimes = Lifetimes(),  # noqa: B008 - it is frozen
        policy: Policy = reasons_against,
        keep: int = 4,
        content_keys: ContentKeys | None = None,
        clock: Clock = utc_now,
        patience_s: float = 30.0,
    ) -> None:
        """A repository that is there, or that `create` will make.

        Args:
            path: its folder; `metadata/` and `targets/` in it are what devices read.
            lifetimes: of what is signed from now on.
            policy: what is asked before anything is signed for a tier.
            keep: releases that a tier offers at a time, 1 to 16.
            content_keys: models are sealed from now on, and their keys kept there; None: they are not.
            clock: the time in UTC.
            patience_s: how long to wait for another publisher.

        Raises:
            UserError: `keep` is out of range.
        """
        if not 1 <= keep <= MAX_KEPT:
            raise UserError(f"keep = {keep}: a tier offers 1 to {MAX_KEPT} releases at a time")
        self._folder = Folder(path)
        self._lifetimes, self._policy, self._keep = lifetimes, policy, keep
        self._clock, self._patience_s = clock, patience_s
        self._content_keys = content_keys

    @property
    def is_there(self) -> bool:
        """Whether it has been created."""
        return bool(self._folder.roots())

    @contextmanager
    def still(self) -> Iterator[None]:
        """Nobody publishes meanwhile: for whoever copies the files.

        Raises:
            FedgeError: a publisher is at work for all the time that one waits.
        """
        if not self.is_there:
            yield
            return
        with self._folder.locked(self._patience_s):
            yield

    def create(self, keys: Mapping[TopRole, RoleKeys], signing: Sequence[Signing]) -> bytes:
        """Begin a repository without tiers.

        Args:
            keys: of root, targets, snapshot and timestamp.
            signing: enough keys of each.

        Returns:
            The first root, which devices are given when they are enrolled.

        Raises:
            UserError: there is a repository already, or keys are missing.
        """
        with self._alone() as state:
            if state is not None:
                raise UserError(f"{self._folder.path}: holds a repository already")
            change = Change(edits.first_targets(), root=edits.first_root(dict(keys)))
            if self._folder.used().roles:  # else nothing here is of a creation that was killed
                self._folder.remove_all_but(set(), set())
            self._commit(None, change, signing)
            return self._folder.read("root", 1)

    def add_tier(self, tier: str, keys: RoleKeys, signing: Sequence[Signing], *, floor: int = 0) -> None:
        """Delegate to a new tier.

        Args:
            tier: its name.
            keys: that sign its releases, and nothing else.
            signing: keys of targets, snapshot, timestamp and of the tier.
            floor: the lowest version that its devices may run.
        """
        with self._open() as state:
            change = Change(edits.with_tier(state.targets.signed, tier, keys))
            self._set(change, TierContent.empty(tier, floor))
            self._commit(state, change, signing)

    def publish(
        self,
        draft: Draft,
        objects: Iterable[bytes],
        signing: Sequence[Signing],
        *,
        floors: Mapping[str, int] | None = None,
        is_floor: bool = False,
        needed: Mapping[str, Collection[int]] | None = None,
    ) -> Release:
        """Offer a release to all tiers that it has variants for, under the next version.

        To take a fleet back, publish the old content again: it gets a higher version.

        Args:
            draft: makes the release of the version it is given.
            objects: that it names (wire bytes, reports, goldens, references), unless the tier offers them.
            signing: keys of the tiers, snapshot and timestamp.
            floors: new floors of its tiers, by tier; at most the new version.
            is_floor: whether the new version is the floor of its tiers, as a way back is.
            needed: versions that stay on offer though newer ones exceed `keep`, by tier.

        Raises:
            RefusedError: a rule or a signer is against it; the message has the reasons.
            UserError: it has a variant for a tier that is not here, or keys are missing.
            FormatError: the release is inconsistent, or names an object that is not at hand.
        """
        offered = {sha256(data): data for data in objects}
        with self._open() as state:
            version = 1 + max(state.newest_release, self._folder.used().release)
            release = draft(version)
            if release.version != version:
                raise FormatError(f"publish: the draft has version {release.version}, not {version}")
            if unknown := sorted(set(floors or {}) - {entry.tier for entry in release.variants}):
                raise UserError(f"publish: a floor for tier {unknown[0]!r}, which the release does not serve")
            change = Change(release=version)
            for entry in release.variants:
                content, stay = state.content(entry.tier), (needed or {}).get(entry.tier, ())
                floor = version if is_floor else (floors or {}).get(entry.tier)
                added = self._added(content, change, release, entry, offered)
                self._set(change, content.with_release(added, floor=floor, keep=self._keep, needed=stay))
            self._commit(state, change, signing)
        return release

    def raise_floor(self, tier: str, floor: int, signing: Sequence[Signing]) -> None:
        """Let devices of a tier run nothing below a version; releases below it are no longer offered.

        Raises:
            RefusedError: it is lower than the floor so far, or above the newest version.
        """
        with self._open() as state:
            change = Change()
            self._set(change, state.content(tier).with_floor(floor))
            self._commit(state, change, signing)

    def rotate(self, role: str, keys: RoleKeys, signing: Sequence[Signing], *, is_lost: bool = False) -> None:
        """Replace the keys of a role, its threshold, or both; keys that are not named are revoked.

        Args:
            role: root, targets, snapshot, timestamp or tier-NAME.
            keys: from now on.
            signing: keys of root, of the role (old and new), snapshot and timestamp; for a tier: of targets,
                of the tier (new), snapshot and timestamp.
            is_lost: the old keys of targets, snapshot or timestamp cannot sign any more. If the publisher is
                killed half way, devices refuse all metadata until this is called again.

        Raises:
            UserError: there is no such role, keys are missing, or one serves two purposes.
        """
        tier = tier_of(role)
        with self._open() as state:
            if tier is not None:
                change = Change(edits.with_tier_keys(state.targets.signed, tier, keys))
                self._set(change, state.content(tier))
            elif (top := edits.top_role(role)) is not None:
                change = self._with_top_keys(state, top, keys, is_lost)
            else:
                raise UserError(f"role {role[:60]!r}: must be {', '.join(edits.TOP_ROLES)} or tier-NAME")
            self._commit(state, change, signing)

    def suspend(self, tier: str, signing: Sequence[Signing]) -> None:
        """Revoke all keys of a tier: its devices accept nothing until `rotate` gives it new ones.

        Other tiers' files do not change.
        """
        with self._open() as state:
            state.content(tier)
            change = Change(edits.with_tier_keys(state.targets.signed, tier, None))
            self._commit(state, change, signing)

    def renew(self, role: str, signing: Sequence[Signing]) -> None:
        """Sign root, targets or a tier's role again, unchanged, for another lifetime."""
        tier = tier_of(role)
        with self._open() as state:
            change = Change()
            if tier is not None:
                self._set(change, state.content(tier))
            elif role == "targets":
                change.targets = deepcopy(state.targets.signed)
            elif role == "root":
                change.root = edits.next_root(state.root)
            else:
                raise UserError(
                    f"role {role[:60]!r}: renew signs root, targets or tier-NAME; else use refresh"
                )
            self._commit(state, change, signing)

    def refresh(self, signing: Sequence[Signing], *, force: bool = False) -> bool:
        """Sign the timestamp, and the snapshot, again where less than three quarters of their lives are left.

        To be called every few hours by whoever holds the online keys; without it devices take nothing new
        after the timestamp's lifetime.

        Returns:
            Whether anything was signed.
        """
        with self._open() as state:
            due = {role.role for role in statuses(state, self._lifetimes, self._clock()) if role.is_due}
            if not force and due.isdisjoint({"snapshot", "timestamp"}):
                return False
            self._commit(state, Change(snapshot=force or "snapshot" in due), signing)
            return True

    def status(self) -> list[RoleStatus]:
        """Every role as it is published, the four of the root first."""
        with self._open() as state:
            return statuses(state, self._lifetimes, self._clock())

    def content(self, tier: str) -> TierContent:
        """Floor, newest version and releases of a tier.

        Raises:
            UserError: there is no such tier.
        """
        with self._open() as state:
            return state.content(tier)

    def manifests(self, tier: str) -> dict[int, bytes]:
        """The manifests of a tier's releases on offer, by version.

        Raises:
            UserError: there is no such tier.
        """
        with self._open() as state:
            return {
                version: self._folder.read_target(
                    target_path(tier, version, "manifest"), offered.files["manifest"]
                )
                for version, offered in state.content(tier).releases.items()
            }

    def root(self, version: int = 1) -> bytes:
        """A root, to be given to devices.

        Raises:
            FormatError: there is none of this version.
        """
        return self._folder.read("root", version)

    def _set(self, change: Change, content: TierContent) -> None:
        """A tier's new content, and the file of its mark."""
        change.tiers[content.mark.tier] = content
        change.files[mark_path(content.mark.tier)] = content.mark.to_bytes()

    def _added(
        self,
        content: TierContent,
        change: Change,
        release: Release,
        entry: VariantEntry,
        offered: Mapping[str, bytes],
    ) -> Offered:
        """A release as a further one of a tier; its files are in the change."""
        tier = entry.tier
        wire = self._wire(content, entry, offered)
        if sha256(unpack(wire, entry.installed_bytes)) != entry.installed_sha256:
            raise FormatError(f"publish: tier {tier!r} does not unpack to its installed_sha256")
        report = self._object(content, entry.evidence_sha256, offered)
        if len(report) > MAX_REPORT_BYTES:
            raise FormatError(f"publish: tier {tier!r}: a report of {len(report)} > {MAX_REPORT_BYTES} bytes")
        data: dict[Kind, bytes] = {
            "manifest": release.to_bytes(),
            "model": wire,
            "report": report,
            "golden": self._object(content, entry.golden_sha256, offered),
        }
        if entry.reference_sha256:
            data["reference"] = self._object(content, entry.reference_sha256, offered)
        sealing = None
        if self._content_keys is not None:
            sealing, data["model"] = self._content_keys.sealed(wire, tier, release.version)
        digest, lineage = sha256(data["manifest"]), lineage_digest(release.lineage)
        note = ReleaseNote(release.version, digest, lineage, sealing)
        change.files.update({target_path(tier, release.version, kind): found for kind, found in data.items()})
        return Offered(note, {kind: FileEntry.of(found) for kind, found in data.items()})

    def _wire(self, content: TierContent, entry: VariantEntry, offered: Mapping[str, bytes]) -> bytes:
        """The variant as it travels unsealed: handed in, or of a release that the tier offers."""
        tier = content.mark.tier
        for version, release in content.releases.items() if entry.wire_sha256 not in offered else ():
            if release.note.sealing is None or self._content_keys is None:
                continue
            files = {
                kind: self._folder.read_target(target_path(tier, version, kind), release.files[kind])
                for kind in ("manifest", "model")
            }
            if Release.from_bytes(files["manifest"]).variant(tier).wire_sha256 == entry.wire_sha256:
                return self._content_keys.opened(files["model"], tier, version)
        return self._object(content, entry.wire_sha256, offered)

    def _object(self, content: TierContent, digest: str, offered: Mapping[str, bytes]) -> bytes:
        """Bytes by their digest: handed in, or of a release that the tier offers."""
        if digest in offered:
            return offered[digest]
        for version, release in content.releases.items():
            for kind, entry in release.files.items():
                if entry.sha256 == digest:
                    return self._folder.read_target(target_path(content.mark.tier, version, kind), entry)
        raise FormatError(
            f"publish: object {digest[:8]} of tier {content.mark.tier!r} was not handed in, "
            "and is none that it offers"
        )

    def _with_top_keys(self, state: State, role: TopRole, keys: RoleKeys, is_lost: bool) -> Change:
        if role == "root" and is_lost:
            raise UserError(
                "root: devices follow a new root only if enough of the old keys sign it; "
                "without them, begin a new repository and enrol the devices again"
            )
        change = Change()
        if not edits.has_keys(state.root, role, keys):  # else the root is there, and what it names follows
            change.root, change.is_lost = edits.next_root(state.root, role, keys), is_lost
        if role == "targets":
            change.targets = deepcopy(state.targets.signed)
        return change

    def _commit(self, state: State | None, change: Change, signing: Sequence[Signing]) -> None:
        root = change.root if change.root is not None or state is None else state.root
        targets = change.targets if change.targets is not None or state is None else state.targets.signed
        if root is not None:
            edits.check_separation(root, targets)
        now = self._clock().astimezone(UTC).replace(microsecond=0)
        keys = self._content_keys
        commit(self._folder, state, change, signing, Terms(self._lifetimes, self._policy, now, keys))
        if keys is not None:
            for tier, content in change.tiers.items():
                keys.keep_only(tier, content.releases)

    @contextmanager
    def _open(self) -> Iterator[State]:
        """The state of a repository that is there, tidied up."""
        absent = UserError(
            f"{self._folder.path}: holds no repository; create one first: fedge-server keys make"
        )
        if not self._folder.metadata.exists():  # before the lock, which would make the folder
            raise absent
        with self._alone() as state:
            if state is None:
                raise absent
            self._folder.remove_all_but(*kept(self._folder, state))
            yield state

    @contextmanager
    def _alone(self) -> Iterator[State | None]:
        try:
            with self._folder.locked(self._patience_s):
                yield load(self._folder)
        except OSError as error:
            raise FedgeError(
                f"{self._folder.path}: cannot be read or written ({error.strerror}); "
                "devices see a whole state"
            ) from error
