"""Evaluation in whole runs: what clients keep back, cross-validation, and stopping when one is sure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedge.config import Config
from fedge.errors import ConfigError, DataError
from fedge.holdout import kept_back, places
from fedge_simulations import run, simulate
from fedge_simulations.folds import FOLDS, dealt, folds_of
from fedge_simulations.statistics import corrected
from fedge_simulations.world import prepare

BASE = {"model": {"name": "logistic"}, "clients": {"count": 6, "partition": "dirichlet:0.5"}}
ROUNDS = {"rounds": {"count": 2}}


@pytest.fixture
def two_wards(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 240)
    x = (rng.normal(size=(240, 3)) + 2 * y[:, None]).astype(np.float32)
    np.savez(tmp_path / "wards.npz", x=x, y=y, client=np.repeat(["a", "b", "c", "d"], 60))
    return str(tmp_path / "wards.npz")


def simulated(**sections):
    return run(Config.from_mapping({**BASE, **ROUNDS, **sections}))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vector", "sequential"])
def test_nobody_trains_on_what_it_keeps_back(engine):
    """The same run on data whose kept-back inputs are spoilt learns the same to the bit."""
    config = Config.from_mapping(
        {**BASE, **ROUNDS, "evaluate": {"federated": True, "client_holdout": 0.3},
         "simulation": {"engine": engine}}
    )  # fmt: skip
    world = prepare(config)
    train = np.concatenate([world.clients[i] for i in range(len(world.clients))])
    held = train[kept_back(places(world.dataset.x[train], 0), 0.3)]
    assert 0.2 < len(held) / len(train) < 0.4
    labels = world.dataset.y.copy()
    digests = []
    for shift in (0, 1):
        world.dataset.y[held] = (labels[held] + shift) % 10
        learned = simulate.learn(world, Path(simulate.tempfile.mkdtemp()), "r", lambda _: None)
        digests.append(learned.model_sha256)
        accuracy = learned.records[-1].client_metrics["accuracy"]
        assert (accuracy > 0.5) == (shift == 0)  # and it is on these that they evaluate
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_engines_agree_on_what_is_kept_back():
    found = [
        simulated(
            evaluate={"federated": True, "client_holdout": 0.25}, simulation={"engine": engine}
        ).history[-1].client_metrics
        for engine in ("vector", "sequential")
    ]  # fmt: skip
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[0]["clients"] == found[0]["asked"] == 6
    assert found[0]["accuracy_min"] <= found[0]["accuracy_worst_decile"] <= found[0]["accuracy_mean"]


@pytest.mark.slow
def test_the_summary_says_how_sure_and_how_fair(tmp_path):
    result = run(
        Config.from_mapping({**BASE, **ROUNDS, "evaluate": {"federated": True, "client_holdout": 0.25}}),
        tmp_path / "out",
    )
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    intervals = found["global_model"]["intervals"]
    assert intervals["accuracy"][0] < found["global_model"]["accuracy"] < intervals["accuracy"][1]
    assert set(intervals) == {"confidence", "over", "units", "accuracy", "loss", "macro_f1"}
    assert found["on_clients"]["accuracy_worst_decile"] > 0
    assert result.history[-1].intervals["accuracy"] == tuple(intervals["accuracy"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "95 % interval over 179 examples" in page
    assert "keep back from training" in page


@pytest.mark.slow
def test_a_target_counts_once_it_is_surely_reached():
    sure = simulated(rounds={"count": 12, "target": "accuracy>=0.84", "target_confidence": 0.95})
    plain = simulated(rounds={"count": 12, "target": "accuracy>=0.84"})
    assert sure.summary["reached_target_at"] > plain.summary["reached_target_at"]
    at = sure.history[-1]
    assert at.target_bound >= 0.84 > sure.history[-2].target_bound
    assert at.target_bound > at.intervals["accuracy"][0]  # one-sided at 95 % is two-sided at 90 %
    assert "at 95 % confidence" in sure.summary["stopped"]


def test_folds_over_examples_test_on_each_once_and_train_on_the_others():
    world = prepare(Config.from_mapping({**BASE, "evaluate": {"folds": 4}}))
    folds = list(folds_of(world))
    sizes = [len(fold.world.server.test) for fold in folds]
    trained = [np.concatenate([f.world.clients[i] for i in range(len(f.world.clients))]) for f in folds]
    assert max(sizes) - min(sizes) <= 1
    for fold, size, train in zip(folds, sizes, trained, strict=True):
        assert fold.trained_on == len(train) == sum(sizes) - size
        held = {row.tobytes() for row in fold.world.server.test.x}
        assert not held & {row.tobytes() for row in world.dataset.x[train]}


def test_parts_are_dealt_class_by_class():
    y = np.repeat([0, 1, 2], [40, 9, 11])
    part = dealt(y, 5, np.random.default_rng(0))
    for label, least in ((0, 8), (1, 1), (2, 2)):
        counts = np.bincount(part[y == label], minlength=5)
        assert counts.min() >= least
        assert counts.max() <= least + 1
    assert (np.bincount(part) == 12).all()


def test_the_corrected_interval_by_hand():
    found = corrected([0.8, 0.9], 1.0, 0.95)
    assert found["mean"] == pytest.approx(0.85)
    assert found["std"] == pytest.approx(0.0707107, abs=1e-6)
    # t(1, 0.975) = 12.7062; variance 0.005 x (1/2 + 1)
    assert found["high"] - 0.85 == pytest.approx(12.7062 * np.sqrt(0.005 * 1.5), abs=1e-4)


@pytest.mark.slow
def test_whole_clients_are_left_out_where_they_are_natural(two_wards):
    config = Config.from_mapping(
        {"task": "tables", "data": two_wards, "clients": {"partition": "natural"}, "evaluate": {"folds": 2},
         **ROUNDS}
    )  # fmt: skip
    found = run(config).summary["cross_validation"]
    assert found["over"] == "clients"
    assert sorted(name for fold in found["folds"] for name in fold["clients"]) == ["a", "b", "c", "d"]
    assert [fold["examples"] for fold in found["folds"]] == [120, 120]
    scores = [fold["accuracy"] for fold in found["folds"]]
    assert found["metrics"]["accuracy"]["mean"] == pytest.approx(np.mean(scores))
    assert found["metrics"]["auc"]["low"] < found["metrics"]["auc"]["mean"] < 1


@pytest.mark.slow
def test_an_interrupted_cross_validation_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    config = Config.from_mapping({**BASE, **ROUNDS, "evaluate": {"folds": 3}})
    whole = run(config, tmp_path / "whole").summary["cross_validation"]
    learn, calls = simulate.learn, []

    def dies(world, home, run_id, observe):
        calls.append(run_id)
        if run_id != "fold-2":
            return learn(world, home, run_id, observe)

        def after_one(record):
            raise KeyboardInterrupt

        return learn(world, home, run_id, after_one)

    monkeypatch.setattr(simulate, "learn", dies)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut")
    assert sorted(path.name for path in (tmp_path / "cut" / FOLDS).iterdir()) == ["1.json", "2"]
    monkeypatch.setattr(simulate, "learn", learn)
    said = []
    assert run(config, tmp_path / "cut", say=said.append).summary["cross_validation"] == whole
    assert [line.partition(":")[0] for line in said if "left out" in line] == [
        "left out part 2",
        "left out part 3",
    ]
    assert "Trained without a part of the data" in (tmp_path / "cut" / "report.html").read_text()


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"evaluate": {"client_holdout": 0.2}}, "nothing is measured on what clients keep back"),
        (
            {"evaluate": {"folds": 3}, "rounds": {"patience": 2}},
            "leave rounds.target and rounds.patience out",
        ),
        ({"evaluate": {"folds": 1}}, "evaluate.folds = 1"),
        ({"rounds": {"target_confidence": 0.9}}, "there is no rounds.target to be sure of"),
        ({"rounds": {"target": "accuracy>=0.9", "target_confidence": 0.4}}, "rounds.target_confidence = 0.4"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_anything_runs(sections, says):
    with pytest.raises((ConfigError, DataError), match=says):
        simulated(**sections)


def test_more_folds_than_natural_clients_are_refused(two_wards):
    natural = {"task": "tables", "data": two_wards, "clients": {"partition": "natural"}}
    with pytest.raises(ConfigError, match="there are 4 clients to leave out"):
        prepare(Config.from_mapping({**natural, "evaluate": {"folds": 5}}))
    with pytest.raises(ConfigError, match="each client is a fold"):
        prepare(Config.from_mapping({**natural, "evaluate": {"folds": 2, "leave_one_client_out": True}}))
