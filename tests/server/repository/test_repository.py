"""What a repository publishes is what python-tuf's own client accepts, and nothing else."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from places import Client, Place, keys_of, model_of, new_key, release_of, report_of
from tuf.api.exceptions import ExpiredMetadataError

from fedge.artefact import pack, unpack
from fedge.delivery import ReleaseNote, TierMark, lineage_digest, mark_path, target_path
from fedge.errors import DigestError, FedgeError, FormatError, RefusedError, SignatureError, UserError
from fedge.files import sha256
from fedge.manifest import Release
from fedge_server.repository import Lifetimes, Repository, Request, RoleKeys
from fedge_server.repository.content import Offered, TierContent
from fedge_server.repository.folder import Folder
from fedge_server.repository.state import HISTORY, load

DAY = timedelta(days=1)


def test_a_fresh_device_finds_mark_manifest_and_model_of_its_tier(place: Place, client: Client) -> None:
    release = place.publish(1, floors={"micro": 1})
    assert release.version == 1
    assert client.mark("micro") == TierMark("micro", floor=1, newest=1)
    assert client.mark("board") == TierMark("board", floor=0, newest=1)
    manifest = client.look(target_path("micro", 1, "manifest"))
    model = client.look(target_path("micro", 1, "model"))
    assert manifest is not None
    assert model is not None
    note = ReleaseNote(1, sha256(release.to_bytes()), lineage_digest(release.lineage))
    assert ReleaseNote.from_json(manifest.custom) == ReleaseNote.from_json(model.custom) == note
    entry = release.variant("micro")
    assert (model.length, model.hashes["sha256"]) == (entry.wire_bytes, entry.wire_sha256)
    wire = client.model("micro")
    assert unpack(wire, entry.installed_bytes) == model_of(1)


def test_a_tier_without_a_release_has_a_mark_and_no_more(place: Place, client: Client) -> None:
    assert client.mark() == TierMark("micro", 0, 0)
    assert client.look(target_path("micro", 1, "model")) is None


def test_versions_rise_over_all_tiers_together_and_a_tier_may_skip_some(place: Place, client: Client) -> None:
    assert [place.publish(n, tier).version for n, tier in enumerate(["micro", "board", "micro"])] == [1, 2, 3]
    assert client.mark("micro").newest == 3
    assert client.mark("board").newest == 2
    assert sorted(place.repository.content("micro").releases) == [1, 3]


def test_old_content_comes_back_under_a_higher_version_without_being_handed_in_again(
    place: Place, client: Client
) -> None:
    place.publish(1)
    place.publish(2)
    draft, _ = release_of(1, "micro", "board")
    assert place.repository.publish(draft, [], place.of("tier-micro", "tier-board")).version == 3
    assert client.model() == pack(model_of(1))


def test_a_release_may_not_name_objects_that_are_nowhere(place: Place) -> None:
    draft, _ = release_of(1, "micro")
    before = place.files()
    with pytest.raises(FormatError, match="not handed in"):
        place.repository.publish(draft, [], place.all())
    assert place.files() == before


def test_a_tier_offers_its_newest_releases_and_none_below_its_floor(place: Place, client: Client) -> None:
    place.options["keep"] = 3
    for number in range(5):
        place.publish(number)
    assert sorted(place.repository.content("micro").releases) == [3, 4, 5]
    place.repository.raise_floor("micro", 5, place.of("tier-micro"))
    assert sorted(place.repository.content("micro").releases) == [5]
    assert sorted(place.repository.content("board").releases) == [3, 4, 5]
    assert client.mark().floor == 5


def test_what_a_rollout_needs_stays_on_offer_however_old_as_far_as_a_tier_may_offer_so_many() -> None:
    content = TierContent.empty("micro")
    for version in range(1, 40):
        offered = Offered(ReleaseNote(version, "0" * 64, "0" * 64), {})
        content = content.with_release(offered, floor=None, keep=3, needed=(2, 5, version))
        assert version in content.releases
    assert list(content.releases) == [2, 5, 37, 38, 39]
    content = content.with_release(offered, floor=4, keep=1, needed=(2, 5))
    assert list(content.releases) == [5, 39]
    for version in range(40, 80):
        offered = Offered(ReleaseNote(version, "0" * 64, "0" * 64), {})
        content = content.with_release(offered, floor=None, keep=16, needed=range(80))
        assert version in content.releases
    assert list(content.releases) == [5, *range(65, 80)]
    content = content.with_release(offered, floor=None, keep=16)
    assert len(content.releases) == 16
    found = dict.fromkeys(range(1, 21), offered)
    content = TierContent.empty("micro").with_floor(0, newest=20, releases=found, keep=16, needed={1, 5})
    assert list(content.releases) == [1, 5, *range(7, 21)]


@pytest.mark.parametrize(
    ("floor", "why"), [(1, "may not be lowered from 2 to 1"), (4, "above the newest version 3")]
)
def test_a_floor_only_rises_and_never_above_the_newest_version(place: Place, floor: int, why: str) -> None:
    for number in range(3):
        place.publish(number)
    place.repository.raise_floor("micro", 2, place.of("tier-micro"))
    before = place.files()
    with pytest.raises(RefusedError, match=why):
        place.repository.raise_floor("micro", floor, place.of("tier-micro"))
    assert place.files() == before


def test_what_the_gate_held_back_is_not_published(place: Place) -> None:
    draft, objects = release_of(1, "micro", report=report_of(passed=False, reasons=["too bad"]))
    before = place.files()
    with pytest.raises(RefusedError, match=r"tier-micro: not signed: version 1: its gate has not.*too bad"):
        place.repository.publish(draft, objects, place.all())
    assert place.files() == before


def test_a_version_that_a_refused_or_killed_publication_took_is_not_taken_again(place: Place) -> None:
    class Breaks:
        key = place.keys["timestamp"][0].key

        def sign(self, request: Request) -> None:
            raise RuntimeError("no power")

    signing = [s for s in place.all() if s.key.keyid != Breaks.key.keyid]
    with pytest.raises(RefusedError, match=r"did not sign \(no power\)"):
        place.publish(1, signing=[*signing, Breaks()])
    assert place.publish(1).version == 2


def test_a_signer_may_refuse_with_its_reasons_and_nothing_changes(place: Place) -> None:
    class Strict:
        key = place.keys["tier-micro"][0].key

        def sign(self, request: Request) -> None:
            assert request.role == "tier-micro"
            assert request.previous is not None
            assert set(request.evidence) == {1}
            raise RefusedError("tier-micro: lineage of run-1 is not in the register")

    before = place.files()
    with pytest.raises(RefusedError, match="not in the register"):
        place.publish(1, "micro", signing=[Strict(), *place.of()])
    assert place.files() == before


def test_a_signer_that_returns_another_signature_is_found_out(place: Place) -> None:
    class Liar:
        key = place.keys["tier-micro"][0].key

        def sign(self, request: Request) -> object:
            return place.keys["tier-micro"][0].sign(Request("tier-micro", b"something else"))

    with pytest.raises(SignatureError, match="is not its signature"):
        place.publish(1, "micro", signing=[Liar(), *place.of()])


def test_missing_keys_are_named(place: Place) -> None:
    with pytest.raises(UserError, match="tier-micro: 0 of 1 signatures; bring 1 more of these keys"):
        place.publish(1, "micro", signing=place.of())


def test_a_release_for_an_unknown_tier_is_refused(place: Place) -> None:
    with pytest.raises(UserError, match="'gateway' is not in this repository; it has: board, micro"):
        place.publish(1, "gateway", signing=place.all())
    with pytest.raises(UserError, match="floor for tier 'board', which the release does not serve"):
        place.publish(1, "micro", floors={"board": 1})


@pytest.mark.parametrize("name", ["", "Micro", "../x", "a/b", "a*", "a" * 33, "1a", "tier.json"])
def test_names_of_tiers_are_checked(place: Place, name: str) -> None:
    with pytest.raises(FormatError, match="must be 1 to 32 lower-case"):
        place.repository.add_tier(name, keys_of(new_key()), place.all())


def test_a_key_serves_one_purpose(place: Place) -> None:
    for role in ("tier-micro", "targets", "timestamp", "root"):
        with pytest.raises(UserError, match="make a new one"):
            place.repository.add_tier("third", keys_of(place.keys[role][0]), place.all())
    with pytest.raises(UserError, match="online key too"):
        place.repository.rotate("targets", keys_of(place.keys["snapshot"][0]), place.all())


def test_a_tier_is_delegated_once_terminating_and_for_its_own_paths(place: Place) -> None:
    state = load(Folder(place.path))
    assert state is not None
    delegations = state.targets.signed.delegations
    assert delegations is not None
    assert delegations.roles is not None
    assert {(r.name, r.terminating, *(r.paths or ())) for r in delegations.roles.values()} == {
        ("tier-micro", True, "micro/*"),
        ("tier-board", True, "board/*"),
    }
    assert state.targets.signed.targets == {}
    with pytest.raises(UserError, match="there already"):
        place.repository.add_tier("micro", keys_of(new_key()), place.all())


def test_a_folder_holds_one_repository(place: Place) -> None:
    with pytest.raises(UserError, match="holds a repository already"):
        place.make()
    with pytest.raises(UserError, match="create one first"):
        Repository(place.path.parent / "empty").status()
    assert not (place.path.parent / "empty").exists()


def changed(before: dict[str, bytes], place: Place) -> set[str]:
    return {name for name, data in place.files().items() if before.get(name) != data}


def test_the_timestamp_is_signed_again_after_a_quarter_of_its_life(place: Place, client: Client) -> None:
    place.publish(1)
    online = place.of()
    assert not place.repository.refresh(online)
    place.clock.now += timedelta(hours=12, minutes=1)
    before = place.files()
    assert place.repository.refresh(online)
    assert changed(before, place) == {"metadata/timestamp.json"}
    assert client.mark(late=1.4 * DAY).newest == 1
    place.clock.now += 20 * DAY  # nobody was there: all online metadata has expired
    with pytest.raises(ExpiredMetadataError):
        client.mark()
    assert place.repository.refresh(online)
    assert client.mark().newest == 1


def test_a_device_whose_clock_is_a_day_wrong_still_updates(place: Place, client: Client) -> None:
    place.publish(1)
    place.clock.now += timedelta(hours=12)  # the longest that a refresher waits
    assert client.mark(late=DAY).newest == 1
    assert client.mark(late=-DAY).newest == 1
    with pytest.raises(ExpiredMetadataError):
        Client(client.home.parent / "late", place).mark(late=2 * DAY)


def test_offline_roles_are_renewed_by_their_own_keys(place: Place, client: Client) -> None:
    place.publish(1)
    place.clock.now += 89 * DAY
    place.repository.refresh(place.of())
    due = {role.role for role in place.repository.status() if role.is_due}
    assert due == {"tier-micro", "tier-board"}
    place.repository.renew("tier-micro", place.of("tier-micro"))
    place.clock.now += 2 * DAY
    place.repository.refresh(place.of(), force=True)
    assert client.mark("micro").newest == 1
    with pytest.raises(ExpiredMetadataError):
        client.mark("board")
    for role in ("root", "targets"):
        place.repository.renew(role, place.of(role))
    place.clock.now += 300 * DAY
    place.repository.renew("tier-micro", place.of("tier-micro"))
    assert Client(client.home.parent / "second", place).mark("micro").newest == 1
    with pytest.raises(UserError, match="else use refresh"):
        place.repository.renew("snapshot", place.all())


@pytest.mark.slow
def test_files_of_old_snapshots_go_and_roots_stay(place: Place) -> None:
    for number in range(HISTORY + 5):
        place.publish(number, "micro")
    place.repository.status()  # tidies up
    names = [path.name for path in (place.path / "metadata").iterdir()]
    assert sum(name.endswith(".snapshot.json") for name in names) == HISTORY
    assert "1.root.json" in names
    kept = {path.name.partition(".")[2] for path in (place.path / "targets/micro").glob("*.model")}
    assert f"{HISTORY + 5}.model" in kept
    assert "1.model" not in kept


def test_two_publishers_at_once_take_versions_of_their_own(place: Place, client: Client) -> None:
    found: list[int] = []

    def work(tier: str) -> None:
        found.extend(place.publish(number, tier).version for number in range(4))

    threads = [threading.Thread(target=work, args=(tier,)) for tier in ("micro", "board")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(1, 9))
    assert max(client.mark("micro").newest, client.mark("board").newest) == 8


def test_a_publisher_that_the_lock_did_not_stop_changes_nothing(
    place: Place, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system whose locks do nothing."""
    draft, objects = release_of(1, "micro")

    def other_first(version: int) -> Release:
        monkeypatch.setattr(Folder, "locked", lambda self, patience_s: threading.Lock())
        place.publish(2, "micro")
        return draft(version)

    with pytest.raises(FedgeError, match="meanwhile; nothing has changed, try again"):
        place.repository.publish(other_first, objects, place.all())
    assert client.model() == pack(model_of(2))


def test_a_second_publisher_waits_no_longer_than_it_should(place: Place) -> None:
    place.options["patience_s"] = 0.05
    repository = Repository(place.path, clock=place.clock, patience_s=0.05)
    with Folder(place.path).locked(1.0), pytest.raises(FedgeError, match="another publisher is at work"):
        repository.status()


def test_a_damaged_target_is_not_published_again_in_another_release(place: Place) -> None:
    place.publish(1, "micro")
    for path in (place.path / "targets/micro").glob("*.report"):
        path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DigestError, match=r"micro/1.report .* is damaged"):
        place.repository.raise_floor("micro", 1, place.of("tier-micro"))


def test_a_damaged_target_that_is_published_again_as_it_was_is_written_anew(place: Place) -> None:
    place.publish(1, "micro")
    whole = place.repository.content("micro").mark.to_bytes()
    mark = place.path / f"targets/micro/{sha256(whole)}.tier.json"
    mark.write_bytes(b"x" * len(whole))
    place.repository.renew("tier-micro", place.of("tier-micro"))
    assert mark.read_bytes() == whole


def test_metadata_that_devices_would_not_read_is_not_written(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedge_server.repository.commit.limit_of", lambda role: 1200)
    before = place.files()
    with pytest.raises(FedgeError, match=r"tier-board: takes \d+ bytes, over the 1200 it may have"):
        place.publish(1)
    assert place.files() == before


def test_versions_that_a_restored_folder_is_told_of_are_not_taken_again(place: Place, client: Client) -> None:
    used = {"release": 41, "roles": {"timestamp": 900, "snapshot": 120, "tier-micro": 45}}
    (place.path / "state/used.json").write_text(json.dumps(used))
    assert place.publish(1, "micro").version == 42
    assert client.mark().newest == 42
    found = {role.role: role.version for role in place.repository.status()}
    assert (found["timestamp"], found["snapshot"], found["tier-micro"]) == (901, 121, 46)


def test_the_state_folder_says_what_is_damaged(place: Place) -> None:
    (place.path / "state/used.json").write_text(json.dumps({"release": -1, "roles": {}}))
    with pytest.raises(FormatError, match=r"used\.json: damaged"):
        place.publish(1)


@pytest.mark.parametrize("wrong", [{"timestamp": 8 * DAY}, {"snapshot": 31 * DAY}, {"tier": 5}])
def test_lifetimes_that_make_no_sense_are_refused(wrong: dict[str, timedelta]) -> None:
    with pytest.raises(UserError, match="lifetime"):
        replace(Lifetimes(), **wrong)


def test_thresholds_that_make_no_sense_are_refused() -> None:
    key = new_key().key
    for keys, threshold in (((), 1), ((key,), 2), ((key,), 0), ((key, key), 1)):
        with pytest.raises(UserError):
            RoleKeys(keys, threshold)


def test_a_mark_is_what_its_file_says(place: Place, client: Client, tmp_path: Path) -> None:
    found = client.look(mark_path("board"))
    assert found is not None
    data = (place.path / "targets/board" / f"{found.hashes['sha256']}.tier.json").read_bytes()
    assert json.loads(data) == found.custom == {"schema": 1, "tier": "board", "floor": 0, "newest": 0}
