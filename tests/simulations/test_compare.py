"""Runs side by side: groups over seeds, intervals worked by hand, pairs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.config import Config
from fedge.errors import UserError
from fedge.files import sole_holder
from fedge_server.registry.database import Registry
from fedge_server.rounds.record import RoundRecord
from fedge_simulations.cli import main
from fedge_simulations.compare import compare
from fedge_simulations.compare_page import columns, row, write_comparison
from fedge_simulations.runs import LOCK, committed, run_id_of
from fedge_simulations.statistics import estimate


def past(folder: Path, accuracies: list[float], *, finished: bool = True, **changes: Any) -> Path:
    """A run folder whose rounds gave these accuracies."""
    config = Config.from_mapping({"rounds": {"count": 3}, **changes})
    run_id = run_id_of(config)
    with Registry.open(folder) as registry:
        registry.begin_run(
            run_id, task=config.task, seed=config.seed, config=config.to_mapping(), data="d" * 64
        )
        for number, accuracy in enumerate([0.1, *accuracies]):
            metrics = {"accuracy": accuracy, "loss": 1 - accuracy, "recall": [accuracy]}
            record = RoundRecord(number, metrics, clients=2, asked=2, seconds=0.5, bytes_up=10, bytes_down=20)
            registry.commit_round(run_id, record, {"w": np.full(1, number, np.float32)}, b"")
    if finished:
        (folder / "summary.json").write_text("{}")
    return folder


def two_rates(tmp_path: Path) -> Path:
    """Two groups of three seeds; the second is better by .1, .2 and .3."""
    for seed, (low, high) in enumerate([(0.5, 0.6), (0.6, 0.8), (0.4, 0.7)]):
        past(tmp_path / "all" / f"low-{seed}", [0.2, 0.3, low], seed=seed)
        past(tmp_path / "all" / f"high-{seed}", [0.3, 0.5, high], seed=seed, train={"learning_rate": 0.1})
    return tmp_path / "all"


def test_the_interval_is_students_t() -> None:
    found = estimate([1.0, 2.0, 3.0])  # deviation 1, so 1 / sqrt(3) times the t of two degrees of freedom
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert estimate([5.0]).half_width is None


@pytest.mark.slow
def test_runs_that_differ_in_the_seed_alone_are_one_group(tmp_path: Path) -> None:
    found = compare([two_rates(tmp_path)])
    assert [(group.label, len(group.runs)) for group in found.groups] == [
        ("train.learning_rate=0.1", 3),
        ("train.learning_rate=0.05", 3),
    ]
    high = found.groups[0].figures
    assert high["final"].mean == pytest.approx(0.7)
    assert (high["seconds"].mean, high["bytes"].mean, high["rounds"].mean) == (1.5, 90, 3)
    assert [point.mean for point in found.groups[0].curve] == pytest.approx([0.3, 0.5, 0.7])


@pytest.mark.slow
def test_equal_seeds_are_compared_pair_by_pair(tmp_path: Path) -> None:
    (difference,) = compare([two_rates(tmp_path)]).differences
    assert difference.seeds == (0, 1, 2)
    assert difference.difference.mean == pytest.approx(-0.2)
    # The pairs differ by .1, .2 and .3: deviation .1.
    assert difference.difference.half_width == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)


@pytest.mark.slow
def test_rounds_to_a_target_are_a_mean_only_where_all_runs_reached_it(tmp_path: Path) -> None:
    folder = two_rates(tmp_path)
    all_did, some_did = compare([folder], target="accuracy>=0.6").groups
    assert all_did.figures["rounds_to_target"].mean == 3
    assert (some_did.reached, "rounds_to_target" in some_did.figures) == (1, False)
    assert "1 of 3 reached it" in row(compare([folder], target="accuracy>=0.6"), some_did)


def test_the_best_loss_is_the_least(tmp_path: Path) -> None:
    (group,) = compare([past(tmp_path / "r", [0.9, 0.2])], metric="loss").groups
    assert group.figures["best"].mean == pytest.approx(0.1)
    assert group.figures["final"].mean == pytest.approx(0.8)


def test_a_run_that_still_goes_on_counts_as_far_as_it_is(tmp_path: Path) -> None:
    going = past(tmp_path / "going", [0.5], finished=False)
    past(tmp_path / "done", [0.4, 0.6, 0.8], seed=1)
    with sole_holder(going / LOCK):
        found = compare([going, tmp_path / "done"])
    assert found.notes == (f"{going}: running after round 1 of 3",)
    assert len(found.groups[0].curve) == 1
    assert compare([going]).notes[0].endswith("interrupted after round 1 of 3")
    assert committed(going, Config.from_mapping({"rounds": {"count": 3}})) == 1


def test_the_same_run_twice_is_not_two_seeds(tmp_path: Path) -> None:
    first, copy = past(tmp_path / "a", [0.5]), past(tmp_path / "b", [0.5])
    found = compare([first, copy, first])
    assert [len(group.runs) for group in found.groups] == [1]
    assert f"{copy}: the same configuration and seed as {first}; left out" in found.notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: is no folder"),
        (["empty"], "empty: holds no run"),
        (["one", "other"], "different tasks cannot be compared"),
        (["one", "--metric", "auc"], "'auc' was not measured; measured: accuracy, loss"),
        (["one", "--metric", "recall"], "'recall' was not measured"),
        (["one", "--target", "accuracy=0.9"], "--target 'accuracy=0.9': must be like"),
        (["fresh"], "no run has a committed round yet"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    past(Path("one"), [0.5])
    past(Path("other"), [0.5], task="images", data="x.npz")
    past(Path("fresh"), [])
    assert main(["compare", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not Path("nowhere").exists()


@pytest.mark.slow
def test_the_command_prints_a_table_or_json_and_writes_a_page_that_needs_no_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, page = str(two_rates(tmp_path)), tmp_path / "compare.html"
    assert main(["compare", folder, "--out", str(page)]) == 0
    told = capsys.readouterr().out
    assert "0.7000 \u00b1 0.2484" in told
    assert f"written: {page}" in told
    text = page.read_text()
    assert text.count("<svg") == 2
    assert "src=" not in text
    assert "http" not in text.split("<svg")[0]
    assert main(["compare", folder, "--format", "json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [group["n"] for group in value["groups"]] == [3, 3]
    assert value["groups"][0]["runs"][0] == {
        "name": "high-0",
        "folder": f"{folder}/high-0",
        "seed": 0,
        "rounds": 3,
        "state": "finished",
    }


def test_a_label_is_shown_as_text_whatever_stands_in_it(tmp_path: Path) -> None:
    for name in ("<b>", "$x$_^"):
        past(tmp_path / "all" / name, [0.5], strategy={"name": "fedavg", "note": name})
    found = compare([tmp_path / "all"])
    write_comparison(tmp_path / "c.html", found)
    assert "<b>" not in (tmp_path / "c.html").read_text()
    assert len(columns(found)) == len(row(found, found.groups[0]))


def test_a_page_that_cannot_be_written_is_the_users_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = past(tmp_path / "r", [0.5])
    (tmp_path / "file").write_text("")
    assert main(["compare", str(folder), "--out", str(tmp_path / "file" / "c.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_damaged_database_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "fedge.db").write_bytes(b"not a database, but longer than its header would be" * 40)
    assert main(["compare", str(tmp_path / "r")]) in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1


def test_compare_refuses_no_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="is no folder"):
        compare([tmp_path / "f"])
