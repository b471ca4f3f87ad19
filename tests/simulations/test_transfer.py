"""Runs that begin with an earlier model: its weights, a new head, or another architecture that it taught."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedge import tensors
from fedge.config import Config
from fedge.errors import ConfigError
from fedge.files import sha256
from fedge_server import pipeline
from fedge_server.data import server_part, split_of
from fedge_server.registry.database import Registry
from fedge_server.rounds.starting import heads
from fedge_simulations import run
from fedge_simulations.world import prepare

MLP = {"model": {"name": "mlp"}, "clients": {"count": 4}, "rounds": {"count": 3}}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    run(Config.from_mapping(MLP), folder)
    return folder


@pytest.fixture
def flowers(tmp_path):
    """Write images of 8x8 whose classes have these names; returns the path."""

    def write(*labels: str) -> str:
        rng = np.random.default_rng(0)
        y = np.array(labels)[rng.integers(0, len(labels), 300)]
        x = rng.integers(0, 255, (300, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / f"{len(labels)}{labels[0]}.npz", x=x, y=y)
        return str(tmp_path / f"{len(labels)}{labels[0]}.npz")

    return write


def begun(folder: Path) -> tuple[dict, dict]:
    """Round 0's record and state."""
    with Registry.open(folder) as registry:
        (row,) = registry.runs()
        record = registry.records(row["id"])[0]
    return record.origin, record.metrics


def after(config, folder, **model):
    changed = {**config, "model": {**config["model"], **model}}
    return run(Config.from_mapping(changed), folder)


@pytest.mark.slow
def test_a_run_goes_on_from_an_earlier_model(earlier, tmp_path):
    result = after(MLP, tmp_path / "out", start=str(earlier))
    before = json.loads((earlier / "summary.json").read_text())["global_model"]
    origin, metrics = begun(tmp_path / "out")
    assert metrics["accuracy"] == before["accuracy"]  # the seed, and so the test data, are the same
    assert metrics["loss"] == pytest.approx(before["loss"])
    assert origin["sha256"] == before["sha256"] == sha256((earlier / "model.safetensors").read_bytes())
    assert origin["new"] == []
    assert result.summary["origin"] == origin
    assert "started from" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_its_moments_go_along_and_nobody_is_asked(earlier, tmp_path, monkeypatch):
    monkeypatch.setattr("fedge_server.rounds.loop.federated_moments", None)
    after(MLP, tmp_path / "out", start=str(earlier / "model.safetensors"))
    files = [tensors.load(folder / "model.safetensors")[0] for folder in (earlier, tmp_path / "out")]
    assert (files[0]["moments.total"] == files[1]["moments.total"]).all()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_without_the_earlier_model(earlier, tmp_path, monkeypatch):
    start = tmp_path / "start.safetensors"
    start.write_bytes((earlier / "model.safetensors").read_bytes())
    whole = after(MLP, tmp_path / "whole", start=str(start))

    def after_two(record):
        if record.round == 2:
            raise KeyboardInterrupt

    config = Config.from_mapping({**MLP, "model": {"name": "mlp", "start": str(start)}})
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut", observe=after_two)
    start.unlink()
    assert run(config, tmp_path / "cut").learned.model_sha256 == whole.learned.model_sha256


@pytest.mark.slow
def test_with_other_classes_the_head_is_new_and_the_body_is_kept(earlier, flowers, tmp_path):
    said = []
    config = {**MLP, "task": "images", "data": flowers("daisy", "rose", "tulip"), "rounds": {"count": 1}}
    changed = Config.from_mapping({**config, "model": {"name": "mlp", "start": str(earlier)}})
    result = run(changed, tmp_path / "out", say=said.append)
    assert result.summary["origin"]["new"] == ["5.weight", "5.bias"]
    assert any("these parts are new: 5.weight, 5.bias" in line for line in said)


@pytest.mark.slow
def test_as_many_classes_of_other_names_are_others(earlier, flowers, tmp_path):
    """The shapes fit; only the file's own words tell."""
    names = [f"flower {i}" for i in range(10)]
    config = {**MLP, "task": "images", "data": flowers(*names), "rounds": {"count": 1}}
    result = after(config, tmp_path / "out", start=str(earlier))
    assert result.summary["origin"]["new"] == ["5.weight", "5.bias"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("mlp", {"5.weight", "5.bias"}), ("logistic", {"1.weight", "1.bias"}), ("cnn", {"9.weight", "9.bias"})],
)
def test_the_head_is_what_one_class_more_or_less_changes(name, expected):
    world = prepare(Config())
    if name in world.task.models:
        assert heads(world.task, name, world.dataset.spec) == expected


@pytest.mark.slow
def test_the_old_model_teaches_a_new_architecture(earlier, tmp_path):
    said = []
    config = Config.from_mapping(
        {**MLP, "model": {"name": "logistic", "distil_from": str(earlier)}, "rounds": {"count": 1}}
    )
    result = run(config, tmp_path / "out", say=said.append)
    origin, metrics = begun(tmp_path / "out")
    before = json.loads((earlier / "summary.json").read_text())["global_model"]
    assert origin["accuracy_before"] == pytest.approx(before["accuracy"])
    assert origin["accuracy_after"] == metrics["accuracy"] > 0.75  # before a single round
    assert result.summary["origin"]["sha256"] == before["sha256"]
    assert any(f"accuracy {before['accuracy']:.4f} before" in line for line in said)


@pytest.mark.slow
def test_a_teacher_whose_file_does_not_say_what_it_is_is_known_by_its_parts(earlier, tmp_path):
    arrays, _ = tensors.load(earlier / "model.safetensors")
    (tmp_path / "bare.safetensors").write_bytes(tensors.dump(arrays))
    config = {**MLP, "model": {"name": "logistic"}, "rounds": {"count": 1}}
    found = after(config, tmp_path / "out", distil_from=str(tmp_path / "bare.safetensors"))
    assert found.summary["origin"]["accuracy_after"] > 0.75


@pytest.mark.slow
def test_a_release_is_found_by_its_version_and_walked_back_to(earlier, tmp_path, capsys):
    """A home where one run was released, and the next begins with that release."""
    from fedge_server.cli import main

    config = Config.from_mapping({**MLP, "tiers": {"micro": {"max_wire_bytes": 200_000, "max_drop": 0.3}}})
    first = run(config, tmp_path / "home")
    assert first.summary["variants"][0]["gate"] == "passed"
    world = prepare(config)
    data = server_part(world.dataset, split_of(config, world.dataset))
    again = Config.from_mapping({**MLP, "model": {"name": "mlp", "start": "release:1"}})
    with Registry.open(tmp_path / "home") as registry:
        from fedge_server.rounds.loop import learn
        from fedge_server.rounds.starting import check_start

        wrong = Config.from_mapping({**MLP, "model": {"name": "mlp", "start": "release:2"}})
        with pytest.raises(ConfigError, match=r"there is no such release; releases: 1"):
            check_start(wrong, world.task, data, registry)
        grid = world.grid({})
        learned = learn(grid, again, world.task, data, registry, "second", lambda _: None)
        assert learned.origin["sha256"] == first.learned.model_sha256
        place = pipeline.Place(
            "second", tmp_path / "home", tmp_path / "home", registry, config, world.task, data
        )
        pipeline.release(place, learned)
    assert main(["release", "show", "2", "--home", str(tmp_path / "home")]) == 0
    shown = capsys.readouterr().out
    assert f"began with the weights of release:1, global model {first.learned.model_sha256[:16]}" in shown


def bare(path: Path, **changes) -> str:
    arrays, _ = tensors.load(path / "model.safetensors")
    kept = {name: value for name, value in (arrays | changes).items() if value is not None}
    target = path.parent / "changed.safetensors"
    target.write_bytes(tensors.dump(kept))
    return str(target)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"1.weight": np.zeros((200, 63), np.float32)}, r"'1.weight' is \(200, 63\), this model's \(200"),
        ({"1.bias": None, "1.bais": np.zeros(200, np.float32)}, "has '1.bais', .*did you mean '1.bias'"),
        ({"3.bias": None}, "lacks '3.bias' of this model"),
        ({"3.bias": np.full(200, np.nan, np.float32)}, "'3.bias' holds NaN or infinite values"),
        ({"moments.count": np.ones(2), "moments.total": np.ones(2), "moments.squares": np.ones(2)},
         "was trained on 2 channels"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_is_written(earlier, tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says):
        after(MLP, tmp_path / "out", start=bare(earlier, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"start": "nowhere"}, "does not exist; name a model file, a run folder or 'release:N'"),
        ({"start": "release:7"}, "there is no such release; releases: none here"),
        ({"start": "a", "distil_from": "b"}, "a run begins with one of them"),
        ({"start": "EARLIER", "filter": "median"}, "was trained with model.filter = 'none'"),
    ],
)
def test_a_start_that_cannot_be_is_refused(earlier, tmp_path, model, says):
    named = {key: str(earlier) if value == "EARLIER" else value for key, value in model.items()}
    with pytest.raises(ConfigError, match=says):
        after(MLP, tmp_path / "out", **named)


def test_a_teacher_of_other_classes_is_refused(earlier, flowers, tmp_path):
    config = {**MLP, "task": "images", "data": flowers("daisy", "rose", "tulip")}
    with pytest.raises(ConfigError, match="only a model of the same classes in the same order can teach"):
        after(config, tmp_path / "out", distil_from=str(earlier))


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "junk.safetensors").write_bytes(b"\x80\x04junk" * 100)
    with pytest.raises(ConfigError, match=r"model.start = .*junk.safetensors'"):
        after(MLP, tmp_path / "out", start=str(tmp_path / "junk.safetensors"))


def test_a_path_in_a_file_is_relative_to_it(tmp_path):
    (tmp_path / "run.toml").write_text(
        '[model]\nstart = "old/model.safetensors"\ndistil_from = "release:3"\n'
    )
    model = Config.load(tmp_path / "run.toml").model
    assert model.start == str(tmp_path / "old" / "model.safetensors")
    assert model.distil_from == "release:3"
