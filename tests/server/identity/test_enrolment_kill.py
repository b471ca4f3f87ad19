"""A device that is killed while it enrols goes on with the same command, whenever it was."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedge_client.agent.identity import Identity, is_enrolled

ROOT = Path(__file__).parents[3]

# Kills itself before the write of this number; with a sixth the enrolment is complete.
SCRIPT = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
from fedge_client.agent import identity
from fedge_client.cli import main

write, left = identity.write_atomically, int(sys.argv[1])

def counted(*words, **options):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    write(*words, **options)

identity.write_atomically = counted
home, _, join = sys.argv[2].partition("=")
sys.exit(main(["enroll", join, "--home", home]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", range(5))
def test_a_kill_before_each_file_is_mended_by_the_same_command(
    server: Any, tmp_path: Path, step: int
) -> None:
    join, home = server.join(), tmp_path / "device"
    paths = [str(ROOT / "common"), str(ROOT / "client")]

    def enroll(writes: int) -> int:
        words = [sys.executable, "-c", SCRIPT, str(writes), f"{home}={join}", *paths]
        return subprocess.run(words, capture_output=True).returncode

    assert enroll(step) == -signal.SIGKILL
    assert not is_enrolled(home)
    known = [row.id for row in server.registry.devices.all()]
    assert enroll(9) == 0
    made = Identity.open(home)
    assert known in ([], [made.device_id])  # the same device, whether its token was used before or not
    assert [row.id for row in server.registry.devices.all()] == [made.device_id]
