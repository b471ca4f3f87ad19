"""How fast updates are looked at and added up, beside Flower's FedAvg and a plain addition in place.

1,000 updates of 1 MB (1,000 distinct buffers) and 100 of 50 MB (a pool of 24 distinct buffers, 1.2 GB: more
than any cache), in turns; every contestant reads the same buffers. GB per CPU second and per second, medians;
ratios are medians of the turns' own. Then the peak memory of 50 MB updates that arrive one after the other.

torch add      `accumulator.add_(update)`, which is no mean and looks at nothing
Flower         FedAvg.aggregate_train over messages that carry `.npy` bytes, as its transport delivers them
fedge          FedAvg.aggregate_train over the same messages, each validated before it is added: names,
               shapes, dtypes, finite values, numbers of examples; the claims are made of this row
fedge, norms   the same with a bound on the norm of each change
fedge, round   the same as `fedge`, with what else the round loop does: the digest, SHA-256 in a second thread
fedge, link    as `fedge, round` from the files of the link, where the hub has hashed what came
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import Options, Row, machine, options, publish
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity
from threadpoolctl import threadpool_limits

from fedge.wire.arrays import FileArray, MemoryArray, ObjectRecord, put
from fedge_server.rounds.closing import Collected, collect, singles
from fedge_server.rounds.validation import Rules, validated
from fedge_server.strategies.fedavg import FedAvg, weighted_metrics

HEADER = 128  # bytes of numpy's before the values
POOL = 24  # distinct buffers of 50 MB
SHAPES = {  # a hidden layer, its bias, an output layer: of one update of so many MB
    1: {"hidden": (500, 512), "bias": (512,), "out": (11, 512)},
    50: {"hidden": (3200, 4064), "bias": (4064,), "out": (25, 4064)},
}


@dataclass(frozen=True, slots=True)
class Work:
    """The updates of a round."""

    megabytes: int
    count: int  # updates
    origin: Mapping[str, np.ndarray[Any, Any]]
    plain: list[ArrayRecord]  # `.npy` bytes
    files: list[ArrayRecord]

    @classmethod
    def made(cls, megabytes: int, count: int, distinct: int, folder: Path) -> Work:
        """Draw distinct updates near one origin; keep each as Flower carries it and as the link does."""
        rng = np.random.default_rng(0)
        origin = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES[megabytes].items()}
        plain, files = [], []
        for k in range(distinct):
            step = np.float32(0.01 * (k + 1) / distinct)
            arrays = {
                name: value + step * rng.random(value.shape, np.float32) for name, value in origin.items()
            }
            plain.append(ArrayRecord({name: Array(value) for name, value in arrays.items()}))
            files.append(_written(arrays, folder / f"{megabytes}-{k}"))
        return cls(megabytes, count, origin, plain, files)

    @property
    def bytes(self) -> int:
        """Of all updates."""
        return self.count * sum(value.nbytes for value in self.origin.values())

    def messages(self, records: list[ArrayRecord]) -> Iterator[Message]:
        """Replies as they arrive; each has a record of its own over the shared buffers."""
        sent = Message(RecordDict(), 1, "train")
        for k in range(self.count):
            record = records[k % len(records)]
            own = ObjectRecord.of(record.sha256) if isinstance(record, ObjectRecord) else ArrayRecord()
            put(own, record)
            metrics = MetricRecord({"num-examples": 100 + k % 7, "train_loss": 0.5})
            reply = Message(RecordDict({"arrays": own, "metrics": metrics}), reply_to=sent)
            reply.metadata.__dict__["_src_node_id"] = k + 1
            yield reply


def _written(arrays: Mapping[str, np.ndarray[Any, Any]], path: Path) -> ObjectRecord:
    data = b"".join(value.tobytes() for value in arrays.values())
    path.write_bytes(data)
    record, offset = ObjectRecord.of(hashlib.sha256(data).digest()), 0
    for name, value in arrays.items():
        record[name] = FileArray(path, offset, "float32", value.shape)
        offset += value.nbytes
    return record


def _torch_add(work: Work) -> Callable[[], object]:
    total = {name: torch.zeros(value.shape) for name, value in work.origin.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the buffers cannot be written to, and nobody does
        buffers = [
            {
                name: torch.frombuffer(array.data, dtype=torch.float32, offset=HEADER).reshape(array.shape)
                for name, array in record.items()
            }
            for record in work.plain
        ]

    def run() -> None:
        for k in range(work.count):
            for name, value in buffers[k % len(buffers)].items():
                total[name].add_(value)

    return run


def _flower(work: Work) -> Callable[[], object]:
    replies = list(work.messages(work.plain))
    return lambda: flower.FedAvg().aggregate_train(1, replies)


def _ours() -> FedAvg:
    return FedAvg(train_metrics_aggr_fn=weighted_metrics)  # as every run has it


def _fedge(work: Work, max_norm: float = math.inf) -> Callable[[], object]:
    replies = list(work.messages(work.plain))
    rules = Rules(work.origin, max_norm=max_norm, norms=max_norm < math.inf, read_once=True)

    def checked() -> Iterator[Message]:
        for reply in replies:
            validated(reply, rules)
            yield reply

    return lambda: _ours().aggregate_train(1, checked())


def _round(work: Work, records: list[ArrayRecord]) -> Callable[[], object]:
    replies = list(work.messages(records))
    admit = singles(Rules(work.origin, read_once=True), set(range(1, work.count + 1)))

    def run() -> None:
        noted = Collected()
        _ours().aggregate_train(1, collect(replies, admit, noted, needed=work.count, once=True))
        assert (noted.clients, noted.rejected, len(noted.digests)) == (work.count, [], work.count)

    return run


CONTESTANTS: dict[str, Callable[[Work], Callable[[], object]]] = {
    "torch add": _torch_add,
    "Flower": _flower,
    "fedge": _fedge,
    "fedge, norms": lambda work: _fedge(work, 1e6),
    "fedge, round": lambda work: _round(work, work.plain),
    "fedge, link": lambda work: _round(work, work.files),
}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads for BLAS and torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


def _speeds(work: Work, turns: int) -> dict[str, tuple[list[float], list[float]]]:
    """GB per CPU second and per second of each contestant, by turn."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in CONTESTANTS}
    for _ in range(turns):
        for name, make in CONTESTANTS.items():
            run = make(work)
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            spent = time.process_time() - cpu, time.perf_counter() - wall
            for speeds, seconds in zip(found[name], spent, strict=True):
                speeds.append(work.bytes / seconds / 1e9)
    return found


def _ratio(over: list[float], under: list[float]) -> float:
    """The median of the turns' ratios: both of a turn ran under the same conditions."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def speeds(work: Work, turns: int) -> tuple[dict[str, float], list[Row]]:
    """Claims and table of one size."""
    rows: list[Row] = []
    claims: dict[str, float] = {}
    size = "small" if work.megabytes == 1 else "big"
    for threads in (1, 2):
        with _threads(threads):
            found = _speeds(work, turns)
        for name, (cpu, wall) in found.items():
            rows.append(
                {
                    "updates": f"{work.count:,} x {work.megabytes} MB",
                    "threads": threads,
                    "who": name,
                    "GB/CPU s": statistics.median(cpu),
                    "GB/s": statistics.median(wall),
                    "to Flower, per core": _ratio(cpu, found["Flower"][0]),
                    "to torch add, per core": _ratio(cpu, found["torch add"][0]),
                }
            )
        if threads == 1:
            claims[f"ratio_to_flower_{size}"] = _ratio(found["fedge"][0], found["Flower"][0])
            claims[f"ratio_to_add_{size}"] = _ratio(found["fedge"][0], found["torch add"][0])
    return claims, rows


def _peak(who: str, count: int) -> float:
    """Peak memory above what there was before, in updates of 50 MB that arrive one after the other."""
    shapes = SHAPES[50]
    origin = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    one = sum(value.nbytes for value in origin.values())

    def replies() -> Iterator[Message]:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1
        sent = Message(RecordDict(), 1, "train")
        for k in range(count):
            arrays = ArrayRecord()
            for name, shape in shapes.items():
                value = np.full(shape, k, np.float32)
                arrays[name] = Array(value) if who == "Flower" else MemoryArray(value, shared=False)
            metrics = MetricRecord({"num-examples": 100, "train_loss": 0.5})
            reply = Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=sent)
            reply.metadata.__dict__["_src_node_id"] = k + 1
            del arrays, value  # a Grid keeps nothing either
            yield reply

    Path("/proc/self/clear_refs").write_text(
        "5", encoding="ascii"
    )  # VmHWM begins anew (proc_pid_clear_refs(5))
    before = _status("VmRSS")
    if who == "Flower":
        flower.FedAvg().aggregate_train(1, replies())
    else:
        rules = Rules(origin, norms=True, max_norm=1e9, read_once=True)
        admit = singles(rules, set(range(1, count + 1)))
        _ours().aggregate_train(1, collect(replies(), admit, Collected(), needed=count, once=True))
    return (_status("VmHWM") - before) / one


def _status(key: str) -> int:
    """Bytes that this process has, or had at most, in memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def peaks(counts: tuple[int, ...]) -> tuple[dict[str, float], list[Row]]:
    """Peak memory of each in a process of its own."""
    rows: list[Row] = []
    for who in ("Flower", "fedge"):
        for count in counts:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(_peak, (who, count))
            rows.append({"updates of 50 MB": count, "who": who, "peak in updates": found})
    return {"peak_in_updates": float(rows[-1]["peak in updates"])}, rows


def main(asked: Options) -> None:
    """Measure, print, write."""
    before = machine()
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1
    turns = 3 if asked.quick else 7
    claims: dict[str, float] = {}
    rows: list[Row] = []
    for megabytes, count, distinct in ((1, 1000, 1000), (50, 100, POOL)):
        count = count // 5 if asked.quick and megabytes > 1 else count
        with tempfile.TemporaryDirectory() as folder:
            found, table = speeds(Work.made(megabytes, count, distinct, Path(folder)), turns)
        claims |= found
        rows += table
    claims["ratio_to_add"] = min(claims.pop("ratio_to_add_small"), claims.pop("ratio_to_add_big"))
    found, table = peaks((5, 20) if asked.quick else (5, 40))
    publish(asked, before, claims | found, rows + table)


if __name__ == "__main__":
    main(options(__doc__ or ""))
