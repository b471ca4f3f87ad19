"""Budget and breaker: rules over values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.errors import UserError
from fedge_client.joint import Breaker, BreakerSettings, Bucket, Budget, take

SETTINGS = BreakerSettings(failures=3, first_s=1.0, most_s=4.0, trial_s=10.0)


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    budget, bucket = Budget(per_hour=3600, burst=5), Bucket(5, 0.0)
    granted, bucket = take(budget, bucket, 9, 0.0)
    assert (granted, bucket) == (5, Bucket(0.0, 0.0))
    assert take(budget, bucket, 9, 2.5) == (2, Bucket(0.5, 2.5))
    assert take(budget, bucket, 9, 3600.0)[0] == 5


@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), max_size=40),
    st.floats(0, 1e4),
    st.floats(0, 60),
)
def test_never_more_is_sent_than_burst_and_rate_allow(
    asked: list[tuple[float, int]], rate: float, burst: float
) -> None:
    budget, bucket, now, sent = Budget(rate, burst), Bucket(burst, 0.0), 0.0, 0
    for pause, wanted in asked:
        now += pause
        granted, bucket = take(budget, bucket, wanted, now)
        assert 0 <= granted <= wanted
        sent += granted
        assert sent <= burst + now * rate / 3600 + 1e-6


def test_a_clock_that_goes_backwards_gives_nothing() -> None:
    assert take(Budget(3600, 5), Bucket(0.0, 100.0), 3, 50.0) == (0, Bucket(0.0, 100.0))


@pytest.mark.parametrize("values", [(-1.0, 1.0), (1.0, float("nan")), (float("inf"), 1.0)])
def test_a_budget_that_is_none_is_refused(values: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="budget"):
        Budget(*values)


def test_a_breaker_opens_after_failures_in_a_row_tries_once_and_closes_again() -> None:
    breaker = Breaker().failed(SETTINGS, 0.0, 1.0).failed(SETTINGS, 0.0, 1.0)
    assert breaker.ask(SETTINGS, 0.0) == (True, breaker)  # two of three
    assert breaker.succeeded() == Breaker()
    breaker = breaker.failed(SETTINGS, 10.0, 1.0)
    assert [breaker.ask(SETTINGS, t)[0] for t in (10.0, 10.9, 11.0)] == [False, False, True]
    assert breaker.failed(SETTINGS, 10.5, 1.0) == breaker  # of a request that had gone before
    trying = breaker.ask(SETTINGS, 11.0)[1]
    assert not trying.ask(SETTINGS, 11.1)[0]  # one trial at a time
    assert trying.ask(SETTINGS, 21.0)[0]  # it was never heard of again
    again = trying.failed(SETTINGS, 11.2, 1.0)
    assert (again.opened, again.until) == (2, 13.2)  # twice as long
    assert again.ask(SETTINGS, 13.2)[1].succeeded() == Breaker()


def test_pauses_double_up_to_the_most_and_are_spread() -> None:
    breaker, now, pauses = Breaker(failures=2), 0.0, []
    for _ in range(5):
        breaker = breaker.failed(SETTINGS, now, 0.0)
        pauses.append(breaker.until - now)
        now = breaker.until
        breaker = breaker.ask(SETTINGS, now)[1]
    assert pauses == [0.5, 1.0, 2.0, 2.0, 2.0]


@given(st.lists(st.tuples(st.sampled_from("asf"), st.floats(0, 5), st.floats(0, 1)), max_size=60))
def test_a_breaker_never_stays_open_for_ever_and_lets_at_most_one_trial_go(
    steps: list[tuple[str, float, float]],
) -> None:
    breaker, now = Breaker(), 0.0
    for what, pause, jitter in steps:
        now += pause
        if what == "a":
            went, after = breaker.ask(SETTINGS, now)
            if went and breaker.opened:
                assert not after.ask(SETTINGS, now)[0]
            breaker = after
        else:
            breaker = breaker.succeeded() if what == "s" else breaker.failed(SETTINGS, now, jitter)
        assert breaker.ask(SETTINGS, now + SETTINGS.most_s + SETTINGS.trial_s)[0]
