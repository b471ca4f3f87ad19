"""The collector: what it counts, what survives a kill, a restart, a full disk and a clock that jumps."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fedge.errors import UserError
from fedge.spec import Spec
from fedge.telemetry.reference import Reference
from fedge.telemetry.sketch import latency_quantile
from fedge.telemetry.window import Window
from fedge_client.telemetry import outgoing
from fedge_client.telemetry.collector import Answering, Collector
from fedge_client.telemetry.outgoing import Outgoing
from fedge_client.telemetry.settings import Settings

SPEC = Spec("features", (2,), "float32", ("no", "yes"))
HOUR = 3600


@dataclass
class Clock:
    now: float = 1_000_000 * HOUR

    def __call__(self) -> float:
        return self.now


def data(count: int, seed: int = 0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    draw = np.random.default_rng(seed)
    p = draw.random(count).astype(np.float32)
    return draw.normal(size=(count, 2)).astype(np.float32), np.stack([p, 1 - p], axis=1)


REFERENCE = Reference.of(*data(200), SPEC)
ANSWERING = Answering(1, SPEC, REFERENCE)
Make = Callable[..., Collector]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Make:
    def new(answering: Answering = ANSWERING, **settings: object) -> Collector:
        below = random.Random(3).randrange
        given = Settings(**{"keep_every_s": 0.0, **settings})  # type: ignore[arg-type]
        return Collector(tmp_path / "telemetry", answering, given, now=clock, below=below)

    return new


def windows(collector: Collector) -> list[Window]:
    return [Window.from_bytes(sent) for _, sent in collector.due(100)]


def test_answers_are_counted_in_the_window_of_their_hour(make: Make, clock: Clock) -> None:
    collector = make()
    x, p = data(30, seed=1)
    collector.answered(x[:20], p[:20], 0.01)
    collector.answered(x[20:], p[20:], 0.5, "cloud")
    collector.failed()
    assert windows(collector) == []
    clock.now += HOUR
    (found,) = windows(collector)
    assert found.sketch.routes.tolist() == [20, 10, 0, 0, 1]
    assert (found.sketch.inputs == REFERENCE.sketched(x, SPEC)).all()
    assert found.sketch.answers.tolist() == [int((p[:, 0] > 0.5).sum()), int((p[:, 0] <= 0.5).sum())]
    assert latency_quantile(found.sketch.latency, 0.5) == pytest.approx(0.01, rel=0.1)
    assert (found.slot, found.version, found.reference) == (1_000_000, 1, REFERENCE.digest)
    assert found.memory_bytes > 0


def test_a_window_is_told_until_the_server_has_it_and_never_after(make: Make, clock: Clock) -> None:
    collector = make()
    collector.answered(*data(5), 0.01)
    clock.now += HOUR
    ((slot, first),) = collector.due(10)
    assert collector.due(10) == [(slot, first)]
    assert make().due(10) == [(slot, first)]  # a restart
    collector.sent(slot)
    assert collector.due(10) == []
    assert make().due(10) == []


def test_an_hour_without_a_request_tells_nothing(make: Make, clock: Clock) -> None:
    collector = make()
    clock.now += 5 * HOUR
    assert collector.due(10) == []


def test_a_restart_goes_on_with_the_window_under_way(make: Make, clock: Clock) -> None:
    make().answered(*data(5), 0.01)
    clock.now += 60
    again = make()
    again.answered(*data(7), 0.01)
    clock.now += HOUR
    (found,) = windows(again)
    assert found.sketch.count == 12


def test_a_window_left_open_by_a_kill_is_told_when_its_time_is_over(make: Make, clock: Clock) -> None:
    make().answered(*data(5), 0.01)
    clock.now += 3 * HOUR
    (found,) = windows(make())
    assert (found.slot, found.sketch.count) == (1_000_000, 5)


def test_another_release_has_windows_of_its_own(make: Make, clock: Clock) -> None:
    collector = make()
    collector.answered(*data(5), 0.01)
    collector.installed(Answering(2, SPEC))
    collector.answered(*data(6), 0.01)
    clock.now += 2 * HOUR
    one, two = windows(collector)
    assert [(w.version, w.sketch.count, len(w.sketch.inputs)) for w in (one, two)] == [(1, 5, 2), (2, 6, 0)]
    assert one.slot < two.slot


def test_numbers_that_are_none_count_as_errors(make: Make, clock: Clock) -> None:
    collector = make()
    x, p = data(2)
    p[0] = np.nan
    collector.answered(x, p, 0.01)
    clock.now += HOUR
    (found,) = windows(collector)
    assert (found.sketch.routes.tolist(), found.sketch.count) == ([1, 0, 0, 0, 1], 1)


def test_a_clock_that_is_set_back_repeats_no_slot_of_the_last_hours(make: Make, clock: Clock) -> None:
    collector = make()
    slots = []
    for step in (HOUR, HOUR, -HOUR, -HOUR, HOUR, HOUR, HOUR, HOUR, -100 * HOUR, HOUR, HOUR):
        collector.answered(*data(3), 0.01)
        clock.now += step
        for slot, _ in collector.due(10):
            slots.append(slot)
            collector.sent(slot)
    assert len(set(slots)) == len(slots)
    assert slots[-1] < slots[0]  # far back: the clock is believed
    rising = slots[: slots.index(max(slots)) + 1]
    assert rising == sorted(rising)


def test_the_oldest_windows_go_when_there_are_too_many(make: Make, clock: Clock) -> None:
    collector = make(keep=3)
    for _ in range(6):
        collector.answered(*data(2), 0.01)
        clock.now += HOUR
    found = windows(collector)
    assert [w.slot - 1_000_000 for w in found] == [3, 4, 5]
    collector.answered(*data(2), 0.01)
    clock.now += HOUR
    assert sum(w.lost for w in windows(collector)) >= 2


def test_a_full_disk_costs_no_answer_and_windows_wait_in_memory(
    make: Make, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    collector = make()
    with monkeypatch.context() as patch:
        patch.setattr(outgoing, "write_atomically", full)
        collector.answered(*data(5), 0.01)
        clock.now += HOUR
        (found,) = windows(collector)
        assert found.sketch.count == 5
        collector.answered(*data(6), 0.01)
        clock.now += HOUR
        assert [w.sketch.count for w in windows(collector)] == [5, 6]
    assert list((tmp_path / "telemetry").glob("*.window")) == []
    collector.answered(*data(7), 0.01)
    clock.now += HOUR
    assert [w.sketch.count for w in windows(collector)] == [5, 6, 7]


def test_a_damaged_window_is_dropped_and_spoils_no_other(make: Make, clock: Clock, tmp_path: Path) -> None:
    collector = make()
    for _ in range(2):
        collector.answered(*data(5), 0.01)
        clock.now += HOUR
        collector.due(10)
    first = sorted((tmp_path / "telemetry").glob("*.window"))[0]
    first.write_bytes(b"damaged")
    assert [w.slot for w in windows(collector)] == [1_000_001]
    assert not first.exists()


def test_noise_is_drawn_once_for_a_window_and_what_was_spent_outlives_a_restart(
    make: Make, clock: Clock
) -> None:
    collector = make(epsilon=2.0, most_epsilon=5.0)
    collector.answered(*data(50), 0.01)
    clock.now += HOUR
    ((slot, first),) = collector.due(10)
    assert Window.from_bytes(first).epsilon == 2.0
    again = make(epsilon=2.0, most_epsilon=5.0)
    assert again.due(10) == [(slot, first)]
    assert again.budget is not None
    assert again.budget.spent == 2.0
    for _ in range(4):
        again.answered(*data(50), 0.01)
        clock.now += HOUR
        again.due(10)
    assert len(again.due(10)) == 2  # a third one would be 6
    assert again.budget.spent == 4.0
    again.forget()
    assert again.due(10) == []
    assert again.budget.spent == 4.0  # what was told stays told


def test_a_window_that_was_closed_before_a_kill_is_not_told_again_with_other_noise(
    make: Make, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = make(epsilon=2.0)
    collector.answered(*data(50), 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(Outgoing, "forget_open", lambda _: None)  # killed before
        clock.now += HOUR
        ((slot, _),) = collector.due(10)
    assert (tmp_path / "telemetry" / "open").exists()
    collector.sent(slot)
    assert make(epsilon=2.0).due(10) == []


def test_nothing_of_an_input_is_on_the_disk(make: Make, tmp_path: Path) -> None:
    x = np.array([[12345.678, -98765.4321]], np.float32)
    collector = make()
    collector.answered(x, np.array([[0.25, 0.75]], np.float32), 0.01)
    collector.keep()
    (file,) = [path for path in (tmp_path / "telemetry").iterdir() if path.is_file()]
    content = file.read_bytes()
    for value in x.ravel():
        assert np.float32(value).tobytes() not in content
        assert np.float64(value).tobytes() not in content
    assert len(content) < 400


@pytest.mark.parametrize(
    "values", [{"period_s": 1}, {"keep_every_s": -1.0}, {"epsilon": 0.0}, {"most_epsilon": 1.0}, {"keep": 0}]
)
def test_settings_that_are_none_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UserError, match="telemetry"):
        Settings(**values)  # type: ignore[arg-type]


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_collector import ANSWERING, Clock, data
from fedge_client.telemetry.collector import Collector
from fedge_client.telemetry.settings import Settings
clock = Clock()
clock.now += 3600 * int(sys.argv[3])
collector = Collector(Path(sys.argv[1]), ANSWERING, Settings(keep_every_s=0.0), now=clock)
while True:
    collector.answered(*data(3), 0.01)
    clock.now += 600
    print("counted", flush=True)
    collector.due(1)
"""


@pytest.mark.slow
def test_windows_are_whole_and_rise_after_kills_at_any_moment(tmp_path: Path) -> None:
    folder, draw, begins = tmp_path / "telemetry", random.Random(5), 0
    for _ in range(6):
        command = [sys.executable, "-c", KILLED, str(folder), str(Path(__file__).parent), str(begins)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert child.stdout is not None
        for _ in range(draw.randrange(3, 40)):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        kept = Outgoing(folder)
        found = [kept.read(slot) for slot in kept.waiting()]
        assert all(data is not None for data in found)
        begins = max([kept.last_slot, *kept.waiting()]) + 2 - 1_000_000
    totals = [Window.from_bytes(data).sketch.count for data in found if data is not None]
    assert len(totals) > 5
    assert max(totals) <= 18  # 6 calls of 3 answers in an hour: nothing is counted twice
