"""`fedge-server release`, and what `init` and `keys` do for it, as a person uses them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dying import dies_at

from fedge.errors import FedgeError
from fedge_server.cli import main
from fedge_server.registry import schema
from fedge_server.registry.database import Registry
from fedge_server.registry.engine import writing
from fedge_server.release import ReleasePlace, draft_again, publish_draft
from fedge_server.repository import create_key, load_key
from fedge_server.signer.judging import Judge
from fedge_server.signer.memory import Memory
from fedge_server.signer.service import serving

Run = Callable[..., Any]


@pytest.fixture
def run(server: ReleasePlace, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command of the home; the JSON that it printed, or its lines with `text`."""

    def go(*argv: str, code: int = 0, text: bool = False) -> Any:
        form = () if text or code == 2 else ("--format", "json")
        assert main([*argv, "--home", str(server.home), *form]) == code
        printed = capsys.readouterr()
        return printed.err if code == 2 else printed.out if text else json.loads(printed.out)

    return go


@pytest.mark.slow
def test_a_draft_is_listed_with_its_reason_published_and_shown_with_its_lineage(
    server, registry, drafted, run
):
    draft = drafted("micro")
    assert run("release", "ls", text=True) == (
        f"no releases\ndraft {draft}  digits  {registry.drafts.get(draft).created[:19]}Z\n"
        "  tier micro: awaiting signature\n"
    )
    waits = run("release", "publish", draft, code=1)
    assert waits["release"] is None
    assert waits["waiting"]["micro"]["status"] == "awaiting signature"
    (listed,) = run("release", "ls")["drafts"]
    assert listed["tiers"]["micro"]["reason"] == waits["waiting"]["micro"]["reason"]
    server.make(["micro"])
    assert run("release", "publish", draft, text=True) == (
        f"release 1 published in {server.home / 'repository'} (tiers: micro)\n"
    )
    assert run("release", "publish", draft, text=True) == "nothing to do: it is published\n"
    assert run("release", "ls")["drafts"] == []
    shown = run("release", "show", "1")
    assert shown["lineage"]["run"] == "run-1"
    assert shown["reports"]["micro"]["n"] == 300
    assert shown["rollouts"] == {"micro": None}
    told = run("release", "show", "1", text=True)
    assert "  gate: passed on 300 examples, 1.00 points allowed" in told
    assert "  cloud: no threshold by itself (9 examples are few); for a share from 0.1 to 0.1" in told


@pytest.mark.slow
def test_old_content_gets_a_higher_version(server, registry, drafted, run):
    server.make(["micro", "board"])
    publish_draft(server, registry, drafted("micro", "board"))
    publish_draft(server, registry, drafted("micro", "board", answer=1, created="2026-02-01T00:00:00Z"))
    made = run("release", "publish", "--again", "1", "--tier", "micro")
    assert (made["release"], made["waiting"]) == (3, {})
    first, third = (run("release", "show", number) for number in ("1", "3"))
    assert [entry["tier"] for entry in third["variants"]] == ["micro"]
    assert third["variants"][0] == first["variants"][0]
    assert run("release", "publish", "--again", "1", "--tier", "micro")["release"] == 4  # in the same second
    assert server.repository.content("board").mark.newest == 2


@pytest.mark.slow
def test_what_a_device_reported_last_leads_back(server, registry, drafted, run):
    server.make(["micro"])
    for answer in (0, 1):
        publish_draft(server, registry, drafted("micro", answer=answer))
    name = "ab" * 32
    device = dict.fromkeys(("public_key", "sealing_key", "reason", "fedge_version", "bundle"), "")
    numbers = {"node_id": 1, "enrolled": 0.0, "certificate_not_after": 0.0, "wire_version": 2}
    with writing(registry.engine) as connection:
        connection.execute(
            schema.devices.insert().values(id=name, tier="micro", status="active", **device, **numbers)
        )
    assert "has not reported" in run("release", "show", "--device", "abab", code=2)
    with writing(registry.engine) as connection:
        for version, kind, at in ((1, "installed", 5.0), (2, "install_failed", 6.0)):
            connection.execute(
                schema.rollout_reports.insert().values(
                    device_id=name, kind=kind, version=version, value=1.0, reported=at
                )
            )
    shown = run("release", "show", "--device", "abab")
    assert (shown["version"], shown["device"]["tier"]) == (1, "micro")
    assert run("release", "show", "--device", "ab", text=True).startswith(
        "device abababababababab of tier micro runs release 1\nrelease 1 of task digits"
    )


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("release", "show"), "give a VERSION, or --device ID"),
        (("release", "show", "1", "--device", "x"), "give a VERSION, or --device ID"),
        (("release", "show", "9"), "release 9: there is none; releases: none"),
        (("release", "show", "--device", "zz"), "device 'zz': there is none"),
        (("release", "publish"), "give a DRAFT, or --again VERSION"),
        (("release", "publish", "x"), "draft 'x': there is none"),
        (("release", "publish", "x", "--tier", "micro"), "only with --again"),
        (("release", "publish", "--again", "4"), "release 4: there is none"),
    ],
)
def test_mistakes_are_one_line(run, argv, why):
    said = run(*argv, code=2)
    assert why in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_the_socket_of_a_signer_stands_for_its_key(server, registry, drafted, run, tmp_path, monkeypatch):
    key = create_key(tmp_path / "tier-micro.key")
    monkeypatch.chdir(tmp_path)  # a short name for the socket
    keys = server.keys
    sign = [w for name in ("targets", "snapshot", "timestamp") for w in ("--sign", str(keys / f"{name}.key"))]
    judge = Judge("micro", key, Memory(tmp_path / "memory", "tier-micro"))
    with serving(judge, Path("s"), [os.geteuid()]):
        roles = run("keys", "add-tier", "micro", "--public", "s", *sign, "--sign", "s")
        assert roles[-1]["keys"] == [key.key.keyid]
        (server.home / "server.toml").write_text(f'[delivery]\nsigners = ["{tmp_path / "s"}"]\n')
        draft = drafted("micro")
        if len(str(tmp_path / "s")) < 100:
            assert run("release", "publish", draft)["release"] == 1
    if registry.drafts.get(draft).open:
        assert "does not answer" in run("release", "publish", draft, code=1)["waiting"]["micro"]["reason"]


def test_init_makes_keys_and_repository_and_says_what_to_carry_away(tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text("a long passphrase\n")
    where = ["--home", str(tmp_path / "home")]
    assert (
        main(["init", *where, "--name", "localhost", "--tier", "micro", "--passphrase-file", str(secret)])
        == 0
    )
    assert f"Carry away {tmp_path / 'home' / 'keys' / 'root.key'} and targets.key" in capsys.readouterr().out
    place = ReleasePlace.of(tmp_path / "home")
    assert place.is_server
    assert list(place.tiers()) == ["micro"]
    at_hand = place.at_hand()
    assert sorted(at_hand.top) == ["snapshot", "timestamp"]  # the others are encrypted
    assert list(at_hand.tiers) == ["micro"]
    with pytest.raises(FedgeError, match="is encrypted"):
        load_key(place.keys / "targets.key")
    capsys.readouterr()
    assert main(["keys", "make", "--tier", "board", "--passphrase-file", str(secret), *where]) == 0
    assert "tier-board" in capsys.readouterr().out
    assert sorted(path.name for path in place.keys.glob("*.pub")) == [
        f"{role}.key.pub" for role in ("root", "snapshot", "targets", "tier-board", "tier-micro", "timestamp")
    ]


@pytest.mark.slow
def test_two_processes_publish_the_same_draft_once(server, registry, drafted):
    server.make(["micro"])
    draft = drafted("micro")
    registry.close()
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                with Registry.open(server.home) as own:
                    publish_draft(server, own, draft)
                os._exit(0)
            finally:
                os._exit(9)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    with Registry.open(server.home) as again:
        assert [row["version"] for row in again.releases()] == [1]
    assert server.repository.content("micro").mark.newest == 1


@pytest.mark.slow
def test_killed_at_any_step_a_draft_is_published_once(server, registry, drafted):
    server.make(["micro"])
    registry.close()

    def work(draft: str) -> None:
        with Registry.open(server.home) as own:
            publish_draft(server, own, draft)

    point, kills = 0, 0
    while True:
        with Registry.open(server.home) as own:
            before = len(own.releases())
        draft = _fresh(server.home, drafted, point)
        died = dies_at(point, lambda draft=draft: work(draft))
        work(draft)
        with Registry.open(server.home) as own:
            assert len(own.releases()) == before + 1
            assert own.drafts.get(draft).open == ()
            assert own.releases()[-1]["version"] == server.repository.content("micro").mark.newest
        kills += died
        if not died:
            break
        point += 3
    assert kills > 5


def _fresh(home: Path, drafted: Callable[..., str], number: int) -> str:
    return drafted("micro", created=f"2026-01-01T00:{number // 60:02}:{number % 60:02}Z")


@pytest.mark.slow
def test_a_draft_made_again_in_the_second_of_its_release_is_another_one(server, registry, drafted):
    server.make(["micro"])
    publish_draft(server, registry, drafted("micro"))
    names = []
    for _ in range(3):
        names.append(draft_again(registry, 1))
        assert publish_draft(server, registry, names[-1]).release is not None
    assert len(set(names)) == 3
