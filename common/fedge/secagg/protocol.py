"""What clients and server say to each other in a round of secure aggregation, and how keys are signed.

| phase | the server sends to each client | the client answers |
|---|---|---|
| keys | session | `Keys` |
| shares | its neighbours' `Keys`, threshold | `Dealt`: a sealed box for each neighbour |
| check | the boxes for it, with their commitments | which of them hold what they should |
| masked input | those with whom it shares masks, and the model | its encoded change under masks |
| unmasking | who came through and who was lost | `Revealed`: one share for each, never both kinds |

The check is one phase more than in the papers: a client whose shares are wrong is found before anybody trains
or masks, and only the edges between it and those that say so are lost.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from fedge.errors import FormatError, SignatureError
from fedge.identity import device_id_of, node_id_of
from fedge.secagg.masks import KEY_BYTES, TAG_BYTES, Session
from fedge.secagg.shamir import SECRET_BYTES

BOX_BYTES: Final = 2 * SECRET_BYTES + TAG_BYTES
_CONTEXT: Final = b"fedge.v1.secagg.keys\0"  # a signature for this purpose serves no other
_MAX_SIGNATURE: Final = 80  # bytes of an ECDSA signature on P-256 in DER: 72 at most
_POINT: Final = 33  # bytes of a compressed point


@dataclass(frozen=True, slots=True)
class Keys:
    """A client's public keys for one session."""

    channel: bytes  # X25519, for the boxes
    mask: bytes  # X25519, for the masks; neighbours hold shares of its private half
    seed: bytes  # commitment to the seed of the client's own mask
    identity: bytes = b""  # the device's P-256 key, a compressed point; empty where devices have none
    signature: bytes = b""  # by that key

    def __post_init__(self) -> None:
        lengths = [len(self.channel), len(self.mask), len(self.seed)]
        if lengths != [KEY_BYTES] * 3:
            raise FormatError(f"keys: have {lengths} bytes instead of {KEY_BYTES} each")
        if len(self.identity) not in (0, _POINT) or len(self.signature) > _MAX_SIGNATURE:
            raise FormatError(
                f"keys: identity of {len(self.identity)} bytes, signature of {len(self.signature)}"
            )


@dataclass(frozen=True, slots=True)
class Box:
    """Two shares for one neighbour: of the dealer's seed, and of the private half of its mask key."""

    sealed: bytes
    seed: bytes  # commitment to the share of the seed
    key: bytes  # commitment to the share of the key

    def __post_init__(self) -> None:
        lengths = len(self.sealed), len(self.seed), len(self.key)
        if lengths != (BOX_BYTES, SECRET_BYTES, SECRET_BYTES):
            raise FormatError(f"box: parts of {lengths} bytes instead of {BOX_BYTES}, 32 and 32")


@dataclass(frozen=True, slots=True)
class Dealt:
    """All boxes of one dealer, and the commitments to the shares that it keeps itself."""

    boxes: Mapping[int, Box]  # by neighbour
    own_seed: bytes
    own_key: bytes


@dataclass(frozen=True, slots=True)
class Revealed:
    """Shares that open masks: a client gives one kind for each other client."""

    seeds: Mapping[int, bytes]  # of clients whose change is in the sum
    keys: Mapping[int, bytes]  # of clients that were lost


class Signer(Protocol):
    """A device's identity key, wherever it is kept."""

    @property
    def point(self) -> bytes:
        """Its public half, a compressed point on P-256."""
        ...

    def sign(self, content: bytes) -> bytes:
        """An ECDSA signature with SHA-256, in DER."""
        ...


def places(client: int, neighbours: Iterable[int]) -> dict[int, int]:
    """The place, from 1, of each holder of a client's shares: its neighbours and itself."""
    return {holder: place for place, holder in enumerate(sorted({client, *neighbours}), 1)}


def signed_content(session: Session, client: int, keys: Keys) -> bytes:
    """What a client's signature covers: keys serve one client in one session."""
    return _CONTEXT + session.bound + struct.pack(">Q", client) + keys.channel + keys.mask + keys.seed


def check_signature(session: Session, client: int, keys: Keys) -> None:
    """Check that a client's own identity has signed its keys for this session.

    Raises:
        SignatureError: it has not; the id of a client is the hash of its identity, so no list is needed.
    """
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), keys.identity)
        if node_id_of(device_id_of(key)) != client:
            raise SignatureError(f"keys of client {client}: signed by another device")
        key.verify(keys.signature, signed_content(session, client, keys), ec.ECDSA(SHA256()))
    except (ValueError, InvalidSignature):
        raise SignatureError(f"keys of client {client}: not signed by that device for this round") from None


def check_neighbours(client: int, neighbours: Collection[int], threshold: int) -> None:
    """Refuse a neighbourhood in which a server could get both secrets of a client.

    Raises:
        FormatError: the line says what is wrong with it.
    """
    holders = len(neighbours) + 1
    if client in neighbours:
        raise FormatError(f"client {client}: is not its own neighbour")
    if not holders < 2 * threshold <= 2 * holders:
        raise FormatError(
            f"client {client}: a threshold of {threshold} of {holders} holders; it must be "
            "more than half of them"
        )
