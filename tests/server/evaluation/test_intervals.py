"""Intervals over the test data: by hand, against scikit-learn, and as often right as they claim."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta, norm
from scipy.stats import t as student

from fedge.config import Gate
from fedge.learning.metrics import evaluate
from fedge_server.compression.gate import bound
from fedge_server.evaluation import bootstrap
from fedge_server.evaluation.intervals import MIN_CLIENTS, WEIGHED, Answered, interval, stated


def answered(right: np.ndarray, owners: np.ndarray | None = None) -> Answered:
    """Two classes, all examples of the first, answered rightly or not."""
    probabilities = np.where(right[:, None], [1.0, 0.0], [0.0, 1.0])
    return Answered.of(probabilities, np.zeros(len(right), np.int64), owners)


def at_95(metric: str, of: Answered, seed: int = 0) -> bootstrap.Interval:
    found = interval(metric, of, tail=0.025, resamples=1000, seed=seed)
    assert found is not None
    return found


def guesses(n: int, classes: int, seed: int = 0) -> Answered:
    rng = np.random.default_rng(seed)
    return Answered.of(rng.dirichlet(np.ones(classes), n), rng.integers(0, classes, n), None)


@pytest.mark.parametrize("metric", ["accuracy", "loss", "macro_f1", "auc"])
def test_with_each_example_once_a_metric_is_what_scikit_learn_says(metric: str) -> None:
    own = guesses(200, 2 if metric == "auc" else 5)
    expected = evaluate(own.probabilities, own.y, ("macro_f1", "auc"))[metric]
    assert WEIGHED[metric](own, np.ones((1, 200)))[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", ["accuracy", "loss", "macro_f1", "auc"])
def test_a_weight_of_two_is_the_example_twice(metric: str) -> None:
    own = guesses(60, 2)
    often = np.random.default_rng(1).integers(0, 3, 60)
    twice = np.repeat(np.arange(60), often)
    expected = evaluate(own.probabilities[twice], own.y[twice], ("macro_f1", "auc"))[metric]
    assert WEIGHED[metric](own, often[None].astype(float))[0] == pytest.approx(expected, abs=1e-12)


def test_equal_scores_count_half_for_the_area_under_the_curve() -> None:
    scores = np.array([0.3, 0.3, 0.8, 0.1])  # pairs of positive 0.3, 0.8 with negative 0.3, 0.1: 0.5, 1, 1, 1
    own = Answered.of(np.stack([1 - scores, scores], 1), np.array([1, 0, 1, 0]), None)
    assert WEIGHED["auc"](own, np.ones((1, 4)))[0] == 3.5 / 4


def test_a_tail_is_taken_further_out_for_few_units() -> None:
    expected = norm.cdf(-np.sqrt(10 / 9) * student.ppf(0.975, 9))
    assert bootstrap.expanded(0.025, 10) == pytest.approx(expected)
    assert bootstrap.expanded(0.025, 10**6) == pytest.approx(0.025, rel=1e-4)


def test_a_drawn_sample_is_multinomial() -> None:
    counts = bootstrap.drawn((30, 10), 40, 20_000, np.random.default_rng(0))
    assert (counts.sum(1) == 40).all()
    assert counts[:, 0].mean() == pytest.approx(30, abs=0.1)
    assert counts[:, 0].var() == pytest.approx(40 * 0.75 * 0.25, rel=0.05)


def test_the_gates_bound_is_the_same_bootstrap() -> None:
    pool = np.array([4, 1, 96], dtype=np.float64) / 101  # 3 losses and the one that was not observed, 1 win
    draws = np.random.default_rng(5).multinomial(100, pool, size=4000)
    expected = np.quantile((draws[:, 0] - draws[:, 1]) / 100, 0.95, method="inverted_cdf")
    assert bound(3, 1, 100, 0.95, Gate().resamples, np.random.default_rng(5)).drop_upper == expected


def test_without_a_single_error_the_bound_is_about_that_of_clopper_and_pearson() -> None:
    found = at_95("accuracy", answered(np.ones(100, bool)))
    assert found.low == pytest.approx(beta.ppf(0.025, 100, 1), abs=0.012)
    assert found.high == 1.0
    none = at_95("accuracy", answered(np.zeros(100, bool)))
    assert (none.low, none.high) == (0.0, pytest.approx(1 - found.low))


def test_a_single_example_says_nothing() -> None:
    assert interval("accuracy", answered(np.ones(1, bool)), tail=0.025, resamples=200, seed=0) is None
    assert stated(["accuracy"], answered(np.ones(1, bool)), confidence=0.9, resamples=200, seed=0) == {}


def test_clients_are_drawn_where_there_are_enough_of_them() -> None:
    right, few = np.ones(90, bool), np.repeat(np.arange(9), 10)
    assert answered(right, few).over == "examples"
    enough = answered(right, np.repeat(np.arange(MIN_CLIENTS), 9) * 7)
    assert (enough.over, enough.units) == ("clients", MIN_CLIENTS)
    assert stated(["accuracy"], enough, confidence=0.9, resamples=200, seed=0)["units"] == MIN_CLIENTS


def test_clients_that_are_wholly_right_or_wrong_count_as_units_and_not_their_examples() -> None:
    """20 clients of 50 examples, 16 of them right: as sure as 20 coins, and not as 1,000."""
    right = np.repeat(np.arange(20) < 16, 50)
    over_clients = at_95("accuracy", answered(right, np.repeat(np.arange(20), 50)))
    over_examples = at_95("accuracy", answered(right))
    assert over_clients.high - over_clients.low > 5 * (over_examples.high - over_examples.low)


def test_clients_that_are_all_alike_claim_no_more_than_their_examples() -> None:
    right = np.tile(np.arange(10) < 9, 20)
    alike = at_95("accuracy", answered(right, np.repeat(np.arange(20), 10)))
    assert alike == at_95("accuracy", answered(right))


def test_the_same_seed_gives_the_same_interval() -> None:
    own = guesses(100, 3)
    assert at_95("macro_f1", own, 4) == at_95("macro_f1", own, 4) != at_95("macro_f1", own, 5)


def test_a_class_is_in_every_resample_of_macro_f1() -> None:
    """One example of the rare class, rightly answered: drawn or not, it would move the mean by 0.5."""
    y = np.array([0] * 99 + [1])
    own = Answered.of(np.eye(2)[y], y, None)
    assert at_95("macro_f1", own) == bootstrap.Interval(1.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "p"), [(500, 0.9), (400, 0.75), (1000, 0.95)])
def test_an_interval_at_95_percent_holds_the_true_accuracy_about_so_often(n: int, p: float) -> None:
    rng = np.random.default_rng(0)
    hits = []
    for seed in range(2000):
        found = at_95("accuracy", answered(rng.random(n) < p), seed)
        hits.append(found.low <= p <= found.high)
    assert 0.93 <= np.mean(hits) <= 0.97


@pytest.mark.slow
def test_over_unlike_clients_an_interval_over_clients_holds_and_one_over_examples_does_not() -> None:
    rng = np.random.default_rng(0)
    owners, hits = np.repeat(np.arange(20), 20), {"clients": [], "examples": []}
    for seed in range(400):
        right = (
            rng.random((20, 20)) < rng.beta(8, 2, 20)[:, None]
        ).ravel()  # clients' accuracies: 0.8 +- 0.12
        for over, known in (("clients", owners), ("examples", None)):
            found = at_95("accuracy", answered(right, known), seed)
            hits[over].append(found.low <= 0.8 <= found.high)
    assert 0.92 <= np.mean(hits["clients"]) <= 0.98
    assert np.mean(hits["examples"]) < 0.85


@pytest.mark.slow
def test_the_interval_of_the_area_under_the_curve_holds_it() -> None:
    rng, truth, hits = np.random.default_rng(0), norm.cdf(1 / np.sqrt(2)), []
    y = np.repeat([0, 1], [80, 40])
    for seed in range(400):
        scores = norm.cdf(rng.normal(size=120) + y)
        found = at_95("auc", Answered.of(np.stack([1 - scores, scores], 1), y, None), seed)
        hits.append(found.low <= truth <= found.high)
    assert 0.92 <= np.mean(hits) <= 0.98
