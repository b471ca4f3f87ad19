"""`fedge-server keys`: a repository's whole life from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedge_server.cli import main
from fedge_server.repository import Repository


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with keys and a repository with the tier micro."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDGE_HOME", str(tmp_path))
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text("a long passphrase\n")
    for name in ("ann", "ben", "targets"):
        assert main(["keys", "new", name, "--passphrase-file", "secret"]) == 0
    for name in ("snapshot", "timestamp", "micro", "new"):
        assert main(["keys", "new", name, "--online"]) == 0
    roles = [f"--{role}={role}.pub" for role in ("targets", "snapshot", "timestamp")]
    assert (
        main(
            ["keys", "init", "--root", "ann.pub", "--root", "ben.pub", *roles, *sign("ann", "ben", "targets")]
        )
        == 0
    )
    assert main(["keys", "add-tier", "micro", "--public", "micro.pub", *sign("targets", "micro")]) == 0
    capsys.readouterr()
    return tmp_path


def sign(*names: str) -> list[str]:
    closed = {"ann", "ben", "targets"}
    given = [f"{name}=secret" if name in closed else name for name in (*names, "snapshot", "timestamp")]
    return [word for name in given for word in ("--sign", name)]


def roles(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["keys", "show", "--format", "json"]) == 0
    return {role["role"]: role for role in json.loads(capsys.readouterr().out)}


@pytest.mark.slow
def test_show_lists_every_role(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = roles(capsys)
    assert set(found) == {"root", "targets", "snapshot", "timestamp", "tier-micro"}
    assert found["root"]["threshold"] == 2
    assert [found[role]["version"] for role in ("root", "targets", "timestamp")] == [1, 2, 2]
    assert main(["keys", "show"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["role", "version", "expires", "keys"]
    assert len(lines) == 5


@pytest.mark.slow
def test_keys_are_rotated_and_a_tier_is_suspended_and_renewed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = roles(capsys)
    assert main(["keys", "rotate", "tier-micro", "--public", "new.pub", *sign("targets", "new")]) == 0
    after = roles(capsys)
    assert after["tier-micro"]["keys"] != before["tier-micro"]["keys"]
    assert main(["keys", "suspend", "micro", *sign("targets")]) == 0
    assert roles(capsys)["tier-micro"]["keys"] == []
    assert main(["keys", "rotate", "tier-micro", "--public", "micro.pub", *sign("targets", "micro")]) == 0
    assert main(["keys", "renew", "root", *sign("ann", "ben")]) == 0
    assert main(["keys", "refresh", "--force", *sign()]) == 0
    final = roles(capsys)
    assert final["tier-micro"]["keys"] == before["tier-micro"]["keys"]
    assert final["root"]["version"] == 2
    assert final["timestamp"]["version"] == after["timestamp"]["version"] + 4
    assert Repository(place / "repository").content("micro").mark.floor == 0


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (["new", "ann", "--passphrase-file", "secret"], "ann.pub: exists already"),
        (["new", "eva"], "an offline key needs a passphrase; give --passphrase-file, or --online"),
        (["new", "eva", "--online", "--passphrase-file", "secret"], "leave out --passphrase-file"),
        (["renew", "root", "--sign", "ann"], "ann: is encrypted; give the file"),
        (["renew", "root", "--sign", "ann=ann.pub"], "others may read it"),
        (["renew", "root", *sign("ann")], "root: 1 of 2 signatures"),
        (["rotate", "mirror", "--public", "new.pub", *sign()], "must be root, targets"),
        (["show", "--home", "elsewhere"], "create one first"),
        (["rotate", "tier-micro", "--public", "micro", *sign()], "micro: public key: not a public key"),
        (["rotate", "tier-nano", "--public", "new.pub", *sign()], "list them with: fedge-server keys show"),
        (["make", "--tier", "micro"], "which are not here; bring one to"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    place: Path, capsys: pytest.CaptureFixture[str], call: list[str], why: str
) -> None:
    assert main(["keys", *call]) == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1


def test_a_person_is_asked_for_the_passphrase(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    answers = iter(["a long passphrase", "a long passphrase", "one passphrase", "other passphrase"])
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(answers))
    assert main(["keys", "new", "eva"]) == 0
    assert b"ENCRYPTED" in (place / "eva").read_bytes()
    assert main(["keys", "new", "tom"]) == 2
    assert "the two passphrases differ" in capsys.readouterr().err
    assert not (place / "tom").exists()
