"""`fedge-client memory`: nothing is kept without consent, and what was kept goes when it is withdrawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.errors import FedgeError
from fedge.files import sole_holder
from fedge_client import cli
from fedge_client.agent import settings
from fedge_client.memory import training


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publisher: Any) -> Path:
    """A device with an installed release of images, whose labels are zero, one and two."""
    monkeypatch.setenv("FEDGE_HOME", str(tmp_path / "home"))
    publisher.offer(1, answer=1)
    root = tmp_path / "root.json"
    root.write_bytes(publisher.root)
    assert cli.main(["install", str(publisher.folder), "--tier", "micro", "--root", str(root)]) == 0
    return tmp_path / "home"


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    np.save(tmp_path / "x.npy", np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8))
    return str(tmp_path / "x.npy")


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["memory", "show", "--format", "json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_examples_are_kept_by_consent_and_forgotten_on_demand(
    home: Path, pictures: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["memory", "add", pictures, "--label", "two"]) == 2
    assert "fedge-client memory consent" in capsys.readouterr().err
    assert shown(capsys) == {"consent": False, "examples": 0, "labels": {}, "seen": {}}
    assert cli.main(["memory", "consent"]) == 0
    for label in ("two", "zero"):
        assert cli.main(["memory", "add", pictures, "--label", label]) == 0
    assert capsys.readouterr().out.endswith("kept 3 of 3 examples of 'two'\nkept 3 of 3 examples of 'zero'\n")
    assert shown(capsys)["labels"] == {"zero": 3, "two": 3}
    assert cli.main(["memory", "show"]) == 0
    assert "two                   3 of 3\n" in capsys.readouterr().out
    assert cli.main(["memory", "forget", "--label", "two", "--older-days", "1"]) == 0
    assert cli.main(["memory", "forget", "--label", "two"]) == 0
    assert capsys.readouterr().out == "forgot 0 examples\nforgot 3 examples\n"
    assert shown(capsys) == {
        "consent": True,
        "examples": 3,
        "labels": {"zero": 3},
        "seen": {"zero": 3, "two": 0},
    }
    assert cli.main(["memory", "withdraw"]) == 0
    assert shown(capsys) == {"consent": False, "examples": 0, "labels": {}, "seen": {}}
    data = (home / "memory" / "digits" / "memory.db").read_bytes()
    assert np.load(pictures)[2].tobytes() not in data


def test_the_devices_file_says_how_much_is_kept_and_what_trains_on_it(
    home: Path, pictures: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "agent.toml").write_text("[memory]\nsize = 2\n[tasks.digits]\nmemory = true\n[tasks.images]\n")
    digits, images = settings.load(home / "agent.toml").tasks
    assert digits.node_config("d")["memory"] == str(home / "memory" / "digits")
    assert "memory" not in images.node_config("d")
    assert cli.main(["memory", "consent"]) == 0
    assert cli.main(["memory", "add", pictures, "--label", "one"]) == 0
    assert shown(capsys)["labels"] == {"one": 2}


def test_a_mistake_is_one_clear_line(home: Path, pictures: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "consent"]) == 0
    for options, said in (
        (["add", pictures, "--label", "seven"], "'seven': is none of the release's: 'zero', 'one', 'two'"),
        (["add", str(home / "absent.npy"), "--label", "one"], "absent.npy"),
        (["forget", "--older-days", "-1"], "--older-days -1"),
        (["show", "--task", "images"], "the installed release is of task 'digits'"),
    ):
        assert cli.main(["memory", *options]) == 2
        assert said in capsys.readouterr().err


def test_a_memory_of_another_model_is_withdrawn_all_the_same(
    home: Path, pictures: str, publisher: Any, tools: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["memory", "consent"]) == 0
    assert cli.main(["memory", "add", pictures, "--label", "one"]) == 0
    other = type(tools.images)("image", (9, 9), "uint8", tools.labels)
    publisher.offer(2, answer=1, spec=other)
    assert cli.main(["install", str(publisher.folder)]) == 0
    assert cli.main(["memory", "show"]) == 2
    assert "another model" in capsys.readouterr().err
    assert cli.main(["memory", "withdraw"]) == 0
    assert not (home / "memory" / "digits" / "memory.db").exists()


def test_one_process_at_a_time_is_at_work_on_it(
    home: Path, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_PATIENCE_S", 0.0)
    folder = home / "memory" / "digits"
    folder.mkdir(parents=True)
    with (
        sole_holder(folder / "lock"),
        pytest.raises(FedgeError, match="another process is at work"),
        training.opened(folder, tools.images),
    ):
        pass
