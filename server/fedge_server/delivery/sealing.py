"""Sealed versions in the Distribution service: keys for devices, plaintexts for deltas, sealed deltas.

Each works for unsealed versions as well, since a tier may offer both after the setting was changed.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedge.delivery import target_path
from fedge.errors import ForbiddenError
from fedge.manifest import Release
from fedge.sealing import DELTA, Place, seal
from fedge_server.delivery.shelf import Shelf
from fedge_server.registry.devices import Devices
from fedge_server.repository.content_keys import ContentKeys
from fedge_server.repository.wrapping import wrapped_key


@dataclass(frozen=True, slots=True)
class Sealing:
    """A repository's shelf with the keys of what lies there."""

    shelf: Shelf
    keys: ContentKeys

    def key_for(self, devices: Devices, device: str, tier: str, version: int) -> bytes | None:
        """The content key of a version on offer, wrapped for a device; None: it is not sealed.

        Raises:
            ForbiddenError: the device is unknown, revoked or of another tier.
            AbsentError: the version is not on offer, or its key is not here.
        """
        row = devices.get(device)
        if row is None:
            raise ForbiddenError(f"device {device[:16]}: is not enrolled here")
        if not self._is_sealed(tier, version):
            return None
        return wrapped_key(self.keys, self.shelf.view.tiers[tier].content, version, row)

    def content(self, tier: str, version: int) -> tuple[bytes, int]:
        """A version as it travels when it is not sealed, and the length that it unpacks to.

        Raises:
            AbsentError: the version is not on offer, or its key is not here.
            TrustError: it is damaged.
        """
        manifest = self.shelf.target(target_path(tier, version, "manifest"), tier, version, "manifest")
        wire = self.shelf.target(target_path(tier, version, "model"), tier, version, "model")
        if self._is_sealed(tier, version):
            wire = self.keys.opened(wire, tier, version)
        return wire, Release.from_bytes(manifest).variant(tier).installed_bytes

    def delta(self, tier: str, version: int, made: bytes) -> bytes:
        """A delta to a version, sealed as that version is."""
        if not self._is_sealed(tier, version):
            return made
        return seal(made, self.keys.key(tier, version), Place(tier, version, DELTA))

    def _is_sealed(self, tier: str, version: int) -> bool:
        view = self.shelf.view
        return (
            view.offers(tier, version) and view.tiers[tier].content.releases[version].note.sealing is not None
        )
