"""The memory on disk: by consent, bounded, whole after kills and on a full disk, empty when it must be."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fedge.errors import DataError, UserError
from fedge.spec import Spec
from fedge_client.memory.memory import Memory, Settings, remove

SPEC = Spec("features", (3,), "float32", ("a", "b", "c"))


def example(number: float) -> npt.NDArray[np.float32]:
    return np.array([number, 7654.25, -1], np.float32)


def opened(folder: Path, **settings: object) -> Memory:
    memory = Memory(folder, SPEC, Settings(**settings))  # type: ignore[arg-type]
    memory.give_consent()
    return memory


def content(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


def test_nothing_is_kept_before_consent(tmp_path: Path) -> None:
    memory = Memory(tmp_path, SPEC)
    assert not memory.consent
    assert not memory.add(example(1), 0, 0.0)
    assert len(memory.examples()) == 0
    memory.give_consent()
    assert memory.add(example(1), 0, 0.0)
    memory.close()
    again = Memory(tmp_path, SPEC)
    assert again.consent
    assert again.examples().x.tolist() == [[1, 7654.25, -1]]


def test_withdrawn_consent_forgets_everything_and_leaves_no_byte_of_it(tmp_path: Path) -> None:
    memory = opened(tmp_path)
    for number in range(50):
        memory.add(example(number), number % 3, 0.0)
    assert example(7).tobytes() in content(tmp_path)
    memory.withdraw_consent()
    assert len(memory.examples()) == 0
    assert not memory.add(example(1), 0, 0.0)
    assert np.float32(7654.25).tobytes() not in content(tmp_path)
    memory.close()
    assert not Memory(tmp_path, SPEC).consent


def test_examples_are_forgotten_by_class_and_by_age(tmp_path: Path) -> None:
    memory = opened(tmp_path)
    for number in range(30):
        memory.add(example(number), number % 3, float(number))
    assert memory.forget(label=1) == 10
    assert memory.forget(before=20.0) == 13
    assert memory.examples().x[:, 0].tolist() == [20, 21, 23, 24, 26, 27, 29]
    assert example(1).tobytes() not in content(tmp_path)
    assert memory.add(example(99), 1, 40.0)
    assert 99 in memory.examples().x[:, 0]


def test_classes_get_equal_room_and_the_memory_is_bounded(tmp_path: Path) -> None:
    memory, draw = opened(tmp_path, size=30), random.Random(0)
    for number in range(600):
        memory.add(example(number), draw.choices([0, 1, 2], [0.9, 0.08, 0.02])[0], 0.0)
    found = memory.examples()
    assert len(found) == 30
    assert max(Counter(found.y.tolist()).values()) <= 11
    assert sum(memory.seen().values()) == 600
    assert found.x.dtype == np.float32


@pytest.mark.slow
def test_uniformly_each_has_the_same_chance(tmp_path: Path) -> None:
    first: Counter[float] = Counter()
    for run in range(30):
        memory = opened(tmp_path / str(run), size=10, balanced=False)
        for number in range(40):
            memory.add(example(number), 0, 0.0)
        first.update(memory.examples().x[:, 0].tolist())
        memory.close()
    early = sum(first[number] for number in range(20))
    assert 110 < early < 190  # 150 of 300 are expected


def test_answers_are_labels_only_where_they_are_sure_and_it_is_wanted(tmp_path: Path) -> None:
    memory = opened(tmp_path / "one")
    assert not memory.add(example(1), 0, 0.0, confidence=1.0)
    memory = opened(tmp_path / "two", least_confidence=0.9)
    assert not memory.add(example(1), 0, 0.0, confidence=0.8)
    assert not memory.add(example(1), 0, 0.0, confidence=float("nan"))
    assert memory.add(example(1), 0, 0.0, confidence=0.95)
    assert memory.add(example(2), 1, 0.0)
    assert len(memory.examples()) == 2
    assert memory.examples(given_only=True).y.tolist() == [1]


def test_what_is_no_example_of_the_model_is_refused(tmp_path: Path) -> None:
    memory = opened(tmp_path)
    with pytest.raises(DataError, match="float64"):
        memory.add(example(1).astype(np.float64), 0, 0.0)
    with pytest.raises(DataError, match="label 3"):
        memory.add(example(1), 3, 0.0)


def test_a_memory_of_another_model_is_refused_until_it_is_removed(tmp_path: Path) -> None:
    opened(tmp_path).close()
    other = Spec("features", (2,), "float32", ("a", "b"))
    with pytest.raises(UserError, match="another model"):
        Memory(tmp_path, other)
    remove(tmp_path)
    assert not Memory(tmp_path, other).consent


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    memory = opened(tmp_path, size=20_000, max_bytes=64 * 1024)
    kept = sum(memory.add(example(number), number % 3, 0.0) for number in range(3000))
    assert 100 < kept < 3000
    assert len(memory.examples()) == kept
    assert (tmp_path / "memory.db").stat().st_size <= 64 * 1024
    memory.close()
    again = Memory(tmp_path, SPEC, Settings(size=20_000, max_bytes=64 * 1024))
    assert len(again.examples()) == kept
    again.withdraw_consent()
    assert len(again.examples()) == 0


@pytest.mark.parametrize("values", [{"size": 0}, {"max_bytes": 1}, {"least_confidence": 0.0}])
def test_settings_that_are_none_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="memory"):
        Settings(**values)  # type: ignore[arg-type]


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_memory import example, opened
memory, number = opened(Path(sys.argv[1]), size=50), 0
print("ready", flush=True)
while True:
    memory.add(example(number), number % 3, 0.0)
    number += 1
    if number % 97 == 0:
        memory.forget(label=1)
    print(number, flush=True)
"""


@pytest.mark.slow
def test_kills_at_any_moment_leave_a_whole_memory(tmp_path: Path) -> None:
    draw = random.Random(3)
    for _ in range(6):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "m"), str(Path(__file__).parent)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert child.stdout is not None
        for _ in range(draw.randrange(5, 300)):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        memory = Memory(tmp_path / "m", SPEC, Settings(size=50))
        found = memory.examples()
        assert len(found) <= 50
        assert (found.x[:, 1] == 7654.25).all()
        assert (found.x[:, 0] % 3 == found.y).all()
        memory.close()
    with sqlite3.connect(tmp_path / "m" / "memory.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
