from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from fedge.errors import FormatError, IdentityError, RevokedError
from fedge.identity import node_id_of
from fedge_client.agent.identity import load_or_create_keys
from fedge_server.identity.admission import (
    Rate,
    RateLimiter,
    check,
    check_freshness,
    check_token,
    peer_address,
    peer_of,
    secret_digest,
    split_token,
)
from fedge_server.identity.authority import Authority

NOW = 1_800_000_000.0
DAY = 86400.0


@dataclass(frozen=True)
class Row:
    status: str = "active"
    reason: str = ""


@dataclass(frozen=True)
class Token:
    secret_sha256: str
    expires: float = NOW + 10
    used_by: str | None = None


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca", clock=lambda: NOW)


@pytest.fixture
def csr(tmp_path: Path) -> bytes:
    return load_or_create_keys(tmp_path / "keys").request()


def test_a_device_of_this_authority_is_let_in_from_a_day_before_until_the_end(
    authority: Authority, csr: bytes
) -> None:
    peer = peer_of(authority.issue_device(csr, 168), authority.certificates)
    assert peer.node_id == node_id_of(peer.device_id)
    for moment in (NOW - DAY, NOW, NOW + 7 * DAY):
        check(peer, Row(), moment)
    with pytest.raises(IdentityError, match="certificate: not valid before 2027-01-14"):
        check(peer, Row(), NOW - DAY - 1)
    with pytest.raises(IdentityError, match="certificate: expired at 2027-01-22"):
        check(peer, Row(), NOW + 7 * DAY + 1)


def test_a_revoked_or_unknown_device_is_not(authority: Authority, csr: bytes) -> None:
    peer = peer_of(authority.issue_device(csr, 168), authority.certificates)
    with pytest.raises(RevokedError, match=r"revoked \(stolen\)"):
        check(peer, Row("revoked", "stolen"), NOW)
    with pytest.raises(IdentityError, match="is not enrolled here"):
        check(peer, None, NOW)


def test_only_authorities_that_are_trusted_now_count(authority: Authority, csr: bytes) -> None:
    old = authority.issue_device(csr, 168)
    authority.rotate()
    new = authority.issue_device(csr, 168)
    assert peer_of(old, authority.certificates).device_id == peer_of(new, authority.certificates).device_id
    authority.finish()
    assert peer_of(new, authority.certificates)
    with pytest.raises(IdentityError, match="not issued by this server's authority"):
        peer_of(old, authority.certificates)


def test_neither_the_servers_nor_the_cas_certificate_is_a_devices(authority: Authority) -> None:
    _, server = authority.issue_server(["localhost"], 90)
    for pem in (server, authority.certificates[0].public_bytes(Encoding.PEM)):
        with pytest.raises(IdentityError, match="not one of a device"):
            peer_of(pem, authority.certificates)


@pytest.mark.parametrize(
    "pem", [b"", b"x", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_what_is_no_certificate_is_refused_with_our_error(authority: Authority, pem: bytes) -> None:
    with pytest.raises((IdentityError, FormatError), match="certificate"):
        peer_of(pem, authority.certificates)


def test_a_token_lets_in_once_and_its_user_again() -> None:
    token = Token(secret_digest("secret"))
    check_token(token, "secret", "a", NOW)
    used = replace(token, used_by="a")
    check_token(used, "secret", "a", NOW)
    with pytest.raises(IdentityError, match="already used by another device"):
        check_token(used, "secret", "b", NOW)
    with pytest.raises(IdentityError, match="expired"):
        check_token(used, "secret", "a", NOW + 11)


def test_who_does_not_know_the_secret_learns_nothing() -> None:
    token = Token(secret_digest("secret"))
    for row in (None, token, replace(token, used_by="x"), replace(token, expires=0.0)):
        with pytest.raises(IdentityError, match="token: unknown"):
            check_token(row, "wrong", "a", NOW)


@given(st.text(max_size=200))
def test_any_text_is_a_token_or_refused(text: str) -> None:
    try:
        identifier, secret = split_token(text)
    except IdentityError:
        return
    assert f"{identifier}.{secret}" == text


@pytest.mark.parametrize("error", [-2 * DAY, -DAY, 0.0, DAY, 2 * DAY])
def test_a_renewal_may_be_two_days_off(error: float) -> None:
    check_freshness(NOW + error, NOW)


@pytest.mark.parametrize(
    "moment", [NOW - 2 * DAY - 1, NOW + 2 * DAY + 1, 0.0, 1e300, float("nan"), float("-inf")]
)
def test_a_renewal_may_not_be_older_or_from_the_future(moment: float) -> None:
    with pytest.raises(IdentityError, match="set the device's clock"):
        check_freshness(moment, NOW)


def test_a_rate_gives_its_burst_and_then_what_comes_in() -> None:
    limiter = RateLimiter(Rate(2, 0.5), Rate(100, 100))
    assert [limiter.take("a", 0.0) for _ in range(4)] == [0, 0, 2, 2]
    assert limiter.take("a", 1.0) == 1
    assert [limiter.take("a", 2.0), limiter.take("a", 2.0)] == [0, 2]
    assert [limiter.take("a", 1000.0) for _ in range(3)] == [0, 0, 2]  # no more than the burst gathers


def test_one_address_does_not_use_up_what_is_there_for_all() -> None:
    limiter = RateLimiter(Rate(2, 0.5), Rate(3, 0.1))
    for _ in range(50):
        limiter.take("a", 0.0)
    assert limiter.take("b", 0.0) == 0
    assert limiter.take("c", 0.0) == 10  # but all together may not have more than this


def test_a_clock_that_goes_back_gives_and_takes_nothing() -> None:
    limiter = RateLimiter(Rate(1, 1), Rate(100, 100))
    assert [limiter.take("a", moment) for moment in (100.0, 50.0, 51.0)] == [0, 1, 0]


def test_the_memory_of_a_limiter_is_bounded() -> None:
    limiter = RateLimiter(Rate(1, 0.001), Rate(1e9, 1e9), max_peers=10)
    for number in range(1000):
        assert limiter.take(str(number), 0.0) == 0
    assert len(limiter._peers) == 10
    assert limiter.take("999", 0.0) > 0


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1:567", "192.0.2.1"),
        ("ipv6:%5B2001:db8:1:2:3::4%5D:567", "2001:db8:1:2::/64"),
        ("ipv6:[::ffff:192.0.2.1]:567", "192.0.2.1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:567", "fe80::/64"),
        ("unix:", "unix"),
        ("", ""),
    ],
)
def test_an_address_is_counted_without_its_port(peer: str, address: str) -> None:
    assert peer_address(peer) == address
