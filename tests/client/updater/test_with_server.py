"""The device against repositories that fedge's server writes: what publishers and thieves of keys can do."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from places import Place, forge, keys_of, model_of, new_key
from tuf.api.metadata import Metadata, Targets

from fedge.errors import (
    DowngradeError,
    ExpiredError,
    FormatError,
    SignatureError,
    TrustError,
    UserError,
)
from fedge.manifest import Release
from fedge_client.updater import Installer, State, Trust, anything, folder, offer, unpacked, within


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("repository") / "made").make()


@pytest.fixture
def place(made: Place, tmp_path: Path) -> Place:
    """A repository of its own with the tiers micro and board, and no release."""
    shutil.copytree(made.path, tmp_path / "repository")
    keys = {role: list(held) for role, held in made.keys.items()}
    return Place(tmp_path / "repository", copy.deepcopy(made.clock), {}, keys, made.first_root)


class Device:
    """A device of a tier that polls a repository's folder."""

    def __init__(self, home: Path, place: Place, tier: str = "micro") -> None:
        self.home, self.place, self.tier = home, place, tier
        fetch = within("targets", folder(place.path))
        self.installer = Installer(home, fetch, anything, expand=unpacked)
        self.targets = fetch

    def update(self, told: int | None = None) -> State:
        fetch = within("metadata", folder(self.place.path))
        root, clock = self.place.first_root, self.place.clock
        trusted = Trust(self.home / "metadata", root, fetch, clock=clock).refresh()
        offered = offer(trusted, self.targets, self.tier, told)
        assert offered is not None
        return self.installer.install(offered.artefact)

    def runs(self) -> tuple[int, bytes]:
        opened = self.installer.store.open()
        assert Release.from_bytes(opened.notes).version == opened.record.version
        return opened.record.version, opened.data


@pytest.fixture
def device(place: Place, tmp_path: Path) -> Device:
    return Device(tmp_path / "device", place)


def test_releases_floors_and_a_fleet_rollback_reach_a_device(place: Place, device: Device) -> None:
    first, second = place.publish(1), place.publish(2)
    device.update(first.version)  # as a rollout in stages says
    assert device.runs() == (first.version, model_of(1))
    device.update()
    assert device.runs() == (second.version, model_of(2))
    device.installer.return_to_previous()
    back = place.publish(1, floors={"micro": second.version})  # old content, new version
    state = device.update()
    assert device.runs() == (back.version, model_of(1))
    assert state.floor == second.version
    with pytest.raises(UserError, match="below this device's floor"):
        device.installer.return_to_previous()
    with pytest.raises(DowngradeError):
        device.update(first.version)


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp", "tier-micro"])
def test_every_role_changes_its_keys_and_the_device_follows(place: Place, device: Device, role: str) -> None:
    place.publish(3)
    device.update()
    old, new = place.keys[role], [new_key() for _ in place.keys[role]]
    threshold = 2 if role == "root" else 1
    place.repository.rotate(role, keys_of(*new, threshold=threshold), [*place.all(), *new])
    place.keys[role] = new
    release = place.publish(4)
    device.update()
    assert device.runs()[0] == release.version
    fresh = Device(device.home / "fresh", place)
    fresh.update()  # from the first root on
    assert fresh.runs()[0] == release.version
    assert old != new


def test_a_suspended_tiers_devices_keep_what_they_run_and_other_tiers_go_on(
    place: Place, device: Device, tmp_path: Path
) -> None:
    place.publish(5)
    device.update()
    before = device.runs()
    other = Device(tmp_path / "other", place, "board")
    place.repository.suspend("micro", place.of("targets"))
    with pytest.raises(TrustError):
        device.update()
    assert device.runs() == before
    other.update()
    place.repository.rotate("tier-micro", keys_of(*place.keys["tier-micro"]), place.all())
    device.update()


def test_a_repository_that_nobody_renews_is_refused_and_the_model_answers_on(
    place: Place, device: Device
) -> None:
    place.publish(6)
    device.update()
    before = device.runs()
    place.clock.now += timedelta(days=1)  # or a clock a day fast
    device.update()
    place.clock.now += timedelta(days=2)
    with pytest.raises(ExpiredError):
        device.update()
    assert device.runs() == before
    place.repository.refresh(place.of())
    device.update()
    place.clock.now -= timedelta(days=1)  # a clock a day slow
    device.update()


def newest(place: Place, tier: str) -> Metadata[Targets]:
    files = (place.path / "metadata").glob(f"*.tier-{tier}.json")
    newest = max(files, key=lambda path: int(path.name.split(".")[0]))
    return Metadata[Targets].from_file(str(newest))


@pytest.mark.parametrize("thief", ["online", "another tier", "unsigned"])
def test_a_tier_that_is_forged_with_keys_of_others_ships_nothing(
    place: Place, device: Device, tmp_path: Path, thief: str
) -> None:
    place.publish(7)
    device.update()
    before = device.runs()
    held = {"online": ["snapshot", "timestamp"], "another tier": ["tier-board"], "unsigned": []}[thief]
    tier = newest(place, "micro")
    tier.signed.version += 1
    tier.signatures.clear()
    for role in held:
        tier.sign(place.keys[role][0]._signer, append=True)
    forge(place, micro=tier.to_bytes())
    with pytest.raises(SignatureError):
        device.update()
    with pytest.raises(SignatureError):
        Device(tmp_path / "fresh", place).update()
    assert device.runs() == before
    Device(tmp_path / "other", place, "board").update()  # which the thief did not touch


def test_a_tiers_own_thief_reaches_no_other_tier_and_cannot_lower_a_floor(
    place: Place, device: Device, tmp_path: Path
) -> None:
    place.publish(8)
    release = place.publish(9, floors={"micro": 2})
    device.update()
    tier = newest(place, "micro")
    tier.signed.version += 1
    mark = tier.signed.targets["micro/tier.json"]
    mark.unrecognized_fields["custom"]["floor"] = 0
    tier.signed.targets["board/tier.json"] = mark
    tier.sign(place.keys["tier-micro"][0]._signer)
    forge(place, micro=tier.to_bytes())
    assert device.update().floor == 2
    other = Device(tmp_path / "other", place, "board")
    other.update()
    assert other.runs() == (release.version, model_of(9))


def test_an_old_copy_of_the_repository_is_refused_by_a_device_that_saw_a_newer_one(
    place: Place, device: Device, tmp_path: Path
) -> None:
    place.publish(10)
    device.update()
    old = tmp_path / "old"
    shutil.copytree(place.path, old)
    place.publish(11)
    device.update()
    before = device.runs()
    stale = Device(device.home, replace(place, path=old))
    with pytest.raises(DowngradeError, match="older than what this device has seen"):
        stale.update()
    assert device.runs() == before


def test_a_name_that_leads_out_of_a_copied_repository_is_refused(place: Place) -> None:
    with pytest.raises(FormatError, match="leads out of"):
        next(folder(place.path)("../secret", 10))
