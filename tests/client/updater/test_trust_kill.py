"""A poll that is killed at any step of the file system: the next goes on, and nothing older is accepted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tuf_repository import Repository

from fedge.errors import DowngradeError
from fedge_client.updater import Trust, folder

ROOT = Path(__file__).parents[3]
STEP_BY_STEP = """
import json, sys
from datetime import UTC, datetime
from pathlib import Path
from fedge_client.updater import Trust, folder
from steps import killed_at_each
before, after, home, copies = map(Path, sys.argv[1:])
now = datetime(2026, 3, 1, 12, tzinfo=UTC)

def poll(place, published):
    root = (before / "1.root.json").read_bytes()
    return Trust(place, root, folder(published), clock=lambda: now).refresh().versions()

poll(home, before)
steps = 0
for place in killed_at_each(home, copies, lambda place: poll(place, after)):
    steps += 1
    json.loads((place / "timestamp.json").read_bytes())  # whole, old or new
    found = poll(place, after)
    assert found == {"root": 2, "timestamp": 2, "snapshot": 2, "targets": 2}, found
    left = [str(path) for path in place.rglob(".*") if path.name != ".lock"]
    assert not left, left
print(json.dumps(steps))
"""


@pytest.mark.slow
def test_a_poll_that_is_killed_at_any_step_is_made_good_by_the_next(tmp_path: Path) -> None:
    repository = Repository()
    before, after, copies = (tmp_path / name for name in ("before", "after", "copies"))
    for made in (before, after, copies):
        made.mkdir()
    repository.write(before)
    old = repository.rotate("root")
    repository.publish_root(old)
    repository.publish_targets()
    repository.publish()
    repository.write(after)
    done = subprocess.run(
        [sys.executable, "-c", STEP_BY_STEP, *map(str, (before, after, tmp_path / "home", copies))],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'common'}:{ROOT / 'client'}:{Path(__file__).parent}"},
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = int(done.stdout)
    assert steps > 15
    for step in (1, steps):
        with pytest.raises(DowngradeError):
            Trust(copies / str(step), repository.trusted_root, folder(before)).refresh()
