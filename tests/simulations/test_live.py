"""What a run shows while it goes on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedge.config import Config
from fedge_server.rounds.record import RoundRecord
from fedge_simulations import run
from fedge_simulations.cli import main
from fedge_simulations.live import Lines, Screen, duration, is_watched, sparkline


def record(number: int, **changes: Any) -> RoundRecord:
    metrics = {"accuracy": number / 10, "loss": 1.0, "recall": [0.5]}
    return RoundRecord(number, metrics, **{"clients": 30, "asked": 40, "seconds": 2.0, **changes})


def screen(width: int, **rounds: Any) -> tuple[Screen, Console]:
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    return Screen(Config.from_mapping({"rounds": {"count": 10, **rounds}}), 0, console), console


def shown(made: Screen, console: Console) -> str:
    with console.capture() as capture:
        console.print(made.render())
    return capture.get()


def test_bars_stand_between_the_least_and_the_greatest_value_and_are_thinned_out() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([]) == ""
    long = sparkline([float(i) for i in range(1000)], width=50)
    assert (len(long), long[-1]) == (50, "█")


def test_durations_are_minutes_and_seconds_and_hours_where_there_are_any() -> None:
    assert [duration(s) for s in (0.4, 61, 3600 + 62)] == ["0:00", "1:01", "1:01:02"]


def test_the_screen_tells_speed_simulated_time_and_time_left() -> None:
    made, console = screen(120)
    for number in (1, 2, 3):
        made.observe(record(number, simulated_s=number * 10.0))
    text = shown(made, console)
    assert "round 3/10  15 clients/s  simulated 30.0 s  0:14 left" in text
    assert "accuracy  ▁▅█  0.3000" in text
    assert "at most" not in text
    made, console = screen(120, target="loss<=0.1")
    made.observe(record(1))
    assert "0:18 left at most" in shown(made, console)


def test_rounds_of_an_earlier_call_do_not_count_for_the_speed() -> None:
    made, console = screen(120)
    made.earlier = 2
    for number, seconds in ((1, 1000.0), (2, 1000.0), (3, 3.0)):
        made.observe(record(number, seconds=seconds))
    assert "round 3/10  10 clients/s  0:21 left" in shown(made, console)


@pytest.mark.parametrize("width", [30, 60, 75, 200])
def test_a_narrow_terminal_gets_fewer_columns_and_no_line_is_cut(width: int) -> None:
    made, console = screen(width)
    for number in range(1, 20):
        made.observe(record(number, simulated_s=1e6, train_loss=0.5))
    text = shown(made, console)
    assert ("train loss" in text) == (width >= 80)
    assert "…" not in text or width < 50


def test_without_a_terminal_or_under_ci_there_are_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not is_watched()
    lines = Lines(Config.from_mapping({"rounds": {"count": 10}}), 1)
    lines.observe(record(1))
    lines.observe(record(2, simulated_s=1.5))
    (told,) = capsys.readouterr().out.splitlines()
    assert told.startswith("round  2/10  accuracy 0.2000  loss 1.0000  30 clients  2.00 s")
    assert told.endswith("simulated 1.5 s  15 clients/s")
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert is_watched()
    monkeypatch.setenv("CI", "true")
    assert not is_watched()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Stop(Exception):  # noqa: N818 - stands for a power cut
    pass


@pytest.mark.slow
def test_a_run_says_from_which_round_it_goes_on_and_does_not_tell_the_others_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[rounds]\ncount = 4\n[clients]\ncount = 2\n[model]\nname = 'logistic'\n")

    def stop(record: RoundRecord) -> None:
        if record.round == 2:
            raise Stop

    with pytest.raises(Stop):
        run(Config.load(config), tmp_path / "out", observe=stop)
    assert main(["run", str(config), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "rounds 1 to 2 are committed, going on with round 3" in told
    assert "round 2/4" not in told
    assert "round 3/4" in told


def test_a_folder_in_which_a_process_runs_is_left_to_it(tmp_path: Path) -> None:
    from fedge.errors import UserError
    from fedge.files import sole_holder
    from fedge_simulations.runs import LOCK

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fedge.db").touch()
    with sole_holder(tmp_path / "out" / LOCK), pytest.raises(UserError, match="another process runs in it"):
        run({"rounds": {"count": 1}, "model": {"name": "logistic"}}, tmp_path / "out", overwrite=True)


def test_a_result_has_readable_attributes() -> None:
    import torch

    result = run({"model": {"name": "logistic"}, "clients": {"count": 2}, "rounds": {"count": 2}})
    assert result.accuracy == result.metrics["accuracy"] == result.history[-1].metrics["accuracy"]
    assert [record.round for record in result.history] == [1, 2]
    with torch.no_grad():
        assert result.model(torch.zeros((3, 8, 8), dtype=torch.uint8)).shape == (3, 10)
