"""Signatures over releases: DSSE envelopes with Ed25519, checked before the payload is read.

An envelope is JSON: base64 of the payload, its type, and signatures over both (https://github.com/
secure-systems-lab/dsse). Keys are PEM files: PKCS #8 for the private key, SubjectPublicKeyInfo for the
public one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib import exceptions
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner, SSlibKey

from fedge.errors import FormatError, SignatureError

PAYLOAD_TYPE: Final = "application/vnd.fedge.release+json"
MAX_ENVELOPE_BYTES: Final = 12 * 1024**2  # base64 of the longest manifest, and signatures
MAX_KEY_BYTES: Final = 4096
_MAX_SIGNATURES: Final = 16  # bounds the work that a hostile envelope can ask for


def generate_key() -> tuple[bytes, bytes]:
    """A new Ed25519 key: (private PEM, public PEM)."""
    signer = CryptoSigner.generate_ed25519()
    return signer.private_bytes, public_of(signer.private_bytes)


def public_of(private_pem: bytes) -> bytes:
    """The public PEM of a private one.

    Raises:
        FormatError: not an unencrypted Ed25519 private key.
    """
    public = _private_key(private_pem).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def key_id(public_pem: bytes) -> str:
    """The name by which signatures refer to this key: 64 hexadecimal digits.

    Raises:
        FormatError: not an Ed25519 public key.
    """
    return _public_key(public_pem).keyid


def sign(payload: bytes, private_pem: bytes) -> bytes:
    """An envelope around a payload; the same payload and key give the same bytes.

    Raises:
        FormatError: not an unencrypted Ed25519 private key.
    """
    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(CryptoSigner(_private_key(private_pem)))
    return json.dumps(envelope.to_dict(), sort_keys=True, separators=(",", ":")).encode()


def verify(envelope: bytes, trusted: Sequence[bytes], *, max_bytes: int = MAX_ENVELOPE_BYTES) -> bytes:
    """The payload, if one of the trusted keys signed it; it is not parsed here.

    Args:
        envelope: bytes from outside.
        trusted: public PEM keys; one good signature of one of them is enough.
        max_bytes: a longer envelope is refused unread.

    Raises:
        FormatError: no envelope, too long, or of another payload type; or a trusted key is no key.
        SignatureError: no trusted key signed it.
    """
    keys = [_public_key(pem) for pem in trusted]
    opened = _open(envelope, max_bytes)
    try:
        opened.verify(list(keys), 1)
    except (exceptions.Error, ValueError) as error:
        names = ", ".join(key.keyid[:8] for key in keys) or "none"
        signers = ", ".join(repr(name[:8]) for name in opened.signatures) or "none"
        raise SignatureError(
            f"release: not signed by a trusted key (trusted: {names}; signed by: {signers})"
        ) from error
    return opened.payload


def unverified_payload(envelope: bytes, *, max_bytes: int = MAX_ENVELOPE_BYTES) -> bytes:
    """The payload without looking at its signature: for the publisher's own files, never for a device.

    Raises:
        FormatError: no envelope, too long, or of another payload type.
    """
    return _open(envelope, max_bytes).payload


def _open(envelope: bytes, max_bytes: int) -> Envelope:
    if len(envelope) > max_bytes:
        raise FormatError(f"envelope: {len(envelope)} bytes, over the {max_bytes} it may have")
    try:
        value: Any = json.loads(envelope.decode("utf-8"))
        if value["payloadType"] != PAYLOAD_TYPE:  # stops a signature over one kind of thing serving another
            raise FormatError(f"envelope: holds {str(value['payloadType'])[:60]!r}, not a release")
        if len(value["signatures"]) > _MAX_SIGNATURES:
            raise ValueError(f"over {_MAX_SIGNATURES} signatures")
        opened = Envelope.from_dict(value)
        if not all(isinstance(name, str) for name in opened.signatures):
            raise TypeError("a key id must be a string")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, exceptions.Error) as error:
        raise FormatError(
            f"envelope: malformed or truncated ({type(error).__name__}: {str(error)[:80]!r})"
        ) from error
    return opened


def _private_key(pem: bytes) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FormatError("signing key: not an unencrypted private key in PEM form") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise FormatError("signing key: it must be an Ed25519 key")
    return key


def _public_key(pem: bytes) -> SSlibKey:
    if len(pem) > MAX_KEY_BYTES:
        raise FormatError(f"public key: {len(pem)} bytes, over the {MAX_KEY_BYTES} it may have")
    try:
        key = load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FormatError("public key: not a public key in PEM form") from error
    if not isinstance(key, Ed25519PublicKey):
        raise FormatError("public key: it must be an Ed25519 key")
    return SSlibKey.from_crypto(key)
