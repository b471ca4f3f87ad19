"""What a resident agent costs a device; the figures of docs/agent.md."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def memory_mb(pid: int) -> float:
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1000


def test_an_agent_at_rest_is_small_and_quickly_connected(hub: Any, agent: Any) -> None:
    started = time.monotonic()
    agent.start()
    seconds = time.monotonic() - started
    memory = memory_mb(agent.process.pid)
    print(f"agent: {memory:.1f} MB, connected after {seconds:.2f} s")
    assert memory < 80
    # 2 s on a machine that is not busy with other tests.
    assert seconds < 10
