"""Sealed releases: what is published opens with kept keys alone, and no signer signs what it cannot read."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from places import Client, Place, model_of

from fedge.artefact import pack
from fedge.delivery import ReleaseNote, target_path
from fedge.errors import AbsentError, DigestError, ForbiddenError, FormatError, RefusedError, UserError
from fedge.files import sha256
from fedge.sealing import FORMAT, key_id, new_key, sealed_bytes, unwrap
from fedge_server.registry.devices import DeviceRow
from fedge_server.repository import ContentKeys, Request, Sealed, reasons_against
from fedge_server.repository.wrapping import wrapped_key

WIRE = pack(model_of(1))


@pytest.fixture
def keys(tmp_path: Path) -> ContentKeys:
    return ContentKeys(tmp_path / "keys" / "content")


@pytest.fixture
def sealing_place(tmp_path: Path, keys: ContentKeys) -> Place:
    return Place(tmp_path / "sealed", options={"content_keys": keys}).make()


def test_what_devices_can_read_is_a_ciphertext_that_opens_to_the_manifests_variant(
    sealing_place: Place, keys: ContentKeys, tmp_path: Path
) -> None:
    release = sealing_place.publish(1, "micro")
    client = Client(tmp_path / "device", sealing_place)
    target = client.look(target_path("micro", 1, "model"))
    assert target is not None
    note = ReleaseNote.from_json(target.custom)
    assert note.sealing is not None
    assert note.sealing.format == FORMAT
    assert target.length == sealed_bytes(len(WIRE)) == sealed_bytes(release.variant("micro").wire_bytes)
    ciphertext = client.model()
    assert keys.opened(ciphertext, "micro", 1) == WIRE
    assert key_id(keys.key("micro", 1)) == note.sealing.key
    readable = b"".join(sealing_place.files().values())
    assert WIRE not in readable
    assert keys.key("micro", 1) not in readable


def test_each_tier_and_version_has_a_key_of_its_own_that_only_its_owner_reads(
    sealing_place: Place, keys: ContentKeys
) -> None:
    sealing_place.publish(1)
    sealing_place.publish(2)
    found = {path.name: path.read_bytes() for path in keys.folder.iterdir()}
    assert sorted(found) == ["board.1", "board.2", "micro.1", "micro.2"]
    assert len(set(found.values())) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys.folder.iterdir()} == {0o600}
    assert stat.S_IMODE(keys.folder.stat().st_mode) == 0o700
    (keys.folder / "micro.1").chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        keys.key("micro", 1)


def test_a_key_goes_with_the_offer_of_its_version(sealing_place: Place, keys: ContentKeys) -> None:
    for number in (1, 2, 3):
        sealing_place.publish(number, "micro")
    sealing_place.repository.raise_floor("micro", 3, sealing_place.of("tier-micro"))
    assert [path.name for path in keys.folder.iterdir()] == ["micro.3"]
    with pytest.raises(AbsentError, match="publish the content again"):
        keys.key("micro", 2)


def test_old_content_is_sealed_anew_under_its_higher_version(
    sealing_place: Place, keys: ContentKeys, tmp_path: Path
) -> None:
    first = sealing_place.publish(1, "micro")
    sealing_place.publish(2, "micro")
    old = Client(tmp_path / "device", sealing_place).model()

    def again(version: int) -> Any:
        return replace(first, version=version)

    release = sealing_place.repository.publish(again, [], sealing_place.of("tier-micro"), floors={"micro": 3})
    ciphertext = Client(tmp_path / "device", sealing_place).model()
    assert (release.version, ciphertext != old) == (3, True)
    assert keys.opened(ciphertext, "micro", 3) == WIRE
    assert [path.name for path in keys.folder.iterdir()] == ["micro.3"]


def test_sealed_and_unsealed_releases_may_follow_one_another(
    sealing_place: Place, keys: ContentKeys, tmp_path: Path
) -> None:
    first = sealing_place.publish(1, "micro")
    sealing_place.options = {}
    sealing_place.publish(2, "micro")
    client = Client(tmp_path / "device", sealing_place)
    assert client.model() == pack(model_of(2))
    with pytest.raises(FormatError, match="was not handed in"):
        sealing_place.repository.publish(
            lambda version: replace(first, version=version), [], sealing_place.of("tier-micro")
        )
    sealing_place.options = {"content_keys": keys}
    sealing_place.publish(3, "micro")
    assert keys.opened(client.model(), "micro", 3) == pack(model_of(3))


def test_what_was_signed_stays_on_offer_when_its_key_is_lost(
    sealing_place: Place, keys: ContentKeys, tmp_path: Path
) -> None:
    sealing_place.publish(1, "micro")
    (keys.folder / "micro.1").unlink()
    sealing_place.publish(2, "micro")
    assert list(sealing_place.repository.content("micro").releases) == [1, 2]


class Watching:
    """A policy that lets a test change what it is shown."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def __call__(self, request: Request) -> tuple[str, ...]:
        changed = {version: self.change(evidence) for version, evidence in request.evidence.items()}
        return reasons_against(replace(request, evidence=changed))


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda evidence: replace(evidence, sealed=None), "were not shown"),
        (
            lambda evidence: replace(
                evidence, sealed=Sealed(evidence.sealed.key, flip(evidence.sealed.ciphertext))
            ),
            "the ciphertext that was shown is not the one that is offered",
        ),
        (
            lambda evidence: replace(evidence, sealed=Sealed(new_key(), evidence.sealed.ciphertext)),
            "the content key that was shown is not the one that is named",
        ),
    ],
)
def test_a_signer_that_cannot_open_a_new_model_does_not_sign_it(
    sealing_place: Place, change: Any, why: str
) -> None:
    sealing_place.options["policy"] = Watching(change)
    with pytest.raises(RefusedError, match=why):
        sealing_place.publish(1, "micro")
    sealing_place.options.pop("policy")
    sealing_place.publish(1, "micro")
    sealing_place.options["policy"] = Watching(change)
    sealing_place.repository.renew(
        "tier-micro", sealing_place.of("tier-micro")
    )  # nothing new: not opened again


@pytest.mark.parametrize(
    ("swap", "why"),
    [
        (
            lambda tier, version, wire: (tier, version, pack(model_of(9))),
            "sealed model has not the format, or the length",
        ),
        (
            lambda tier, version, wire: (tier, version, flip(wire)),
            "sealed model is not the manifest's variant",
        ),
        (lambda tier, version, wire: ("board", version, wire), "does not open at chunk 0"),
        (lambda tier, version, wire: (tier, version + 1, wire), "does not open at chunk 0"),
    ],
)
def test_a_ciphertext_of_something_else_is_not_signed(
    sealing_place: Place, keys: ContentKeys, monkeypatch: pytest.MonkeyPatch, swap: Any, why: str
) -> None:
    """A publisher that was taken over seals another model than the gate let out."""
    honest = keys.sealed

    def dishonest(wire: bytes, tier: str, version: int) -> Any:
        other, number, what = swap(tier, version, wire)
        made = honest(what, other, number)
        (keys.folder / f"{other}.{number}").rename(keys.folder / f"{tier}.{version}")
        return made

    monkeypatch.setattr(keys, "sealed", dishonest)
    with pytest.raises(RefusedError, match=why):
        sealing_place.publish(11, "micro")


DEVICE = X25519PrivateKey.from_private_bytes(bytes(range(32)))
ROW = DeviceRow(
    id="ab" * 32, node_id=1, tier="micro", status="active", reason="", public_key="",
    sealing_key=DEVICE.public_key().public_bytes_raw().hex(), enrolled=0.0, revoked=None, last_seen=None,
    certificate_not_after=0.0, wire_version=2, fedge_version="", bundle="",
)  # fmt: skip


def test_a_device_is_given_the_key_of_a_version_of_its_tier(sealing_place: Place, keys: ContentKeys) -> None:
    sealing_place.publish(1)
    content = sealing_place.repository.content("micro")
    wrapped = wrapped_key(keys, content, 1, ROW)
    key = keys.key("micro", 1)
    assert unwrap(wrapped, DEVICE, tier="micro", version=1, device_id=ROW.id, expected=key_id(key)) == key


def test_no_other_device_is_and_none_of_what_is_not_on_offer(sealing_place: Place, keys: ContentKeys) -> None:
    sealing_place.publish(1)
    repository = sealing_place.repository
    for row in (replace(ROW, tier="board"), replace(ROW, status="revoked")):
        with pytest.raises(ForbiddenError, match="may not have keys of tier 'micro'"):
            wrapped_key(keys, repository.content("micro"), 1, row)
    with pytest.raises(AbsentError, match="not on offer"):
        wrapped_key(keys, repository.content("micro"), 2, ROW)
    with pytest.raises(FormatError, match="its sealing key is none"):
        wrapped_key(keys, repository.content("micro"), 1, replace(ROW, sealing_key="00" * 32))
    (keys.folder / "micro.1").write_bytes(new_key())
    with pytest.raises(DigestError, match="not the one that was signed"):
        wrapped_key(keys, repository.content("micro"), 1, ROW)
    (keys.folder / "micro.1").write_bytes(b"short")
    with pytest.raises(DigestError, match="damaged"):
        wrapped_key(keys, repository.content("micro"), 1, ROW)
    sealing_place.options = {}
    sealing_place.publish(2, "micro")
    with pytest.raises(AbsentError, match="not sealed"):
        wrapped_key(keys, repository.content("micro"), 2, ROW)


def test_the_evidence_does_not_show_keys_when_it_is_printed(sealing_place: Place) -> None:
    seen: list[Request] = []

    def looking(request: Request) -> tuple[str, ...]:
        seen.append(request)
        return ()

    sealing_place.options["policy"] = looking
    sealing_place.publish(1, "micro")
    (evidence,) = seen[-1].evidence.values()
    assert evidence.sealed is not None
    assert repr(evidence.sealed.key)[2:10] not in repr(seen)
    assert sha256(evidence.sealed.ciphertext)
    assert json.loads(evidence.report)["passed"] is True
