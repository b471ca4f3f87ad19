"""A device's home as far as releases are concerned: what it is, what it trusts, and what it runs.

    delivery/tier.json   the tier that the device was made for: written last, so that with it there is one
    delivery/root.json   root metadata as it was first given, which everything is trusted by
    delivery/metadata/   what has been verified since (`updater.trust`)
    delivery/*.json      reports of releases, and answers counted, of the tier (`reports`, `answers`)
    installed/           what runs, what ran before (`updater.store`), and their telemetry references;
                         also the tier that is followed, beside its floor: a device moves by one write

To find out what runs nothing is written, and the library of The Update Framework is not loaded.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedge.delivery import MAX_ROOT_BYTES, MAX_TARGETS_BYTES, check_tier, role_of
from fedge.errors import DigestError, FedgeError, FormatError, TrustError, UserError
from fedge.files import read_bounded, sha256, write_atomically
from fedge.manifest import Release, VariantEntry
from fedge_client.updater.store import Opened, Record, State, Store

if TYPE_CHECKING:
    from fedge.telemetry.reference import Reference
    from fedge_client.updater.streams import Fetcher, Pace
    from fedge_client.updater.trust import Clock, Trust

DELIVERY: Final = "delivery"  # folder of what is trusted
INSTALLED: Final = "installed"  # folder of what runs
TIER, ROOT, METADATA = "tier.json", "root.json", "metadata"
REPORTS, ANSWERS = "reports.json", "answers.json"
REFERENCES: Final = "references"  # in the folder of what runs, by digest
SCHEMA: Final = 1
_MAX_REFERENCES: Final = 4  # two slots, and what is being installed
_log = logging.getLogger("fedge.telemetry")
_MAX_TIER_BYTES: Final = 1024
_MAX_KEPT_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Installed:
    """A release that is installed here, whole and checked."""

    release: Release
    entry: VariantEntry  # the variant that lies here
    record: Record
    damaged: str = ""  # why the version committed last does not answer, and this one before it does


@dataclass(frozen=True, slots=True)
class Role:
    """What a device has verified of a role of the repository's metadata."""

    version: int
    expires: str  # RFC 3339, UTC


@dataclass(frozen=True, slots=True)
class Device:
    """A device's home folder: make it with `create`, find it again with `open`."""

    home: Path
    tier: str

    @classmethod
    def create(cls, home: Path, tier: str, root: bytes, *, floor: int = 0) -> Device:
        """Make a folder the home of a device, or move the device that lives there to another tier.

        The root is given once: where there is one already it stays, and what is installed goes on answering
        until a version of the new tier is there. The floor counts with the tier: a server that gives it again
        later cannot raise it, and that of an earlier tier does not count in the new one. Killed at any point,
        the device is of the tier before, or of the new one with its floor.

        Args:
            home: the device's folder.
            tier: the class of devices that it belongs to.
            root: root metadata of the repository, of any version, got by a way that is trusted.
            floor: the lowest version that the tier's devices may run now; 0: none is known.

        Raises:
            FormatError: the tier's name is impossible, or the root is no root metadata.
            FedgeError: the disk refuses it.
        """
        made, known = cls(home, check_tier(tier)), home / DELIVERY / ROOT
        root_version(root)
        before = cls.open(home).tier if exists(home) else ""
        try:
            if before != tier:
                if not (before and known.exists()):
                    write_atomically(known, root)
                with made.store.locked():
                    state = made.store.state().in_channel(before or tier).in_channel(tier)
                    made.store.commit(state.with_floor(floor))  # the one write that moves a device
            made._name_tier()
        except OSError as error:
            raise FedgeError(f"{home}: cannot be made a device's home ({error.strerror})") from error
        return made

    @classmethod
    def open(cls, home: Path) -> Device:
        """Find a device again.

        Raises:
            UserError: there is none at this folder.
            FormatError: its file is damaged.
        """
        if not exists(home):
            raise UserError(
                f"no device at {home}; make one with: fedge-client enroll JOIN, "
                "or fedge-client install FOLDER --tier TIER --root 1.root.json"
            )
        named = _named_tier(home)
        try:
            followed = Store(home / INSTALLED).state().channel
        except FormatError:  # whoever needs the state says so
            followed = ""
        return cls(home, check_tier(followed or named))

    def _name_tier(self) -> None:
        """Say in the file of the tier what is so: it makes a new device, and tells a person of a move.

        What was kept of the tier before goes first: a file that names no tier is of the one named here.
        """
        if not exists(self.home) or _named_tier(self.home) != self.tier:
            for path in (self.home / DELIVERY / REPORTS, self.home / DELIVERY / ANSWERS):
                if path.exists() and _tier_in(path) != self.tier:  # not what was kept since the move
                    path.unlink(missing_ok=True)
            content = json.dumps({"schema": SCHEMA, "tier": self.tier}).encode() + b"\n"
            write_atomically(self.home / DELIVERY / TIER, content)

    @property
    def store(self) -> Store:
        """What is installed."""
        return Store(self.home / INSTALLED)

    @property
    def root(self) -> bytes:
        """The root metadata that this device was given first.

        Raises:
            FormatError: it is damaged.
        """
        data = read_bounded(self.home / DELIVERY / ROOT, MAX_ROOT_BYTES)
        root_version(data)
        return data

    def keep_reference(self, data: bytes) -> None:
        """Keep what a release's telemetry counts by, before the release is committed; nothing if it is empty.

        Raises:
            FedgeError: the disk refuses it.
        """
        if not data:
            return
        folder = self.home / INSTALLED / REFERENCES
        try:
            write_atomically(folder / sha256(data), data)
            others = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
            for path in others[:-_MAX_REFERENCES]:  # of releases that lie in no slot any more
                path.unlink()
        except OSError as error:
            raise FedgeError(f"{folder}: the disk refuses it ({error.strerror or error})") from error

    def reference(self, installed: Installed) -> Reference | None:
        """What an installed release's telemetry counts by; None: it has none, or what lies here is not it."""
        digest = installed.entry.reference_sha256
        if not digest:
            return None
        from fedge.telemetry.reference import MAX_BYTES, Reference

        try:
            data = read_bounded(self.home / INSTALLED / REFERENCES / digest, MAX_BYTES)
            if sha256(data) != digest:
                raise DigestError(f"reference {digest[:8]}: not the bytes that were installed")
            return Reference.from_bytes(data, installed.release.spec)
        except TrustError as error:
            _log.warning("inputs are not counted: %s; install the release again", error)
            return None

    def trust(self, fetch: Fetcher, *, clock: Clock | None = None, pace: Pace | None = None) -> Trust:
        """What this device trusts of a repository.

        Args:
            fetch: gets files of the repository, by names such as `metadata/timestamp.json`.
            clock: the time that dates of expiry are compared with; None: the system's.
            pace: how slow a stream may be; None: the usual one.
        """
        from fedge_client.updater.streams import DEFAULT_PACE, within
        from fedge_client.updater.trust import Trust, utc_now

        folder = self.home / DELIVERY / METADATA
        return Trust(
            folder, self.root, within("metadata", fetch), clock=clock or utc_now, pace=pace or DEFAULT_PACE
        )

    def running(self) -> tuple[Installed, bytes]:
        """What answers on this device, and the model's bytes. Writes nothing.

        Raises:
            UserError: nothing is installed.
            TrustError: what is installed is damaged, and there is nothing to return to.
        """
        opened = self.store.open()
        return _installed(opened), opened.data

    def previous(self, state: State) -> Release | None:
        """The release committed before, if the device can return to it."""
        record = state.previous
        if record is None or not state.may_run(record):
            return None
        try:
            return Release.from_bytes(self.store.read(record)[1])
        except TrustError:
            return None

    def metadata(self) -> dict[str, Role]:
        """What has been verified of the repository so far, by role; empty before the first poll."""
        folder = self.home / DELIVERY / METADATA
        found = {}
        for role in ("root", "timestamp", "snapshot", "targets", role_of(self.tier)):
            try:
                signed = _load(folder / f"{role}.json", MAX_TARGETS_BYTES)["signed"]
                found[role] = Role(int(signed["version"]), str(signed["expires"]))
            except (FormatError, KeyError, TypeError, ValueError):
                continue  # the next poll fetches it anew
        return found


def exists(home: Path) -> bool:
    """Whether a folder is the home of a device that releases can be installed on."""
    return (home / DELIVERY / TIER).exists()


def tier_at(home: Path) -> str:
    """The tier of the device at a folder; empty where there is none, or its file is damaged."""
    try:
        return Device.open(home).tier
    except (UserError, TrustError):
        return ""


def of_this_tier(home: Path, tier: object) -> bool:
    """Whether what a file keeps is of the tier that the device at a folder follows now.

    Args:
        home: the device's folder.
        tier: the tier that the file names. Files of earlier versions name none: they are of the tier in
            `delivery/tier.json`, which after a move is written when they are gone.
    """
    try:
        named = _named_tier(home) if exists(home) else ""
    except TrustError:
        named = ""
    return (tier or named) == tier_at(home)


def _tier_in(path: Path) -> object:
    """The tier that a file names; None: it names none, or is damaged."""
    try:
        return _load(path, _MAX_KEPT_BYTES).get("tier")
    except FormatError:
        return None


def _named_tier(home: Path) -> str:
    path = home / DELIVERY / TIER
    value = _load(path, _MAX_TIER_BYTES)
    if value.pop("schema", None) != SCHEMA or value.keys() != {"tier"}:
        raise FormatError(f"{path}: damaged, or written by another version of fedge")
    try:
        return check_tier(value["tier"])
    except FormatError as error:
        raise FormatError(f"{path}: damaged ({error})") from error


def root_version(data: bytes) -> int:
    """The version of root metadata, which is not verified by that.

    Raises:
        FormatError: it is none.
    """
    if len(data) > MAX_ROOT_BYTES:
        raise FormatError(f"root: {len(data)} bytes, over the {MAX_ROOT_BYTES} it may have")
    try:
        signed = json.loads(data.decode("utf-8"))["signed"]
        if signed["_type"] != "root" or type(signed["version"]) is not int:
            raise ValueError(signed["_type"])
        return int(signed["version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError("root: no root metadata; give the repository's metadata/1.root.json") from error


def _installed(opened: Opened) -> Installed:
    release = Release.from_bytes(opened.notes)
    for entry in release.variants:
        if entry.installed_sha256 == opened.record.installed_sha256:
            damaged = "the version committed last is damaged; install it again" if opened.returned else ""
            return Installed(release, entry, opened.record, damaged)
    raise DigestError(
        f"release {release.version}: its manifest does not name what is installed; install it again"
    )


def _load(path: Path, maximum: int) -> dict[str, Any]:
    try:
        value = json.loads(read_bounded(path, maximum).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: damaged, not JSON") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: damaged, no object of JSON")
    return value
