"""The report's pictures and tables, from records alone."""

from __future__ import annotations

from fedge_server.report import Failure, failures_by_reason
from fedge_server.rounds.record import Rejected, RoundRecord


def test_failures_are_counted_by_reason_whatever_numbers_stand_in_it() -> None:
    records = [
        RoundRecord(
            1,
            {},
            clients=5,
            asked=9,
            rejected=(
                Rejected(3, "train_loss is 2155.5; it must be a number from 0 to 1e+06"),
                Rejected(4, "train_loss is -17; it must be a number from 0 to 1e+06"),
                Rejected(7, "Traceback ...\nValueError: no"),
            ),
        ),
        RoundRecord(2, {}, clients=8, asked=9),
        RoundRecord(3, {}, clients=0, asked=9, counted=False),
    ]
    assert set(failures_by_reason(records)) == {
        Failure("the round did not count", 9),
        Failure("train_loss is N; it must be a number from N to N", 2),
        Failure("no answer in time", 2),
        Failure("ValueError: no", 1),
    }
    assert failures_by_reason(records)[0].count == 9


def test_many_reasons_end_in_one_line_for_the_others() -> None:
    rejected = tuple(Rejected(i, "reason " + chr(65 + i)) for i in range(20))
    found = failures_by_reason([RoundRecord(1, {}, clients=0, asked=20, rejected=rejected)])
    assert (len(found), found[-1]) == (13, Failure("other reasons", 8))
    assert sum(failure.count for failure in found) == 20
