"""`status` and `preflight` on devices that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedge_client import cli


def shown(capsys: pytest.CaptureFixture[str], home: Path, command: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main([command, "--home", str(home), "--format", "json"]) == code
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.slow
def test_status_shows_the_agent_while_it_runs_and_after_it_was_killed(
    hub: Any, agent: Any, ping: Any, wait: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = shown(capsys, agent.home, "status")["agent"]
    assert (before["state"], before["last_contact"], before["tier"]) == ("not running", None, "micro")
    assert 6.9 < before["certificate_days_left"] <= 7
    agent.start()
    hub.send(ping("m1"))
    hub.answer("m1")
    wait(lambda: agent.status.get("child", "").startswith("started"))
    during = shown(capsys, agent.home, "status")["agent"]
    assert (during["state"], during["last_contact"]) == ("connected", "now")
    assert during["tasks"] == before["tasks"] == {"digits": hub.digest_of("digits")}
    assert during["training_process"].startswith("started (process ")
    assert cli.main(["status", "--home", str(agent.home)]) == 0
    assert "agent state           connected\n" in capsys.readouterr().out
    agent.kill()
    after = shown(capsys, agent.home, "status")["agent"]
    assert (after["state"], after["detail"]) == ("not running", "it ended without saying so")
    assert after["last_contact"] != "now"


@pytest.mark.slow
def test_preflight_passes_on_a_device_that_trains(
    hub: Any, agent: Any, wait: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    results = shown(capsys, agent.home, "preflight")
    assert list(results) == [
        *("home", "space", "certificate", "server", "server clock", "settings"),
        *("task digits", "data digits"),
    ]
    assert results["server clock"]["detail"] == "+0 s off the server's"
    assert results["data digits"]["detail"].startswith("60 examples in ")
    assert results["task digits"]["detail"] == f"digest {hub_digest()}"
    agent.start()
    wait(lambda: agent.status["state"] == "connected")
    assert shown(capsys, agent.home, "preflight")["server"]["ok"]
    assert len(hub.hellos) == 2  # the second one asks the agent that runs


def hub_digest() -> str:
    from fedge.task_digest import task_digest

    return task_digest("digits")


@pytest.mark.slow
def test_preflight_names_each_thing_that_fails(
    hub: Any, agent: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (agent.home / "broken.py").write_text("import nothing_like_it\n")
    agent.write({"digits": {"data": "absent.npz"}, "broken:TASK": {}})
    hub.stop()
    results = shown(capsys, agent.home, "preflight", code=1)
    wrong = {name: result["detail"] for name, result in results.items() if not result["ok"]}
    assert set(wrong) == {"server", "server clock", "data digits", "task broken:TASK", "data broken:TASK"}
    assert wrong["server"].startswith("unreachable: ")
    assert "absent.npz does not exist" in wrong["data digits"]
    assert "No module named 'nothing_like_it'" in wrong["task broken:TASK"]


def test_preflight_says_when_the_server_refuses_this_device(
    hub: Any, agent: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuse = grpc.StatusCode.PERMISSION_DENIED
    agent.write({}, delivery={"enabled": False})
    results = shown(capsys, agent.home, "preflight", code=1)
    assert "device: revoked" in results["server"]["detail"]
    assert "offers no task and takes no releases" in results["settings"]["detail"]
