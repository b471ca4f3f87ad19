"""Sweeps: which runs lists make, what is refused, and that one run's end is not the others'."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedge.errors import ConfigError
from fedge.files import sole_holder
from fedge_simulations.cli import main
from fedge_simulations.processes import environment
from fedge_simulations.sweep import name_of, plan, takes_list

QUICK = "[rounds]\ncount = 2\n[clients]\ncount = 2\n[model]\nname = 'logistic'\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(QUICK)
    return path


def test_lists_make_every_combination_with_names_that_say_the_values(config: Path) -> None:
    planned = plan(config, ["train.learning_rate=[0.01,0.1]", "seed=[0,1]", "rounds.count=5"])
    assert [run.name for run in planned] == [
        "train.learning_rate=0.01,seed=0",
        "train.learning_rate=0.01,seed=1",
        "train.learning_rate=0.1,seed=0",
        "train.learning_rate=0.1,seed=1",
    ]
    last = planned[-1].config
    assert (last.train.learning_rate, last.seed, last.rounds.count) == (0.1, 1, 5)


def test_words_need_no_quotes_since_a_shell_takes_them_away(config: Path) -> None:
    planned = plan(config, ["strategy.name=[fedavg, fedprox]", "clients.partition=[iid,dirichlet:0.5]"])
    assert [run.config.strategy.name for run in planned] == ["fedavg", "fedavg", "fedprox", "fedprox"]
    assert planned[1].name == "strategy.name=fedavg,clients.partition=dirichlet-0.5"


def test_a_key_whose_value_is_a_list_takes_a_list_of_lists(config: Path) -> None:
    planned = plan(config, ['train.augment=[["noise:0.1"],[]]'])
    assert [run.config.train.augment for run in planned] == [("noise:0.1",), ()]
    assert [run.name for run in planned] == ["train.augment=noise-0.1", "train.augment=none"]


@pytest.mark.parametrize(
    ("key", "is_list"),
    [
        ("train.augment", True),
        ("compress.prune.ratios", True),
        ("evaluate.metrics", True),
        ("data_size", True),
        ("seed", False),
        ("rounds.target", False),
        ("tiers.micro.max_drop", False),
        ("strategy.mu", False),
        ("nosuch.key", False),
    ],
)
def test_the_configurations_types_say_which_values_are_lists(key: str, is_list: bool) -> None:
    assert takes_list(key) is is_list


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["seed=3"], "nothing to sweep over"),
        (["seed=[]"], "an empty list has nothing"),
        (["seed=[1,1]"], "1 stands there twice"),
        (["seed=[1,2]", "seed=[3]"], "seed is set twice"),
        (["seed=[1"], "not a list as TOML writes it"),
        (['train.augment=["flip"]'], r'\[\["flip"\]\] for this one value'),
        (['train.augment=[["flip"],"flip"]'], "give a list of such lists"),
        (["train.lerning_rate=[1,2]"], "unknown key 'train.lerning_rate': did you mean 'learning_rate'"),
        (["train.learning_rate=[0.1,-1]"], "learning_rate = -1"),
        (["seed=[1,x]"], "seed = 'x'"),
        ([f"seed={list(range(200))}", f"rounds.count={list(range(1, 200))}"], "these lists make 39,800 runs"),
    ],
)
def test_what_is_ambiguous_or_wrong_is_refused_before_any_run(
    assignments: list[str], message: str, config: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(config, assignments)


def test_names_are_safe_in_a_shell_and_never_too_long() -> None:
    awkward = name_of({"data": "/a b/c;d.npz"})
    assert awkward != name_of({"data": "/a b/c d.npz"})
    assert set(awkward) <= set("abcdefghijklmnopqrstuvwxyz0123456789.,=-")
    assert len(name_of({f"key{i}": "x" * 30 for i in range(20)})) <= 160


def test_a_dry_run_lists_and_writes_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["sweep", str(config), "--set", "seed=[0,1]", "--out", str(tmp_path / "out"), "--dry-run"]
    assert main(call) == 0
    assert capsys.readouterr().out.splitlines() == ["seed=0", "seed=1", "2 runs"]
    assert main([*call, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[1] == {"name": "seed=1", "settings": {"seed": 1}}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--parallel", "0"], "--parallel 0: at least 1"), (["--target", "good"], "--target 'good'")],
)
def test_wrong_options_are_refused_before_any_run(
    more: list[str], message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["sweep", str(config), "--set", "seed=[0,1]", "--out", str(out), *more]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_a_folder_that_holds_something_else_or_another_sweep_is_left_alone(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    call = ["sweep", str(config), "--set", "seed=[0,1]", "--out", str(out), "--overwrite"]
    assert main(call) == 2
    assert "is not empty and holds no sweep" in capsys.readouterr().err
    (out / "sweep.json").write_text('{"runs": {}}')
    with sole_holder(out / "sweep.lock"):
        assert main(call) == 2
    assert "another sweep works in it" in capsys.readouterr().err
    assert (out / "thesis.tex").read_text() == "precious"


@pytest.mark.slow
def test_one_run_that_fails_does_not_stop_the_others_and_a_second_call_does_what_is_missing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    sets = ["--set", "train.learning_rate=[0.05,1e9]", "--set", "seed=[0,1]", "--set", "rounds.count=3"]
    call = ["sweep", str(config), *sets, "--out", str(out), "--parallel", "2"]
    assert main([*call, "--format", "json"]) == 1
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert [run["ended"] for run in found["runs"]] == ["done", "done", "failed", "failed"]
    assert "train.learning_rate=1000000000.0,seed=0: failed: round 3: 3 rounds in a row" in told.err
    (group,) = found["comparison"]["groups"]
    assert (group["n"], [run["name"] for run in group["runs"]]) == (
        2,
        ["train.learning_rate=0.05,seed=0", "train.learning_rate=0.05,seed=1"],
    )
    assert "round 3/3" in (out / "logs" / "train.learning_rate=0.05,seed=0.log").read_text()
    sets[1] = "train.learning_rate=[0.05,0.1]"
    assert main(["sweep", str(config), *sets, "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert told.out.count("was finished before") == 2
    assert told.out.count("  done") == 2
    assert (out / "compare.html").read_text().count("<svg") == 3


@pytest.mark.slow
def test_a_finished_run_of_another_configuration_is_not_taken_for_this_one(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["sweep", str(config), "--set", "seed=[0]", "--out", str(tmp_path / "out")]
    assert main(call) == 0
    config.write_text(QUICK + "[train]\nepochs = 2\n")
    assert main(call) == 1
    assert "holds a finished run of another configuration" in capsys.readouterr().err
    assert main([*call, "--overwrite"]) == 0


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 90
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def rounds_of(out: Path, name: str) -> int:
    history = out / name / "history.jsonl"
    return len(history.read_text().splitlines()) if history.exists() else 0


def children(process: subprocess.Popen[bytes]) -> list[int]:
    return [
        int(stat.parent.name) for stat in Path("/proc").glob("[0-9]*/stat") if _parent(stat) == process.pid
    ]


def _parent(stat: Path) -> int | None:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None  # it has just ended


@pytest.mark.slow
@pytest.mark.parametrize("blow", [pytest.param("interrupt", marks=pytest.mark.soak), "kill"])
def test_an_interrupted_sweep_leaves_no_process_and_goes_on_from_its_last_rounds(
    blow: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    call = ["sweep", str(config), "--set", "seed=[0]", "--set", "rounds.count=100", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", f"from fedge_simulations.cli import main; raise SystemExit(main({call!r}))"],
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    until(lambda: rounds_of(out, "seed=0") >= 2)
    (worker,) = children(process)
    process.send_signal(signal.SIGINT if blow == "interrupt" else signal.SIGKILL)
    process.communicate()
    assert process.returncode == (130 if blow == "interrupt" else -signal.SIGKILL)
    until(lambda: not Path(f"/proc/{worker}").exists() or _state(worker) == "Z")
    done = rounds_of(out, "seed=0")
    assert 2 <= done < 100
    again = [*call[:4], "--set", "rounds.count=100", "--out", str(out)]
    assert main(again) == 0
    log = (out / "logs" / "seed=0.log").read_text()
    assert f"going on with round {done + 1}" in log or f"going on with round {done + 2}" in log


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.slow
def test_a_worker_that_is_killed_fails_its_run_and_no_other(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    call = ["sweep", str(config), "--set", "seed=[0,1]", "--set", "rounds.count=60", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", f"from fedge_simulations.cli import main; raise SystemExit(main({call!r}))"],
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    until(lambda: rounds_of(out, "seed=0") >= 1)
    os.kill(children(process)[0], signal.SIGKILL)
    printed, told = process.communicate()
    assert process.returncode == 1
    assert "seed=0: failed: its process ended by signal 9" in told.decode()
    assert "seed=1  done" in printed.decode()
