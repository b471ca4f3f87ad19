"""The whole loop in a deployment: `learn`, a hub, its worker and an agent, each a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from federation import Federation, toml, wait_for

from fedge_client.device import Device
from fedge_server.cli import main
from fedge_server.release import ReleasePlace

TIER = "edge"  # that Federation's devices are of
CONFIG = {
    "task": "digits",
    "data": "server.npz",
    "model": {"name": "logistic"},
    "clients": {"count": 1},
    "rounds": {"count": 1},
    "compress": {"data": "none", "students": [], "forms": ["fp32"], "prune": {"kinds": []}},
    "tiers": {TIER: {"max_drop": 0.05}},
}
POLICY = """
[rollout.criteria.install]
tolerated = 0.02
unacceptable = 0.1
at_least = 1

[[rollout.stages]]
name = "all"
percent = 100
hold_h = 0
min_installs = 1
"""


def with_tier(made: Federation) -> None:
    ReleasePlace.of(made.home).make([TIER])


@pytest.mark.slow
def test_a_cycle_goes_from_a_word_to_a_release_on_the_device_without_a_hand_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Federation(tmp_path, agents=1, before_up=with_tier) as site:
        site.start_agents()
        (tmp_path / "digits.toml").write_text(toml(CONFIG))
        (tmp_path / "learn.toml").write_text(POLICY)
        monkeypatch.chdir(tmp_path)

        def learn(*words: str) -> Any:
            capsys.readouterr()
            assert main(["learn", *words, "--home", str(site.home), "--format", "json"]) == 0
            return json.loads(capsys.readouterr().out)

        assert learn("start", "digits.toml", "--policy", "learn.toml")["hub"] is True
        learn("now", "--reason", "the first release")

        def over() -> bool:
            (row,) = site.query("SELECT state FROM learnings WHERE name = ?", "digits")
            state = json.loads(row["state"])
            return bool(state["cycle"] == 1 and state["status"] == "watching")

        try:
            wait_for(over, "the cycle is over")
        except TimeoutError as error:
            raise AssertionError(f"{error}: {learn('status', 'digits')}\n{site.story('digits-1')}") from None
        found = learn("status", "digits")
        assert [entry["what"] for entry in found["audit"]] == [
            "learning begun",
            "cycle 1 begun",
            "cycle 1: release 1",
            "cycle 1 done",
        ]
        assert site.run_row("digits-1")["status"] == "done"
        (agent,) = site.devices
        current = Device.open(agent.home).store.state().current
        assert current is not None
        assert current.version == 1
