"""What a device keeps on disk, and the checks that its bytes pass each time they are read.

    device.json          tier, and which keys are trusted
    trusted/<key>.pem    public keys
    current.json         which slot runs, which release it holds, and the floor: replaced as a whole
    slots/a, slots/b     model.onnx and release.json, the signed envelope it came with

`current.json` is the one commit point. Everything else is written, and made durable, before it.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

from fedge import signing
from fedge.errors import DigestError, FedgeError, FormatError, TrustError, UserError
from fedge.files import read_bounded, sha256, write_atomically
from fedge.manifest import MAX_VERSION, Release, VariantEntry

Slot = Literal["a", "b"]

SCHEMA: Final = 1
MODEL, RELEASE = "model.onnx", "release.json"
_MAX_FILE_BYTES: Final = 64 * 1024  # device.json, current.json
_MAX_KEYS: Final = 16
_TIER = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Current:
    """What `current.json` says: the committed state of a device."""

    slot: Slot
    version: int  # of the release in that slot
    identity: str  # SHA-256 of its manifest: tells two releases of one version apart
    floor: int  # no release below this is ever installed
    left: int = 0  # a local return left this version: it is not offered again; 0: none

    @property
    def other(self) -> Slot:
        """The slot that does not run."""
        return "b" if self.slot == "a" else "a"

    def to_bytes(self) -> bytes:
        """The file's content."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Current:
        """Read the file's content.

        Raises:
            FormatError: damaged.
        """
        value = _load(data, "current.json", {item.name for item in fields(cls)})
        numbers = (value["version"], value["floor"], value["left"])
        sound = (
            value["slot"] in ("a", "b")
            and all(type(number) is int and 0 <= number <= MAX_VERSION for number in numbers)
            and 1 <= value["floor"] <= value["version"]
            and isinstance(value["identity"], str)
            and _DIGEST.fullmatch(value["identity"])
        )
        if not sound:
            raise FormatError("current.json: holds values that fedge never writes; it is damaged")
        return cls(**value)


@dataclass(frozen=True, slots=True)
class Installed:
    """A release in a slot, verified: signature, tier, and every byte of the model."""

    release: Release
    entry: VariantEntry  # of this device's tier
    slot: Slot
    identity: str  # SHA-256 of the manifest


@dataclass(frozen=True, slots=True)
class Device:
    """A device's home folder: make it with `create`, find it again with `open`."""

    home: Path
    tier: str
    trusted: tuple[bytes, ...]  # public PEM keys

    @classmethod
    def create(cls, home: Path, tier: str, trusted: Sequence[bytes]) -> Device:
        """Make a folder the home of a device.

        Raises:
            UserError: it is one already, the tier's name is impossible, or there is no usable key.
            FedgeError: the disk refuses it.
        """
        if (home / "device.json").exists():
            raise UserError(f"{home} is the home of a device already; use it, or another --home")
        if not _TIER.fullmatch(tier):
            raise UserError(f"tier {tier!r}: a name has 1 to 32 lower-case letters, digits, '-' and '_'")
        if not 1 <= len(trusted) <= _MAX_KEYS:
            raise UserError(f"{len(trusted)} trusted keys; give 1 to {_MAX_KEYS} public keys")
        try:
            keys = {signing.key_id(pem): pem for pem in trusted}
        except FormatError as error:
            raise UserError(
                f"trusted {error}; give the {'signing.pub'!r} that the publisher hands out"
            ) from error
        content = {"schema": SCHEMA, "tier": tier, "trusted": sorted(keys)}
        try:
            for name, pem in keys.items():
                write_atomically(home / "trusted" / f"{name}.pem", pem)
            write_atomically(home / "device.json", json.dumps(content, indent=1).encode() + b"\n")
        except OSError as error:
            raise FedgeError(f"{home}: cannot be made a device's home ({error.strerror})") from error
        return cls.open(home)

    @classmethod
    def open(cls, home: Path) -> Device:
        """Find a device again.

        Raises:
            UserError: there is none at this folder.
            FormatError: its files are damaged.
        """
        path = home / "device.json"
        if not path.exists():
            raise UserError(
                f"no device at {home}; make one with: fedge-client install FOLDER --tier TIER --trust KEY.pub"
            )
        value = _load(read_bounded(path, _MAX_FILE_BYTES), str(path), {"tier", "trusted"})
        tier, names = value["tier"], value["trusted"]
        if not isinstance(tier, str) or not _TIER.fullmatch(tier) or not isinstance(names, list):
            raise FormatError(f"{path}: damaged; make the device anew")
        if not 1 <= len(names) <= _MAX_KEYS or not all(_DIGEST.fullmatch(str(name)) for name in names):
            raise FormatError(f"{path}: names no usable key; make the device anew")
        return cls(home, tier, tuple(_trusted_key(home, name) for name in names))

    def current(self) -> Current | None:
        """The committed state; None before the first installation.

        Raises:
            FormatError: the file is damaged.
        """
        path = self.home / "current.json"
        return Current.from_bytes(read_bounded(path, _MAX_FILE_BYTES)) if path.exists() else None

    def commit(self, current: Current) -> None:
        """Replace the committed state."""
        write_atomically(self.home / "current.json", current.to_bytes())

    def folder(self, slot: Slot) -> Path:
        """Where a slot's files lie."""
        return self.home / "slots" / slot

    def verified(self, slot: Slot) -> tuple[Installed, bytes]:
        """What a slot holds and the model's bytes, checked from the signature down.

        Raises:
            FormatError: a file is absent, too long or malformed.
            SignatureError: the manifest is not signed by a trusted key.
            DigestError: the model is not the one that was signed.
            TrustError: it is for other tiers.
        """
        folder = self.folder(slot)
        payload = signing.verify(read_bounded(folder / RELEASE, signing.MAX_ENVELOPE_BYTES), self.trusted)
        release = Release.from_bytes(payload)
        entry = release.variant(self.tier)
        model = read_bounded(folder / MODEL, entry.installed_bytes)
        if sha256(model) != entry.installed_sha256:
            raise DigestError(
                f"{folder / MODEL}: not the bytes that release {release.version} signed; install it again"
            )
        return Installed(release, entry, slot, sha256(payload)), model

    def running(self) -> tuple[Installed, bytes]:
        """What the current slot holds, verified, and the model's bytes.

        An installation may flip the slots meanwhile; then the new current one is read.

        Raises:
            UserError: nothing is installed.
            TrustError: the current slot fails its checks.
        """
        while True:
            current = self.current()
            if current is None:
                raise UserError(f"nothing is installed at {self.home}; run: fedge-client install FOLDER")
            try:
                installed, model = self.verified(current.slot)
            except TrustError:
                if self.current() == current:
                    raise
                continue
            if installed.identity != current.identity and self.current() == current:
                raise DigestError(
                    f"{self.folder(current.slot)}: holds another release than was committed; install it again"
                )
            if installed.identity == current.identity:
                return installed, model

    def remove_leftovers(self) -> None:
        """Drop half-written files of a process that was killed; call it with the lock held."""
        for path in self.home.glob(".current.json.*"):
            path.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time changes what is installed.

        Raises:
            FedgeError: another one does so now.
        """
        with (self.home / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FedgeError(
                    f"{self.home}: another installation is under way; try again later"
                ) from error
            yield


def previous(device: Device, current: Current) -> Installed | None:
    """The committed release before the current one, if the other slot still holds it whole."""
    try:
        found, _ = device.verified(current.other)
    except (FedgeError, OSError):
        return None
    return found if current.floor <= found.release.version < current.version else None


def _trusted_key(home: Path, name: str) -> bytes:
    pem = read_bounded(home / "trusted" / f"{name}.pem", signing.MAX_KEY_BYTES)
    if signing.key_id(pem) != name:
        raise FormatError(f"{home}/trusted/{name}.pem: holds another key than its name says")
    return pem


def _load(data: bytes, where: str, names: set[str]) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: damaged, not JSON") from error
    if not isinstance(value, dict) or value.pop("schema", None) != SCHEMA or value.keys() != names:
        raise FormatError(f"{where}: damaged, or written by another version of fedge")
    return value
