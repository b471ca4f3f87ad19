"""The files that make a device itself; they lie in `home/identity`, mode 0700.

    device.key        P-256 private key, made here; it never leaves
    sealing.key       X25519 private key, for what is sealed to this device
    ca.pem            the CAs that may have signed the server's certificate
    certificate.pem   what the server has signed for device.key
    hub.json          where the server is, and what this device is called there: the commit point

The device is enrolled once `hub.json` is there. Later writes replace one file each, and every mixture of
old and new ones works: the key stays, a new bundle holds the CA that the server uses, and either
certificate is valid.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from fedge.errors import FedgeError, FormatError, IdentityError, UserError
from fedge.files import read_bounded, write_atomically
from fedge.identity import (
    BACKDATED_S,
    MAX_BUNDLE_BYTES,
    MAX_CERTIFICATE_BYTES,
    bundle_digest,
    device_id_of,
    is_p256,
    issued_by,
    load_certificates,
    node_id_of,
    pins_of,
    split_address,
)

FOLDER: Final = "identity"
DEVICE_KEY, SEALING_KEY = "device.key", "sealing.key"
BUNDLE, CERTIFICATE, HUB = "ca.pem", "certificate.pem", "hub.json"

_SCHEMA: Final = 1
_MAX_FILE_BYTES: Final = 4096
_TIER = re.compile(r"[a-z][a-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True)
class Hub:
    """What `hub.json` says."""

    link_address: str  # host:port of the Link service
    enrolment_address: str  # host:port, for renewal
    device_id: str
    tier: str
    node_id: int

    def __post_init__(self) -> None:
        for text in (self.link_address, self.enrolment_address):
            split_address(text)
        if not _TIER.fullmatch(self.tier):
            raise FormatError(f"tier {self.tier[:40]!r}: no name of a tier")
        if not re.fullmatch(r"[0-9a-f]{64}", self.device_id) or self.node_id != node_id_of(self.device_id):
            raise FormatError("device id and node id do not belong together")

    def to_bytes(self) -> bytes:
        """The file's content."""
        return json.dumps({"schema": _SCHEMA, **asdict(self)}, indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read the file's content.

        Raises:
            FormatError: damaged.
        """
        try:
            value: Any = json.loads(data.decode("utf-8"))
            if value.pop("schema") != _SCHEMA or value.keys() != {item.name for item in fields(cls)}:
                raise ValueError
            for item in fields(cls):
                if type(value[item.name]) is not (int if item.name == "node_id" else str):
                    raise TypeError
            return cls(**value)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FormatError(f"{HUB}: damaged; enrol the device again") from error


@dataclass(frozen=True, slots=True)
class Keys:
    """A device's private keys."""

    device: ec.EllipticCurvePrivateKey = field(repr=False)
    sealing: X25519PrivateKey = field(repr=False)

    @property
    def device_id(self) -> str:
        """SHA-256 of the public key."""
        return device_id_of(self.device.public_key())

    @property
    def sealing_public(self) -> bytes:
        """32 bytes that others seal to."""
        return self.sealing.public_key().public_bytes_raw()

    def request(self) -> bytes:
        """DER of a request for a certificate, signed with the device's key."""
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.device_id)])
        request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(self.device, SHA256())
        return request.public_bytes(Encoding.DER)


@dataclass(frozen=True, slots=True)
class Identity:
    """An enrolled device: keys, certificate, and the server it belongs to. Find it with `open`."""

    folder: Path
    hub: Hub
    keys: Keys
    certificate: bytes  # PEM
    bundle: bytes  # PEM
    not_before: float  # of the certificate, Unix seconds
    not_after: float
    newest: bool  # whether the newest CA of the bundle has signed the certificate

    @classmethod
    def open(cls, home: Path) -> Self:
        """Find the identity of a device's home.

        Raises:
            UserError: it is not enrolled, or others may read its keys.
            FormatError: a file is damaged.
        """
        if not is_enrolled(home):
            raise UserError(f"{home}: not enrolled; run: fedge-client enroll JOIN --home {home}")
        folder = home / FOLDER
        keys = load_keys(folder)
        hub = Hub.from_bytes(read_bounded(folder / HUB, _MAX_FILE_BYTES))
        certificate = read_bounded(folder / CERTIFICATE, MAX_CERTIFICATE_BYTES)
        bundle = read_bounded(folder / BUNDLE, MAX_BUNDLE_BYTES)
        first = load_certificates(certificate, MAX_CERTIFICATE_BYTES)[0]
        if hub.device_id != keys.device_id:
            raise FormatError(
                f"{folder}: {DEVICE_KEY} is not the key that was enrolled; enrol the device again"
            )
        return cls(folder, hub, keys, certificate, bundle, *_facts(first, bundle))

    @property
    def device_id(self) -> str:
        """64 hexadecimal digits."""
        return self.hub.device_id

    @property
    def link_address(self) -> str:
        """host:port of the server's link."""
        return self.hub.link_address

    @property
    def key_pem(self) -> bytes:
        """The device's private key, as TLS wants it."""
        return self.keys.device.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def bundle_sha256(self) -> bytes:
        """32 bytes that name the CA bundle: what Hello carries."""
        return bytes.fromhex(bundle_digest(self.bundle))

    def needs_renewal(self, now: float) -> bool:
        """Whether under a third of the certificate's time is left, or another CA has begun to sign devices.

        Args:
            now: Unix seconds by this device's clock.
        """
        issued = self.not_before + BACKDATED_S
        return not self.newest or now > self.not_after - (self.not_after - issued) / 3

    def expired(self, now: float) -> bool:
        """Whether the certificate has ended, by this device's clock."""
        return now > self.not_after

    def with_bundle(self, bundle: bytes) -> Identity:
        """Keep another CA bundle, which the server has sent over its authenticated link.

        Raises:
            FormatError: it holds no CA.
            FedgeError: the disk refuses it.
        """
        pins_of(load_certificates(bundle))
        if bundle == self.bundle:
            return self
        _write(self.folder, {BUNDLE: bundle})
        first = load_certificates(self.certificate, MAX_CERTIFICATE_BYTES)[0]
        return replace(self, bundle=bundle, newest=_facts(first, bundle)[2])

    def with_reply(self, hub: Hub, certificate: bytes, bundle: bytes) -> Identity:
        """Keep a renewed certificate, and what else the server may have changed.

        Raises:
            TrustError: the certificate is not this device's.
            FedgeError: the disk refuses it.
        """
        return commit(self.folder, self.keys, hub, certificate, bundle)


def is_enrolled(home: Path) -> bool:
    """Whether an enrolment was completed here."""
    return (home / FOLDER / HUB).exists()


def load_or_create_keys(folder: Path) -> Keys:
    """The keys in a folder, made and durable before anybody hears of them.

    Raises:
        UserError: others may read them.
        FormatError: they are damaged.
        FedgeError: the disk refuses them.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        for name, make in ((DEVICE_KEY, _new_p256), (SEALING_KEY, X25519PrivateKey.generate)):
            if not (folder / name).exists():
                pem = make().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
                write_atomically(folder / name, pem, mode=0o600)
    except OSError as error:
        raise FedgeError(f"{folder}: keys cannot be kept there ({error.strerror})") from error
    return load_keys(folder)


def load_keys(folder: Path) -> Keys:
    """The keys in a folder.

    Raises:
        UserError: others may read them.
        FormatError: absent, damaged or of another kind.
    """
    device, sealing = _load_key(folder / DEVICE_KEY), _load_key(folder / SEALING_KEY)
    if not isinstance(device, ec.EllipticCurvePrivateKey) or not is_p256(device.public_key()):
        raise FormatError(f"{folder / DEVICE_KEY}: must be an EC key on P-256")
    if not isinstance(sealing, X25519PrivateKey):
        raise FormatError(f"{folder / SEALING_KEY}: must be an X25519 key")
    return Keys(device, sealing)


def commit(folder: Path, keys: Keys, hub: Hub, certificate: bytes, bundle: bytes) -> Identity:
    """Check what a server gave this device and keep it; `hub.json` is written last.

    Raises:
        TrustError: the certificate is for another key or signed by no CA of the bundle.
        FedgeError: the disk refuses it.
    """
    issuers = load_certificates(bundle)
    pins_of(issuers)
    first = load_certificates(certificate, MAX_CERTIFICATE_BYTES)[0]
    if hub.device_id != keys.device_id or device_id_of(first) != keys.device_id:
        raise IdentityError("certificate: the server sent one for another key")
    if not any(_signed(first, issuer) for issuer in issuers):
        raise IdentityError("certificate: signed by none of the CAs that the server sent with it")
    _write(folder, {BUNDLE: bundle, CERTIFICATE: certificate, HUB: hub.to_bytes()})
    return Identity(folder, hub, keys, certificate, bundle, *_facts(first, bundle))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process at a time enrols or renews.

    Raises:
        FedgeError: another one does so now, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise FedgeError(f"{folder}: cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FedgeError(f"{folder}: another process enrols or renews now; try again") from error
        yield


def _facts(certificate: x509.Certificate, bundle: bytes) -> tuple[float, float, bool]:
    """Of a certificate: not before, not after, and whether the bundle's newest CA, its last, signed it."""
    newest = load_certificates(bundle)[-1]
    return (
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
        _signed(certificate, newest),
    )


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    key = issuer.public_key()
    return isinstance(key, ec.EllipticCurvePublicKey) and issued_by(certificate, key)


def _write(folder: Path, files: dict[str, bytes]) -> None:
    try:
        for name, data in files.items():
            write_atomically(folder / name, data, mode=0o600)
    except OSError as error:
        raise FedgeError(f"{folder}: {name} cannot be written ({error.strerror})") from error


def _new_p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _load_key(path: Path) -> Any:
    pem = read_bounded(path, _MAX_FILE_BYTES)
    if (mode := path.stat().st_mode & 0o777) & 0o077:
        raise UserError(f"{path}: others may read it (mode {mode:o}); run: chmod 600 {path}")
    try:
        return load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FormatError(f"{path}: damaged, no unencrypted private key; enrol the device again") from error
