"""From data to answering devices, in real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedge.config import Config
from fedge.files import sha256
from fedge.sealing import sealed_bytes
from fedge_server.registry.database import Registry
from fedge_server.release.lineage import released
from fedge_simulations import run
from fedge_simulations.cli import main

SOURCES = os.pathsep.join(
    str(Path(__file__).parents[2] / name) for name in ("common", "server", "client", "simulations")
)


def quick(**sections) -> Config:
    values = {
        "clients": {"count": 4},
        "rounds": {"count": 3},
        "train": {"epochs": 2, "batch_size": 16},
        "evaluate": {"holdout_fraction": 0.4, "proxy_fraction": 0.3},
        **sections,
    }
    return Config.from_mapping(values)


@pytest.mark.slow
def test_without_tiers_a_run_leaves_model_history_report_and_summary(tmp_path):
    result = run(quick(), tmp_path / "out")
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert summary == result.summary
    assert [row["round"] for row in history] == [1, 2, 3]
    assert {"round", "loss", "accuracy", "clients", "failures", "seconds", "bytes_up", "bytes_down"} <= set(
        history[0]
    )
    assert summary["global_model"]["sha256"] == sha256((out / "model.safetensors").read_bytes())
    assert history[-1]["accuracy"] == summary["global_model"]["accuracy"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 5
    assert json.loads((out / "privacy.json").read_text()) == summary["privacy"]
    assert "Nothing protects the updates: hub, worker and operator can see each single one" in page
    assert summary["bytes_up"] == sum(row["bytes_up"] for row in history)
    assert summary["clients_per_second"] > 0
    assert "http" not in page.split("<svg")[0]  # nothing is fetched from elsewhere
    assert "variants" not in summary
    assert not (out / "repository").exists()


@pytest.mark.quick_where(model=("logistic",))
@pytest.mark.parametrize("model", ["logistic", "mlp"])
def test_same_seed_same_model_another_seed_another_model(model):
    first, again, other = (run(quick(model={"name": model}, seed=seed)) for seed in (0, 0, 1))
    assert first.summary["global_model"] == again.summary["global_model"]
    assert first.summary["global_model"]["sha256"] != other.summary["global_model"]["sha256"]


@pytest.mark.slow
def test_a_finished_run_is_not_overwritten_by_accident(tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text("[rounds]\ncount = 1\n[clients]\ncount = 2\n[model]\nname = 'logistic'\n")
    out = tmp_path / "out"
    assert main(["run", str(config), "--out", str(out)]) == 0
    assert main(["run", str(config), "--out", str(out)]) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert main(["run", str(config), "--out", str(out), "--overwrite", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["rounds"] == 1


def test_quorum_and_deadline_close_rounds_in_simulated_time(tmp_path):
    slow = {"clients": {"count": 8}, "scenario": {"speed_sigma": 1.5}, "model": {"name": "logistic"}}
    by_quorum = run(quick(**slow, rounds={"count": 2, "quorum": 0.5}))
    assert [record.clients for record in by_quorum.learned.records] == [4, 4]
    # 8 clients of about 94 examples, 2 epochs of 1 ms: half of them need about 0.19 s.
    by_deadline = run(quick(**slow, rounds={"count": 2, "deadline_s": 0.2}))
    assert all(1 <= record.clients < 8 for record in by_deadline.learned.records)
    assert all(record.failures == 8 - record.clients for record in by_deadline.learned.records)


def test_a_target_ends_training_and_is_reported(tmp_path):
    result = run(quick(rounds={"count": 30, "target": "accuracy>=0.8"}))
    assert result.summary["reached_target_at"] == result.summary["rounds"] < 30


def test_nobody_ever_answers_in_time(tmp_path):
    from fedge.errors import RoundError

    with pytest.raises(RoundError, match=r"no answer before the deadline|nobody answered"):
        run(quick(rounds={"count": 9, "deadline_s": 1e-6}))


@pytest.mark.slow
def test_a_table_with_missing_values_leaves_out_each_hospital(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.normal(size=(240, 4)).astype(np.float32) * [1, 10, 100, 1]
    y = (x[:, 0] + x[:, 1] / 10 > 0).astype(int)
    x[rng.random(x.shape) < 0.1] = np.nan
    np.savez(tmp_path / "t.npz", x=x, y=y, client=np.repeat(["north", "south"], 120))
    config = Config.from_mapping(
        {
            "task": "tables",
            "data": str(tmp_path / "t.npz"),
            "clients": {"partition": "natural"},
            "rounds": {"count": 10},
            "evaluate": {"leave_one_client_out": True},
        }
    )
    summary = run(config).summary
    assert summary["global_model"]["auc"] > 0.8
    folds = summary["cross_validation"]["folds"]
    assert [fold["clients"] for fold in folds] == [["north"], ["south"]]
    assert all(fold["auc"] > 0.8 and fold["examples"] == 120 for fold in folds)


@pytest.mark.slow
def test_the_demo_deploys_a_hub_and_four_agents_whose_devices_answer_as_the_gate_scored(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["global_model"]["accuracy"] >= 0.95
    assert summary["clients"] == 4
    assert [variant["gate"] for variant in summary["variants"]] == ["passed"] * 3
    allowed = {"gateway": 0.03, "board": 0.03, "micro": 0.04}
    assert all(variant["drop_upper"] <= allowed[variant["tier"]] for variant in summary["variants"])
    assert [device["same_as_gate"] for device in summary["devices"]] == [True] * 4
    assert {device["tier"] for device in summary["devices"]} == {"gateway", "board", "micro"}
    assert "round 30/30" in printed
    assert "one compact version per tier" in printed
    sure, doubted = summary["joint"]["answers"]
    assert sure.endswith(" device (sure)")
    assert doubted.endswith(" cloud (asked)")
    end = printed[printed.index("may ask the cloud now") :]
    assert f"  {sure}\n  {doubted}\n" in end
    assert f"from global model {summary['global_model']['sha256'][:16]} of run demo" in end
    server = out / "server"
    with Registry.open(server) as registry:
        (release,) = released(registry)
    assert release.lineage.global_model == summary["global_model"]["sha256"]
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert release.lineage.updates == history[release.lineage.round - 1]["updates"]
    assert all(row["clients"] == 4 for row in history)
    for entry, variant in zip(release.variants, summary["variants"], strict=True):
        assert (entry.tier, sealed_bytes(entry.wire_bytes)) == (variant["tier"], variant["wire_bytes"])
    assert all(path.stat().st_mode & 0o077 == 0 for path in (server / "keys").glob("*.key"))
    mark = os.fsencode(tmp_path)
    lines = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
    assert not [line for line in lines if mark in line], "a process of the demonstration is left"
    assert main(["demo", "--out", str(out)]) == 2
    assert "holds a demonstration" in capsys.readouterr().err


def test_a_demo_neither_overwrites_a_folder_of_others_nor_takes_other_data(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["demo", "--out", str(tmp_path), "--overwrite"]) == 2
    assert "holds no demonstration" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "new"), "--set", "data=x.npz"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_a_killed_simulation_goes_on_and_ends_bit_for_bit_the_same(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text(
        "[clients]\ncount = 6\npartition = 'dirichlet:1'\n[rounds]\ncount = 12\nfraction = 0.7\n"
        "[train]\nepochs = 2\n[strategy]\nname = 'fedadam'\n"
    )

    def command(out: str) -> list[str]:
        code = "import sys; from fedge_simulations.cli import main; sys.exit(main(sys.argv[1:]))"
        return [sys.executable, "-c", code, "run", str(config), "--out", str(tmp_path / out)]

    environment = {**os.environ, "PYTHONPATH": SOURCES}
    assert subprocess.run(command("whole"), env=environment, capture_output=True, check=False).returncode == 0
    for stop_at in (3, 7):
        killed = subprocess.Popen(command("cut"), env=environment, stdout=subprocess.PIPE, text=True)
        for line in killed.stdout:
            if line.startswith(f"round {stop_at:>2}/12"):
                killed.send_signal(signal.SIGKILL)
                break
        killed.stdout.close()
        assert killed.wait() == -signal.SIGKILL
    done = subprocess.run(command("cut"), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "resuming the interrupted run" in done.stdout
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    rows = [
        [
            {**json.loads(line), "seconds": 0}
            for line in (tmp_path / out / "history.jsonl").read_text().splitlines()
        ]
        for out in ("whole", "cut")
    ]
    assert rows[0] == rows[1]
