from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tuf_repository import Repository

from fedge.telemetry.reference import Reference
from fedge_client import cli
from fedge_client.telemetry.outgoing import Outgoing


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def root(tmp_path: Path, publisher: Any) -> str:
    (tmp_path / "root.json").write_bytes(publisher.root)
    return str(tmp_path / "root.json")


@pytest.fixture
def picture(tmp_path: Path) -> str:
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8), np.uint8))
    return str(tmp_path / "x.npy")


def install(publisher: Any, *options: str) -> int:
    return cli.main(["install", str(publisher.folder), *options])


def test_a_device_is_made_by_its_first_installation_and_answers(
    home: Path, publisher: Any, root: str, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher.offer(1, answer=1)
    assert install(publisher, "--tier", "micro", "--root", root) == 0
    assert capsys.readouterr().out.startswith("installed release 1 (tier micro, distil + int8): ")
    assert install(publisher) == 0
    assert "nothing to do: release 1 runs" in capsys.readouterr().out
    assert cli.main(["infer", picture]) == 0
    assert capsys.readouterr().out == "one 0.9647\none 0.9647\n"  # e^4 / (e^4 + 2)
    assert cli.main(["infer", picture, "--format", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["release"] == 1
    assert [list(p["probabilities"]) for p in answer["predictions"]] == [["zero", "one", "two"]] * 2
    counted = Outgoing(home / "telemetry").opened()
    assert counted is not None
    assert counted.sketch.answers.tolist() == [0, 4, 0]
    (home / "agent.toml").write_text("[telemetry]\nenabled = false\n")
    assert cli.main(["infer", picture]) == 0
    assert Outgoing(home / "telemetry").opened().sketch.count == 4  # type: ignore[union-attr]


@pytest.mark.slow
def test_inputs_are_counted_by_the_reference_that_came_with_the_release(
    home: Path, publisher: Any, root: str, picture: str, tools: Any
) -> None:
    x = np.random.default_rng(0).integers(0, 17, (200, 8, 8)).astype(np.uint8)
    reference = Reference.of(x, np.full((200, 3), 1 / 3), tools.images)
    publisher.offer(1, answer=1)
    assert install(publisher, "--tier", "micro", "--root", root) == 0
    publisher.offer(2, answer=1, reference=reference.to_bytes())
    assert install(publisher) == 0

    def counted() -> Any:
        assert cli.main(["infer", picture]) == 0
        window = Outgoing(home / "telemetry").opened()
        assert window is not None
        return window

    assert counted().reference == reference.digest
    zeros = reference.sketched(np.zeros((4, 8, 8), np.uint8), tools.images)
    assert (counted().sketch.inputs == zeros).all()
    kept = home / "installed" / "references" / reference.digest
    kept.write_bytes(kept.read_bytes()[:-1])  # the disk has damaged it: all but inputs is counted
    assert (counted().reference, len(counted().sketch.inputs)) == ("", 0)
    assert install(publisher) == 0  # nothing to do
    publisher.offer(3, answer=1, reference=reference.to_bytes())
    publisher.file("micro/3.reference").write_bytes(b"other bytes")
    assert install(publisher) == 1
    publisher.offer(4, answer=2)
    assert install(publisher) == 0
    assert counted().version == 4


def test_status_shows_what_runs_and_where_it_comes_from(
    home: Path, publisher: Any, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in (3, 4):
        publisher.offer(version, answer=1)
        install(publisher, "--tier", "micro", "--root", root)
    capsys.readouterr()
    assert cli.main(["status", "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["tier"], shown["recipe"], shown["task"]) == ("micro", "distil + int8", "digits")
    assert (shown["version"], shown["previous"], shown["floor"], shown["left"]) == (4, 3, 0, None)
    assert shown["quarantine"] == []
    assert shown["metadata"]["timestamp"] == {"version": 3, "expires": "2999-01-01T00:00:00Z"}
    assert shown["lineage"] == {"run": "run-1", "round": 7, "global_model": "a" * 64, "updates": "b" * 64}
    assert cli.main(["status"]) == 0
    assert f"lineage updates       {'b' * 64}\n" in capsys.readouterr().out


def test_rollback_returns_and_install_takes_it_back_only_when_told(
    home: Path, publisher: Any, root: str, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in (1, 2):
        publisher.offer(version, answer=version)
        install(publisher, "--tier", "micro", "--root", root)
    assert cli.main(["rollback"]) == 0
    capsys.readouterr()
    assert cli.main(["infer", picture]) == 0
    assert capsys.readouterr().out.startswith("one ")
    assert install(publisher) == 0
    assert "--again takes it back" in capsys.readouterr().out
    assert cli.main(["rollback"]) == 2
    assert install(publisher, "--again") == 0
    capsys.readouterr()
    assert cli.main(["infer", picture]) == 0
    assert capsys.readouterr().out.startswith("two ")


def test_an_older_release_exits_with_1_and_the_installed_one_answers(
    home: Path, publisher: Any, root: str, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher.offer(2, answer=2)
    install(publisher, "--tier", "micro", "--root", root)
    publisher.offer(1, answer=1)
    assert install(publisher) == 1
    assert capsys.readouterr().err.startswith("fedge-client: error: version 1 is older than the installed 2")
    assert cli.main(["infer", picture]) == 0
    assert capsys.readouterr().out.startswith("two ")


def test_mistakes_exit_with_2_and_leave_no_device_behind(
    home: Path, publisher: Any, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher.offer(1, answer=1)
    for arguments, line in (
        (["install", str(publisher.folder)], "the first time, give --tier"),
        (["install", str(tmp_path / "nowhere"), "--tier", "micro", "--root", root], "is no repository"),
        (
            ["install", str(publisher.folder), "--tier", "micro", "--root", str(tmp_path)],
            "cannot be read",
        ),
        (["install"], "not enrolled; give the FOLDER"),
        (["status"], "no device at"),
        (["rollback"], "no device at"),
        (["infer", "x.npy"], "no device at"),
    ):
        assert cli.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1
    assert not home.exists()


def test_a_wrong_root_or_tier_the_first_time_leaves_no_device_behind(
    home: Path, publisher: Any, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher.offer(1, answer=1)
    (tmp_path / "other.json").write_bytes(Repository().trusted_root)
    assert install(publisher, "--tier", "micro", "--root", str(tmp_path / "other.json")) == 1
    assert "not signed by enough of the keys" in capsys.readouterr().err
    assert install(publisher, "--tier", "mega", "--root", root) == 1
    assert "tier 'mega': metadata says nothing of it" in capsys.readouterr().err
    assert not home.exists()


def test_tier_and_root_of_a_device_are_fixed(
    home: Path, publisher: Any, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher.offer(1, answer=1)
    install(publisher, "--tier", "micro", "--root", root)
    assert install(publisher, "--tier", "micro", "--root", root) == 0
    assert install(publisher, "--tier", "mini") == 2
    (tmp_path / "other.json").write_bytes(Repository().trusted_root)
    assert install(publisher, "--root", str(tmp_path / "other.json")) == 2
    assert "a device is given its root once" in capsys.readouterr().err


def test_a_file_that_does_not_fit_exits_with_2(
    home: Path, publisher: Any, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher.offer(1, answer=1)
    install(publisher, "--tier", "micro", "--root", root)
    np.save(tmp_path / "wrong.npy", np.zeros((3, 3), np.uint8))
    for name in ("absent.png", "wrong.npy"):
        assert cli.main(["infer", str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err


def test_preflight_passes_on_a_sound_device_and_names_what_fails(
    home: Path, publisher: Any, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["preflight"]) == 1
    assert "FAIL home: no device at" in capsys.readouterr().out
    assert not home.exists()
    publisher.offer(1, answer=1)
    install(publisher, "--tier", "micro", "--root", root)
    capsys.readouterr()
    assert cli.main(["preflight"]) == 0
    assert [line[:4] for line in capsys.readouterr().out.splitlines()] == ["ok  "] * 5
    (home / "installed" / "slots" / "a" / "artefact").write_bytes(b"x")
    assert cli.main(["preflight", "--format", "json"]) == 1
    results = json.loads(capsys.readouterr().out)
    assert {name for name, result in results.items() if not result["ok"]} == {"model", "clock"}
    assert cli.main(["status", "--format", "json"]) == 1
    assert "install it again" in json.loads(capsys.readouterr().out)["damaged"]


def test_preflight_notices_a_clock_before_the_release(
    home: Path, publisher: Any, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher.offer(1, answer=1, created="2999-01-01T00:00:00Z")
    install(publisher, "--tier", "micro", "--root", root)
    capsys.readouterr()
    assert cli.main(["preflight"]) == 1
    assert "set the clock" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_home_that_cannot_be_written_is_named(
    home: Path, publisher: Any, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher.offer(1, answer=1)
    install(publisher, "--tier", "micro", "--root", root)
    home.chmod(0o500)
    try:
        assert cli.main(["preflight"]) == 1
        assert "FAIL home" in capsys.readouterr().out
        publisher.offer(2, answer=2)
        assert install(publisher) == 1
    finally:
        home.chmod(0o700)


@pytest.mark.parametrize("command", [[], ["install"], ["status"], ["infer"], ["rollback"], ["preflight"]])
def test_every_help_ends_with_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    assert "examples:\n  fedge-client" in capsys.readouterr().out
