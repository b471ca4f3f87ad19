"""The ClientApp on a device: its own settings decide, and what a server says is only compared."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedge.config import Train
from fedge.errors import ConfigError, DataError
from fedge.learning.messages import CONFIG, EXAMPLES, METRICS, QUERY_MOMENTS, QUERY_PING, Instructions
from fedge.spec import Spec
from fedge.task_digest import task_digest
from fedge_client import app
from fedge_client.memory.training import opened

SPEC = Spec("features", (2,), "float32", ("a", "b"), ())


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    x = np.arange(20, dtype=np.float32).reshape(10, 2)
    np.savez(tmp_path / "rows.npz", x=x, y=np.array(["a", "b"] * 5))
    return tmp_path / "rows.npz"


def instructions(**changes: Any) -> Instructions:
    values: dict[str, Any] = {
        "task": "tables",
        "spec": SPEC,
        "model": "mlp",
        "noise_filter": "none",
        "moments": None,
        "train": Train(),
        "seed": 0,
        "update": "weights",
    }
    return Instructions(**(values | changes))


def device(**node: Any) -> Context:
    return Context(1, 7, {name.replace("_", "-"): value for name, value in node.items()}, RecordDict(), {})


def test_a_ping_touches_neither_task_nor_data() -> None:
    reply = app.app(Message(RecordDict(), 7, QUERY_PING), device())
    assert dict(reply.content.metric_records[METRICS]) == {EXAMPLES: 0}


def test_a_task_that_the_server_names_is_not_imported(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_task.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    content = RecordDict({CONFIG: instructions(task="evil_task:TASK").to_config()})
    with pytest.raises(
        ConfigError, match="'evil_task:TASK' is not offered here; this device offers 'tables'"
    ):
        app.app(Message(content, 7, QUERY_MOMENTS), device(task="tables", data=str(rows)))
    assert "evil_task" not in sys.modules
    assert not (tmp_path / "ran").exists()


def test_a_task_may_be_offered_under_the_name_that_servers_use(rows: Path) -> None:
    task, examples = app.own_share(
        device(task="tables", task_name="their.module:TASK", data=str(rows)),
        instructions(task="their.module:TASK"),
    )
    assert (task.name, len(examples)) == ("tables", 10)


def test_another_digest_is_refused_with_both_named(rows: Path) -> None:
    own = task_digest("tables")
    with pytest.raises(ConfigError, match=f"has the digest {own}, the server's is {'ab' * 32}"):
        app.own_share(device(task="tables", data=str(rows)), instructions(task_digest="ab" * 32))
    with pytest.raises(ConfigError, match=f"has the digest {own}, its pin is {'cd' * 32}"):
        app.own_share(device(task="tables", data=str(rows), digest="cd" * 32), instructions(task_digest=own))
    app.own_share(device(task="tables", data=str(rows), digest=own), instructions(task_digest=own))


def test_data_is_read_again_only_when_the_file_has_changed(rows: Path) -> None:
    context = device(task="tables", data=str(rows))
    first = app.own_share(context, instructions())[1]
    again = app.own_share(context, instructions(round=2))[1]
    assert np.shares_memory(first.x, again.x)
    os.utime(rows, ns=(1, 1))
    assert not np.shares_memory(first.x, app.own_share(context, instructions())[1].x)
    rows.unlink()
    with pytest.raises(DataError, match="does not exist"):
        app.own_share(context, instructions())


def test_the_devices_own_settings_say_how_to_read_a_table(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("age,dose,died\n1,2,a\n3,4,b\n")
    _, examples = app.own_share(
        device(task="tables", data=str(tmp_path / "rows.csv"), data_label="died"), instructions()
    )
    assert examples.y.tolist() == [0, 1]


def test_what_a_device_keeps_by_consent_is_trained_on_after_its_data(rows: Path, tmp_path: Path) -> None:
    folder, x = tmp_path / "memory" / "tables", np.array([3.0, 4.0], np.float32)
    context = device(task="tables", data=str(rows), memory=str(folder))
    assert len(app.own_share(context, instructions())[1]) == 10
    assert not folder.exists()  # nothing is made of a memory that is not there
    with opened(folder, SPEC) as memory:
        memory.add(x, 1, at=0.0)  # without consent
        memory.give_consent()
    assert len(app.own_share(context, instructions())[1]) == 10
    with opened(folder, SPEC) as memory:
        memory.add(x, 1, at=0.0)
    own = app.own_share(device(task="tables", data=str(rows)), instructions())[1]
    both = app.own_share(context, instructions())[1]
    assert len(own) == 10  # only where the device's file says so
    assert np.array_equal(both.x[:10], own.x)
    assert (both.x[10].tolist(), both.y[10], len(both)) == ([3.0, 4.0], 1, 11)
    content = RecordDict({CONFIG: instructions().to_config()})
    reply = app.app(Message(content, 7, QUERY_MOMENTS), context)
    assert dict(reply.content.metric_records[METRICS])[EXAMPLES] == 11
    other = Spec("features", (2,), "float32", ("a", "c"), ())
    with opened(tmp_path / "other", other) as memory:
        memory.give_consent()
        memory.add(x, 1, at=0.0)
    context = device(task="tables", data=str(rows), memory=str(tmp_path / "other"))
    assert len(app.own_share(context, instructions())[1]) == 10  # of another model: left out


def test_a_folder_of_images_is_scaled_as_the_device_says(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("L", (12, 10), 7).save(tmp_path / name / "1.png")
    spec = Spec("image", (8, 6), "uint8", ("a", "b"), ())
    node = {"task": "images", "data": str(tmp_path)}
    _, examples = app.own_share(
        device(**node, data_size="8x6"), instructions(task="images", spec=spec, model="cnn")
    )
    assert examples.x.shape == (2, 8, 6)
    Image.new("L", (12, 10), 9).save(tmp_path / "a" / "2.png")
    found = app.own_share(device(**node, data_size="8x6"), instructions(task="images", spec=spec))[1]
    assert len(found) == 3
    with pytest.raises(ConfigError, match="must be HEIGHTxWIDTH"):
        app.own_share(device(**node, data_size="8"), instructions(task="images", spec=spec))


def test_seeds_of_many_clients_at_once_are_those_of_each_alone():
    nodes = [1, 2, 10**6, 2**63 - 1]
    assert app.client_seeds(7, 3, nodes) == [app.client_seed(7, 3, node) for node in nodes]
    assert all(0 <= seed < 2**63 for seed in app.client_seeds(7, 3, nodes))


def test_a_node_of_a_superlink_may_have_a_number_of_64_bits():
    assert 0 <= app.client_seed(7, 3, 2**64 - 1) < 2**63
