"""Which device is given which content key: its own tier's, of what is on offer, while it is not revoked."""

from __future__ import annotations

from fedge.errors import AbsentError, DigestError, ForbiddenError
from fedge.sealing import key_id, wrap
from fedge_server.registry.devices import ACTIVE, DeviceRow
from fedge_server.repository.content import TierContent
from fedge_server.repository.content_keys import ContentKeys


def wrapped_key(keys: ContentKeys, content: TierContent, version: int, device: DeviceRow) -> bytes:
    """The content key of a version, for one device alone.

    Args:
        keys: of the repository.
        content: what the tier offers now.
        version: that the device asks for.
        device: its row, as the database has it now.

    Raises:
        ForbiddenError: the device is of another tier, or revoked.
        AbsentError: the version is not on offer, is not sealed, or its key is not here.
        DigestError: the key here is not the one that was signed.
        FormatError: the device's sealing key is none.
    """
    tier = content.mark.tier
    if device.status != ACTIVE or device.tier != tier:
        raise ForbiddenError(f"device {device.id[:16]}: may not have keys of tier {tier!r}")
    offered = content.releases.get(version)
    if offered is None or offered.note.sealing is None:
        what = "is not on offer" if offered is None else "is not sealed"
        raise AbsentError(f"version {version} of tier {tier!r} {what}")
    key = keys.key(tier, version)
    if key_id(key) != offered.note.sealing.key:
        raise DigestError(
            f"the content key of {tier} {version} here is not the one that was signed; publish again"
        )
    return wrap(key, bytes.fromhex(device.sealing_key), tier=tier, version=version, device_id=device.id)
