from __future__ import annotations

import hashlib
from typing import Any

import pytest


@pytest.mark.slow
def test_an_agent_connects_trains_in_its_child_and_submits(hub: Any, agent: Any, training: Any) -> None:
    agent.start()
    hello = hub.hellos[0]
    assert [task.name for task in hello.tasks] == ["digits"]
    message, data = training("m1")
    hub.objects[hashlib.sha256(data).digest()] = data
    hub.send(message)
    result, answer = hub.answer("m1")
    assert result.WhichOneof("kind") == "content", result
    assert len(answer) == len(data)
    assert answer != data
    assert result.seconds > 0
    assert agent.terminate() == 0
