"""The folder that devices read: objects by digest, every release, and the newest one, replaced last.

    objects/<sha256>         variants as they travel, and gate reports
    releases/<version>.json  the signed envelope of each release
    release.json             the newest of them: replacing this file publishes

A publication that is killed leaves files that nothing points to. The next one removes them, and uses a
new version number, so that no two envelopes ever carry the same one.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedge import signing
from fedge.artefact import unpack
from fedge.errors import FedgeError, FormatError
from fedge.files import read_bounded, sha256, sync_folder, write_atomically
from fedge.manifest import Release, VariantEntry

Draft = Callable[[int], Release]
"""Make the release of a given version; it is called once the version is known."""

NEWEST: Final = "release.json"
USED: Final = "versions-used"  # the highest version taken; versions are never used twice
PRIVATE_KEY, PUBLIC_KEY = "signing.key", "signing.pub"  # PEM files in the folder of the signing key
MAX_REPORT_BYTES: Final = 16 * 1024**2  # of one gate report


def publish(folder: Path, draft: Draft, objects: Iterable[bytes], private_pem: bytes) -> Release:
    """Sign a release under the next version and put it where devices find it.

    Killed at any point, the folder shows the release before or this one. Nothing is signed that a device
    would refuse: each variant must unpack to the bytes that the manifest declares.

    Args:
        folder: the published folder; made if absent.
        draft: makes the release of the version it is given.
        objects: the wire bytes and gate reports that the release names, unless published before.
        private_pem: the key to sign with.

    Raises:
        FormatError: the release is inconsistent, names an object that is not there, or the folder holds
            something that is no release.
        FedgeError: the disk refuses a write.
    """
    offered = {sha256(data): data for data in objects}
    try:
        with _locked(folder):
            committed, highest = _versions(folder)
            release = draft(highest + 1)
            if release.version != highest + 1:
                raise FormatError(f"publish: the draft has version {release.version}, not {highest + 1}")
            for entry in release.variants:
                _check_variant(folder, entry, offered)
            envelope = signing.sign(release.to_bytes(), private_pem)
            write_atomically(folder / USED, str(release.version).encode())  # before its envelope: never again
            _remove_leftovers(folder, committed)
            _write(folder, release.version, offered, envelope)
    except OSError as error:
        raise FedgeError(
            f"publish: {folder} cannot be written ({error.strerror}); the newest release is what it was"
        ) from error
    return release


def published(folder: Path, trusted: Sequence[bytes] = ()) -> list[Release]:
    """Every published release, oldest first.

    Args:
        folder: the published folder.
        trusted: public PEM keys; without any, signatures are not checked (the publisher's own folder).

    Raises:
        FormatError: a file there is no release.
        SignatureError: one is signed by none of the trusted keys.
    """
    committed, _ = _versions(folder)
    found = []
    for version in sorted(number for number in _numbered(folder) if number <= committed):
        release = _read(folder / "releases" / f"{version}.json", trusted)
        if release.version != version:
            raise FormatError(f"{folder}/releases/{version}.json: holds version {release.version}")
        found.append(release)
    return found


def load_or_create_key(folder: Path) -> bytes:
    """The private PEM key in a folder; made on first use, with the public key beside it for devices.

    Raises:
        FormatError: the file is no Ed25519 key.
        FedgeError: other users may read it, or the disk refuses a write.
    """
    private, public = folder / PRIVATE_KEY, folder / PUBLIC_KEY
    try:
        with _locked(folder):
            if not private.exists():
                write_atomically(private, signing.generate_key()[0], mode=0o600)
            if (mode := private.stat().st_mode & 0o777) & 0o077:
                raise FedgeError(f"{private}: others may read it (mode {mode:o}); run: chmod 600 {private}")
            pem = read_bounded(private, signing.MAX_KEY_BYTES)
            derived = signing.public_of(pem)
            if not public.exists() or public.read_bytes() != derived:
                write_atomically(public, derived)
    except OSError as error:
        raise FedgeError(f"{folder}: the signing key cannot be kept there ({error.strerror})") from error
    return pem


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One publisher at a time; the lock goes with the process that held it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _versions(folder: Path) -> tuple[int, int]:
    """The newest published version (0: none), and the highest that was ever used up."""
    newest = folder / NEWEST
    committed = _read(newest, ()).version if newest.exists() else 0
    return committed, max([committed, _used(folder), *_numbered(folder)])


def _used(folder: Path) -> int:
    """The highest version that any publication took, finished or not."""
    path = folder / USED
    text = read_bounded(path, 32).decode("ascii", "replace") if path.exists() else "0"
    if not text.isdecimal():
        raise FormatError(
            f"{path}: holds {text!r}, not a version; write the highest version ever published there"
        )
    return int(text)


def _numbered(folder: Path) -> list[int]:
    return [int(path.stem) for path in (folder / "releases").glob("*.json") if path.stem.isdecimal()]


def _read(path: Path, trusted: Sequence[bytes]) -> Release:
    envelope = read_bounded(path, signing.MAX_ENVELOPE_BYTES)
    try:
        payload = signing.verify(envelope, trusted) if trusted else signing.unverified_payload(envelope)
        return Release.from_bytes(payload)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def _check_variant(folder: Path, entry: VariantEntry, offered: Mapping[str, bytes]) -> None:
    wire = _object(folder, entry.wire_sha256, entry.wire_bytes, offered)
    if len(wire) != entry.wire_bytes:
        raise FormatError(f"publish: tier {entry.tier!r} has {len(wire)} wire bytes, not {entry.wire_bytes}")
    if sha256(unpack(wire, entry.installed_bytes)) != entry.installed_sha256:
        raise FormatError(f"publish: tier {entry.tier!r} does not unpack to its installed_sha256")
    _object(folder, entry.evidence_sha256, MAX_REPORT_BYTES, offered)


def _object(folder: Path, digest: str, maximum: int, offered: Mapping[str, bytes]) -> bytes:
    if digest in offered:
        return offered[digest]
    data = read_bounded(folder / "objects" / digest, maximum)
    if sha256(data) != digest:
        raise FormatError(f"publish: object {digest[:8]} in {folder} is damaged; hand it in again")
    return data


def _remove_leftovers(folder: Path, committed: int) -> None:
    """What a killed publication left: half-written files, and envelopes that were never the newest."""
    for inner in (folder, folder / "objects", folder / "releases"):
        for path in inner.glob(".*.*"):
            path.unlink()
    for version in _numbered(folder):
        if version > committed:
            (folder / "releases" / f"{version}.json").unlink()


def _write(folder: Path, version: int, objects: Mapping[str, bytes], envelope: bytes) -> None:
    for inner in ("objects", "releases"):
        (folder / inner).mkdir(exist_ok=True)
    sync_folder(folder)
    for digest, data in objects.items():
        path = folder / "objects" / digest
        if not path.exists() or path.read_bytes() != data:
            write_atomically(path, data)
    path = folder / "releases" / f"{version}.json"
    if path.exists():
        raise FormatError(f"publish: {path} exists already; a release is never overwritten")
    write_atomically(path, envelope)
    write_atomically(folder / NEWEST, envelope)  # the commit point
