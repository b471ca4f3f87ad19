"""The server's own certificate authority: one P-256 CA, two while it is being rotated.

    ca/1.pem   key and certificate of a CA in one file, so that they are replaced and lost together
    ca/2.pem   the next CA, between `rotate` and `finish`

The first CA signs the server's certificate, the newest the devices': between the two stages every device
learns of the new CA before the server needs it. A rotation is the appearance of one file and the
disappearance of another; a kill leaves it before or after.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedge.errors import FedgeError, FormatError, UserError
from fedge.files import read_bounded, sync_folder, write_atomically
from fedge.identity import (
    BACKDATED_S,
    MAX_CERTIFICATE_BYTES,
    bundle_digest,
    device_id_of,
    is_p256,
    issued_by,
    load_certificates,
    names_of,
    pin_of,
)
from fedge_server.identity.requests import all_names, csr_key, general_name

Clock = Callable[[], float]
"""Gives Unix seconds."""

SERVER_FILE: Final = "server.pem"  # key and certificate of the server, in home/tls

_CA_DAYS: Final = 3653
# Clocks err: a device whose clock is a day behind must find these valid already.
_CA_BACK: Final = timedelta(days=30)
_SERVER_BACK: Final = timedelta(days=7)
_DEVICE_BACK: Final = timedelta(seconds=BACKDATED_S)
_MAX_FILE_BYTES: Final = 2 * MAX_CERTIFICATE_BYTES


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """What the server shows on both of its ports."""

    key: bytes = field(repr=False)  # PEM
    chain: bytes  # PEM of its certificate
    certificate: x509.Certificate

    @property
    def not_after(self) -> float:
        """Unix seconds."""
        return self.certificate.not_valid_after_utc.timestamp()

    @property
    def names(self) -> frozenset[str]:
        """Names and addresses it stands for."""
        return names_of(self.certificate)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `ensure_server_certificate` keeps in a folder.

        Raises:
            FormatError: it is absent or damaged.
        """
        key, certificate = _read_pair(folder / SERVER_FILE)
        return cls(_key_pem(key), certificate.public_bytes(Encoding.PEM), certificate)


@dataclass(frozen=True, slots=True)
class _Issuer:
    number: int
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate


class Authority:
    """The CAs of a folder. `reload` after another process may have changed them."""

    def __init__(self, folder: Path, *, clock: Clock = time.time) -> None:
        self.folder = folder
        self._clock = clock
        self._issuers: tuple[_Issuer, ...] = ()
        self._bundle, self._bundle_digest = b"", ""
        self.reload()

    @classmethod
    def create(cls, folder: Path, *, clock: Clock = time.time) -> Self:
        """Make a folder with a first CA.

        Raises:
            UserError: it holds one already.
            FedgeError: the disk refuses it.
        """
        if list(_numbered(folder)):
            raise UserError(f"{folder}: there is a certificate authority already; it is never overwritten")
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)
            _write_ca(folder, 1, clock())
        except OSError as error:
            raise FedgeError(f"{folder}: a CA cannot be made there ({error.strerror})") from error
        return cls(folder, clock=clock)

    @classmethod
    def open(cls, folder: Path, *, clock: Clock = time.time) -> Self:
        """The CAs of a folder.

        Raises:
            UserError: others may read the keys.
            FormatError: there is none, or it is damaged.
        """
        return cls(folder, clock=clock)

    def reload(self) -> None:
        """Read the folder again.

        Raises:
            UserError: others may read the keys.
            FormatError: there is none, or it is damaged.
        """
        found = []
        for number, path in sorted(_numbered(self.folder)):
            found.append(_Issuer(number, *_read_pair(path)))
            if (mode := _mode(path)) & 0o077:
                raise UserError(
                    f"{path}: others may read the CA's key (mode {mode:o}); run: chmod 600 {path}"
                )
        if not found:
            raise FormatError(f"{self.folder}: holds no certificate authority; restore it from a backup")
        self._issuers = tuple(found)
        # Asked for at every call of a device, so made once.
        self._bundle = b"".join(issuer.certificate.public_bytes(Encoding.PEM) for issuer in found)
        self._bundle_digest = bundle_digest(self._bundle)

    @property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        """Of all CAs, the oldest first."""
        return tuple(issuer.certificate for issuer in self._issuers)

    @property
    def bundle(self) -> bytes:
        """PEM of all CAs that devices and server have to trust now."""
        return self._bundle

    @property
    def bundle_digest(self) -> str:
        """The bundle's name, as devices report it."""
        return self._bundle_digest

    @property
    def pin(self) -> str:
        """Names the CA that signs the server's certificate: what a join string carries."""
        return pin_of(self._issuers[0].key.public_key())

    @property
    def rotating(self) -> bool:
        """Whether there are two CAs: `rotate` was called and `finish` was not."""
        return len(self._issuers) > 1

    def issue_device(self, csr_der: bytes, hours: float) -> bytes:
        """A certificate (PEM) for the key of a request; whatever else the request asks for is ignored.

        Args:
            csr_der: PKCS #10.
            hours: how long it is valid from now.

        Raises:
            FormatError: the request is malformed, not self-signed, or its key is not P-256.
        """
        key = csr_key(csr_der)
        issuer = self._issuers[-1]  # once: another thread may reload meanwhile
        builder = self._builder(issuer, key, device_id_of(key), _DEVICE_BACK, hours)
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(usage, critical=True)
        return builder.sign(issuer.key, SHA256()).public_bytes(Encoding.PEM)

    def issue_server(self, names: Sequence[str], days: float) -> tuple[bytes, bytes]:
        """A new key and certificate (both PEM) for the server.

        Args:
            names: host names and addresses; those of this machine itself are added.
            days: how long it is valid from now.

        Raises:
            UserError: a name is none.
        """
        issuer = self._issuers[0]
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives = x509.SubjectAlternativeName([general_name(name) for name in all_names(names)])
        builder = (
            self._builder(issuer, key.public_key(), "fedge server", _SERVER_BACK, 24 * days)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=True)
            .add_extension(alternatives, critical=False)
        )
        return _key_pem(key), builder.sign(issuer.key, SHA256()).public_bytes(Encoding.PEM)

    def ensure_server_certificate(self, folder: Path, names: Sequence[str], days: float) -> bool:
        """Make or renew the server's certificate in a folder when it is due; returns whether it did.

        It is due when it is absent or damaged, under a third of its time is left, the names have changed,
        or the CA that signed it is not the one that should.

        Args:
            folder: where `ServerCertificate.load` finds it.
            names: host names and addresses.
            days: how long a new one is valid.

        Raises:
            UserError: a name is none.
            FedgeError: the disk refuses it.
        """
        wanted = frozenset(all_names(names))
        if not self._due(folder, wanted, days):
            return False
        key, chain = self.issue_server(names, days)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(folder / SERVER_FILE, key + chain, mode=0o600)
        except OSError as error:
            raise FedgeError(f"{folder}: the certificate cannot be kept there ({error.strerror})") from error
        return True

    def rotate(self) -> None:
        """Stage one: add a CA that signs devices from now on; the server's certificate stays with the first.

        Raises:
            UserError: a rotation is under way.
        """
        with self._locked():
            self.reload()
            if self.rotating:
                raise UserError("a rotation is under way; end it with: fedge-server ca finish")
            _write_ca(self.folder, self._issuers[-1].number + 1, self._clock())
            self.reload()

    def finish(self) -> None:
        """Stage two: drop the first CA; `ensure_server_certificate` then moves the server to the new one.

        Raises:
            UserError: no rotation is under way.
        """
        with self._locked():
            self.reload()
            if not self.rotating:
                raise UserError("no rotation is under way; begin one with: fedge-server ca rotate")
            for issuer in self._issuers[:-1]:
                _path(self.folder, issuer.number).unlink()
            sync_folder(self.folder)
            self.reload()

    def _due(self, folder: Path, wanted: frozenset[str], days: float) -> bool:
        try:
            found = ServerCertificate.load(folder)
        except FormatError:
            return True
        left = found.not_after - self._clock()
        signed = issued_by(found.certificate, self._issuers[0].key.public_key())
        return left < days * 86400 / 3 or found.names != wanted or not signed

    def _builder(
        self, issuer: _Issuer, key: ec.EllipticCurvePublicKey, name: str, back: timedelta, hours: float
    ) -> x509.CertificateBuilder:
        now = _at(self._clock())
        signer = issuer.certificate
        usage = _key_usage(digital_signature=True)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(signer.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - back)
            .not_valid_after(min(now + timedelta(hours=hours), signer.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(identifier, critical=False)
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            except OSError as error:
                raise FedgeError(f"{self.folder}: cannot be changed ({error.strerror})") from error


def _write_ca(folder: Path, number: int, now: float) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key()
    name = _name(f"fedge CA {device_id_of(public)[:16]}")  # no two CAs share a name: TLS looks them up by it
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_at(now) - _CA_BACK)
        .not_valid_after(_at(now) + timedelta(days=_CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, SHA256())
    )
    write_atomically(
        _path(folder, number), _key_pem(key) + certificate.public_bytes(Encoding.PEM), mode=0o600
    )


def _read_pair(path: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    pem = read_bounded(path, _MAX_FILE_BYTES)
    try:
        key = load_pem_private_key(pem, password=None)
        (certificate,) = load_certificates(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm, FormatError) as error:
        raise FormatError(f"{path}: damaged, not a key and its certificate; restore a backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not is_p256(key.public_key()):
        raise FormatError(f"{path}: the key must be an EC key on P-256")
    if certificate.public_key() != key.public_key():
        raise FormatError(f"{path}: key and certificate do not belong together; restore a backup")
    return key, certificate


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode & 0o777
    except OSError as error:  # another process has just ended a rotation
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from error


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    return ((int(path.stem), path) for path in folder.glob("*.pem") if path.stem.isdecimal())


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number}.pem"


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=0)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
