"""Keys of every role are replaced, and devices old and new follow; revoked ones sign nothing any more."""

from __future__ import annotations

import pytest
from places import TOP, Client, Place, keys_of, new_key, publish_online
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import Metadata, Root

from fedge.errors import RefusedError, UserError
from fedge_server.repository import FileSigning
from fedge_server.repository.folder import Folder


def rotate(place: Place, role: str, *new: FileSigning, threshold: int = 1, is_lost: bool = False) -> None:
    """With the keys that should be needed at hand, and no others."""
    tier = role.startswith("tier-")
    needed = {"targets" if tier else "root", "snapshot", "timestamp", *(() if tier or is_lost else (role,))}
    held = [s for name in sorted(needed - ({role} if is_lost else set())) for s in place.keys[name]]
    place.repository.rotate(role, keys_of(*new, threshold=threshold), [*held, *new], is_lost=is_lost)
    place.keys[role] = list(new)


def both(place: Place, client: Client) -> list[Client]:
    """A device that has followed from the beginning, and a fresh one with the first root."""
    folder = client.home.parent
    return [client, Client(folder / f"fresh{len(list(folder.iterdir()))}", place)]


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("role", [*TOP, "tier-micro"])
def test_devices_follow_when_the_keys_of_a_role_are_replaced(
    place: Place, client: Client, role: str, is_lost: bool
) -> None:
    is_lost = is_lost and role not in ("root", "tier-micro")  # where that makes no difference
    place.publish(1)
    assert client.mark().newest == 1
    new = [new_key(), new_key()] if role == "root" else [new_key()]
    rotate(place, role, *new, threshold=len(new), is_lost=is_lost)
    for device in both(place, client):
        assert device.mark().newest == 1
    place.publish(2)
    assert place.repository.refresh(place.of(), force=True)
    for device in both(place, client):
        assert device.mark().newest == 2
    status = {found.role: found for found in place.repository.status()}
    assert status[role].keys == tuple(signer.key.keyid for signer in new)
    assert status[role].threshold == len(new)


@pytest.mark.parametrize("role", ["snapshot", "timestamp"])
def test_a_revoked_online_key_signs_nothing_any_more(place: Place, client: Client, role: str) -> None:
    place.publish(1)
    stolen = list(place.keys[role])
    rotate(place, role, new_key())
    assert client.mark().newest == 1
    place.keys[role] = stolen
    state = max((place.path / "metadata").glob("*.snapshot.json"))
    snapshot = Metadata.from_file(str(state))
    snapshot.signed.version += 1
    publish_online(place, snapshot.signed)
    for device in both(place, client):
        with pytest.raises(UnsignedMetadataError):
            device.mark()


def test_what_an_old_root_allowed_is_not_replayed_under_a_new_one(place: Place, client: Client) -> None:
    place.publish(1)
    old = (place.path / "metadata/timestamp.json").read_bytes()
    rotate(place, "timestamp", new_key())
    place.repository.refresh(place.of(), force=True)
    (place.path / "metadata/timestamp.json").write_bytes(old)
    with pytest.raises(UnsignedMetadataError):
        client.mark()


def test_a_new_root_needs_enough_of_the_old_keys_and_of_the_new(place: Place, client: Client) -> None:
    old, new = place.keys["root"], [new_key(), new_key()]
    before = place.files()
    for signing in ([old[0], *new], [*old, new[0]]):
        with pytest.raises(UserError, match="root: 1 of 2 signatures"):
            place.repository.rotate("root", keys_of(*new, threshold=2), [*signing, *place.of()])
    assert place.files() == before
    rotate(place, "root", *new, threshold=2)
    with pytest.raises(UserError, match="root: 0 of 2 signatures"):  # the old ones are revoked
        place.repository.renew("root", [*old, *place.of()])
    root = Metadata[Root].from_bytes(place.repository.root(2))
    root.signed.version = 3
    for signer in old:
        root.sign(signer._signer, append=True)
    (place.path / "metadata/3.root.json").write_bytes(root.to_bytes())
    with pytest.raises(RepositoryError):
        client.mark()


def test_a_device_walks_a_chain_of_roots(place: Place, client: Client) -> None:
    for _ in range(5):
        rotate(place, "root", new_key(), new_key(), new_key(), threshold=2)
        rotate(place, "timestamp", new_key())
    place.publish(1)
    assert client.mark().newest == 1
    assert Metadata[Root].from_bytes(place.repository.root(11)).signed.version == 11


def test_a_threshold_changes_without_new_keys(place: Place, client: Client) -> None:
    root = place.keys["root"]
    rotate(place, "root", *root, threshold=3)
    with pytest.raises(UserError, match="root: 2 of 3 signatures"):
        place.repository.renew("root", [*root[:2], *place.of()])
    place.repository.renew("root", [*root, *place.of()])
    second = new_key()
    rotate(place, "tier-micro", *place.keys["tier-micro"], second, threshold=2)
    with pytest.raises(UserError, match="tier-micro: 1 of 2"):
        place.publish(1, "micro", signing=[second, *place.of()])
    place.publish(1, "micro")
    for device in both(place, client):
        assert device.mark().newest == 2  # the refused one took a version


def test_a_tiers_key_is_revoked_without_touching_other_tiers(place: Place, client: Client) -> None:
    place.publish(1)
    stolen = place.keys["tier-micro"][0]
    before = place.files()
    rotate(place, "tier-micro", new_key())
    new = {name for name, data in place.files().items() if before.get(name) != data}
    assert {name.removeprefix("metadata/").lstrip("0123456789.") for name in new} == {
        *("timestamp.json", "snapshot.json", "targets.json", "tier-micro.json"),
    }
    with pytest.raises(UserError, match="tier-micro: 0 of 1"):
        place.publish(2, "micro", signing=[stolen, *place.of()])
    for device in both(place, client):
        assert device.mark("micro").newest == device.mark("board").newest == 1


def test_a_suspended_tier_accepts_nothing_until_it_has_a_key_again(place: Place, client: Client) -> None:
    place.publish(1)
    place.repository.suspend("micro", place.of("targets"))
    for device in both(place, client):
        with pytest.raises(UnsignedMetadataError):
            device.mark("micro")
        assert device.mark("board").newest == 1
    place.publish(2, "board")
    with pytest.raises(UserError, match="tier-micro: 0 of 1 signatures"):
        place.publish(3, "micro")
    assert {s.role: s.keys for s in place.repository.status()}["tier-micro"] == ()
    rotate(place, "tier-micro", new_key())
    assert client.mark("micro").newest == 1
    release = place.publish(4, "micro")
    assert client.mark("micro").newest == release.version


def test_keys_of_a_tier_are_not_replaced_where_the_rules_are_against_what_it_offers(place: Place) -> None:
    place.publish(1)
    place.options["policy"] = lambda request: ("no",)
    with pytest.raises(RefusedError, match="tier-micro: not signed: no"):
        rotate(place, "tier-micro", new_key())


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_half_a_replacement_of_lost_keys_is_finished_by_calling_it_again(
    place: Place, client: Client, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    place.publish(1)
    new, write = new_key(), Folder.write

    def killed_after_root(self: Folder, name: str, version: int, data: bytes) -> None:
        if name != "root":
            raise KeyboardInterrupt
        write(self, name, version, data)

    monkeypatch.setattr(Folder, "write", killed_after_root)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            rotate(place, role, new, is_lost=True)
    monkeypatch.undo()
    with pytest.raises(UnsignedMetadataError):
        client.mark()
    assert role in {found.role for found in place.repository.status() if found.is_due}
    rotate(place, role, new, is_lost=True)
    for device in both(place, client):
        assert device.mark().newest == 1


def test_keys_of_the_root_that_are_lost_cannot_be_replaced(place: Place) -> None:
    with pytest.raises(UserError, match="begin a new repository"):
        place.repository.rotate("root", keys_of(new_key()), place.all(), is_lost=True)
    with pytest.raises(UserError, match="must be root, targets, snapshot, timestamp or tier-NAME"):
        place.repository.rotate("mirrors", keys_of(new_key()), place.all())
    with pytest.raises(UserError, match="'tier-other' does not exist"):
        place.repository.rotate("tier-other", keys_of(new_key()), place.all())
