"""A device that moves to another tier: versions of the two are in no order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.delivery import TierMark
from fedge.errors import DowngradeError, ForbiddenError, FormatError
from fedge_client.agent.installation import bring
from fedge_client.agent.standing import Done, standing
from fedge_client.answers import Tally, count, tally
from fedge_client.delivery import Report
from fedge_client.device import Device
from fedge_client.installing import install, refresh, return_to_previous
from fedge_client.reports import Reports
from fedge_client.runtime import Runtime
from fedge_client.updater import Record, State, folder

ROOT = Path(__file__).parents[2]


def answer(home: Path) -> str:
    return Runtime.open(home).infer(np.zeros((8, 8), np.uint8))[0].label


@pytest.mark.slow
@pytest.mark.parametrize("version", [5, 7, 8])
def test_a_device_that_moves_gets_its_new_tiers_release_however_that_is_numbered(
    tmp_path: Path, publisher: Any, tools: Any, version: int
) -> None:
    home = Device.create(tmp_path / "home", "micro", publisher.root).home
    fetch = folder(publisher.folder)
    publisher.offer(7, answer=1)
    publisher.mark(TierMark("micro", 6, 7))
    install(Device.open(home), fetch)
    Reports(home).add([Report(7, "installed"), Report(version, "healthy")])
    count(home, 7, [0.5])
    entry, wire = tools.entry_of("mini", tools.constant_model(2))
    publisher.place(tools.release_of(version, (entry,)), (wire,))
    publisher.mark(TierMark("mini", 2, version))
    device = Device.create(home, "mini", publisher.root, floor=2)
    assert standing(device).has == 0
    assert device.store.state().lowest == 2
    assert (tally(home), Reports(home).waiting()) == (Tally(), [])
    assert answer(home) == "one"  # until then

    assert bring(device, fetch, version) == Done(version, changed=True)
    assert {one.kind for one in Reports(home).waiting()} == {"installed", "healthy", "latency_ms"}
    assert answer(home) == "two"
    assert standing(device).has == version

    return_to_previous(device)  # the earlier tier's: better than none, and no floor is against it
    assert answer(home) == "one"
    assert standing(device).has == 0
    assert not install(device, fetch).changed  # what was left is not taken again by itself
    assert install(device, fetch, again=True).changed
    entry, wire = tools.entry_of("mini", tools.constant_model(0))
    publisher.place(tools.release_of(version + 1, (entry,)), (wire,))
    publisher.mark(TierMark("mini", version + 1, version + 1))
    assert bring(device, fetch, version + 1).changed
    with pytest.raises(DowngradeError):
        install(device, fetch, told=version)


MOVE = """
import sys
from pathlib import Path
from fedge_client.device import Device
from steps import killed_at_each
home, root, copies = map(Path, sys.argv[1:])
work = lambda place: Device.create(place, "mini", root.read_bytes(), floor=2)
print(sum(1 for _ in killed_at_each(home, copies, work)))
"""


@pytest.mark.slow
def test_a_device_that_is_killed_while_it_moves_is_of_one_tier_or_the_other_with_its_floor_and_reports(
    tmp_path: Path, publisher: Any
) -> None:
    home, root, copies = tmp_path / "home", tmp_path / "root.json", tmp_path / "copies"
    Device.create(home, "micro", publisher.root, floor=6)
    Reports(home).add([Report(7, "installed")])
    count(home, 7, [0.5])
    root.write_bytes(publisher.root)
    paths = (ROOT / "common", ROOT / "client", ROOT / "tests" / "client" / "updater")
    done = subprocess.run(
        [sys.executable, "-c", MOVE, home, root, copies],
        env={**os.environ, "PYTHONPATH": ":".join(map(str, paths))},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    before = ("micro", "micro", 6, [Report(7, "installed")], Tally(7, 1, 0.5))
    after = ("mini", "mini", 2, [], Tally())
    seen = []
    for step in range(1, int(done.stdout or f"0{done.stderr}") + 1):
        place = copies / str(step)
        device, state = Device.open(place), Device.open(place).store.state()
        told = Reports(place).waiting(), tally(place)
        seen.append((device.tier, state.channel, state.lowest, *told))
        moved = Device.create(place, "mini", publisher.root, floor=2)  # called again
        assert (moved.store.state().channel, moved.store.state().lowest) == ("mini", 2)
        assert json.loads((place / "delivery" / "tier.json").read_text())["tier"] == "mini"
    assert seen == [before] * seen.count(before) + [after] * seen.count(after)
    assert before in seen
    assert seen.count(after) > 1  # killed between the two writes, too


@pytest.mark.parametrize("killed", [False, True], ids=["moved", "killed before the files went"])
def test_reports_and_counts_from_before_they_named_a_tier_are_of_the_tier_before_a_move(
    tmp_path: Path, publisher: Any, killed: bool
) -> None:
    device = Device.create(tmp_path, "micro", publisher.root)
    Reports(tmp_path).add([Report(7, "installed")])
    count(tmp_path, 7, [0.5])
    for name in ("reports.json", "answers.json"):
        path = tmp_path / "delivery" / name
        value = json.loads(path.read_bytes())
        assert value.pop("tier") == "micro"
        path.write_text(json.dumps(value))
    assert Reports(tmp_path).waiting() == [Report(7, "installed")]  # nothing is lost by an upgrade
    assert tally(tmp_path) == Tally(7, 1, 0.5)
    if killed:
        device.store.commit(device.store.state().in_channel("mini"))
        assert Device.open(tmp_path).tier == "mini"
    else:
        Device.create(tmp_path, "mini", publisher.root)
        assert not (tmp_path / "delivery" / "reports.json").exists()
        assert not (tmp_path / "delivery" / "answers.json").exists()
    assert (Reports(tmp_path).waiting(), tally(tmp_path)) == ([], Tally())
    assert not Reports(tmp_path).has_said(7, "installed")
    Reports(tmp_path).add([Report(7, "installed")])  # of the new tier: what it says since is kept
    count(tmp_path, 7, [1.0])
    Device.create(tmp_path, "mini", publisher.root)  # called again, for good
    assert Reports(tmp_path).waiting() == [Report(7, "installed")]
    assert tally(tmp_path) == Tally(7, 1, 1.0)


def test_what_was_fetched_for_the_tier_before_is_not_installed_after_the_move(
    tmp_path: Path, publisher: Any
) -> None:
    home = tmp_path / "home"
    before, fetch = Device.create(home, "micro", publisher.root), folder(publisher.folder)
    publisher.offer(7, answer=1)
    publisher.mark(TierMark("micro", 6, 7))
    moved = Device.create(home, "mini", publisher.root, floor=2)
    for work in (install, refresh):
        with pytest.raises(ForbiddenError, match="follows 'mini' by now, and 'micro' no longer"):
            work(before, fetch)  # by a process that began before
    done = bring(before, fetch, 7)
    assert (done.changed, Reports(home).waiting()) == (False, [])  # no fault of the version
    assert (moved.store.state().channel, moved.store.state().lowest) == ("mini", 2)


def test_a_home_from_before_there_were_channels_moves_without_its_old_floor(
    tmp_path: Path, publisher: Any
) -> None:
    device = Device.create(tmp_path, "micro", publisher.root)
    old = State(floor=9)
    device.store.commit(old)
    assert Device.open(tmp_path).tier == "micro"
    moved = Device.create(tmp_path, "mini", publisher.root, floor=2)
    assert moved.store.state() == State(floor=2, channel="mini")


def test_what_was_written_before_there_were_channels_is_read() -> None:
    record = Record("a", 3, *["a" * 64] * 2, 1, "a" * 64, 1)
    value = json.loads(State(current=record, floor=2).to_bytes())
    del value["channel"], value["current"]["channel"]
    state = State.from_bytes(json.dumps(value).encode())
    assert state == State(current=record, floor=2)
    assert state.in_channel("micro") == replace(state, channel="micro")
    assert state.in_channel("micro").counted == record
    with pytest.raises(FormatError, match="channel"):
        replace(record, channel="x" * 65)
    with pytest.raises(FormatError, match="channel"):
        State(channel=7)  # type: ignore[arg-type]
