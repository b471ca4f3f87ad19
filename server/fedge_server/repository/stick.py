"""What devices need to install without a network: metadata, their tiers' targets, and keys wrapped for them.

    metadata/                    roots, timestamp, and the roles of these tiers
    targets/TIER/                what these tiers offer
    keys/TIER/VERSION/DEVICE     content keys of what is sealed, each for one device alone

Of sealed models nobody can read it but these devices, and nothing on it is trusted unverified. It is good
until its timestamp expires.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedge.delivery import KEYS, key_path, mark_path, role_of, target_path
from fedge.errors import FedgeError, UserError
from fedge.files import write_atomically
from fedge_server.registry.devices import DeviceRow
from fedge_server.repository.content import FileEntry, TierContent
from fedge_server.repository.content_keys import ContentKeys
from fedge_server.repository.folder import TIMESTAMP, Folder, hashed_path, metadata_name, parse
from fedge_server.repository.state import State, load
from fedge_server.repository.wrapping import wrapped_key


@dataclass(frozen=True, slots=True)
class Stick:
    """What was written."""

    tiers: tuple[str, ...]
    keys: int  # wrapped ones
    size: int  # bytes in all
    expires: datetime  # of its timestamp: devices refuse it afterwards


def write_stick(
    repository: Path,
    keys: ContentKeys,
    place: Path,
    devices: Sequence[DeviceRow],
    *,
    patience_s: float = 30.0,
) -> Stick:
    """Write all that these devices need.

    Args:
        repository: its folder.
        keys: of what is sealed.
        place: a folder that is empty, or made.
        devices: for whom; at least one.
        patience_s: how long to wait for a publisher.

    Raises:
        UserError: the place holds something, or a device's tier is not in the repository.
        ForbiddenError: a device is revoked.
        AbsentError: a content key is not here.
        FedgeError: the place refuses it.
    """
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{place}: holds something already; give a folder that is empty, or none")
    folder = Folder(repository)
    if not folder.metadata.exists():
        raise UserError(f"{repository}: holds no repository; create one first")
    with folder.locked(patience_s):
        files, tiers = _files(folder, keys, devices)
    try:
        for name, data in files.items():  # the timestamp is the last: half a stick is none
            write_atomically(place / name, data)
    except OSError as error:
        raise FedgeError(f"{place}: cannot be written ({error.strerror}); it is not whole") from error
    written = [name for name in files if name.startswith(f"{KEYS}/")]
    expires = parse(files[f"metadata/{TIMESTAMP}"], TIMESTAMP).signed.expires
    return Stick(tiers, len(written), sum(map(len, files.values())), expires)


def _files(
    folder: Folder, keys: ContentKeys, devices: Sequence[DeviceRow]
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """All files by name, in the order of writing, and the tiers that they are of."""
    state = load(folder)
    if state is None:
        raise UserError(f"{folder.path}: holds no repository; create one first")
    tiers = {device.tier: state.content(device.tier) for device in devices}
    files = {**_targets(folder, tiers), **_keys(keys, tiers, devices), **_metadata(folder, state, tiers)}
    return files, tuple(sorted(tiers))


def _targets(folder: Folder, tiers: dict[str, TierContent]) -> dict[str, bytes]:
    found = {}
    for tier, content in tiers.items():
        mark = FileEntry.of(content.mark.to_bytes())
        entries = {mark_path(tier): mark}
        for version, offered in content.releases.items():
            entries |= {target_path(tier, version, kind): entry for kind, entry in offered.files.items()}
        for path, entry in entries.items():
            found[f"targets/{hashed_path(path, entry.sha256)}"] = folder.read_target(path, entry)
    return found


def _keys(keys: ContentKeys, tiers: dict[str, TierContent], devices: Sequence[DeviceRow]) -> dict[str, bytes]:
    return {
        key_path(device.tier, version, device.id): wrapped_key(keys, tiers[device.tier], version, device)
        for device in devices
        for version, offered in tiers[device.tier].releases.items()
        if offered.note.sealing is not None
    }


def _metadata(folder: Folder, state: State, tiers: dict[str, TierContent]) -> dict[str, bytes]:
    names = [("root", version) for version in folder.roots()]
    names += [(role_of(tier), state.tiers[tier].signed.version) for tier in sorted(tiers)]
    names += [("targets", state.targets.signed.version), ("snapshot", state.snapshot.signed.version)]
    found = {f"metadata/{metadata_name(*name)}": folder.read(*name) for name in names}
    return {**found, f"metadata/{metadata_name('timestamp', 0)}": state.timestamp_bytes}
