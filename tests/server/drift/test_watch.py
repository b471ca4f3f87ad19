"""The watch: false alarms as stated, changes found, liars ignored, and plain values throughout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fedge.errors import UserError
from fedge_server.drift.scores import Shapes
from fedge_server.drift.watch import NEWCOMERS, Settings, Track, Watch, observe

SETTINGS = Settings()
Draw = np.random.Generator
PROBABILITIES = np.array([0.1] * 10 + [0.0])
SHIFTED = np.array([0.02] * 5 + [0.18] * 5 + [0.0])


def window(draw: Draw, own: np.ndarray, n: int = 100) -> Shapes:
    confidence = np.zeros(20)
    confidence[10:] = draw.multinomial(n, [0.1] * 10)
    return Shapes(
        draw.multinomial(n, own, 4).astype(float), confidence, draw.multinomial(n, [0.6, 0.4]).astype(float)
    )


def fleet(
    seed: int,
    devices: int,
    periods: int,
    world: Callable[[int, int], np.ndarray | None],
    settings: Settings = SETTINGS,
    reference: Shapes | None = None,
) -> Watch:
    """A fleet of devices each of which has a distribution of its own, mixed with the world's."""
    draw, watch, tracks = np.random.default_rng(seed), Watch(), [Track() for _ in range(devices)]
    own = draw.dirichlet(PROBABILITIES[:10] * 50, devices)
    for slot in range(periods):
        for device in range(devices):
            shift = world(device, slot)
            mixed = np.append(own[device], 0.0)
            mixed = mixed if shift is None else shift
            watch, tracks[device] = observe(
                settings,
                watch,
                tracks[device],
                period=slot,
                slot=slot,
                window=window(draw, mixed),
                reference=reference,
            )
    return watch


@pytest.mark.slow
def test_nothing_changes_and_no_alarm_comes() -> None:
    alarms = sum(fleet(seed, 8, 40, lambda *_: None).alarm is not None for seed in range(8))
    assert alarms == 0


def test_a_change_on_all_devices_is_found_within_two_periods() -> None:
    found = fleet(0, 12, 40, lambda _, slot: SHIFTED if slot >= 30 else None)
    assert found.alarm is not None
    assert found.alarm.stream == "inputs"
    assert 30 <= found.alarm.period <= 31


def test_a_change_on_half_of_the_devices_is_found() -> None:
    found = fleet(1, 20, 40, lambda device, slot: SHIFTED if slot >= 30 and device < 10 else None)
    assert found.alarm is not None
    assert found.alarm.period >= 30


def test_two_devices_raise_no_alarm_and_one_may_where_it_is_allowed() -> None:
    def world(device: int, slot: int) -> np.ndarray | None:
        more = (slot - 29) / 50  # ever further away
        return (1 - more) * PROBABILITIES + more * np.eye(11)[0] if more > 0 and device < 2 else None

    assert fleet(2, 8, 80, world).alarm is None
    assert fleet(2, 8, 80, world, replace(SETTINGS, at_least=1)).alarm is not None


def test_new_devices_that_see_something_else_are_found_by_the_reference() -> None:
    draw = np.random.default_rng(9)
    reference = window(draw, PROBABILITIES, 10_000)
    watch, joined = Watch(), 0
    for number in range(60):
        own = np.append(draw.dirichlet(PROBABILITIES[:10] * 5000), 0.0) if number < 40 else SHIFTED
        track = Track()
        for slot in range(5):
            now = window(draw, own)
            watch, track = observe(
                SETTINGS, watch, track, period=number * 5 + slot, slot=slot, window=now, reference=reference
            )
        joined += watch.alarm is None
    assert watch.alarm is not None
    assert watch.alarm.stream == NEWCOMERS
    assert 42 <= joined <= 57


def test_late_double_and_small_windows_change_nothing() -> None:
    draw = np.random.default_rng(0)
    now = window(draw, PROBABILITIES)
    watch, track = observe(SETTINGS, Watch(), Track(), period=5, slot=5, window=now, reference=None)
    for slot, other in ((5, now), (4, now), (6, window(draw, PROBABILITIES, 10))):
        again = observe(SETTINGS, watch, track, period=9, slot=slot, window=other, reference=None)
        assert again == (watch, track)
    other = Shapes(now.inputs[:2], now.confidence, now.answers)
    assert observe(SETTINGS, watch, track, period=9, slot=7, window=other, reference=None) == (watch, track)


def test_values_survive_json_and_go_on_the_same() -> None:
    draw = np.random.default_rng(4)
    watch, track = Watch(), Track()
    for slot in range(20):
        now = window(draw, PROBABILITIES)
        plain = observe(SETTINGS, watch, track, period=slot, slot=slot, window=now, reference=None)
        watch = Watch.from_json(json.loads(json.dumps(watch.to_json())))
        track = Track.from_json(json.loads(json.dumps(track.to_json())))
        watch, track = observe(SETTINGS, watch, track, period=slot, slot=slot, window=now, reference=None)
        assert watch == plain[0]
        assert track.to_json() == plain[1].to_json()
    assert watch.windows == 20


@pytest.mark.parametrize(
    "values", [{"false_alarms": 0.0}, {"at_least": 0}, {"periods": 0}, {"baseline": 0}, {"least_answers": 0}]
)
def test_settings_that_are_none_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="drift"):
        Settings(**values)  # type: ignore[arg-type]
