"""Device and server together: real gRPC, real certificates, real files."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedge.errors import FedgeError, IdentityError, RevokedError, UserError
from fedge.files import write_atomically
from fedge.identity import JoinString, device_id_of, sign_renewal
from fedge.wire.v1 import enrolment_pb2 as pb
from fedge.wire.v1 import enrolment_pb2_grpc
from fedge_client.agent import identity as files
from fedge_client.agent.diagnosis import diagnose
from fedge_client.agent.enrolment import check_server, enrol, renew, server_certificate
from fedge_client.agent.identity import Identity, Keys, load_or_create_keys
from fedge_server.identity.admission import Rate, RateLimiter
from fedge_server.identity.authority import Authority, ServerCertificate

DAY = 86400.0
ERRORS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def call_link(server: Any, identity: Identity, channel: Any = None) -> str:
    """The device id that the link answers to this device."""
    if channel is None:
        with channel_of(server, identity) as made:
            return call_link(server, identity, made)
    return channel.unary_unary("/fedge.v1.Link/WhoAmI")(b"", timeout=5).decode()


def channel_of(server: Any, identity: Identity) -> Any:
    credentials = grpc.ssl_channel_credentials(identity.bundle, identity.key_pem, identity.certificate)
    return grpc.secure_channel(f"localhost:{server.link_port}", credentials)


def code_of(work: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        work()
    return caught.value.code()  # type: ignore[attr-defined,no-any-return]


def raw(server: Any) -> Any:
    """A stub of Enrolment, for requests that no device of ours sends."""
    credentials = grpc.ssl_channel_credentials(server.authority.bundle)
    channel = grpc.secure_channel(f"localhost:{server.enrolment_port}", credentials)
    return enrolment_pb2_grpc.EnrolmentStub(channel)


def request_of(keys: Keys, join: JoinString, **changes: Any) -> pb.EnrolRequest:
    values = {
        "wire_version": 2,
        "token": join.token,
        "csr": keys.request(),
        "sealing_key": keys.sealing_public,
        "fedge_version": "0.1.0",
    }
    return pb.EnrolRequest(**{**values, **changes})


@pytest.fixture
def device(server: Any, tmp_path: Path) -> Identity:
    return enrol(tmp_path / "device", server.join())


def test_a_join_string_makes_a_device_that_the_link_knows(server: Any, tmp_path: Path) -> None:
    join = JoinString.parse(str(server.join("board")))
    made = enrol(tmp_path / "device", join)
    row = server.registry.devices.get(made.device_id)
    assert (made.hub.tier, row.tier, row.status) == ("board", "board", "active")
    assert (made.hub.node_id, row.sealing_key) == (row.node_id, made.keys.sealing_public.hex())
    assert made.hub.link_address == f"localhost:{server.link_port}"
    assert made.bundle == server.authority.bundle
    assert row.bundle == server.authority.bundle_digest
    assert Identity.open(tmp_path / "device").certificate == made.certificate
    assert call_link(server, made) == made.device_id


def test_the_key_never_leaves_and_only_its_owner_may_read_it(device: Identity, server: Any) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in device.folder.iterdir()}
    assert modes[files.DEVICE_KEY] == modes[files.SEALING_KEY] == 0o600
    assert device.folder.stat().st_mode & 0o777 == 0o700
    assert device.key_pem not in (server.home / "fedge.db").read_bytes()


def test_an_enrolled_device_enrols_again_with_its_key_and_may_change_its_tier(
    server: Any, device: Identity
) -> None:
    again = enrol(device.folder.parent, server.join("board"))
    assert (again.device_id, again.hub.tier) == (device.device_id, "board")
    assert [row.tier for row in server.registry.devices.all()] == ["board"]


def test_an_enrolled_device_survives_a_join_string_that_is_over(
    server: Any, device: Identity, make_server: Any
) -> None:
    used = server.join()
    enrol(device.folder.parent.parent / "other", used)
    for join in (used, server.join(hours=1e-9)):
        assert enrol(device.folder.parent, join).device_id == device.device_id


def test_a_device_that_the_server_has_lost_comes_back_with_a_token(server: Any, device: Identity) -> None:
    with server.registry.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM tokens")
        connection.exec_driver_sql("DELETE FROM devices")
    with pytest.raises(UserError, match="token: unknown"):
        enrol(device.folder.parent, replace(server.join(), secret="A" * 32))
    assert enrol(device.folder.parent, server.join()).device_id == device.device_id


def test_a_home_of_another_server_is_refused(device: Identity, tmp_path: Path, server: Any) -> None:
    other = Authority.create(tmp_path / "other")
    with pytest.raises(UserError, match="enrolled with another server"):
        enrol(device.folder.parent, server.join(pin=other.pin))


def test_an_ipv6_address_serves_as_well(make_server: Any, tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    server = make_server("server6")
    server.stop()
    server.name, server.listen, server.link_port, server.enrolment_port = "::1", "[::1]", 0, 0
    server.start()
    made = enrol(tmp_path / "device", JoinString.parse(str(server.join())))
    assert made.hub.link_address == f"[::1]:{server.link_port}"
    assert renew(made).device_id == made.device_id
    assert diagnose(made, made.hub.link_address).kind == "ok"


def test_successes_and_refusals_are_logged_without_the_secret(
    server: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    join = server.join()
    with caplog.at_level("INFO", logger="fedge.hub"):
        made = renew(enrol(tmp_path / "device", join))
        with pytest.raises(UserError):
            enrol(tmp_path / "other", join)
    lines = [record.getMessage() for record in caplog.records]
    assert f"enrolled device {made.device_id}, tier micro, with token {join.token_id}, from 127" in lines[0]
    assert lines[1].startswith(f"renewed the certificate of device {made.device_id}, from ")
    assert "refused enrol from" in lines[2]
    assert "already used by another device" in lines[2]
    assert join.secret not in caplog.text


class TestTokens:
    def test_a_used_token_lets_no_other_key_in(self, server: Any, tmp_path: Path) -> None:
        join = server.join()
        enrol(tmp_path / "first", join)
        with pytest.raises(UserError, match="already used by another device"):
            enrol(tmp_path / "second", join)
        assert len(server.registry.devices.all()) == 1

    def test_a_lost_reply_can_be_asked_for_again_with_the_same_key(self, server: Any, tmp_path: Path) -> None:
        join = server.join()
        first = enrol(tmp_path / "device", join)
        (first.folder / files.HUB).unlink()  # as if the reply had never been kept
        again = enrol(tmp_path / "device", join)
        assert again.device_id == first.device_id
        assert len(server.registry.devices.all()) == 1

    def test_an_expired_token_is_refused_also_for_the_key_that_used_it(
        self, server: Any, tmp_path: Path
    ) -> None:
        join = server.join(hours=1)
        first = enrol(tmp_path / "device", join)
        (first.folder / files.HUB).unlink()
        server.shift = 3700.0
        with pytest.raises(UserError, match="token: expired at"):
            enrol(tmp_path / "device", join)

    def test_a_wrong_secret_and_an_unknown_id_look_the_same(self, server: Any, tmp_path: Path) -> None:
        said = []
        for change in ({"secret": "A" * 32}, {"token_id": "0" * 16}):
            with pytest.raises(UserError) as caught:
                enrol(tmp_path / "device", replace(server.join(), **change))
            said.append(str(caught.value))
        assert said[0] == said[1]
        assert "token: unknown" in said[0]

    def test_of_two_keys_at_once_only_one_gets_in(self, server: Any, tmp_path: Path) -> None:
        join = server.join()

        def attempt(number: int) -> bool:
            try:
                enrol(tmp_path / str(number), join)
            except UserError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(attempt, range(4))) == 1
        assert len(server.registry.devices.all()) == 1


class TestWhatIsRefused:
    def test_another_authority_in_between_never_sees_the_token(
        self, server: Any, tmp_path: Path, make_server: Any
    ) -> None:
        middle = make_server("middle")
        join = server.join(port=middle.enrolment_port)
        with pytest.raises(UserError, match="not from the CA that the join string pins"):
            enrol(tmp_path / "device", join)
        assert server.registry.devices.token(join.token_id).used_by is None

    def test_a_device_cannot_pose_as_the_server(self, server: Any, device: Identity, tmp_path: Path) -> None:
        # The same authority has signed its certificate, but not for this use.
        write_atomically(server.home / "tls" / "server.pem", device.key_pem + device.certificate)
        server.restart()
        with pytest.raises(UserError, match="not from the CA that the join string pins"):
            enrol(tmp_path / "second", server.join())

    def test_a_name_that_the_certificate_does_not_hold_is_explained(self, server: Any) -> None:
        leaf = server_certificate("localhost", server.enrolment_port, 5)
        join = server.join(host="fedge.example.org")
        with pytest.raises(
            UserError, match=r"fedge\.example\.org: the server's certificate is for .*localhost"
        ):
            check_server(leaf, join, time.time())

    def test_a_clock_that_is_weeks_wrong_is_told(self, server: Any, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="clock: this device's says 20"):
            enrol(tmp_path / "device", server.join(), now=time.time() - 8 * DAY)

    def test_a_name_that_does_not_resolve_is_an_outage(self, server: Any, tmp_path: Path) -> None:
        with pytest.raises(FedgeError, match="does not resolve") as caught:
            enrol(tmp_path / "device", server.join(host="no-such-host.invalid"))
        assert caught.value.exit_code == 1

    def test_nobody_listening_is_an_outage(self, server: Any, tmp_path: Path) -> None:
        join = server.join()
        server.stop()
        with pytest.raises(FedgeError, match="no server answers there") as caught:
            enrol(tmp_path / "device", join)
        assert caught.value.exit_code == 1

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"csr": b""}, "malformed"),
            ({"csr": b"\x30" * 5000}, "over the 4096"),
            ({"sealing_key": b"short"}, "sealing key"),
            ({"wire_version": 0}, "wire version 0"),
            ({"fedge_version": "1" * 65}, "fedge version"),
        ],
    )
    def test_a_malformed_request(
        self, server: Any, tmp_path: Path, change: dict[str, Any], said: str
    ) -> None:
        keys = load_or_create_keys(tmp_path / "keys")
        with pytest.raises(grpc.RpcError) as caught:
            raw(server).Enrol(request_of(keys, server.join(), **change))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        assert said in caught.value.details()  # type: ignore[attr-defined]

    @pytest.mark.parametrize("token", ["", "x", "a.b.c" * 100, "é.b", "0" * 16 + "."])
    def test_a_malformed_token(self, server: Any, tmp_path: Path, token: str) -> None:
        keys = load_or_create_keys(tmp_path / "keys")
        request = request_of(keys, server.join(), token=token)
        assert code_of(lambda: raw(server).Enrol(request)) is grpc.StatusCode.UNAUTHENTICATED

    def test_a_message_over_its_maximum(self, server: Any, tmp_path: Path) -> None:
        keys = load_or_create_keys(tmp_path / "keys")
        request = request_of(keys, server.join(), fedge_version="1" * 100_000)
        assert code_of(lambda: raw(server).Enrol(request)) is grpc.StatusCode.RESOURCE_EXHAUSTED

    def test_who_asks_too_often_is_told_how_long_to_wait(self, server: Any, tmp_path: Path) -> None:
        server.limiter = RateLimiter(per_peer=Rate(2, 0.01))
        server.restart()
        for name in ("first", "second"):
            enrol(tmp_path / name, server.join())
        with pytest.raises(FedgeError, match=r"too many requests; ask again in \d+ s"):
            enrol(tmp_path / "third", server.join())


class TestRenewal:
    def test_gives_the_same_device_a_later_certificate(self, server: Any, device: Identity) -> None:
        server.shift = 1.5 * DAY
        later = renew(device)
        assert later.device_id == device.device_id
        assert later.not_after - device.not_after == pytest.approx(1.5 * DAY, abs=10)
        assert Identity.open(device.folder.parent).certificate == later.certificate

    def test_works_after_the_certificate_has_expired(self, server: Any, device: Identity) -> None:
        old = Authority.open(server.authority.folder, clock=lambda: time.time() - 30 * DAY)
        expired = device.with_reply(device.hub, old.issue_device(device.keys.request(), 168), device.bundle)
        assert expired.expired(time.time())
        assert code_of(lambda: call_link(server, expired)) is grpc.StatusCode.UNAVAILABLE
        assert call_link(server, renew(expired)) == device.device_id

    def test_is_for_devices_that_are_enrolled_and_not_revoked(
        self, server: Any, device: Identity, tmp_path: Path
    ) -> None:
        stranger = replace(device, keys=load_or_create_keys(tmp_path / "keys"))
        with pytest.raises(IdentityError, match="is not enrolled here"):
            renew(stranger)
        server.registry.devices.revoke(device.device_id, "stolen")
        with pytest.raises(RevokedError, match=r"revoked \(stolen\)"):
            renew(device)

    def test_needs_a_signature_of_the_key_over_this_request_and_time(
        self, server: Any, device: Identity, tmp_path: Path
    ) -> None:
        csr, now = device.keys.request(), time.time()
        other = load_or_create_keys(tmp_path / "keys").device
        signature = sign_renewal(device.keys.device, csr, now)
        for bad in (
            pb.RenewRequest(wire_version=2, csr=csr, time=now, signature=sign_renewal(other, csr, now)),
            pb.RenewRequest(wire_version=2, csr=csr, time=now + 1, signature=signature),
            pb.RenewRequest(wire_version=2, csr=device.keys.request(), time=now, signature=signature),
            pb.RenewRequest(wire_version=2, csr=csr, time=now, signature=b""),
        ):
            assert code_of(lambda bad=bad: raw(server).Renew(bad)) is grpc.StatusCode.UNAUTHENTICATED

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0, -1e300])
    def test_refuses_a_time_that_is_none(self, server: Any, device: Identity, wrong: float) -> None:
        with pytest.raises(IdentityError, match="renewal: the device's clock says"):
            renew(device, now=wrong)

    def test_a_replayed_renewal_gives_a_certificate_for_the_same_key_only(
        self, server: Any, device: Identity
    ) -> None:
        csr, now = device.keys.request(), time.time()
        signature = sign_renewal(device.keys.device, csr, now)
        request = pb.RenewRequest(wire_version=2, csr=csr, time=now, signature=signature)
        replies = [raw(server).Renew(request) for _ in range(2)]
        owners = {device_id_of(files.load_certificates(reply.certificate)[0]) for reply in replies}
        assert owners == {device.device_id}

    def test_is_due_when_a_third_is_left(self, device: Identity) -> None:
        issued = device.not_after - 7 * DAY
        assert not device.needs_renewal(issued + 4.6 * DAY)
        assert device.needs_renewal(issued + 4.7 * DAY)


@pytest.mark.parametrize("hours", [-24.0, 24.0], ids=["a day behind", "a day ahead"])
def test_a_device_whose_clock_is_a_day_wrong_enrols_connects_and_renews(
    server: Any, tmp_path: Path, hours: float
) -> None:
    # The server's clock is moved and its certificate made anew; this machine's is the device's.
    server.shift = -hours * 3600
    (server.home / "tls" / "server.pem").unlink()
    server.authority.ensure_server_certificate(server.home / "tls", ["localhost"], 90)
    server.restart()
    made = enrol(tmp_path / "device", server.join())
    assert call_link(server, made) == made.device_id
    assert call_link(server, renew(made)) == made.device_id
    assert diagnose(made, made.hub.link_address).kind == "ok"


class TestTheLinkRefuses:
    def test_a_device_without_a_certificate(self, server: Any) -> None:
        credentials = grpc.ssl_channel_credentials(server.authority.bundle)
        with grpc.secure_channel(f"localhost:{server.link_port}", credentials) as channel:
            work = channel.unary_unary("/fedge.v1.Link/WhoAmI")
            assert code_of(lambda: work(b"", timeout=5)) is grpc.StatusCode.UNAVAILABLE

    def test_a_certificate_of_another_authority(self, server: Any, device: Identity, tmp_path: Path) -> None:
        other = Authority.create(tmp_path / "other")
        forged = replace(device, certificate=other.issue_device(device.keys.request(), 168))
        assert code_of(lambda: call_link(server, forged)) is grpc.StatusCode.UNAVAILABLE

    def test_the_servers_own_certificate(self, server: Any) -> None:
        shown = ServerCertificate.load(server.home / "tls")
        credentials = grpc.ssl_channel_credentials(server.authority.bundle, shown.key, shown.chain)
        with grpc.secure_channel(f"localhost:{server.link_port}", credentials) as channel:
            work = channel.unary_unary("/fedge.v1.Link/WhoAmI")
            code = code_of(lambda: work(b"", timeout=5))
        assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNKNOWN)

    def test_an_expired_certificate_at_the_handshake(self, server: Any, device: Identity) -> None:
        old = Authority.open(server.authority.folder, clock=lambda: time.time() - 30 * DAY)
        expired = replace(device, certificate=old.issue_device(device.keys.request(), 168))
        assert code_of(lambda: call_link(server, expired)) is grpc.StatusCode.UNAVAILABLE

    def test_a_certificate_that_expires_on_a_live_connection(self, server: Any, device: Identity) -> None:
        with channel_of(server, device) as channel:
            assert call_link(server, device, channel) == device.device_id
            server.shift = 8 * DAY
            assert code_of(lambda: call_link(server, device, channel)) in ERRORS

    def test_a_device_that_is_revoked_on_a_live_connection(self, server: Any, device: Identity) -> None:
        with channel_of(server, device) as channel:
            assert call_link(server, device, channel) == device.device_id
            server.registry.devices.revoke(device.device_id, "")
            assert code_of(lambda: call_link(server, device, channel)) is grpc.StatusCode.PERMISSION_DENIED


def test_an_authority_is_rotated_under_a_device_that_stays(server: Any, device: Identity) -> None:
    home, authority = device.folder.parent, server.authority
    authority.rotate()
    server.restart()
    assert call_link(server, device) == device.device_id  # it has heard of nothing yet
    told = Identity.open(home).with_bundle(authority.bundle)
    assert call_link(server, told) == device.device_id  # knows both, its certificate is of the first
    assert not device.needs_renewal(time.time())
    assert told.needs_renewal(time.time())  # the newest authority has not signed it
    renewed = renew(told)
    assert not renewed.needs_renewal(time.time())
    assert call_link(server, renewed) == device.device_id
    authority.finish()
    assert authority.ensure_server_certificate(server.home / "tls", ["localhost"], 90)
    server.restart()
    assert call_link(server, renewed) == device.device_id
    assert code_of(lambda: call_link(server, told)) is grpc.StatusCode.UNAVAILABLE
    told.with_reply(told.hub, told.certificate, told.bundle)  # as if it had not renewed before
    assert diagnose(told, told.hub.link_address).kind == "own_certificate_refused"
    assert call_link(server, renew(told)) == device.device_id  # and can still do so
    assert renew(renewed).bundle == authority.bundle
