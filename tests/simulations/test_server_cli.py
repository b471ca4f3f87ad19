"""`fedge-server` on a run folder: runs, releases with their lineage, and variants for further tiers."""

from __future__ import annotations

import json
import shutil

import pytest

from fedge.artefact import unpack
from fedge.config import Config
from fedge.files import sha256
from fedge_server.cli import main
from fedge_simulations import run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "run"
    config = {
        "clients": {"count": 3},
        "rounds": {"count": 3},
        "train": {"epochs": 3, "batch_size": 16},
        "evaluate": {"holdout_fraction": 0.45, "gate_fraction": 0.6, "proxy_fraction": 0.3},
    }
    run(Config.from_mapping(config), folder)
    return folder


@pytest.fixture
def folder(home, tmp_path):
    return shutil.copytree(home, tmp_path / "home")


def as_json(capsys, *arguments: str):
    assert main([*arguments, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_runs_are_listed_and_shown(folder, capsys):
    (row,) = as_json(capsys, "run", "ls", "--home", str(folder))
    assert (row["task"], row["status"], row["rounds"]) == ("digits", "done", 3)
    shown = as_json(capsys, "run", "show", row["id"], "--home", str(folder))
    assert [record["round"] for record in shown["history"]] == [1, 2, 3]
    assert shown["config"]["clients"]["count"] == 3
    assert main(["run", "show", row["id"], "--home", str(folder)]) == 0
    assert "round 3: accuracy" in capsys.readouterr().out


def test_home_comes_from_the_environment_too(folder, capsys, monkeypatch):
    monkeypatch.setenv("FEDGE_HOME", str(folder))
    assert as_json(capsys, "release", "ls") == {"releases": [], "drafts": []}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "show", "nosuch"], "run 'nosuch': there is none; runs: run-"),
        (["release", "show", "7"], "release 7: there is none; releases: none"),
        (["compress"], "the run names no tiers"),
        (["compress", "--tiers", "nowhere.toml"], "nowhere.toml: cannot be read"),
        (["compress", "--run", "nosuch"], "run 'nosuch': there is none"),
    ],
)
def test_mistakes_get_one_line(folder, capsys, arguments, says):
    assert main([*arguments, "--home", str(folder)]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1


def test_a_folder_that_is_no_home_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FEDGE_HOME", raising=False)
    assert main(["run", "ls", "--home", str(tmp_path)]) == 2
    assert "holds no fedge.db" in capsys.readouterr().err
    assert main(["run", "ls"]) == 2
    assert "give --home DIR or set FEDGE_HOME" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_variants_for_further_tiers_become_the_next_release_with_its_lineage(folder, capsys):
    tiers = folder / "tiers.toml"
    tiers.write_text("[board]\nmax_wire_bytes = 60_000\nmax_drop = 0.05\n")
    made = as_json(capsys, "compress", "--tiers", str(tiers), "--home", str(folder))
    assert made["release"] == 1
    assert list(made["tiers"]) == ["board"]
    (release,) = as_json(capsys, "release", "ls", "--home", str(folder))["releases"]
    shown = as_json(capsys, "release", "show", "1", "--home", str(folder))
    assert shown["lineage"] == release["lineage"]
    assert shown["round"]["updates"] == release["lineage"]["updates"]
    again = as_json(capsys, "compress", "--tiers", str(tiers), "--home", str(folder))
    assert again["release"] == 2


@pytest.mark.slow
def test_variants_of_a_model_file_are_written_with_their_evidence_and_a_report(folder, tmp_path, capsys):
    config = tmp_path / "digits.toml"
    config.write_text(
        'task = "digits"\n[evaluate]\nholdout_fraction = 0.45\ngate_fraction = 0.6\n'
        "[compress.distil]\nepochs = 20\n"
        '[tiers.tiny]\naim = "bytes"\nmax_wire_bytes = 6_000\nmax_drop = 0.15\n'
    )
    out, model = tmp_path / "small", folder / "model.safetensors"
    made = as_json(capsys, "compress", str(model), "--tiers", str(config), "--out", str(out))
    (row,) = made["variants"]
    wire, installed = ((out / f"tiny.{kind}").read_bytes() for kind in ("wire", "onnx"))
    assert unpack(wire, len(installed)) == installed
    assert (row["gate"], row["wire_bytes"]) == ("passed", len(wire))
    assert made["sha256"]["tiny"] == sha256(wire)
    assert json.loads((out / "tiny.gate.json").read_text())["passed"]
    assert json.loads((out / "summary.json").read_text()) == made
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert row["recipe"] in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give --out DIR and --tiers FILE"),
        (["--out", "{out}", "--tiers", "{toml}"], "nosuch.safetensors does not exist"),
    ],
)
def test_a_model_that_cannot_be_compressed_is_refused(tmp_path, capsys, arguments, says):
    config = tmp_path / "digits.toml"
    config.write_text("[tiers.any]\n")
    given = [each.format(toml=config, out=tmp_path / "o") for each in arguments]
    assert main(["compress", "nosuch.safetensors", *given]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
