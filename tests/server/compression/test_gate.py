from __future__ import annotations

import json

import numpy as np
import pytest

from fedge.config import Gate, Tier
from fedge.counts import Counts
from fedge_server.compression.gate import (
    Evidence,
    bound,
    decide,
    evidence_of,
    judge,
    level,
    smallest_provable,
)

LABELS = ("a", "b")
SETTINGS = Gate()
ALLOWED = Tier(max_drop=0.05)


def answers(y, wrong=()):
    """Certain probabilities (N, 2) that are right everywhere but at these positions."""
    y = np.asarray(y)
    chosen = y.copy()
    chosen[list(wrong)] = 1 - chosen[list(wrong)]
    return np.eye(2, dtype=np.float32)[chosen]


def half_and_half(n):
    return np.arange(n, dtype=np.int64) % 2


def held(n, *, variant=(), teacher=(), tier=ALLOWED, attempt=1, y=None):
    y = half_and_half(n) if y is None else y
    return judge(
        answers(y, variant), answers(y, teacher),
        y, labels=LABELS, tier=tier, settings=SETTINGS, attempt=attempt,
    )  # fmt: skip


def test_drop_and_accuracies_are_counted_on_pairs():
    # The variant errs on 0, 2, 4, the teacher on 4 and 5: two losses (0, 2), one win (5), one tie.
    report = held(100, variant=[0, 2, 4], teacher=[4, 5])
    assert report.n == 100
    assert report.accuracy == pytest.approx(0.97)
    assert report.teacher_accuracy == pytest.approx(0.98)
    assert report.drop == pytest.approx(0.01)


def test_recall_of_each_class_is_compared_on_its_own_examples():
    # Class a (even positions) loses 3 of its 50; class b wins 1 of its 50.
    report = held(100, variant=[0, 2, 4], teacher=[5])
    a, b = report.classes
    assert (a.label, a.n, a.teacher_recall) == ("a", 50, 1.0)
    assert (a.recall, a.drop) == (pytest.approx(0.94), pytest.approx(0.06))
    assert (b.teacher_recall, b.recall, b.drop) == (pytest.approx(0.98), 1.0, pytest.approx(-0.02))
    assert (report.worst_class, report.worst_class_drop) == ("a", pytest.approx(0.06))
    assert report.worst_class_drop_upper == max(a.drop_upper, b.drop_upper)


def test_the_bound_without_a_loss_is_three_over_n():
    # One pseudo-loss among n + 1, n draws: about Poisson(1), whose 95 % quantile is 3 (.981 >= .95 > .920).
    for n in (100, 300, 1000):
        found = bound(0, 0, n, 0.95, 20_000, np.random.default_rng(0))
        assert (found.drop, found.drop_upper) == (0.0, pytest.approx(3 / n))


def test_the_bound_with_ten_losses_is_the_quantile_of_eleven():
    # Poisson(11): P(X <= 16) = .944, P(X <= 17) = .968. Binomial(1000, 11 / 1001) has the same quantile.
    found = bound(10, 0, 1000, 0.95, 100_000, np.random.default_rng(0))
    assert found.drop == pytest.approx(0.010)
    assert found.drop_upper == pytest.approx(0.017)


def test_wins_lower_the_drop_and_widen_the_bound_as_the_normal_law_says():
    # Values of mean .02 and variance .05 - .02^2 on 10,000: .02 + 1.645 * sqrt(.0496 / 10,000) = .02366.
    found = bound(350, 150, 10_000, 0.95, 100_000, np.random.default_rng(0))
    assert found.drop == pytest.approx(0.02)
    assert found.drop_upper == pytest.approx(0.02366 + 1e-4, abs=3e-4)


@pytest.mark.quick_where(n=(180,))
@pytest.mark.parametrize(
    ("n", "losses", "wins"), [(180, 0.03, 0.01), (1000, 0.01, 0.0), (1000, 0.05, 0.05), (5000, 0.012, 0.01)]
)
def test_the_bound_lies_below_the_true_drop_in_at_most_five_percent(n, losses, wins):
    rng = np.random.default_rng(7)
    counts, times = np.unique(rng.multinomial(n, [losses, wins, 1 - losses - wins], size=2000)[:, :2],
                              axis=0, return_counts=True)  # fmt: skip
    uppers = [bound(int(lost), int(won), n, 0.95, 2000, rng).drop_upper for lost, won in counts]
    too_low = np.array(uppers) < losses - wins - 1e-12
    assert times[too_low].sum() / times.sum() <= 0.055


def test_the_levels_of_all_attempts_add_up_to_the_whole():
    assert level(0.95, 1) == pytest.approx(0.975)
    assert level(0.95, 2) == pytest.approx(0.9875)
    assert sum(1 - level(0.95, k) for k in range(1, 40)) == pytest.approx(0.05)


def test_later_attempts_need_stronger_evidence():
    bounds = [held(400, variant=range(0, 8, 2), attempt=k).drop_upper for k in (1, 2, 3)]
    assert bounds == sorted(bounds)
    assert bounds[0] < bounds[2]


def test_few_resamples_do_not_weaken_a_high_confidence():
    few = bound(0, 0, 1000, 0.9999, 200, np.random.default_rng(0)).drop_upper
    assert few >= 0.006  # Poisson(1): P(X <= 5) = .9994, P(X <= 6) = .99992


def test_a_good_variant_passes_without_reasons():
    report = held(1000, variant=[0, 1], teacher=[5])
    assert report.passed
    assert report.reasons == ()
    assert report.drop_upper <= 0.05


def test_the_same_evidence_gives_the_same_report():
    assert held(500, variant=[0, 1, 2]) == held(500, variant=[0, 1, 2])


def test_a_drop_that_might_exceed_the_limit_fails_with_its_figures():
    report = held(200, variant=range(8))
    assert not report.passed
    (reason,) = report.reasons
    assert "max_drop allows 5.00" in reason
    assert "4.00 observed on 200 examples, bound at 97.50 %" in reason


def test_a_class_that_suffers_fails_a_variant_that_is_good_overall():
    y = np.r_[np.zeros(900, np.int64), np.ones(100, np.int64)]
    lost = range(900, 910)
    assert held(1000, variant=lost, y=y).passed
    report = held(1000, variant=lost, y=y, tier=Tier(max_drop=0.05, max_class_drop=0.05))
    assert not report.passed
    assert report.reasons[0].startswith("recall of class 'b' may drop by up to")


def test_too_few_examples_prove_nothing():
    report = held(50)
    assert not report.passed
    assert report.drop == 0
    assert report.drop_upper > 0.05
    assert report.drop_upper == smallest_provable(50, SETTINGS)


def test_an_empty_gate_set_fails():
    report = held(0)
    assert not report.passed
    assert "the gate set is empty" in report.reasons[0]
    assert (report.n, report.drop_upper) == (0, 1.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("who", ["variant", "teacher"])
def test_a_single_probability_that_is_no_number_fails(who, value):
    y = half_and_half(1000)
    scores = {"variant": answers(y), "teacher": answers(y)}
    scores[who][3, 0] = value
    report = judge(
        scores["variant"], scores["teacher"],
        y, labels=LABELS, tier=Tier(max_drop=0.5), settings=SETTINGS,
    )  # fmt: skip
    assert not report.passed
    assert f"the {who} gives NaN or infinite probabilities for 1 of 1000" in report.reasons[0]


def test_answers_of_another_shape_fail():
    y = half_and_half(1000)
    report = judge(
        answers(y)[:999], answers(y), y, labels=LABELS, tier=Tier(max_drop=0.99), settings=SETTINGS
    )
    assert not report.passed
    assert report.drop_upper == 1.0


def test_a_class_without_examples_fails_only_where_classes_are_required():
    y = np.zeros(1000, np.int64)
    assert held(1000, y=y).passed
    report = held(1000, y=y, tier=Tier(max_drop=0.05, max_class_drop=0.5))
    assert not report.passed
    assert "class 'b' cannot be judged" in report.reasons[0]
    assert report.classes[1].drop_upper == 1.0


def test_a_report_is_plain_json():
    report = held(200, variant=range(8))
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert value["passed"] is False
    assert value["classes"][0]["label"] == "a"
    assert value["reasons"] == list(report.reasons)


def test_counts_of_many_clients_decide_as_the_same_examples_in_one_place_do():
    y = half_and_half(300)
    variant, teacher = answers(y, [0, 2, 4]), answers(y, [4, 5])
    parts = [evidence_of(variant[i::3], teacher[i::3], y[i::3], 2).counts for i in range(3)]
    merged = Evidence(Counts.sum(parts, 2), clients=3)
    found = decide(merged, labels=LABELS, tier=ALLOWED, settings=SETTINGS)
    alone = judge(variant, teacher, y, labels=LABELS, tier=ALLOWED, settings=SETTINGS)
    assert found.clients == 3
    assert {**found.to_json(), "clients": None} == alone.to_json()


def test_counts_that_come_with_a_fault_or_are_none_fail():
    y = half_and_half(1000)
    good = evidence_of(answers(y), answers(y), y, 2).counts
    report = decide(
        Evidence(good, ("a client lies",)), labels=LABELS, tier=Tier(max_drop=0.5), settings=SETTINGS
    )
    assert report.reasons == ("a client lies",)
    nothing = decide(
        Evidence(Counts.sum([], 2), clients=0), labels=LABELS, tier=Tier(max_drop=0.9), settings=SETTINGS
    )
    assert "the gate set is empty" in nothing.reasons[0]
