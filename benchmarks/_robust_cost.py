"""Seconds and memory of each rule on 20 updates of 10 MB; Flower's own beside those that read by blocks."""

from __future__ import annotations

import logging
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
from _harness import Row
from _robust_accuracy import RULES
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedge.learning.messages import to_record
from fedge.wire.arrays import FileArray
from fedge_server.strategies import PLAIN

CLIENTS = 20
SHAPES = {"a": (1024, 1024), "b": (1024, 1024), "c": (400, 1000), "d": (2848,)}  # 2.5 million values


class Nodes:
    """Just enough of a Grid to configure a round."""

    def get_node_ids(self) -> range:
        """All of them."""
        return range(1, CLIENTS + 1)


def cost(*, quick: bool) -> tuple[dict[str, float], list[Row]]:
    """A row for each rule and place; claims set ours beside Flower's.

    Args:
        quick: one measurement of each instead of the fastest of three.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1
    rng = np.random.default_rng(0)
    origin = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    updates = [
        {
            name: value + rng.normal(scale=0.01, size=value.shape).astype(np.float32)
            for name, value in origin.items()
        }
        for _ in range(CLIENTS)
    ]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fedge-robust-") as folder:
        filed = [_filed(Path(folder) / str(i), update) for i, update in enumerate(updates)]
        for rule in RULES:
            ours = "mixing" in RULES[rule] or rule in ("geometric median", "centred clipping")
            rows.append(_row(rule, [to_record(u) for u in updates], origin, "memory", 1 if quick else 3))
            if ours:
                rows.append(_row(rule, filed, origin, "files", 1 if quick else 3))
    seconds = {(row["rule"], row["updates in"]): float(row["s"]) for row in rows}
    peaks = {(row["rule"], row["updates in"]): float(row["peak in updates"]) for row in rows}
    pairs = {"median": "median", "multikrum": "multi-krum"}
    return {
        **{
            f"mixed_{name}_time_to_flowers_{name}": seconds[f"mixed {rule}", "memory"]
            / seconds[rule, "memory"]
            for name, rule in pairs.items()
        },
        "geometric_median_s": seconds["geometric median", "memory"],
        "peak_in_updates_files": max(peak for (_, place), peak in peaks.items() if place == "files"),
        "peak_in_updates_flowers_krum": peaks["krum", "memory"],
    }, rows


def _row(
    rule: str, records: list[ArrayRecord], origin: dict[str, npt.NDArray[np.float32]], place: str, times: int
) -> Row:
    best = min(_seconds(rule, records, origin) for _ in range(times))
    tracemalloc.start()
    _seconds(rule, records, origin)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = sum(value.nbytes for value in origin.values())
    return {"part": "cost", "rule": rule, "updates in": place, "s": best, "peak in updates": peak / size}


def _seconds(rule: str, records: list[ArrayRecord], origin: dict[str, npt.NDArray[np.float32]]) -> float:
    options = {key: value for key, value in RULES[rule].items() if key != "name"}
    strategy = PLAIN[RULES[rule]["name"]](**options)
    strategy.configure_train(1, to_record(origin), ConfigRecord(), Nodes())  # type: ignore[arg-type]
    replies = [_reply(node, record) for node, record in enumerate(records, start=1)]
    started = time.process_time()
    found, _ = strategy.aggregate_train(1, replies)
    assert found is not None
    return time.process_time() - started


def _reply(node: int, record: ArrayRecord) -> Message:
    own = ArrayRecord()  # some of Flower's rules empty the records that they are given
    for name, array in record.items():
        own[name] = array
    metrics = MetricRecord({"num-examples": 10, "train_loss": 1.0})
    return Message(
        RecordDict({"arrays": own, "metrics": metrics}), reply_to=Message(RecordDict(), node, "train")
    )


def _filed(path: Path, update: dict[str, npt.NDArray[np.float32]]) -> ArrayRecord:
    record, offset = ArrayRecord(), 0
    with path.open("wb") as file:
        for name, value in update.items():
            record[name] = FileArray(path, offset, "float32", value.shape)
            offset += file.write(value.tobytes())
    return record
