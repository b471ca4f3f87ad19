"""The bets: worked by hand, never gaining on average in exact arithmetic, and no device rules them."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge_server.drift.detector import BETS, LEAST_P, MAX_SCORES, Evidence, Ranks, step
from fedge_server.drift.watch import Settings

FREE = math.inf


def test_a_rank_counts_what_was_at_or_above_it() -> None:
    ranks = Ranks((1.0, 2.0, 2.0, 3.0))
    assert [ranks.rank(score) for score in (0.5, 2.0, 2.5, 9.0)] == [1.0, 4 / 5, 2 / 5, 1 / 5]
    assert Ranks().rank(1.0) == 1.0


def test_the_evidence_is_as_worked_by_hand() -> None:
    factors = [k * 0.04 ** (k - 1) for k in BETS]
    once = Evidence().next_period().after(0.04, FREE)
    assert [math.exp(log) for log in once.logs] == pytest.approx(factors)
    twice = once.next_period().after(0.04, FREE)
    wanted = [(f + 1) * f for f in factors]
    assert [math.exp(log) for log in twice.logs] == pytest.approx(wanted)
    assert math.exp(twice.log) == pytest.approx(sum(wanted) / len(BETS))


@pytest.mark.parametrize("k", BETS)
@pytest.mark.parametrize("room", [0.0, 0.1, 1.0, FREE])
@pytest.mark.parametrize("scores", [1, 3, 20, 200])
def test_the_mean_factor_over_all_ranks_is_at_most_1(k: float, room: float, scores: int) -> None:
    """A new score is as likely to be at any rank: so no bet gains, on average."""
    factors = [math.exp(step(k, (i + 1) / (scores + 1), room)) for i in range(scores + 1)]
    assert sum(factors) / len(factors) <= 1 + 1e-12
    assert max(factors) <= math.exp(room) * (1 + 1e-12)


@given(st.lists(st.integers(0, 4), min_size=5, max_size=5), st.sampled_from([0.5, 1.3, FREE]))
def test_over_all_orders_of_any_scores_the_mean_evidence_is_at_most_the_periods(
    scores: list[int], most: float
) -> None:
    """Exchangeable means: all orders are equally likely. With ties too."""
    total, orders = 0.0, list(permutations(scores))
    for order in orders:
        evidence, ranks = Evidence(), Ranks()
        for score in order:
            p = ranks.rank(score)
            evidence = evidence.next_period().after(p, most - ranks.raised)
            ranks = ranks.after(score, p, most)
        total += math.exp(evidence.log)
    assert total / len(orders) <= len(scores) + 1e-9


def test_fewer_devices_than_at_least_never_reach_the_threshold() -> None:
    """Two that send ever larger scores, alone or together, with rests, among six honest ones."""
    settings, draw = Settings(), np.random.default_rng(1)
    for liars in ((0,), (0, 1)):
        evidence, ranks = Evidence(), [Ranks(tuple(np.sort(draw.random(50)))) for _ in range(8)]
        for period in range(200):
            evidence = evidence.next_period()
            for device in range(8):
                lies = device in liars and period % 7
                score = 100.0 + period if lies else draw.random()
                p = ranks[device].rank(score)
                evidence = evidence.after(p, settings.room - ranks[device].raised)
                ranks[device] = ranks[device].after(score, p, settings.room)
            assert evidence.log < settings.threshold


def test_one_is_enough_where_one_shall_be() -> None:
    assert Settings(at_least=1).room == FREE
    assert 2 * Settings(at_least=3).room < Settings().threshold == pytest.approx(math.log(10_000))


def test_ranks_begin_anew_when_there_are_too_many_scores() -> None:
    ranks = Ranks()
    for number in range(MAX_SCORES + 1):
        ranks = ranks.after(float(number % 7), 0.5, FREE)
    assert len(ranks.scores) == 1


def test_ranks_survive_json() -> None:
    ranks = Ranks((0.1, 2.5), 0.3)
    assert Ranks.from_json(ranks.to_json()) == ranks


def test_a_quiet_time_costs_nothing() -> None:
    """After a thousand periods without a change the evidence is as ready as after ten."""
    draw, evidence, ranks, ready = np.random.default_rng(0), Evidence(), Ranks(), []
    for _ in range(1000):
        score = draw.random()
        p = ranks.rank(score)
        evidence = evidence.next_period().after(p, FREE)
        ranks = ranks.after(score, p, FREE)
        ready.append(evidence.log)
    assert min(ready[500:]) > -2
    for _ in range(8):
        evidence = evidence.after(LEAST_P, FREE)
    assert evidence.log > math.log(10_000)
