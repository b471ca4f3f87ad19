"""The device's identity key, as it signs the keys of masks in the training process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedge_client.agent.identity import FOLDER, load_keys


@dataclass(frozen=True, slots=True)
class DeviceSigner:
    """Signs with the key that the device's id is the hash of."""

    key: ec.EllipticCurvePrivateKey

    @classmethod
    def of(cls, home: Path) -> Self:
        """The signer of the device that lives in this folder.

        Raises:
            FedgeError: its keys cannot be read.
        """
        return cls(load_keys(home / FOLDER).device)

    @property
    def point(self) -> bytes:
        """The public half, a compressed point."""
        return self.key.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)

    def sign(self, content: bytes) -> bytes:
        """An ECDSA signature with SHA-256, in DER."""
        return self.key.sign(content, ec.ECDSA(SHA256()))
