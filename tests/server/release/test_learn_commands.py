"""`fedge-server learn`, over a server's home."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedge_server.cli import main
from fedge_server.cli import runs as runs_command
from fedge_server.hub.home import Home
from fedge_server.hub.learning import Learner
from fedge_server.registry.database import Registry

Run = Callable[..., tuple[int, str, str]]
CONFIG = """
task = "digits"
[rounds]
count = 2
[tiers.micro]
max_drop = 0.02
"""


@pytest.fixture
def run(home: Path, registry: Registry, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command on the home; returns the exit code and what it printed."""
    (home / "server.toml").write_text("")
    (home / "digits.toml").write_text(CONFIG)
    (home / "learn.toml").write_text("every_s = 604_800\nremember = 0.5\n")

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["learn", *words, "--home", str(home)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def value(said: tuple[int, str, str]) -> Any:
    code, out, err = said
    assert code == 0, err
    return json.loads(out)


@pytest.mark.slow
def test_a_learning_from_start_to_removal(
    run: Run, home: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    monkeypatch.setattr(runs_command, "check", lambda config, _: checked.append(config.task))
    assert run("status")[1].startswith("nothing is learned again")
    code, _, err = run("now")
    assert (code, "which one? learnings: none" in err) == (2, True)
    started = value(
        run("start", str(home / "digits.toml"), "--policy", str(home / "learn.toml"), "--format", "json")
    )
    assert checked == ["digits"]
    assert (started["name"], started["tiers"], started["hub"]) == ("digits", ["micro"], False)
    assert (started["terms"]["every_s"], started["terms"]["remember"]) == (604_800, 0.5)
    assert "no hub is up" in run("pause")[1]
    code, _, err = run("now", "digits")
    assert (code, "is paused; resume it first" in err) == (2, True)
    run("resume")
    # The schedule begins the first cycle at once.
    assert value(run("status", "digits", "--format", "json"))["state"]["status"] == "running"
    code, _, err = run("rm")
    assert (code, "stop it first" in err) == (2, True)
    Learner(Home(home), registry).advance()
    assert value(run("stop", "--reason", "wrong data", "--format", "json"))["state"]["status"] == "watching"
    stopped = registry.run("digits-1")
    assert stopped is not None
    assert stopped["status"] == "stopped"
    assert value(run("examples", "100", "--format", "json"))["state"]["examples"] == 100
    assert run("examples", "-1", "--home", str(home))[0] == 2
    code, out, _ = run("status", "digits")
    assert "no cycle begins by itself before" in out
    assert "cycle 1 stopped (wrong data)" in out
    asked = value(run("now", "--reason", "new sensors", "--format", "json"))
    assert (asked["state"]["cycle"], asked["run"]) == (2, "digits-2")
    run("stop")
    assert run("rm")[1] == "learning digits: removed\n"
    assert value(run("status", "--format", "json")) == []


def test_what_cannot_be_learned_again_is_refused_in_one_line(run: Run, home: Path) -> None:
    for text, words, said in (
        ('task = "digits"\n', (), "names no tiers"),
        (CONFIG, ("--name", "a b"), "--name a b"),
        (CONFIG, ("--policy", "none.toml"), "policy none.toml: there is no such file"),
        (CONFIG + '[privacy]\nmechanism = "local"\n', ("--policy", str(home / "learn.toml")), "remember"),
    ):
        (home / "digits.toml").write_text(text)
        code, _, err = run("start", str(home / "digits.toml"), *words)
        assert code == 2, err
        assert said.replace("a b", "'a b'") in err
        assert err.count("\n") == 1
