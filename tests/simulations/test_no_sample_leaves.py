"""Every byte that clients send while they teach, calibrate and count: none of their examples is in it.

The examples are random, so that eight pixels of one in a row, or four of its numbers once pre-processed,
are found in other bytes by chance as good as never; the detector looks at any alignment.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord

from fedge.artefact import pack
from fedge.config import Config
from fedge.learning.messages import METRICS, to_record
from fedge.learning.state import arrays_of
from fedge.learning.whole import WholeModel
from fedge.statistics import Moments
from fedge.wire import records
from fedge.wire.arrays import put, records_of
from fedge_server import app as server_app
from fedge_server.compression.clients import Clients, Fleet
from fedge_server.compression.export import export
from fedge_simulations.world import World, prepare

CLIENTS, ROUNDS = 4, 2
STUDENT = "mlp-32"


class Traffic:
    """All that clients have sent: each reply as it stands on the wire, and what it declares."""

    def __init__(self) -> None:
        self.replies: list[bytes] = []
        self.declared: set[tuple[str, ...]] = set()

    def around(self, tamper: Callable[[Any], None]) -> Callable[[Any], Any]:
        def wrap(app: Any) -> Any:
            def call(message: Any, context: Any) -> Any:
                reply = app(message, context)
                tamper(reply)
                self.note(message.metadata.message_type, reply.content)
                return reply

            return call

        return wrap

    def note(self, kind: str, content: Any) -> None:
        packed = records.pack(content)
        self.replies.append(packed.content.SerializeToString() + b"".join(packed.buffers()))
        for name, record in content.items():
            if isinstance(record, MetricRecord):
                self.declared |= {(kind, name, key, type(value).__name__) for key, value in record.items()}
                continue
            assert isinstance(record, ArrayRecord), name
            self.declared |= {
                (kind, name, key, str(np.dtype(array.dtype)), str(tuple(array.shape)))
                for key, array in record.items()
            }


def windows(data: bytes, size: int) -> np.ndarray:
    """Every 8 or 16 bytes in a row, as one number each; of 16, a hash."""
    if len(data) < size:
        return np.zeros(0, np.uint64)
    eights = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), 8)
    found = np.ascontiguousarray(eights).view("<u8").ravel()
    return found if size == 8 else found[:-8] * np.uint64(0x9E3779B97F4A7C15) + found[8:]


def told_by_clients(
    folder: Path, examples: int, tamper: Callable[[Any], None] = lambda _: None
) -> tuple[Traffic, World, list[bytes]]:
    """The traffic of a student's rounds, a calibration, a selection and a gate; and the raw examples."""
    rng = np.random.default_rng(5)
    clients = np.repeat(np.arange(CLIENTS), examples)
    data = {"x_train": rng.integers(0, 256, (CLIENTS * examples, 12, 12), dtype=np.uint8)}
    data |= {"y_train": np.tile(np.arange(2), CLIENTS * examples // 2), "client_train": clients}
    data |= {"x_test": rng.integers(0, 256, (20, 12, 12), dtype=np.uint8), "y_test": np.tile([0, 1], 10)}
    folder.mkdir()
    np.savez(folder / "data.npz", **data)
    config = Config.from_mapping(
        {
            "task": "images",
            "data": str(folder / "data.npz"),
            "model": {"name": "mlp"},
            "clients": {"partition": "natural"},
            "evaluate": {"client_holdout": 0.4, "proxy_fraction": 0.0},
            "compress": {"data": "clients", "clients": {"rounds": ROUNDS, "epochs": 1}},
            "simulation": {"engine": "sequential"},
        }
    )
    world, traffic = prepare(config), Traffic()
    moments = Moments.of(world.dataset.x, world.dataset.spec)
    torch.manual_seed(0)
    network = world.task.model("mlp")(world.dataset.spec).eval()
    model = WholeModel(world.task.preprocess(world.dataset.spec, moments, "none"), network)

    def over(home: Path) -> Any:
        return closing(world.grid(server_app.run_config(config, home, "s"), around=traffic.around(tamper)))

    asked = Clients(config, world.task, world.server, Fleet(over, folder / "fleet"), model, moments)
    student = world.task.students[STUDENT](world.dataset.spec)
    taught = asked.teach(student, config.compress.distil, model=f"student:{STUDENT}", seed=0)
    installed = asked.calibrate(export(WholeModel(model.preprocess, taught), world.dataset.spec))
    assert asked.selection(pack(installed), len(installed)).examples > 0
    assert asked.evidence(pack(installed), len(installed)).clients == CLIENTS
    own = np.concatenate([world.dataset.x[world.clients[i]] for i in range(CLIENTS)])
    assert len(own) == CLIENTS * examples
    with torch.no_grad():
        prepared = model.preprocess(torch.from_numpy(own)).numpy()
    floats = own.astype(np.float32)
    forms = [own, floats, floats / np.float32(255), prepared]
    return traffic, world, [np.ascontiguousarray(form).tobytes() for form in forms]


def leaks(traffic: Traffic, forms: list[bytes]) -> int:
    """How many windows of what was sent are windows of an example: eight pixels, or four of its numbers."""
    found = 0
    for number, form in enumerate(forms):
        size = 8 if number == 0 else 16
        sent = np.concatenate([windows(reply, size) for reply in traffic.replies])
        found += int(np.isin(sent, np.unique(windows(form, size))).sum())
    return found


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Traffic, World, list[bytes]]:
    return told_by_clients(tmp_path_factory.mktemp("honest") / "small", 130)


@pytest.mark.slow
def test_no_window_of_an_example_occurs_in_what_clients_send(honest: Any) -> None:
    traffic, _, forms = honest
    assert len(traffic.replies) == CLIENTS * (ROUNDS + 3)  # rounds, ranges, selection, gate
    assert sum(map(len, forms)) > 900_000
    assert leaks(traffic, forms) == 0


@pytest.mark.slow
def test_only_what_is_declared_travels(honest: Any) -> None:
    traffic, world, _ = honest
    state = arrays_of(world.task.students[STUDENT](world.dataset.spec))
    update = {("train", "arrays", key, str(value.dtype), str(value.shape)) for key, value in state.items()}
    numbers = {("train", METRICS, "num-examples", "int"), ("train", METRICS, "train_loss", "float")}
    counts = {("query.counts", "counts", key, "int64", "(2,)") for key in ("n", "both", "losses", "wins")}
    ranges = {entry for entry in traffic.declared if entry[0] == "query.ranges"}
    assert traffic.declared - ranges == update | numbers | counts | {
        ("query.counts", METRICS, "unusable", "int")
    }
    assert {entry[1:4] for entry in ranges} == {
        ("ranges", "lowest", "float32"),
        ("ranges", "highest", "float32"),
    }
    assert all(int(entry[4].strip("(),")) < 10 for entry in ranges)


@pytest.mark.slow
def test_twice_as_many_examples_send_as_many_bytes(honest: Any, tmp_path: Path) -> None:
    traffic, _, _ = honest
    more, _, forms = told_by_clients(tmp_path / "large", 260)
    assert [len(reply) for reply in more.replies] == [len(reply) for reply in traffic.replies]
    assert leaks(more, forms) == 0


@pytest.mark.parametrize("alignment", [0, 1, 5])
def test_an_example_in_what_is_sent_is_found_at_any_place(alignment: int) -> None:
    rng = np.random.default_rng(5)
    example = rng.integers(0, 256, (CLIENTS * 130, 12, 12), dtype=np.uint8)[7].tobytes()
    traffic = Traffic()
    forms = [example]
    traffic.replies.append(bytes(alignment) + example[3:40] + bytes(9))
    assert leaks(traffic, forms) == 37 - 8 + 1
    traffic.replies = [bytes(alignment) + example[:7]]
    assert leaks(traffic, forms) == 0


@pytest.mark.slow
def test_a_client_that_smuggles_a_part_of_an_example_into_its_update_is_found_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    example = rng.integers(0, 256, (CLIENTS * 130, 12, 12), dtype=np.uint8)[7].tobytes()

    def smuggle(reply: Any) -> None:
        if "arrays" in reply.content:
            record = records_of(reply.content, ArrayRecord)["arrays"]
            name = list(record)[-1]
            value = record[name].numpy().copy()
            value[:2] = np.frombuffer(example[:8], np.float32)
            put(record, dict(to_record({name: value}).items()))

    traffic, _, forms = told_by_clients(tmp_path / "smuggled", 130, smuggle)
    assert leaks(traffic, forms) >= CLIENTS
