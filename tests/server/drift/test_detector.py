"""The bets: worked by hand, never gaining on average in exact arithmetic, and no device rules them."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge_server.drift.detector import BETS, MAX_SCORES, Bet, Evidence, Ranks
from fedge_server.drift.watch import Settings

FREE = math.inf


def test_a_rank_counts_what_was_at_or_above_it() -> None:
    ranks = Ranks((1.0, 2.0, 2.0, 3.0))
    assert [ranks.rank(score) for score in (0.5, 2.0, 2.5, 9.0)] == [1.0, 4 / 5, 2 / 5, 1 / 5]
    assert Ranks().rank(1.0) == 1.0


def test_the_evidence_is_as_worked_by_hand() -> None:
    ranks = Ranks(tuple(np.arange(24.0)))
    factors = [1 - bet.share + bet.share / bet.below for bet in BETS]  # p is 1 / 25
    steps = ranks.steps(99.0, FREE)
    assert [math.exp(step) for step in steps] == pytest.approx(factors)
    once = Evidence().next_period().after(steps)
    twice = once.next_period().after(ranks.steps(20.5, FREE))  # p is 4 / 25: below .2, above .05
    others = [1 - bet.share + (bet.share / bet.below if bet.below == 0.2 else 0) for bet in BETS]
    wanted = [(f + 1) * g for f, g in zip(factors, others, strict=True)]
    assert [math.exp(log) for log in twice.logs] == pytest.approx(wanted)
    assert math.exp(twice.log) == pytest.approx(sum(wanted) / len(BETS))


@pytest.mark.parametrize("bet", BETS)
@pytest.mark.parametrize("room", [0.0, 0.1, 1.0, FREE])
@pytest.mark.parametrize("scores", [1, 3, 19, 200])
def test_the_mean_factor_over_all_ranks_is_at_most_1(bet: Bet, room: float, scores: int) -> None:
    """A new score is as likely to be at any rank: so no bet gains, on average."""
    factors = [math.exp(bet.step((i + 1) / (scores + 1), room)) for i in range(scores + 1)]
    assert sum(factors) / len(factors) <= 1 + 1e-12
    assert max(factors) <= math.exp(room) * (1 + 1e-12)


@pytest.mark.slow
@given(st.lists(st.integers(0, 4), min_size=5, max_size=5), st.sampled_from([0.5, 1.3, FREE]))
def test_over_all_orders_of_any_scores_the_mean_evidence_is_at_most_the_periods(
    scores: list[int], most: float
) -> None:
    """Exchangeable means: all orders are equally likely. With ties too."""
    total, orders = 0.0, list(permutations(scores))
    for order in orders:
        evidence, ranks = Evidence(), Ranks()
        for score in order:
            steps = ranks.steps(score, most)
            evidence, ranks = evidence.next_period().after(steps), ranks.after(score, steps)
        total += math.exp(evidence.log)
    assert total / len(orders) <= len(scores) + 1e-9


def test_devices_that_lie_raise_the_evidence_by_no_more_than_their_room() -> None:
    """Ever larger scores, with rests: against the same fleet without them, in each period and bet."""
    room, draw = Settings().room, np.random.default_rng(1)
    honest, spoilt = Evidence(), Evidence()
    ranks = [Ranks(tuple(np.sort(draw.random(50)))) for _ in range(8)]
    for period in range(200):
        honest, spoilt = honest.next_period(), spoilt.next_period()
        for device in range(8):
            lies = device < 2
            score = draw.random() if not lies or period % 7 == 0 else 100.0 + period
            steps = ranks[device].steps(score, room)
            ranks[device] = ranks[device].after(score, steps)
            spoilt = spoilt.after(steps)
            honest = honest if lies else honest.after(steps)
        pairs = zip(spoilt.logs, honest.logs, strict=True)
        assert all(one <= other + 2 * room + 1e-9 for one, other in pairs)


def test_devices_fewer_than_at_least_do_not_reach_the_threshold_alone() -> None:
    settings = Settings()
    evidence, ranks = Evidence(), [Ranks(tuple(np.arange(50.0))) for _ in range(2)]
    for period in range(50):
        evidence = evidence.next_period()
        for device in range(2):
            steps = ranks[device].steps(100.0 + period, settings.room)
            evidence, ranks[device] = evidence.after(steps), ranks[device].after(100.0 + period, steps)
        assert evidence.log < settings.threshold


def test_one_is_enough_where_one_shall_be() -> None:
    assert Settings(at_least=1).room == FREE
    assert 2 * Settings(at_least=3).room == pytest.approx(math.log(100))
    assert Settings().threshold == pytest.approx(math.log(10_000))


def test_ranks_begin_anew_when_there_are_too_many_scores() -> None:
    ranks = Ranks()
    for number in range(MAX_SCORES + 1):
        ranks = ranks.after(float(number % 7), ranks.steps(0.0, FREE))
    assert len(ranks.scores) == 1


def test_ranks_survive_json() -> None:
    ranks = Ranks((0.1, 2.5), (0.3,) * len(BETS))
    assert Ranks.from_json(ranks.to_json()) == ranks


def test_a_quiet_time_costs_nothing() -> None:
    """After a thousand periods without a change the evidence is as ready as after ten."""
    draw, evidence, ranks, ready = np.random.default_rng(0), Evidence(), Ranks(), []
    for _ in range(1000):
        score = draw.random()
        steps = ranks.steps(score, FREE)
        evidence, ranks = evidence.next_period().after(steps), ranks.after(score, steps)
        ready.append(evidence.log)
    assert min(ready[500:]) > -2
    for _ in range(5):  # of so many devices
        evidence = evidence.after(ranks.steps(2.0, FREE))
    assert evidence.log > math.log(10_000)
