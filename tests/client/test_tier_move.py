"""A device that moves to another tier: versions of the two are in no order."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.delivery import TierMark
from fedge.errors import DowngradeError, FormatError
from fedge_client.agent.installation import bring
from fedge_client.agent.standing import Done, standing
from fedge_client.answers import Tally, count, tally
from fedge_client.delivery import Report
from fedge_client.device import Device
from fedge_client.installing import install, return_to_previous
from fedge_client.reports import Reports
from fedge_client.runtime import Runtime
from fedge_client.updater import Record, State, folder


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
