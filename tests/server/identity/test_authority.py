from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedge.errors import FormatError, UserError
from fedge.identity import device_id_of, has_usage, issued_by, load_certificates, pin_of
from fedge_server.identity import authority as module
from fedge_server.identity.authority import Authority, ServerCertificate
from fedge_server.identity.requests import csr_key

NOW = 1_800_000_000.0
DAY = 86400.0
KEY = ec.generate_private_key(ec.SECP256R1())


def csr(key: Any = KEY, *, name: str = "anybody", ca: bool = False) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder(subject)
    if ca:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else SHA256()
    return builder.sign(key, algorithm).public_bytes(Encoding.DER)


class Clock:
    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authority(tmp_path: Path, clock: Clock) -> Authority:
    return Authority.create(tmp_path / "ca", clock=clock)


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def test_a_ca_is_p256_for_ten_years_and_signs_no_further_ca(authority: Authority) -> None:
    (ca,) = authority.certificates
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    assert (usage.key_cert_sign, usage.digital_signature) == (True, False)
    assert ca.not_valid_after_utc - at(NOW) == timedelta(days=3653)
    assert issued_by(ca, ca.public_key())  # type: ignore[arg-type]
    assert authority.pin == pin_of(ca.public_key())  # type: ignore[arg-type]


def test_the_key_is_for_its_owner_alone(authority: Authority) -> None:
    assert authority.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in authority.folder.glob("*.pem")} == {0o600}
    (authority.folder / "1.pem").chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        Authority.open(authority.folder)


def test_an_authority_is_never_overwritten(authority: Authority) -> None:
    with pytest.raises(UserError, match="never overwritten"):
        Authority.create(authority.folder)
    assert Authority.open(authority.folder).bundle == authority.bundle


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 100_000])
def test_a_damaged_authority_is_no_authority(authority: Authority, content: bytes) -> None:
    (authority.folder / "1.pem").write_bytes(content)
    with pytest.raises(FormatError, match=r"1\.pem"):
        Authority.open(authority.folder)


def test_an_empty_folder_is_no_authority(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no certificate authority"):
        Authority.open(tmp_path)


def test_key_and_certificate_of_two_cas_do_not_mix(authority: Authority, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other")
    key = (authority.folder / "1.pem").read_bytes().partition(b"-----BEGIN CERT")[0]
    (authority.folder / "1.pem").write_bytes(key + other.bundle)
    with pytest.raises(FormatError, match="do not belong together"):
        Authority.open(authority.folder)


def test_a_device_gets_what_fedge_decides_whatever_it_asks_for(authority: Authority) -> None:
    (made,) = load_certificates(authority.issue_device(csr(name="admin", ca=True), 168))
    assert made.subject.rfc4514_string() == f"CN={device_id_of(KEY.public_key())}"
    assert has_usage(made, ExtendedKeyUsageOID.CLIENT_AUTH)
    assert not has_usage(made, ExtendedKeyUsageOID.SERVER_AUTH)
    assert made.not_valid_before_utc == at(NOW - DAY)
    assert made.not_valid_after_utc == at(NOW + 7 * DAY)
    made.verify_directly_issued_by(authority.certificates[0])


def test_no_certificate_outlives_the_ca(authority: Authority, clock: Clock) -> None:
    clock.now = NOW + 3650 * DAY
    (made,) = load_certificates(authority.issue_device(csr(), 168))
    assert made.not_valid_after_utc == authority.certificates[0].not_valid_after_utc


def test_weak_and_foreign_keys_are_refused() -> None:
    for key in (
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP256K1()),
        ed25519.Ed25519PrivateKey.generate(),
    ):
        with pytest.raises(FormatError, match="P-256"):
            csr_key(csr(key))


def test_a_request_that_its_key_did_not_sign_is_refused() -> None:
    good = csr()
    with pytest.raises(FormatError, match="certificate request"):
        csr_key(good[:-1] + bytes([good[-1] ^ 1]))
    for length in range(0, len(good), 7):
        with pytest.raises(FormatError, match="certificate request"):
            csr_key(good[:length])


def test_the_server_gets_names_and_those_of_its_own_machine(authority: Authority, tmp_path: Path) -> None:
    assert authority.ensure_server_certificate(tmp_path / "tls", ["Fedge.example.org", "192.0.2.1"], 90)
    shown = ServerCertificate.load(tmp_path / "tls")
    assert shown.names == {"fedge.example.org", "192.0.2.1", "localhost", "127.0.0.1", "::1"}
    assert has_usage(shown.certificate, ExtendedKeyUsageOID.SERVER_AUTH)
    assert shown.certificate.not_valid_before_utc == at(NOW - 7 * DAY)
    assert shown.not_after == NOW + 90 * DAY
    assert (tmp_path / "tls" / "server.pem").stat().st_mode & 0o777 == 0o600


def test_the_servers_certificate_is_renewed_when_it_is_due(
    authority: Authority, clock: Clock, tmp_path: Path
) -> None:
    def ensure(*names: str) -> bool:
        return authority.ensure_server_certificate(tmp_path, names, 90)

    assert [ensure("a"), ensure("a"), ensure("a", "b"), ensure("b", "a")] == [True, False, True, False]
    clock.now = NOW + 60 * DAY
    assert not ensure("a", "b")
    clock.now = NOW + 60 * DAY + 1
    assert [ensure("a", "b"), ensure("a", "b")] == [True, False]
    (tmp_path / "server.pem").write_bytes(b"damaged")
    assert [ensure("a", "b"), ensure("a", "b")] == [True, False]


@pytest.mark.parametrize(
    "name", ["", "a b", "http://a", "a:9444", "*.example.org", "-a", "a..b", "999.1.1.1", "a" * 64, "é"]
)
def test_what_is_no_name_is_refused(authority: Authority, name: str) -> None:
    with pytest.raises(UserError, match="neither a host name nor an address"):
        authority.issue_server([name], 90)


def test_rotation_is_two_stages_that_each_happen_once(authority: Authority, tmp_path: Path) -> None:
    old = authority.certificates[0]
    authority.ensure_server_certificate(tmp_path / "tls", ["a"], 90)
    with pytest.raises(UserError, match="no rotation is under way"):
        authority.finish()
    authority.rotate()
    assert authority.certificates[0] == old
    new = authority.certificates[1]
    assert authority.pin == pin_of(old.public_key())  # type: ignore[arg-type]  # of the server's CA
    assert not authority.ensure_server_certificate(tmp_path / "tls", ["a"], 90)
    load_certificates(authority.issue_device(csr(), 1))[0].verify_directly_issued_by(new)
    with pytest.raises(UserError, match="a rotation is under way"):
        authority.rotate()
    authority.finish()
    assert authority.certificates == (new,)
    assert authority.ensure_server_certificate(tmp_path / "tls", ["a"], 90)
    ServerCertificate.load(tmp_path / "tls").certificate.verify_directly_issued_by(new)


def test_another_process_sees_a_rotation_when_it_reloads(authority: Authority) -> None:
    other = Authority.open(authority.folder)
    authority.rotate()
    assert not other.rotating
    other.reload()
    assert other.bundle == authority.bundle
    assert other.bundle_digest == authority.bundle_digest


def test_a_ca_that_goes_while_the_folder_is_read_is_our_error(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority.rotate()
    real = module._read_pair

    def read_and_lose(path: Path) -> Any:
        pair = real(path)
        if path.name == "1.pem":  # another process ends the rotation
            path.unlink()
        return pair

    monkeypatch.setattr(module, "_read_pair", read_and_lose)
    with pytest.raises(FormatError, match=r"1\.pem"):
        authority.reload()
    monkeypatch.undo()
    authority.reload()  # the other one is there
    assert not authority.rotating


def test_a_rotation_that_was_killed_has_happened_or_not(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        authority.rotate()
    monkeypatch.undo()
    assert not Authority.open(authority.folder).rotating
    authority.rotate()
    monkeypatch.setattr(module, "sync_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        authority.finish()
    assert not Authority.open(authority.folder).rotating


def test_the_default_clock_is_the_machines(tmp_path: Path) -> None:
    made = Authority.create(tmp_path / "ca").certificates[0]
    assert abs(made.not_valid_after_utc.timestamp() - 3653 * DAY - time.time()) < 60
