"""Sealed models on a device: its content key, unwrapped with its own, and the step that opens and unpacks.

The server, or a stick, gives a content key as a file of the repository: `keys/TIER/VERSION/DEVICE`, wrapped
for this device. It is fetched once the ciphertext is here; what it opens lies in memory alone, until it has
been unpacked and tried.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedge.artefact import unpack
from fedge.delivery import Sealing, key_path
from fedge.errors import AbsentError, DigestError, FormatError
from fedge.files import sha256
from fedge.manifest import VariantEntry
from fedge.sealing import FORMAT, WRAPPED_BYTES, Place, sealed_bytes, unseal, unwrap
from fedge_client.updater.installer import Artefact, Expand
from fedge_client.updater.streams import DEFAULT_PACE, Fetcher, Pace, whole

ContentKey = Callable[[int, str], bytes]
"""The content key of a version of this device's tier, by the name that signed metadata states for it."""


def content_keys(
    fetch: Fetcher, tier: str, device_id: str, private: X25519PrivateKey, *, pace: Pace = DEFAULT_PACE
) -> ContentKey:
    """Content keys from where the repository is.

    Args:
        fetch: gets files of the repository by name; the server wraps what is asked for as `keys/...`.
        tier: of this device.
        device_id: of this device.
        private: its sealing key.
        pace: how slow a stream may be.

    What it returns raises:
        FetchError: no key can be had now; AbsentError and ForbiddenError are kinds of it.
        SealError: the key is not for this device, or not the one that was signed.
    """

    def key(version: int, expected: str) -> bytes:
        try:
            wrapped = whole(fetch, key_path(tier, version, device_id), WRAPPED_BYTES, pace=pace)
        except AbsentError as error:
            raise AbsentError(
                f"version {version} is sealed, and there is no key for this device ({error}); a stick is "
                f"made by: fedge-server release export FOLDER --device {device_id[:16]}"
            ) from error
        return unwrap(wrapped, private, tier=tier, version=version, device_id=device_id, expected=expected)

    return key


def check_sealing(sealing: Sealing, entry: VariantEntry, length: int) -> None:
    """Whether a ciphertext of this length can be the sealed form of a variant.

    Raises:
        FormatError: it is of a format that this fedge does not read.
        DigestError: it cannot be.
    """
    if sealing.format != FORMAT:
        raise FormatError(
            f"tier {entry.tier!r}: sealed in format {sealing.format}; this fedge reads {FORMAT}: update it"
        )
    if length != sealed_bytes(entry.wire_bytes):
        raise DigestError(
            f"tier {entry.tier!r}: the sealed model has {length} bytes, which are not the manifest's variant "
            f"of {entry.wire_bytes}; publish it again"
        )


def unsealed(sealing: Sealing, entry: VariantEntry, key: ContentKey) -> Expand:
    """The `Expand` of a sealed variant.

    Args:
        sealing: from signed metadata.
        entry: from the signed manifest; what is opened must be this.
        key: finds the content key.
    """

    def expand(data: bytes, artefact: Artefact) -> bytes:
        place = Place(entry.tier, artefact.version)
        wire = unseal(data, key(artefact.version, sealing.key), place)
        if sha256(wire) != entry.wire_sha256:  # before a decoder sees it
            raise DigestError(f"{artefact.name}: opens to other bytes than were signed; publish another")
        return unpack(wire, entry.installed_bytes)

    return expand
