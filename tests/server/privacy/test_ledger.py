"""The ledger on both databases: one row for each draw of noise, added up over runs, kept by a backup."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedge.errors import BudgetError
from fedge_server.backup import backup
from fedge_server.privacy.accounting import Spend
from fedge_server.registry.database import Registry
from fedge_server.registry.ledger import Entry, Ledger
from fedge_server.restore import restore

SPEND = Spend("client", 0.1, 1.1)


def entry(run_id: str = "a", number: int = 1, noise: str = "n1") -> Entry:
    return Entry(run_id, number, noise, "central", SPEND)


def anything(_: object) -> None:
    pass


@pytest.fixture
def runs(registry: Registry) -> Registry:
    for run_id in ("a", "b"):
        registry.begin_run(run_id, task="digits", seed=0, config={}, data="")
    return registry


def test_a_row_comes_back_as_it_was_written(runs: Registry) -> None:
    ledger = Ledger(runs.engine, "ward")
    odd = Entry("a", 3, "n", "example", Spend("example", 1 / 3, 0.1 + 0.2, 7))
    ledger.spend(odd, anything)
    assert ledger.entries() == [odd]
    assert Ledger.names(runs.engine) == ["ward"]


def test_the_same_noise_is_one_row_and_fresh_noise_another(runs: Registry) -> None:
    ledger = Ledger(runs.engine, "default")
    for noise in ("n1", "n1", "n2"):
        ledger.spend(entry(noise=noise), anything)
    assert [each.noise for each in ledger.entries()] == ["n1", "n2"]


def test_a_second_run_goes_on_where_the_first_one_was(runs: Registry) -> None:
    seen: list[int] = []
    for run_id in ("a", "b"):
        for number in (1, 2):
            Ledger(runs.engine, "default").spend(
                entry(run_id, number), lambda spends: seen.append(len(spends))
            )
    Ledger(runs.engine, "other").spend(entry("b", 9), lambda spends: seen.append(len(spends)))
    assert seen == [1, 2, 3, 4, 1]


def test_what_the_check_refuses_is_not_written(runs: Registry) -> None:
    def full(_: object) -> None:
        raise BudgetError("full")

    with pytest.raises(BudgetError):
        Ledger(runs.engine, "default").spend(entry(), full)
    assert Ledger(runs.engine, "default").entries() == []


def test_two_runs_cannot_both_take_the_last_round(runs: Registry) -> None:
    """While one checks, the other spends: the first must look again."""
    ledger = Ledger(runs.engine, "default")
    asked: list[int] = []

    def one_fits(spends: object) -> None:
        asked.append(len(list(spends)))  # type: ignore[call-overload]
        if asked == [1]:
            ledger.spend(entry("b"), anything)
        if asked[-1] > 1:
            raise BudgetError("full")

    with pytest.raises(BudgetError):
        ledger.spend(entry("a"), one_fits)
    assert asked == [1, 2]
    assert [each.run_id for each in ledger.entries()] == ["b"]


def test_a_backup_keeps_the_ledger(tmp_path: Path) -> None:
    with Registry.open(tmp_path / "home") as registry:
        registry.begin_run("a", task="digits", seed=0, config={}, data="")
        Ledger(registry.engine, "default").spend(entry(), anything)
    backup(tmp_path / "home", None, tmp_path / "saved.tar.gz")
    restore(tmp_path / "saved.tar.gz", tmp_path / "again")
    with Registry.open(tmp_path / "again") as registry:
        assert Ledger(registry.engine, "default").entries() == [entry()]
