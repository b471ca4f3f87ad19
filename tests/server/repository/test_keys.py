"""Key files: closed to others, encrypted where they are kept offline, of two kinds and no other."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedge.errors import FormatError, UserError
from fedge_server.repository import (
    Request,
    create_key,
    load_key,
    load_public,
    passphrase_in,
    public_pem,
)
from fedge_server.repository.keys import KeyKind

REQUEST = Request("root", b"what is signed")


@pytest.mark.parametrize("kind", ["ed25519", "p256"])
def test_a_key_signs_after_it_has_been_kept_in_a_file(tmp_path: Path, kind: KeyKind) -> None:
    made = create_key(tmp_path / "keys/root-1", kind=kind)
    assert stat.S_IMODE((tmp_path / "keys/root-1").stat().st_mode) == 0o600
    loaded = load_key(tmp_path / "keys/root-1")
    assert loaded.key == made.key
    made.key.verify_signature(loaded.sign(REQUEST), REQUEST.payload)
    assert load_public(public_pem(made.key)) == made.key
    assert made.key.keyid[:8] in repr(made)


def test_an_offline_key_opens_with_its_passphrase_alone(tmp_path: Path) -> None:
    path, secret = tmp_path / "root-1", tmp_path / "passphrase"
    secret.write_bytes(b"a long passphrase\n")
    secret.chmod(0o600)
    made = create_key(path, passphrase=passphrase_in(secret))
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in path.read_bytes()
    assert load_key(path, passphrase=passphrase_in(secret)).key == made.key
    assert load_key(path, passphrase=lambda: b"a long passphrase").key == made.key
    with pytest.raises(UserError, match="the passphrase does not open it"):
        load_key(path, passphrase=lambda: b"another passphrase")
    with pytest.raises(UserError, match="is encrypted; give the file"):
        load_key(path)


@pytest.mark.parametrize("secret", [b"", b"too short", b"x" * 1025])
def test_passphrases_that_are_soon_tried_out_are_refused(tmp_path: Path, secret: bytes) -> None:
    with pytest.raises(UserError, match="it must have 12 to 1024"):
        create_key(tmp_path / "key", passphrase=lambda: secret)
    assert not (tmp_path / "key").exists()


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    made = create_key(tmp_path / "key")
    with pytest.raises(UserError, match="never overwritten"):
        create_key(tmp_path / "key")
    assert load_key(tmp_path / "key").key == made.key
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_files_that_others_may_read_are_refused(tmp_path: Path, mode: int) -> None:
    create_key(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(UserError, match="run: chmod 600"):
        load_key(tmp_path / "key")
    with pytest.raises(UserError, match="run: chmod 600"):
        passphrase_in(tmp_path / "key")()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_key_of_another_user_is_refused(tmp_path: Path) -> None:
    create_key(tmp_path / "key")
    os.chown(tmp_path / "key", 1234, -1)
    with pytest.raises(UserError, match="belongs to another user"):
        load_key(tmp_path / "key")


@pytest.mark.parametrize(
    "private",
    [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())],
    ids=["rsa", "p384"],
)
def test_other_kinds_of_keys_are_refused(
    tmp_path: Path, private: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(FormatError, match="Ed25519 key or one on P-256"):
        load_key(path)
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(FormatError, match="Ed25519 key or one on P-256"):
        load_public(public)


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    with pytest.raises(FormatError, match="not a private key"):
        load_key(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_key(tmp_path / "absent")
    for pem in (b"", b"x" * 5000, b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):
        with pytest.raises(FormatError, match="public key"):
            load_public(pem)
