"""The keys of what a repository has sealed: kept apart from it, and given to devices wrapped.

Files of mode 0600, one for each version of each tier: TIER.VERSION, 32 bytes. A key goes when its version is
no longer on offer, so that what lies in caches then opens for nobody who has not unwrapped it before.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from fedge.delivery import Sealing
from fedge.errors import AbsentError, DigestError, FedgeError, UserError
from fedge.files import read_bounded, write_atomically
from fedge.sealing import FORMAT, KEY_BYTES, Place, key_id, new_key, seal, unseal

FOLDER: Final = "content"  # in the folder of a server's keys


class ContentKeys:
    """One repository's content keys."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read or written yet.

        Args:
            folder: made when the first key is; it must not be one that devices can read.
        """
        self.folder = folder

    def sealed(self, wire: bytes, tier: str, version: int) -> tuple[Sealing, bytes]:
        """Seal a model under a new key, which is kept before anybody sees what it has sealed.

        Raises:
            FedgeError: the disk refuses the key.
        """
        key = new_key()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(self._path(tier, version), key, mode=0o600)
        except OSError as error:
            raise FedgeError(
                f"{self.folder}: a content key cannot be kept there ({error.strerror})"
            ) from error
        return Sealing(FORMAT, key_id(key)), seal(wire, key, Place(tier, version))

    def opened(self, ciphertext: bytes, tier: str, version: int) -> bytes:
        """What was sealed.

        Raises:
            AbsentError: its key is not here.
            TrustError: it is not what was sealed with it.
        """
        return unseal(ciphertext, self.key(tier, version), Place(tier, version))

    def key(self, tier: str, version: int) -> bytes:
        """The content key of a version.

        Raises:
            AbsentError: it is not here.
            UserError: others may read it.
            DigestError: it is damaged.
        """
        path = self._path(tier, version)
        if not path.exists():
            raise AbsentError(
                f"{path}: the content key of {tier} {version} is not here; "
                "bring it back from a backup, or publish the content again"
            )
        if (mode := path.stat().st_mode & 0o777) & 0o077:
            raise UserError(f"{path}: others may read it (mode {mode:o}); run: chmod 600 {path}")
        key = read_bounded(path, KEY_BYTES)
        if len(key) != KEY_BYTES:
            raise DigestError(f"{path}: damaged; bring it back from a backup, or publish the content again")
        return key

    def keep_only(self, tier: str, versions: Iterable[int]) -> None:
        """Remove the keys of all other versions of a tier."""
        kept = {self._path(tier, version) for version in versions}
        for path in self.folder.glob(f"{tier}.*"):  # a tier's name has no point
            if path not in kept:
                path.unlink(missing_ok=True)

    def _path(self, tier: str, version: int) -> Path:
        return self.folder / f"{tier}.{version}"
