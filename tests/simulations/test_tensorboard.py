"""Events for TensorBoard, read back with its own reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedge.config import Config
from fedge_server.rounds.record import RoundRecord
from fedge_simulations.tensorboard import exporting

pytest.importorskip("tensorboard")

CONFIG = Config.from_mapping({"rounds": {"count": 5}})


def record(number: int, accuracy: float) -> RoundRecord:
    metrics = {"accuracy": accuracy, "recall": [0.5]}
    return RoundRecord(
        number, metrics, clients=6, asked=8, seconds=2.0, train_loss=0.25, simulated_s=number * 1.5
    )


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_what_is_written_is_what_tensorboard_reads(tmp_path: Path) -> None:
    with exporting(tmp_path, CONFIG) as observe:
        observe(record(1, 0.5))
        assert read(tmp_path)["test/accuracy"] == [(1, 0.5)]  # while the run goes on
        observe(record(2, 0.75))
    found = read(tmp_path)
    assert found["test/accuracy"] == [(1, 0.5), (2, 0.75)]
    assert found["train/loss"] == [(1, 0.25), (2, 0.25)]
    assert found["speed/clients_per_second"] == [(1, 3.0), (2, 3.0)]
    assert found["speed/simulated_s"] == [(1, 1.5), (2, 3.0)]
    assert found["updates/not_used"] == [(1, 2.0), (2, 2.0)]
    assert "test/recall" not in found


def test_a_resumed_run_leaves_each_round_once(tmp_path: Path) -> None:
    with exporting(tmp_path, CONFIG) as observe:
        observe(record(1, 0.5))
        observe(record(2, 0.6))
    with exporting(tmp_path, CONFIG) as observe:
        for number, accuracy in ((1, 0.5), (2, 0.75), (3, 0.875)):
            observe(record(number, accuracy))
    assert read(tmp_path)["test/accuracy"] == [(1, 0.5), (2, 0.75), (3, 0.875)]
