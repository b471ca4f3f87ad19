"""A draft is published for the tiers that can be signed; the others wait with a word on what is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedge.delivery import target_path
from fedge.errors import FedgeError, RefusedError, UserError
from fedge_server.registry.database import Registry
from fedge_server.release import ReleasePlace, publish_draft
from fedge_server.release.lineage import release_of, released
from fedge_server.repository import Repository, create_key, load_key
from fedge_server.rollout.audit import Audit
from fedge_server.rollout.service import Rollouts


def test_a_folder_of_a_simulation_makes_all_keys_itself_and_publishes(home, registry, drafted):
    done = publish_draft(ReleasePlace.of(home), registry, drafted("micro", "board"))
    assert (done.release.version, done.waiting) == (1, ())
    repository = Repository(home / "repository")
    assert repository.content("micro").mark.newest == repository.content("board").mark.newest == 1
    names = {path.name: path.stat().st_mode & 0o777 for path in (home / "keys").glob("*.key")}
    roles = ("root", "targets", "snapshot", "timestamp", "tier-micro", "tier-board")
    assert names == {f"{role}.key": 0o600 for role in roles}
    assert released(registry) == [done.release]
    assert registry.drafts.all(unpublished=True) == []
    assert [e.what for e in Audit(registry.engine).entries("release 1")] == ["signed and published"]


def test_publishing_for_a_further_tier_leaves_the_others_metadata_alone(home, registry, drafted):
    place = ReleasePlace.of(home)
    publish_draft(place, registry, drafted("micro"))
    before = {
        path.name: path.read_bytes() for path in (home / "repository/metadata").glob("*.tier-micro.json")
    }
    done = publish_draft(place, registry, drafted("board", answer=1))
    assert done.release.version == 2
    assert [entry.tier for entry in done.release.variants] == ["board"]
    after = {
        path.name: path.read_bytes() for path in (home / "repository/metadata").glob("*.tier-micro.json")
    }
    assert after == before
    assert place.repository.content("micro").mark.newest == 1
    first, second = released(registry)
    assert first.lineage == second.lineage


def test_without_a_key_the_draft_waits_and_says_what_to_run(server, registry, drafted):
    name = drafted("micro")
    done = publish_draft(server, registry, name)
    assert done.release is None
    (waiting,) = done.waiting
    assert "no key keys/tier-micro.key and no signer; run: fedge-server signer serve" in waiting.why
    (draft,) = registry.drafts.all(unpublished=True)
    assert [(v.tier, v.status, v.reason) for v in draft.variants] == [("micro", "waiting", waiting.why)]
    assert registry.releases() == []
    create_key(server.keys / "tier-micro.key")
    again = publish_draft(server, registry, name)
    assert again.release.version == 1
    assert publish_draft(server, registry, name).release is None  # nothing is left to do
    assert [row["version"] for row in registry.releases()] == [1]


def test_a_tier_whose_keys_lie_elsewhere_waits_for_them_and_not_for_others(
    server, registry, drafted, tmp_path
):
    server.make(["micro"])
    key = server.keys / "tier-micro.key"
    name = load_key(key).key.keyid[:8]
    key.rename(tmp_path / "away")
    draft = drafted("micro")
    (waiting,) = publish_draft(server, registry, draft).waiting
    assert f"it has keys already ({name}), which are not here; bring one to {key}" in waiting.why
    away = replace(server, delivery=replace(server.delivery, signers=(str(tmp_path / "socket"),)))
    (waiting,) = publish_draft(away, registry, draft).waiting
    assert waiting.why.startswith(f"signer {tmp_path / 'socket'}: does not answer")
    assert waiting.why.endswith(f"; the tier's keys: {name}")


def test_what_a_rollout_offers_stays_listed_while_newer_releases_are_published(server, registry, drafted):
    one = replace(server, delivery=replace(server.delivery, keep=1))
    one.make(["micro"])
    publish_draft(one, registry, drafted("micro", answer=0))
    publish_draft(one, registry, drafted("micro", answer=1))
    assert list(one.repository.content("micro").releases) == [2]
    Rollouts(registry).start(2, "micro", who="ann")
    for answer in (2, 0):
        publish_draft(
            one, registry, drafted("micro", answer=answer, created=f"2026-02-0{answer + 1}T12:00:00Z")
        )
    assert list(one.repository.content("micro").releases) == [2, 4]


def test_a_new_tier_waits_for_the_targets_key_that_was_carried_away(server, registry, drafted, tmp_path):
    create_key(server.keys / "tier-micro.key")
    (server.keys / "targets.key").rename(tmp_path / "stick")
    name = drafted("micro")
    (waiting,) = publish_draft(server, registry, name).waiting
    assert (
        "keys/targets.key, which adds it, is not here; run: fedge-server keys add-tier micro" in waiting.why
    )
    (tmp_path / "stick").rename(server.keys / "targets.key")
    assert publish_draft(server, registry, name).release.version == 1


def test_one_tier_that_can_be_signed_does_not_wait_for_another(server, registry, drafted):
    create_key(server.keys / "tier-micro.key")
    name = drafted("micro", "board")
    done = publish_draft(server, registry, name)
    assert [entry.tier for entry in done.release.variants] == ["micro"]
    assert [each.tier for each in done.waiting] == ["board"]
    create_key(server.keys / "tier-board.key")
    later = publish_draft(server, registry, name)
    assert (later.release.version, [entry.tier for entry in later.release.variants]) == (2, ["board"])


@pytest.mark.slow
def test_what_the_gate_did_not_pass_is_refused_with_its_reasons_and_the_good_tier_goes_out(
    server, registry, drafted
):
    server.make(["micro", "board"])
    bad = {"passed": False, "reasons": ["too bad"], "drop_upper": 0.5, "max_drop": 0.01}
    name = drafted("micro", report=bad)
    (waiting,) = publish_draft(server, registry, name).waiting
    assert waiting.is_refused
    assert "its gate has not passed (['too bad'])" in waiting.why
    assert registry.drafts.get(name).variants[0].status == "refused"
    (entry,) = Audit(registry.engine).entries(f"draft {name}")
    assert entry.what == "signature refused"
    assert publish_draft(server, registry, drafted("board")).release.version == 2  # 1 was taken, never signed


def test_without_an_online_key_nothing_is_published(server, registry, drafted):
    server.make(["micro"])
    (server.keys / "timestamp.key").unlink()
    (waiting,) = publish_draft(server, registry, drafted("micro")).waiting
    assert "the online key" in waiting.why
    assert "timestamp.key is not here" in waiting.why


def test_a_suspended_tier_waits(server, registry, drafted):
    server.make(["micro"])
    server.repository.suspend("micro", server.at_hand().of())
    (waiting,) = publish_draft(server, registry, drafted("micro")).waiting
    assert "suspended; run: fedge-server keys rotate tier-micro" in waiting.why


def test_a_publication_that_was_killed_before_it_was_written_down_is_recognised(
    server, registry, drafted, monkeypatch
):
    server.make(["micro"])
    name = drafted("micro")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Registry, "record_release", killed)
    with pytest.raises(KeyboardInterrupt):
        publish_draft(server, registry, name)
    monkeypatch.undo()
    assert server.repository.content("micro").mark.newest == 1
    assert registry.releases() == []
    done = publish_draft(server, registry, name)
    assert done.release.version == 1
    assert [row["version"] for row in registry.releases()] == [1]
    assert server.repository.content("micro").mark.newest == 1  # it was not published twice


@pytest.mark.slow
def test_the_objects_of_a_release_are_in_the_store_for_the_day_it_is_published_again(
    server, registry, drafted
):
    server.make(["micro"])
    release = publish_draft(server, registry, drafted("micro")).release
    assert release_of(registry, 1) == release
    for entry in release.variants:
        for digest in (entry.wire_sha256, entry.evidence_sha256, entry.golden_sha256):
            assert registry.store.has(digest)
    with pytest.raises(UserError, match="release 2: there is none; releases: 1"):
        release_of(registry, 2)
    folder = Path(server.home / "repository" / "targets")
    assert [p.name for p in folder.glob("micro/*.1.golden")], target_path("micro", 1, "golden")


def test_a_draft_of_no_name_is_a_users_mistake(server, registry):
    with pytest.raises(UserError, match="draft 'nosuch': there is none"):
        publish_draft(server, registry, "nosuch")


def test_making_goes_on_after_a_kill_at_any_file(home, monkeypatch):
    """Whatever of the keys is there is used again; nothing is overwritten."""
    place = ReleasePlace(home, is_server=True)
    place.keys.mkdir(parents=True)
    root = create_key(place.keys / "root.key")
    place.make(["micro"])
    assert place.repository.status()[0].keys == (root.key.keyid,)
    before = json.dumps([str(role) for role in place.repository.status()])
    place.make(["micro"])
    assert json.dumps([str(role) for role in place.repository.status()]) == before
    assert isinstance(RefusedError("x"), FedgeError)


PLAN = """
[[stages]]
name = "all"
percent = 100
[criteria.install]
tolerated = 0.02
unacceptable = 0.1
"""


@pytest.mark.slow
def test_a_release_begins_its_rollouts_by_itself_where_the_settings_say_so(home, registry, server, drafted):
    (home / "server.toml").write_text('[rollouts]\nautomatic = true\nplan = "plan.toml"\n')
    place = ReleasePlace.of(home)
    create_key(place.keys / "tier-micro.key")
    with pytest.raises(UserError, match=r"plan\.toml: there is no such file"):
        publish_draft(place, registry, drafted("micro"))
    assert registry.releases() == []  # nothing was signed
    (home / "plan.toml").write_text(PLAN)
    registry.devices.create_token(token_id="t", secret_sha256="", tier="micro", expires=2e9)
    registry.devices.enrol(
        device_id="a", node_id=1, public_key="", sealing_key="", tier="micro", token_id="t",
        fedge_version="0", wire_version=2, not_after=2e9,
    )  # fmt: skip
    publish_draft(place, registry, drafted("micro"))
    (state,) = Rollouts(registry).all()
    assert (state.id, state.status.value, state.plan.stages[0].name) == ("micro-1", "running", "all")
    publish_draft(place, registry, drafted("micro", answer=1), is_floor=True)  # a way back
    assert [state.id for state in Rollouts(registry).all()] == ["micro-1"]
    (home / "plan.toml").write_text(PLAN.replace("percent = 100", "percent = 100\nmin_installs = 9"))
    done = publish_draft(place, registry, drafted("micro", answer=2))
    assert done.release.version == 3  # its signature does not wait for a rollout that cannot begin
    (entry,) = Audit(registry.engine).entries("micro-3")
    assert (entry.who, entry.what) == ("automatic", "rollout not begun")
    assert "waits for 9 installs" in entry.why


def test_a_rollout_begins_by_itself_even_if_the_publisher_was_killed_before_the_release_was_written_down(
    home, registry, server, drafted, monkeypatch
):
    (home / "server.toml").write_text("[rollouts]\nautomatic = true\n")
    place = ReleasePlace.of(home)
    create_key(place.keys / "tier-micro.key")
    name = drafted("micro")
    with monkeypatch.context() as patched:
        patched.setattr(type(registry), "record_release", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            publish_draft(place, registry, name)
    assert Rollouts(registry).all() == []
    publish_draft(place, registry, name)
    assert [state.id for state in Rollouts(registry).all()] == ["micro-1"]
