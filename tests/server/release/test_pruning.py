"""Old releases without their bytes: lineage is told as before, and what needs the bytes says why not."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedge.config import Config
from fedge.errors import ConfigError, FedgeError, RefusedError, UserError
from fedge.files import sha256
from fedge.manifest import Lineage
from fedge_server.backup import backup
from fedge_server.cli import main
from fedge_server.hub import tidying
from fedge_server.hub.home import Home
from fedge_server.hub.settings import Settings
from fedge_server.inference.exports import Exports
from fedge_server.registry.database import Registry
from fedge_server.registry.drafts import mark
from fedge_server.registry.engine import writing
from fedge_server.release import ReleasePlace, draft_again, publish_draft
from fedge_server.release.lineage import last_variants, release_of, story
from fedge_server.repository import Repository
from fedge_server.restore import restore
from fedge_server.retention import pruning
from fedge_server.retention.pruning import prune
from fedge_server.retention.rule import Keep
from fedge_server.rollout.service import Rollouts
from fedge_server.rounds.record import RoundRecord
from fedge_server.rounds.starting import whole_model


@pytest.fixture
def published(server: ReleasePlace, registry: Registry, drafted: Any) -> ReleasePlace:
    """Three releases for tier micro, of three models."""
    server.make(["micro"])
    for number in range(3):
        lineage = release_of(registry, 1).lineage if number else None
        changes = {} if lineage is None else {"lineage": _of(lineage, registry, number)}
        report = {"passed": True, "reasons": [], "drop_upper": 0.0, "max_drop": 0.01, "n": 300 + number}
        publish_draft(server, registry, drafted("micro", answer=number, report=report, **changes))
    return server


def _of(lineage: Any, registry: Registry, number: int) -> Any:
    return replace(lineage, global_model=registry.store.put(b"model %d" % number))


def pruned(place: ReleasePlace, registry: Registry, **keep: Any) -> Any:
    return prune(Home(place.home), registry, Keep(**({"releases": 1} | keep)), grace_s=-1e12)


def test_a_release_without_its_bytes_is_shown_as_before_and_says_why_it_cannot_be_published_again(
    published, registry, capsys
):
    home = published.home
    exports = Exports(home / "exports")
    models = {number: release_of(registry, number).lineage.global_model for number in (1, 2, 3)}
    for model in (*models.values(), "f" * 64):
        exports.put(model, b"onnx of " + model.encode())
    half = home / "exports" / ".half-written.onnx.abc"
    half.write_bytes(b"onnx")
    before = {number: story(registry, release_of(registry, number)) for number in models}
    done = pruned(published, registry)
    assert done.retired.variants == {(1, "micro"), (2, "micro")}
    after = {number: story(registry, release_of(registry, number)) for number in models}
    removed = {number: list(found.pop("removed")) for number, found in after.items()}
    assert removed == {1: ["micro"], 2: ["micro"], 3: []}
    assert after == {
        number: {k: v for k, v in found.items() if k != "removed"} for number, found in before.items()
    }
    assert [exports.has(model) for model in (*models.values(), "f" * 64)] == [False, False, True, False]
    assert not half.exists()
    assert list(last_variants(registry, ["micro"], besides="")) == ["micro"]
    assert main(["release", "ls", "--home", str(home)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("tiers: micro  bytes removed: micro") for line in lines] == [True, True, False]
    assert main(["release", "show", "1", "--home", str(home)]) == 0
    assert "  bytes: removed on " in capsys.readouterr().out
    assert main(["release", "publish", "--again", "1", "--home", str(home)]) == 2
    said = capsys.readouterr().err
    assert "release 1: its bytes for micro were removed on" in said
    assert "publish a newer one, or restore a backup from before" in said
    assert registry.drafts.all(unpublished=True) == []
    with pytest.raises(UserError, match="its bytes for tier micro are not kept any more"):
        Rollouts(registry).start(1, "micro", who="ann")
    config = Config.from_mapping({"task": "digits"})
    with pytest.raises(ConfigError, match=r"'release:1': its global model is not kept any more"):
        whole_model("release:1", config, None, None, registry)  # type: ignore[arg-type]  # it is refused before


def test_a_backup_of_what_is_left_comes_back_and_goes_on(published, registry, drafted, tmp_path):
    pruned(published, registry)
    publish_draft(published, registry, draft_again(registry, 3))
    backup(published.home, None, tmp_path / "saved.tar.gz")
    restore(tmp_path / "saved.tar.gz", tmp_path / "new")
    with Registry.open(tmp_path / "new") as again:
        assert [row["version"] for row in again.releases()] == [1, 2, 3, 4]
        place = ReleasePlace.of(tmp_path / "new")
        assert publish_draft(place, again, draft_again(again, 4)).release.version == 5
        assert story(again, release_of(again, 1))["reports"]["micro"]["n"] == 300
        assert not prune(Home(place.home), again, Keep(releases=9), grace_s=-1e12).retired


def test_a_draft_that_waits_keeps_all_it_needs_and_refused_ones_only_the_newest(
    server, registry, drafted, monkeypatch
):
    server.make(["micro"])
    release = publish_draft(server, registry, drafted("micro")).release
    waiting = draft_again(registry, 1)  # its model is the release's, which is soon too old
    for answer in (1, 2):
        lineage = _of(release.lineage, registry, answer)
        publish_draft(server, registry, drafted("micro", answer=answer, lineage=lineage))
    bad = {"passed": False, "reasons": ["too bad"], "drop_upper": 0.5, "max_drop": 0.01}
    refused = []
    for number in range(2):
        refused.append(drafted("micro", answer=number, report=bad | {"n": number}, task=f"digits{number}"))
        assert publish_draft(server, registry, refused[-1]).waiting[0].is_refused
    done = pruned(server, registry)
    assert done.retired.variants == {(1, "micro"), (2, "micro")}
    assert done.retired.drafts == {(refused[0], "micro")}
    assert registry.store.has(release.lineage.global_model)
    assert [draft.id for draft in registry.drafts.all(unpublished=True)] == [waiting, refused[1]]
    with pytest.raises(UserError, match=f"draft {refused[0]}: was refused, and its bytes were removed"):
        publish_draft(server, registry, refused[0])
    assert publish_draft(server, registry, waiting).release.version == 4 + len(refused)
    again = drafted("micro", answer=0, report=bad | {"n": 0}, task="digits0")  # made once more
    assert again == refused[0]
    assert registry.drafts.get(again).open == ("micro",)
    assert pruned(server, registry).retired.drafts == {(again, "micro")}


def test_a_refused_draft_that_is_retired_while_its_signer_is_asked_is_published_whole(
    server, registry, drafted, monkeypatch, tmp_path
):
    server.make(["micro"])
    lineage = release_of(registry, publish_draft(server, registry, drafted("micro")).release.version).lineage
    drafts = [
        drafted("micro", answer=number, lineage=_of(lineage, registry, number), task=f"digits{number}")
        for number in (1, 2)
    ]
    for draft in drafts:
        with writing(registry.engine) as connection:
            mark(connection, draft, "micro", "refused", reason="the memory of its signer is away")
    monkeypatch.setattr(pruning, "PATIENCE_S", 0.0)
    real, retired = Repository.publish, []

    def publish(*given: Any, **more: Any) -> Any:
        with pytest.raises(FedgeError, match="something is being put into it all the time"):
            pruned(server, registry)
        retired.extend(each.id for each in registry.drafts.of_run("run-1") if each.variants[0].retired)
        return real(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Repository, "publish", publish)
        release = publish_draft(server, registry, drafts[0]).release
    assert retired == [drafts[0]]
    pruned(server, registry)
    assert registry.store.has(release.lineage.global_model)
    assert registry.store.has(release.variants[0].wire_sha256)
    backup(server.home, None, tmp_path / "saved.tar.gz")  # it holds all that rows name


def test_the_model_of_a_draft_outlives_its_round(server, registry, drafted):
    """A stopped run was compressed, and goes on while its draft awaits a signature."""

    def commit(number: int) -> str:
        model = {"w": np.full(3, number, np.float32)}
        return registry.commit_round("run-1", RoundRecord(number, {"accuracy": 0.5}), model, b"%d" % number)

    model = commit(1)
    drafted("micro", lineage=Lineage("run-1", 1, model, "b" * 64))
    digests = [commit(number) for number in (2, 3, 4)]
    assert [registry.store.has(digest) for digest in (model, *digests)] == [True, False, True, True]


def test_the_command_says_first_what_would_go(published, registry, capsys):
    home = str(published.home)

    def run(*argv: str, code: int = 0) -> Any:
        assert main(["release", "prune", "--home", home, *argv]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    (published.home / "server.toml").write_text("[delivery]\nkeep = 2\n[keeping]\nreleases = 2\n")
    assert "a tier offers 2 releases ([delivery] keep); keep at least these" in run("--keep", "1", code=2)
    assert "runs = 0: the newest is always kept" in run("--runs", "0", code=2)
    said = run("--dry-run")
    assert said == "release 1: tiers micro\nwould remove 0 files, 0 bytes\n"  # all are younger than an hour
    value = json.loads(run("--format", "json"))
    assert value == {
        "releases": {"1": ["micro"]}, "drafts": [], "runs": [], "files": 0, "bytes": 0, "dry_run": False,
    }  # fmt: skip
    assert run() == "removed 0 files, 0 bytes\n"


def test_a_hub_prunes_again_and_again_and_says_what_goes_wrong(
    published, registry, monkeypatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(tidying, "prune", lambda *given: prune(*given, grace_s=-1e12))
    garbage = registry.store.put(b"of a publisher that was killed")

    async def scenario() -> None:
        home = Home(published.home)
        task = asyncio.create_task(tidying.tidy_always(home, registry, Keep(2), interval_s=0.01))
        while registry.store.has(garbage):
            await asyncio.sleep(0.01)
        monkeypatch.setattr(tidying, "prune", refuses)
        while not any("cannot be removed" in record.message for record in caplog.records):
            await asyncio.sleep(0.01)
        task.cancel()

    def refuses(*_: Any) -> Any:
        raise RefusedError("the disk is away")

    asyncio.run(asyncio.wait_for(scenario(), 60))
    assert "no longer kept: release 1: tiers micro" in caplog.messages
    assert "what is old cannot be removed: the disk is away" in caplog.messages
    assert sha256(b"of a publisher that was killed") == garbage


def test_fewer_releases_than_devices_are_offered_are_refused_in_the_settings():
    with pytest.raises(ConfigError, match=r"keeping.releases = 3: must be at least delivery.keep = 4"):
        Settings.from_mapping({"keeping": {"releases": 3}})
    assert Settings().keeping.terms() == Keep()
