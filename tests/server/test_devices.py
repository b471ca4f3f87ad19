"""Devices and tokens, on SQLite and PostgreSQL alike."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from fedge.errors import TrustError, UserError
from fedge_server.registry.database import Registry
from fedge_server.registry.devices import UNUSED_S, DeviceRow

ONE, TWO = "1" * 64, "2" * 64


def enrol(registry: Registry, device_id: str = ONE, token_id: str = "t", **changes: Any) -> DeviceRow:
    values = {
        "node_id": int(device_id[0]),
        "public_key": "pem",
        "sealing_key": "ab" * 32,
        "tier": "micro",
        "fedge_version": "0.1",
        "wire_version": 2,
        "not_after": 2e9,
    }
    return registry.devices.enrol(device_id=device_id, token_id=token_id, **{**values, **changes})


@pytest.fixture(autouse=True)
def token(registry: Registry) -> None:
    registry.devices.create_token(token_id="t", secret_sha256="s" * 64, tier="micro", expires=2e9)


def test_a_device_enrols_with_a_token_and_is_found_again(registry: Registry) -> None:
    device = enrol(registry, node_id=2**63 - 1)
    assert registry.devices.get(ONE) == device
    assert registry.devices.all() == [device]
    assert (device.node_id, device.status, device.tier, device.bundle) == (2**63 - 1, "active", "micro", "")
    assert (device.last_seen, device.revoked) == (None, None)
    used = registry.devices.token("t")
    assert used is not None
    assert (used.used_by, used.used) == (ONE, device.enrolled)
    assert registry.devices.get(TWO) is None


def test_the_same_device_may_use_its_token_again_because_the_reply_may_be_lost(registry: Registry) -> None:
    first = enrol(registry)
    again = enrol(registry, not_after=3e9)
    assert (again.enrolled, again.certificate_not_after) == (first.enrolled, 3e9)
    assert len(registry.devices.all()) == 1


def test_a_token_lets_one_device_in_even_when_many_try_at_once(registry: Registry) -> None:
    def attempt(number: int) -> bool:
        try:
            enrol(registry, f"{number}" * 64)
        except TrustError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(1, 9))) == 1
    assert len(registry.devices.all()) == 1


def test_a_token_that_is_not_there_or_taken_back_lets_nobody_in(registry: Registry) -> None:
    with pytest.raises(TrustError, match="'x': there is none"):
        enrol(registry, token_id="x")
    registry.devices.delete_token("t")
    with pytest.raises(TrustError, match="'t': there is none"):
        enrol(registry)
    with pytest.raises(UserError, match="there is none"):
        registry.devices.delete_token("t")
    assert registry.devices.all() == []
    assert registry.devices.tokens() == []


def test_tokens_that_nobody_used_go_long_after_their_end(registry: Registry) -> None:
    enrol(registry)
    new = partial(registry.devices.create_token, secret_sha256="s" * 64, tier="micro")
    new(token_id="old", expires=time.time() - UNUSED_S - 60)
    new(token_id="ended", expires=time.time() - UNUSED_S + 60)
    new(token_id="open", expires=2e9)
    assert {row.id for row in registry.devices.tokens()} == {"t", "ended", "open"}


def test_a_revoked_device_stays_out(registry: Registry) -> None:
    enrol(registry)
    revoked = registry.devices.revoke(ONE, "stolen")
    assert (revoked.status, revoked.reason) == ("revoked", "stolen")
    assert registry.devices.revoke(ONE, "later") == revoked
    registry.devices.create_token(token_id="u", secret_sha256="s" * 64, tier="micro", expires=2e9)
    with pytest.raises(TrustError, match="is revoked"):
        enrol(registry, token_id="u")
    token = registry.devices.token("u")
    assert token is not None
    assert token.used_by is None
    with pytest.raises(UserError, match="there is none"):
        registry.devices.revoke(TWO, "")


def test_two_devices_do_not_share_a_node_id(registry: Registry) -> None:
    enrol(registry, ONE, node_id=5)
    registry.devices.create_token(token_id="u", secret_sha256="s" * 64, tier="micro", expires=2e9)
    with pytest.raises(TrustError, match="node id 5 belongs to"):
        enrol(registry, TWO, token_id="u", node_id=5)


def test_what_happens_to_a_device_is_remembered(registry: Registry) -> None:
    enrol(registry)
    registry.devices.seen({})
    registry.devices.seen({ONE: 12.5, TWO: 1.0})
    registry.devices.renewed(ONE, 2.5e9, "b" * 64)
    registry.devices.introduced(ONE, wire_version=1, fedge_version="0.2", bundle="")
    device = registry.devices.get(ONE)
    assert device is not None
    assert (device.last_seen, device.certificate_not_after, device.bundle) == (12.5, 2.5e9, "b" * 64)
    assert (device.wire_version, device.fedge_version) == (1, "0.2")


def test_a_device_cannot_say_what_one_of_the_databases_refuses(registry: Registry) -> None:
    with pytest.raises(TrustError, match="there is none"):
        enrol(registry, token_id="t\0")
    assert registry.devices.token("t\0") is None
    device = enrol(registry, wire_version=2**32 - 1, fedge_version="0.1\0" + "x" * 1000)
    assert (device.wire_version, device.fedge_version) == (2**31 - 1, "0.1" + "x" * 61)
    registry.devices.introduced(ONE, wire_version=2**32 - 1, fedge_version="\0\n0.2", bundle="")
    again = registry.devices.get(ONE)
    assert again is not None
    assert again.fedge_version == "0.2"
