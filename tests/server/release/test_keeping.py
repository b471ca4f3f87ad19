"""Keeping a repository alive and in backups: signed again in time, and copied as one state."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from datetime import timedelta
from typing import Any

import pytest

from fedge_server.backup import backup
from fedge_server.cli import main
from fedge_server.hub import keeping
from fedge_server.hub.home import Home
from fedge_server.hub.preflight import check
from fedge_server.registry.database import Registry
from fedge_server.release import ReleasePlace, publish_draft
from fedge_server.release.lineage import released
from fedge_server.repository import Lifetimes, Repository
from fedge_server.restore import restore


def signed_long_ago(server: ReleasePlace, **ago: float) -> None:
    """Sign snapshot and timestamp as they were signed some time ago."""
    lives = Lifetimes(timestamp=timedelta(days=2) - timedelta(**ago), snapshot=timedelta(days=7))
    Repository(server.home / "repository", lifetimes=lives).refresh(server.online(), force=True)


def versions(server: ReleasePlace) -> dict[str, int]:
    return {role.role: role.version for role in server.repository.status()}


def test_a_timestamp_is_signed_again_after_twelve_hours_and_not_before(server):
    before = versions(server)
    assert not keeping.refresh(Home(server.home))
    signed_long_ago(server, hours=13)
    assert keeping.refresh(Home(server.home))
    assert not keeping.refresh(Home(server.home))
    assert versions(server)["timestamp"] == before["timestamp"] + 2
    assert versions(server)["targets"] == before["targets"]


def test_without_repository_or_keys_there_is_nothing_to_do(server, tmp_path):
    assert not keeping.refresh(Home(tmp_path / "none"))
    signed_long_ago(server, hours=13)
    (server.keys / "snapshot.key").unlink()
    assert not keeping.refresh(Home(server.home))


def test_what_goes_wrong_is_logged_and_the_hub_looks_again(server, caplog):
    (server.home / "repository/metadata/timestamp.json").write_text("{}")
    caplog.set_level(logging.ERROR)

    async def scenario() -> None:
        task = asyncio.create_task(keeping.keep_repository(Home(server.home), interval_s=0.01))
        while len(caplog.records) < 2:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert "repository: cannot be signed again" in caplog.text


def test_preflight_and_keys_show_warn_before_a_role_ends(server, capsys):
    def finding(what: str) -> Any:
        return next(found for found in check(Home(server.home)) if found.what == what)

    server.make(["micro"])
    assert finding("repository").good
    assert finding("signers").detail == "keys or signers of micro are at hand"
    signed_long_ago(server, hours=40)
    assert "timestamp ends" in finding("repository").detail
    assert main(["keys", "show", "--home", str(server.home), "--format", "json"]) == 0
    shown = {role["role"]: role["ending"] for role in json.loads(capsys.readouterr().out)}
    assert shown == {
        "root": False, "targets": False, "snapshot": False, "timestamp": True, "tier-micro": False,
    }  # fmt: skip
    (server.home / "server.toml").write_text('[delivery]\nsigners = ["/nowhere/s"]\n')
    assert "signer /nowhere/s: does not answer" in finding("signers").detail


@pytest.mark.slow
def test_a_backup_brings_the_repository_its_keys_and_the_objects_of_releases_and_drafts_back(
    server, registry, drafted, tmp_path
):
    server.make(["micro"])
    publish_draft(server, registry, drafted("micro"))
    draft = drafted("board", answer=1)
    saved = backup(server.home, None, tmp_path / "b.tar.gz")
    assert saved.objects >= 8  # two manifests, each with wire, report and golden; some are the same
    restore(tmp_path / "b.tar.gz", tmp_path / "back")
    place = ReleasePlace.of(tmp_path / "back")
    for folder in ("repository", "keys"):
        names = sorted(
            str(path.relative_to(server.home))
            for path in (server.home / folder).rglob("*")
            if path.is_file() and not path.name.endswith("lock")
        )
        assert names
        for name in names:
            found = tmp_path / "back" / name
            assert found.read_bytes() == (server.home / name).read_bytes()
            assert found.stat().st_mode == (server.home / name).stat().st_mode
    with Registry.open(tmp_path / "back") as again:
        assert released(again) == released(registry)
        place.make(["board"])
        assert publish_draft(place, again, draft).release.version == 2


def test_a_backup_waits_for_a_publisher(server, registry, tmp_path):
    """It holds the lock that publishers take, so the timestamp it copies names files that it copies too."""
    other = Repository(server.home / "repository", patience_s=0.1)
    with server.repository.still():
        pid = os.fork()
        if pid == 0:
            try:
                other.status()
            except Exception as error:  # noqa: BLE001 - its word is the exit status
                os._exit(7 if "another publisher" in str(error) else 8)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert other.status()


@pytest.fixture(autouse=True)
def no_names(monkeypatch):
    """Preflight looks up this machine's name, which is none of these tests' business."""
    monkeypatch.setattr("fedge_server.hub.preflight._names", lambda _: iter(()))
