"""Fetch, check and install the variant of a release, so that a device always has a whole one to run.

The rules are in `decide` and `floor_after`, which only compare values; the rest does files. The current
slot is never written to while it is sound: the new variant goes into the other one, and replacing
`current.json` makes it the current one. Use it with any transport: a `Fetch` is a function.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from fedge import signing
from fedge.artefact import unpack
from fedge.errors import DigestError, DowngradeError, FedgeError, FormatError, TrustError, UserError
from fedge.files import read_bounded, sha256, sync_folder, write_atomically
from fedge.inference import CompactModel
from fedge.manifest import Release, VariantEntry
from fedge.spec import Spec
from fedge_client.device import MODEL, RELEASE, Current, Device, Installed, Slot, previous

__all__ = ["Device", "Fetch", "Installed", "Updater", "decide", "floor_after", "folder_fetch"]

Fetch = Callable[[str, int], bytes]
"""Read a file of the published folder: its name there, and the most bytes it may have."""

NEWEST: Final = "release.json"
_SPARE_BYTES: Final = 256 * 1024  # file system overhead of an installation


def folder_fetch(folder: Path) -> Fetch:
    """Fetch from a published folder that is mounted or was copied here."""

    def fetch(name: str, maximum: int) -> bytes:
        return read_bounded(folder / name, maximum)

    return fetch


@dataclass(frozen=True, slots=True)
class Offer:
    """A release whose signature has been checked."""

    release: Release
    envelope: bytes
    identity: str  # SHA-256 of the manifest


def decide(current: Current | None, offered: Offer, *, sound: bool, again: bool = False) -> bool:
    """Whether to install what is offered.

    Args:
        current: the committed state of the device; None: nothing is installed.
        offered: a release with a good signature.
        sound: whether the current slot passes its checks; a damaged one is installed anew.
        again: take back a version that a local return left.

    Raises:
        DowngradeError: it is older than what runs, or below the floor (a replayed old release).
        TrustError: it has the version of what runs but other content (a version signed twice).
    """
    version = offered.release.version
    if current is None:
        return True
    if version < current.floor:
        raise DowngradeError(
            f"release {version} is below this device's floor {current.floor}; publish a newer one"
        )
    if version < current.version:
        raise DowngradeError(
            f"release {version} is older than the installed {current.version}; "
            "to go back a fleet, publish the old content under a higher version"
        )
    if version == current.version:
        if offered.identity != current.identity:
            raise TrustError(
                f"release {version} is installed with other content; it must not be signed twice"
            )
        return not sound
    return again or version > current.left


def floor_after(floor: int, kept: int | None, version: int) -> int:
    """The floor once `version` is installed: the version of the slot that is kept, never lower than before.

    So a device can make one local return, and no replayed release can take it further back than that.
    A later version of fedge raises the floor by signed metadata instead.

    Args:
        floor: so far; 0: none.
        kept: version in the slot that is not written; None: it holds nothing that is sound.
        version: the one installed.
    """
    return max(floor, version if kept is None else kept)


class Updater:
    """Trust and install, for one device and one source of releases."""

    def __init__(self, home: Path, tier: str, trusted: Sequence[bytes], fetch: Fetch) -> None:
        self._device = Device(home, tier, tuple(trusted))
        self._fetch = fetch

    @classmethod
    def of(cls, device: Device, fetch: Fetch) -> Updater:
        """The updater of a device."""
        return cls(device.home, device.tier, device.trusted, fetch)

    def check(self, *, again: bool = False) -> Release | None:
        """The newest release if it is to be installed; None when there is nothing to do.

        Raises:
            TrustError: it is malformed, unsigned, older, or has nothing for this tier.
            FedgeError: it cannot be fetched.
        """
        offered = self._offered()
        offered.release.variant(self._device.tier)
        current = self._device.current()
        wanted = decide(current, offered, sound=self._is_sound(current), again=again)
        return offered.release if wanted else None

    def install(self, *, again: bool = False) -> Installed:
        """Install the newest release unless it runs already; returns what runs afterwards.

        Whatever fails, the installed release goes on working. The previous one is kept until the new
        variant has been fetched, checked and run once; then its slot is written.

        Args:
            again: take back a version that a local return left.

        Raises:
            TrustError: something fetched was refused; the message says which check failed.
            FedgeError: it cannot be fetched, or the disk is full or refuses a write.
        """
        try:
            self._device.home.mkdir(parents=True, exist_ok=True)
            with self._device.locked():
                self._device.remove_leftovers()
                return self._install(again)
        except OSError as error:
            raise FedgeError(
                f"installing at {self._device.home} failed ({error.strerror}); "
                "what was installed goes on working"
            ) from error

    def return_to_previous(self) -> Installed:
        """Go back to the previous committed release, kept in the other slot; the floor stays.

        The release that is left is not installed again until a newer one comes, or `again` is given.
        There is one step back, not two: the floor is the version of the previous release.

        Raises:
            UserError: there is no previous release.
            TrustError: it cannot be loaded.
            FedgeError: the disk refuses a write.
        """
        try:
            with self._device.locked():
                current = self._device.current()
                back = previous(self._device, current) if current else None
                if current is None or back is None:
                    raise UserError(f"{self._device.home} holds no previous release to return to")
                _try_out(self._device.verified(back.slot)[1], back.release.spec)
                self._device.commit(
                    Current(
                        back.slot, back.release.version, back.identity, current.floor, left=current.version
                    )
                )
                return back
        except OSError as error:
            raise FedgeError(
                f"{self._device.home}: cannot return ({error.strerror}); nothing has changed"
            ) from error

    def _offered(self) -> Offer:
        envelope = self._read(NEWEST, signing.MAX_ENVELOPE_BYTES)
        payload = signing.verify(envelope, self._device.trusted)
        return Offer(Release.from_bytes(payload), envelope, sha256(payload))

    def _install(self, again: bool) -> Installed:
        device, offered = self._device, self._offered()
        entry = offered.release.variant(device.tier)
        current = device.current()
        sound = self._is_sound(current)
        if not decide(current, offered, sound=sound, again=again):
            return device.running()[0]
        slot: Slot = "a" if current is None else current.other if sound else current.slot
        self._check_space(slot, entry.installed_bytes + len(offered.envelope))
        model = self._variant(entry)
        _try_out(model, offered.release.spec)
        self._write(slot, model, offered.envelope)
        installed, _ = device.verified(slot)
        device.commit(self._committed(current, installed))
        return installed

    def _committed(self, current: Current | None, installed: Installed) -> Current:
        kept = self._kept(current, installed.slot)
        version, floor = installed.release.version, current.floor if current else 0
        return Current(installed.slot, version, installed.identity, floor_after(floor, kept, version))

    def _kept(self, current: Current | None, written: Slot) -> int | None:
        """Version in the slot that was not written, if it is a release to return to."""
        if current is None:
            return None
        if written != current.slot:
            return current.version
        back = previous(self._device, current)
        return back.release.version if back else None

    def _is_sound(self, current: Current | None) -> bool:
        if current is None:
            return False
        try:
            installed, _ = self._device.verified(current.slot)
        except TrustError:
            return False
        return installed.identity == current.identity

    def _check_space(self, slot: Slot, content: int) -> None:
        folder = self._device.folder(slot)
        released = sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0
        needed = content + _SPARE_BYTES
        free = shutil.disk_usage(self._device.home).free
        if free + released < needed:
            raise FedgeError(
                f"{self._device.home}: {free} bytes are free, the installation needs {needed - released}; "
                "what was installed goes on working"
            )

    def _variant(self, entry: VariantEntry) -> bytes:
        wire = self._read(f"objects/{entry.wire_sha256}", entry.wire_bytes)
        if sha256(wire) != entry.wire_sha256:
            raise DigestError(
                f"variant of tier {entry.tier!r}: the bytes fetched are not those that were signed"
            )
        installed = unpack(wire, entry.installed_bytes)
        if sha256(installed) != entry.installed_sha256:
            raise DigestError(f"variant of tier {entry.tier!r}: unpacks to other bytes than were signed")
        return installed

    def _write(self, slot: Slot, model: bytes, envelope: bytes) -> None:
        folder = self._device.folder(slot)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            write_atomically(folder / MODEL, model)
            write_atomically(folder / RELEASE, envelope)
            for parent in (folder.parent, self._device.home):
                sync_folder(parent)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)  # gives the space back
            raise

    def _read(self, name: str, maximum: int) -> bytes:
        try:
            data = self._fetch(name, maximum)
        except OSError as error:
            raise FedgeError(
                f"{name}: cannot be fetched ({error.strerror or error}); try again later"
            ) from error
        if len(data) > maximum:  # whatever the transport promises
            raise FormatError(f"{name}: {len(data)} bytes came, over the {maximum} it may have")
        return data


def _try_out(model: bytes, spec: Spec) -> None:
    """Load a variant and run it once on zeros.

    Raises:
        FormatError: it cannot be loaded, cannot run, or gives something else than labels and
            probabilities of the release.
    """
    labels, probabilities = CompactModel(model, spec).run(spec.zeros(1))
    if not np.isfinite(probabilities).all() or labels[0] not in spec.labels:
        raise FormatError(
            f"variant: answers {labels[0][:40]!r} with probabilities {probabilities[0, :4].tolist()} "
            "to an input of zeros; it is not installed"
        )
