"""Signals and text go the whole way: clients, rounds, variants, and a device that answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedge.config import Config
from fedge_client.cli import main
from fedge_simulations import run


def waves(path: Path, *, width: int = 24) -> Path:
    """Three kinds of movement of eight people, in windows of a half; one has a sensor that is absent."""
    rng = np.random.default_rng(0)
    y, client = rng.integers(0, 3, 480), np.repeat(np.arange(8), 60)
    phase = rng.uniform(0, 6, 480)[:, None] + (1 + y[:, None]) * np.linspace(0, 6, width)
    x = np.stack([np.sin(phase), np.cos(phase)], axis=2) * 9 + rng.normal(0, 1, (480, width, 2))
    x[client == 3, :, 1] = np.nan
    np.savez(path, x=x.astype(np.float16), y=y, client=client, channels=np.array(["ax", "ay"]), overlap=1)
    return path


def verses(folder: Path, words: int = 60) -> Path:
    """Six speakers who say the same few words, each in an order of their own; a seventh says too little."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(6):
        said = rng.choice(["sing", "o muse", "the wrath", "of achilles"], words)
        (folder / f"speaker{i}.txt").write_text(", ".join(said))
    (folder / "mute.txt").write_text("o")
    return folder


def config(task: str, data: Path, model: str, **sections: object) -> Config:
    return Config.from_mapping(
        {
            "task": task,
            "data": str(data),
            "model": {"name": model},
            "clients": {"partition": "natural"},
            "rounds": {"count": 3},
            "train": {"epochs": 2, "batch_size": 16, "learning_rate": 0.01, "optimizer": "adam"},
            "evaluate": {"holdout_fraction": 0.3, "proxy_fraction": 0.2},
            **sections,
        }
    )


@pytest.mark.quick_where(model=("cnn1d",))
@pytest.mark.parametrize(("model", "rounds"), [("cnn1d", 3), ("gru", 8)])
def test_people_learn_signals_together_though_one_lacks_a_sensor(tmp_path, model, rounds):
    result = run(config("signals", waves(tmp_path / "waves.npz"), model, rounds={"count": rounds}))
    assert result.learned.records[-1].clients == 8
    assert result.summary["global_model"]["accuracy"] > 0.7
    mean = result.learned.model.preprocess.get_buffer("mean").flatten().numpy()
    assert np.abs(mean).max() < 1  # of waves about 0; computed federated


@pytest.mark.quick_where(words=(15,))
@pytest.mark.parametrize(("model", "words", "most"), [("gru", 15, 2.9), ("gru", 60, 1.5), ("lstm", 60, 1.5)])
def test_speakers_learn_text_together_and_nobody_is_asked_for_moments(tmp_path, model, words, most, caplog):
    result = run(config("characters", verses(tmp_path / "verses", words), model))
    assert result.learned.records[-1].clients == 6
    assert "1 of 7 clients are left out" in caplog.text
    assert result.learned.records[-1].metrics["loss"] < most  # a guess among 18 characters: 2.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "model"),
    [("signals", "cnn1d"), pytest.param("signals", "gru", marks=pytest.mark.soak), ("characters", "gru")],
)
def test_a_device_answers_from_a_window_or_text_as_the_gate_scored(tmp_path, capsys, task, model):
    data = waves(tmp_path / "waves.npz") if task == "signals" else verses(tmp_path / "verses")
    out = tmp_path / "out"
    student = {"signals": "cnn1d-8", "characters": "gru-32"}[task]
    compress = {
        "distil": {"epochs": 20},
        "prune": {"ratios": [0.5], "recovery_epochs": 1},
        "students": [student],
    }
    tiers = {"sensor": {"max_drop": 0.2, "max_wire_bytes": 100_000}}
    result = run(config(task, data, model, rounds={"count": 4}, compress=compress, tiers=tiers), out)
    assert result.complete
    assert result.devices[0].same_as_gate
    tried = {trial.recipe: trial.result for trial in result.outcomes[0].tried}
    assert ("recurrent layers" in tried["prune50+int8"]) == (model == "gru")
    home = ["--home", str(out / "devices" / "sensor-1"), "--format", "json"]
    if task == "signals":
        window = tmp_path / "window.csv"
        rows = 9 * np.stack([np.sin(np.linspace(0, 6, 24)), np.cos(np.linspace(0, 6, 24))], axis=1)
        np.savetxt(window, rows, delimiter=",", header="ax,ay", comments="")
        capsys.readouterr()
        assert main(["infer", str(window), *home]) == 0
        label = "0"
    else:
        capsys.readouterr()
        assert main(["infer", "--text", "sing, the wrath of achille", *home]) == 0
        label = "s"
    assert json.loads(capsys.readouterr().out)["predictions"][0]["label"] == label
    assert main(["infer", *home]) == 2
