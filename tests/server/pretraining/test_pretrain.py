from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from fedge import tensors
from fedge.config import Config
from fedge.learning import local
from fedge.task import resolve
from fedge_server.cli import main
from fedge_server.data import data_of_run, own_data
from fedge_server.pretraining.launching import _reason
from fedge_server.pretraining.preparing import prepared
from fedge_server.pretraining.worker import run
from fedge_server.registry.database import Registry
from fedge_server.rounds.starting import start_of

FILE = """
task = "digits"
seed = 1
[model]
name = "mlp-bn"
[rounds]
count = 5
[train]
epochs = 1
batch_size = 60
augment = ["noise:0.1"]
learning_rate = 0.02
"""
BOUND = 2e-4  # of a weight after 5 rounds, from one process to two: float32 sums in another order


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pretrain") / "digits.toml"
    path.write_text(FILE)
    return path


def argv(file: Path, out: Path, *more: str) -> list[str]:
    return ["pretrain", str(file), "--out", str(out), "--processes", "2", *more]


@pytest.fixture(scope="module")
def uninterrupted(file: Path) -> Path:
    out = file.parent / "uninterrupted"
    assert main(argv(file, out)) == 0
    return out


def workers_of(launcher: int) -> list[int]:
    """The processes of a launcher, in their order."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        if parent == launcher and b"fedge_server.pretraining.worker" in words:
            found.append(int(entry.name))
    return sorted(found)


def committed(out: Path) -> int:
    try:
        return len((out / "history.jsonl").read_text().splitlines())
    except OSError:
        return 0


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_leave_a_run(file, uninterrupted, alone, capsys):
    config, out = Config.load(file), file.parent / "alone"
    with prepared(config, out, 1, overwrite=False) as made:
        run(made.registry, out, made.run_id, torch.device("cpu"))
    (one, about), (two, _) = (tensors.load(each / "model.safetensors") for each in (out, uninterrupted))
    assert one.keys() == two.keys()
    worst = max(float(np.abs(one[name] - two[name]).max()) for name in one if not name.startswith("moments"))
    assert 0 < worst < BOUND
    assert json.loads(about["fedge"])["model"] == "mlp-bn"
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert (summary["processes"], summary["rounds"], summary["stopped"]) == (2, 5, "all 5 rounds done")
    assert summary["global_model"]["accuracy"] > 0.95
    lines = [json.loads(line) for line in (uninterrupted / "history.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(1, 6))
    assert lines[-1]["accuracy"] == summary["global_model"]["accuracy"]
    capsys.readouterr()
    assert main(["run", "ls", "--home", str(uninterrupted)]) == 0
    assert "done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_federation_begins_with_it_and_compression_finds_its_data(uninterrupted, file):
    config = Config.load(file, [f"model.start={uninterrupted}"])
    task = resolve("digits")
    data = own_data(config, task)
    start = start_of(config, task, data, None, local.first(task, "mlp-bn", data.spec, 5))
    model, _ = tensors.load(uninterrupted / "model.safetensors")
    assert all(np.array_equal(model[name], value) for name, value in start.arrays.items())
    assert start.moments is not None
    with Registry.open(uninterrupted) as registry:
        row = registry.runs()[0]
    found = data_of_run(Config.load(file), task, row["data"])
    assert found is not None
    assert len(found.proxy) + len(found.test) + len(found.gate) == 1797
    with Registry.open(uninterrupted) as registry:  # what a release's lineage names
        assert {record.updates for record in registry.records(row["id"])[1:]} == {row["data"]}


@pytest.mark.slow
def test_killed_and_taken_up_again_it_ends_with_the_same_bits(file, uninterrupted, capfd):
    out = file.parent / "killed"

    def kill_when_committed() -> None:
        while committed(out) < 1:
            time.sleep(0.02)
        os.kill(workers_of(os.getpid())[0], signal.SIGKILL)  # the first one, which commits

    threading.Thread(target=kill_when_committed).start()
    assert main(argv(file, out)) == 1
    error = capfd.readouterr().err
    assert "process 0 of 2 was ended by SIGKILL (out of memory?); what is committed stays" in error
    assert "Traceback" not in error
    assert 1 <= committed(out) < 5
    assert main(argv(file, out)) == 0
    assert "going on after round" in capfd.readouterr().out
    one, two = ((each / "model.safetensors").read_bytes() for each in (uninterrupted, out))
    assert one == two


def test_a_process_ends_with_its_parent_however_that_ends():
    child = (
        "import sys, time; from fedge_server.pretraining.ending import end_with; "
        "end_with(int(sys.argv[1])); print('ready', flush=True); time.sleep(60)"
    )
    parent = (
        f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, str(os.getpid())])"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen([sys.executable, "-c", parent], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        assert process.stdout.read() == b""  # which ends only when nobody holds the other side


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_mistakes_are_named_before_anything_is_written(file, tmp_path, capsys):
    out = tmp_path / "out"
    base = ["pretrain", str(file), "--out", str(out)]
    assert "--processes 0: must be from 1" in refused([*base, "--processes", "0"], capsys)
    assert "--processes 61" not in refused([*base, "--processes", "61"], capsys)
    assert "train.batch_size = 60" in refused([*base, "--processes", "61"], capsys)
    if not torch.cuda.is_available():
        assert "need a GPU each, and here are 0" in refused([*base, "--device", "cuda"], capsys)
    absent = [*base, "--set", f"data={tmp_path / 'absent.npz'}"]
    assert "absent.npz" in refused(absent, capsys)
    assert "cannot be read" in refused(["pretrain", str(tmp_path / "x.toml"), "--out", str(out)], capsys)
    assert "train.freeze" in refused([*base, "--set", 'train.freeze=["nothing"]'], capsys)
    assert not out.exists()


@pytest.mark.slow
def test_a_folder_of_something_else_is_left_alone(file, tmp_path, capsys, monkeypatch):
    config = Config.load(file)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    assert "holds no run" in refused(["pretrain", str(file), "--out", str(tmp_path / "other")], capsys)
    out = tmp_path / "out"
    with prepared(config, out, 1, overwrite=False):
        assert "somebody is training there" in refused(["pretrain", str(file), "--out", str(out)], capsys)
    changed = ["pretrain", str(file), "--out", str(out), "--set", "seed=2"]
    assert "another configuration" in refused(changed, capsys)
    (out / "summary.json").write_text("{}")
    assert "a finished run" in refused(["pretrain", str(file), "--out", str(out)], capsys)
    with prepared(config, out, 1, overwrite=True) as made:
        assert [record.round for record in made.registry.records(made.run_id)] == [0]
        assert not (out / "summary.json").exists()


def test_the_process_is_named_that_fell_and_not_the_one_that_was_ended_for_it(tmp_path):
    fell = {0: -signal.SIGTERM, 1: -signal.SIGABRT}
    failures = {rank: ProcessFailure(rank, 1, code, str(tmp_path / "absent")) for rank, code in fell.items()}
    for failure in failures.values():
        failure.timestamp = 0
    assert _reason(failures, 2).startswith("pretrain: process 1 of 2 was ended by SIGABRT")


def test_stopping_rules_are_those_of_rounds(file, tmp_path, alone):
    config = Config.load(file, ["rounds.target=accuracy>=0.5", "rounds.count=5", "model.name=logistic"])
    with prepared(config, tmp_path, 1, overwrite=False) as made:
        run(made.registry, tmp_path, made.run_id, torch.device("cpu"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["reached_target_at"] == summary["rounds"] == 1
    assert summary["stopped"] == "target accuracy>=0.5 reached in round 1"
