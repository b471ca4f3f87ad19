"""Windows in the database: each once, bounded, added up, and watched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from fedge.errors import FormatError, UserError
from fedge.spec import Spec
from fedge.telemetry.reference import Reference
from fedge.telemetry.sketch import Sketch, answers_of, latency_bin
from fedge.telemetry.window import Window
from fedge_server.drift import watch as drift
from fedge_server.registry import schema
from fedge_server.registry.database import Registry
from fedge_server.registry.engine import reading
from fedge_server.telemetry.store import Sender, Settings, Telemetry

HOUR = 3600
FIRST = 400_000  # slot
SPEC = Spec("features", (2,), "float32", ("no", "yes"))
ANN, BOB = Sender("a" * 64, "micro", ("lab",)), Sender("b" * 64, "micro")


@dataclass
class Clock:
    now: float = FIRST * HOUR

    def __call__(self) -> float:
        return self.now


def answers(draw: np.random.Generator, n: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    p = draw.random(n)
    return draw.normal(shift, 1, (n, 2)).astype(np.float32), np.stack([p, 1 - p], axis=1)


REFERENCE = Reference.of(*answers(np.random.default_rng(0), 500), SPEC)


def window(slot: int, n: int = 50, seed: int = 0, shift: float = 0.0, version: int = 1) -> Window:
    x, p = answers(np.random.default_rng(seed), n, shift)
    sketch = Sketch.empty(2, 2)
    sketch.inputs[:] = REFERENCE.sketched(x, SPEC)
    sketch.answers[:], sketch.confidence[:] = answers_of(p)
    sketch.latency[latency_bin(0.01)] = n
    sketch.routes[:] = [n - 10, 10, 1, 0, 2]
    return Window(FIRST + slot, HOUR, version, sketch, REFERENCE.digest, cpu_s=1.0, memory_bytes=100 + slot)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def telemetry(registry: Registry, clock: Clock) -> Telemetry:
    registry.begin_run("r", task="t", seed=0, config={}, data="")
    for version in (1, 2):
        registry.record_release(
            version=version, run_id="r", round_number=1, global_model="", manifest=b"", variants=[]
        )
    return Telemetry(registry.engine, references=lambda *_: REFERENCE, now=clock)


def kinds(telemetry: Telemetry, sender: Sender, *windows: Window) -> list[str]:
    return [outcome.kind for outcome in telemetry.take(sender, [each.to_bytes() for each in windows])]


def test_a_window_that_comes_again_counts_once(telemetry: Telemetry) -> None:
    assert kinds(telemetry, ANN, window(0), window(1), window(0)) == ["counted", "counted", "known"]
    assert kinds(telemetry, ANN, window(1), window(0)) == ["known", "known"]
    assert kinds(telemetry, BOB, window(0)) == ["counted"]
    found = telemetry.summary("micro", 1)
    assert found is not None
    assert (len(found.devices), found.windows, found.requests) == (2, 3, 3 * 53)


def test_a_summary_is_the_sum_by_tier_release_tag_and_time(telemetry: Telemetry, clock: Clock) -> None:
    kinds(telemetry, ANN, window(0), window(1))
    clock.now += HOUR
    kinds(telemetry, BOB, window(0), window(1, version=2))
    assert telemetry.summary("gateway", 1) is None
    lab = telemetry.summary("micro", 1, tag="lab")
    late = telemetry.summary("micro", 1, since=clock.now)
    second = telemetry.summary("micro", 2)
    assert lab is not None
    assert late is not None
    assert second is not None
    assert [(len(s.devices), s.windows) for s in (lab, late, second)] == [(1, 2), (1, 1), (1, 1)]
    shown = lab.to_json()
    assert shown["sent_to_cloud"] == pytest.approx(22 / 106)
    assert shown["cloud_timeouts"] == pytest.approx(2 / 106)
    assert shown["errors"] == pytest.approx(4 / 106)
    assert shown["latency"]["p95_s"] == pytest.approx(0.01, rel=0.1)
    assert (shown["memory_bytes"], shown["cpu_s"]) == (101, 2.0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"nonsense", "cannot be read|format"),
        (window(9).to_bytes(), "future"),
        (replace(window(0), slot=3).to_bytes(), "older"),
        (replace(window(0), slot=FIRST * 360, period_s=10).to_bytes(), "shorter"),
        (window(0, version=7).to_bytes(), "no release 7"),
        (replace(window(0), reference="0" * 64).to_bytes(), "another reference"),
        (replace(window(0), reference="", sketch=Sketch.empty(0, 5)).to_bytes(), "5 classes"),
    ],
)
def test_a_window_that_is_none_is_refused_and_spoils_no_other(
    telemetry: Telemetry, data: bytes, reason: str
) -> None:
    bad, good = telemetry.take(ANN, [data, window(0).to_bytes()])
    assert (bad.kind, good.kind) == ("refused", "counted")
    assert any(part in bad.reason for part in reason.split("|"))


def test_too_many_at_once_are_refused(telemetry: Telemetry) -> None:
    with pytest.raises(FormatError, match="more than"):
        telemetry.take(ANN, [b""] * 65)


def test_old_windows_go_by_age_and_by_number(registry: Registry, telemetry: Telemetry, clock: Clock) -> None:
    bounded = Telemetry(
        registry.engine, Settings(keep_s=10 * HOUR, most_windows=3), lambda *_: REFERENCE, clock
    )
    for slot in range(6):
        clock.now = (FIRST + slot) * HOUR
        kinds(bounded, ANN, window(slot))
    assert [w.slot - FIRST for _, w in bounded.windows("micro", 1)] == [3, 4, 5]
    clock.now += 9 * HOUR
    assert bounded.prune() == 1
    assert bounded.watch("micro", 1).windows == 6
    assert bounded.forget(ANN.device) == 2
    assert bounded.summary("micro", 1) is None
    assert bounded.prune() == 0
    assert bounded.watch("micro", 1) == drift.Watch()


@pytest.mark.slow
def test_a_change_of_the_world_raises_the_alarm_and_a_quiet_one_does_not(
    registry: Registry, telemetry: Telemetry, clock: Clock
) -> None:
    settings = Settings(drift=drift.Settings(baseline=3))
    watched = Telemetry(registry.engine, settings, lambda *_: REFERENCE, clock)
    senders = [Sender(f"{number:064}", "micro") for number in range(6)]
    for slot in range(25):
        clock.now = (FIRST + slot) * HOUR
        for number, sender in enumerate(senders):
            seed, shift = 1 + slot * 8 + number, 1.0 if slot >= 20 else 0.0
            assert kinds(watched, sender, window(slot, seed=seed, shift=shift)) == ["counted"]
        alarm = watched.watch("micro", 1).alarm
        assert slot >= 20 or alarm is None
    assert alarm is not None
    assert alarm.stream == "inputs"
    assert alarm.period - FIRST in (20, 21, 22)
    assert watched.watch("micro", 2) == drift.Watch()


def test_a_window_is_there_with_its_mark_on_the_watch_or_not_at_all(
    registry: Registry, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedge_server.telemetry.store._write", killed)
        with pytest.raises(KeyboardInterrupt):
            telemetry.take(ANN, [window(0).to_bytes()])
    with reading(registry.engine) as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(schema.telemetry_windows)) == 0
    assert kinds(telemetry, ANN, window(0)) == ["counted"]
    assert telemetry.watch("micro", 1).windows == 1


@pytest.mark.parametrize("values", [{"keep_s": 0.0}, {"most_windows": 0}, {"watch_period_s": float("nan")}])
def test_settings_that_are_none_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="telemetry"):
        Settings(**values)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_home_opened_again_goes_on(tmp_path: Path, clock: Clock) -> None:
    for slot in range(3):
        with Registry.open(tmp_path / "home") as registry:
            if slot == 0:
                registry.begin_run("r", task="t", seed=0, config={}, data="")
                registry.record_release(
                    version=1, run_id="r", round_number=1, global_model="", manifest=b"", variants=[]
                )
            telemetry = Telemetry(registry.engine, references=lambda *_: REFERENCE, now=clock)
            assert kinds(telemetry, ANN, window(slot)) == ["counted"]
            assert telemetry.watch("micro", 1).windows == slot + 1
