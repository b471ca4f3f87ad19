"""Key files of a repository: PEM, PKCS #8, mode 0600, and encrypted where the key is kept offline.

Ed25519 or ECDSA on P-256. A passphrase comes from a file or a function, never from a command line, which
every user of the machine can read. The encryption key is derived from it by PBKDF2, so that short ones are
soon tried out: they are refused.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import CryptoSigner, Key, Signature, SSlibKey

from fedge.errors import FedgeError, FormatError, UserError
from fedge.files import read_bounded, write_atomically
from fedge_server.repository.signing import Request

KeyKind = Literal["ed25519", "p256"]
PrivateKey = Ed25519PrivateKey | ec.EllipticCurvePrivateKey
Passphrase = Callable[[], bytes]
"""Gives the passphrase of a key when it is needed; a function may ask a person or a keyring."""

MAX_KEY_BYTES: Final = 16 * 1024  # of one PEM file
MIN_PASSPHRASE_BYTES: Final = 12
MAX_PASSPHRASE_BYTES: Final = 1024


def passphrase_in(path: Path) -> Passphrase:
    """The passphrase in a file that nobody else may read; a line end at its end does not count."""

    def read() -> bytes:
        _refuse_shared(path)
        return read_bounded(path, MAX_PASSPHRASE_BYTES).rstrip(b"\r\n")

    return read


def create_key(path: Path, *, kind: KeyKind = "ed25519", passphrase: Passphrase | None = None) -> FileSigning:
    """Make a key and write its private part, which is never overwritten.

    Args:
        path: the file to write; its folder is made.
        kind: Ed25519, or P-256 for hardware and services that have nothing else.
        passphrase: of a key that is kept offline; None: the key lies open for its owner, for use online.

    Raises:
        UserError: there is a file already, or the passphrase is too short.
        FedgeError: the disk refuses the write.
    """
    private: PrivateKey = (
        Ed25519PrivateKey.generate() if kind == "ed25519" else ec.generate_private_key(ec.SECP256R1())
    )
    encryption: KeySerializationEncryption = NoEncryption()
    if passphrase is not None:
        encryption = BestAvailableEncryption(_given(path, passphrase))
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    try:
        write_atomically(path, pem, mode=0o600, replace=False)
    except FileExistsError as error:
        raise UserError(f"{path}: exists already; a key is never overwritten") from error
    except OSError as error:
        raise FedgeError(f"{path}: the key cannot be kept there ({error.strerror})") from error
    return FileSigning(private)


def load_key(path: Path, *, passphrase: Passphrase | None = None) -> FileSigning:
    """A key that signs, from its file.

    Raises:
        UserError: others may read it, it is another user's, or the passphrase is missing or wrong.
        FormatError: it is no key of a kind that is used here.
    """
    _refuse_shared(path)
    pem = read_bounded(path, MAX_KEY_BYTES)
    encrypted = b"ENCRYPTED" in pem
    if encrypted and passphrase is None:
        raise UserError(f"{path}: is encrypted; give the file that holds its passphrase")
    secret = _given(path, passphrase) if encrypted and passphrase is not None else None
    try:
        private = load_pem_private_key(pem, secret)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if secret is not None:
            raise UserError(f"{path}: the passphrase does not open it, or it is damaged") from error
        raise FormatError(f"{path}: not a private key in PEM form") from error
    if isinstance(private, Ed25519PrivateKey):
        return FileSigning(private)
    if isinstance(private, ec.EllipticCurvePrivateKey) and isinstance(private.curve, ec.SECP256R1):
        return FileSigning(private)
    raise FormatError(f"{path}: must be an Ed25519 key or one on P-256")


def public_pem(key: Key) -> bytes:
    """The public part as a PEM file, to be carried from where a key was made.

    Raises:
        FormatError: a key of another kind.
    """
    if not isinstance(key, SSlibKey) or "public" not in key.keyval:
        raise FormatError(f"key {key.keyid[:8]}: of kind {key.keytype!r}, which has no PEM form here")
    public = key._crypto_key()  # what `keyval` holds is hexadecimal for one kind and PEM for the other
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def load_public(pem: bytes) -> Key:
    """A public key from PEM.

    Raises:
        FormatError: too long, no public key, or of a kind that is not used here.
    """
    if len(pem) > MAX_KEY_BYTES:
        raise FormatError(f"public key: {len(pem)} bytes, over the {MAX_KEY_BYTES} it may have")
    try:
        public = load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FormatError("public key: not a public key in PEM form") from error
    if isinstance(public, Ed25519PublicKey) or (
        isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP256R1)
    ):
        return SSlibKey.from_crypto(public)
    raise FormatError("public key: must be an Ed25519 key or one on P-256")


class FileSigning:
    """A private key in this process: `Signing` for keys in files."""

    def __init__(self, private: PrivateKey) -> None:
        self._signer = CryptoSigner(private)

    @property
    def key(self) -> Key:
        """The public part."""
        return self._signer.public_key

    def sign(self, request: Request) -> Signature:
        """A signature over the payload."""
        return self._signer.sign(request.payload)

    def __repr__(self) -> str:
        return f"FileSigning({self.key.keyid[:8]})"  # never the private part


def _given(path: Path, passphrase: Passphrase) -> bytes:
    secret = passphrase()
    if not MIN_PASSPHRASE_BYTES <= len(secret) <= MAX_PASSPHRASE_BYTES:
        raise UserError(
            f"{path}: a passphrase of {len(secret)} bytes; it must have {MIN_PASSPHRASE_BYTES} "
            f"to {MAX_PASSPHRASE_BYTES}"
        )
    return secret


def _refuse_shared(path: Path) -> None:
    """Stops a secret that other users of the machine can read or have put there."""
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise UserError(f"{path}: others may read it (mode {mode:o}); run: chmod 600 {path}")
    if found.st_uid not in (os.geteuid(), 0):
        raise UserError(f"{path}: belongs to another user ({found.st_uid}); it must be this one's")
