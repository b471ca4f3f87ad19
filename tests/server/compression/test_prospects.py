from __future__ import annotations

import numpy as np
import pytest

from fedge.config import Config, Tier
from fedge.counts import Counts
from fedge_server.compression.candidates import Candidate, front
from fedge_server.compression.measure import Cost
from fedge_server.compression.prospects import (
    MOST_ARCHITECTURES,
    Known,
    Prospect,
    drop_of,
    in_order,
    next_of,
    room,
    useful,
    will_pass,
)
from fedge_server.compression.recipes import Architecture, Recipe
from fedge_server.compression.recovery import Cut

CONFIG, GATE = Config(), 10_000
SMALL, LARGE = Architecture(student="small"), Architecture(student="large")


def counted(losses, wins=0, n=1000, both=900):
    """A teacher that has 90 % right, and a variant that differs from it so often."""
    each = [np.array([value], np.int64) for value in (n, both - losses, losses, wins)]
    return Counts(*each)


def candidate(architecture, form, wire, us, counts=None):
    cost = Cost(b"", bytes(wire), {1: us, 2: us / 2}, 1000)
    return Candidate(Recipe(architecture, form), cost, 10, counts, 0.0)


def prospect(architecture, form, parameters=10_000, us=20.0):
    return Prospect(Recipe(architecture, form), parameters, {1: us})


def known(*candidates, short=None):
    return Known({each.recipe: each for each in candidates}, short or {})


def test_a_candidate_is_on_the_front_unless_another_is_as_good_in_everything_and_better_in_something():
    tier = Tier()
    best = candidate(SMALL, "fp32", 100, 10, counted(10))
    smaller = candidate(SMALL, "w4", 50, 10, counted(20))
    beaten = candidate(LARGE, "fp32", 100, 11, counted(10))
    equal = candidate(LARGE, "int8", 50, 10, counted(20))
    assert front([best, smaller, beaten, equal], tier) == {
        "student-small",
        "student-small+w4",
        "student-large+int8",
    }


def test_without_selection_data_bytes_and_latency_make_the_front():
    one, other = candidate(SMALL, "fp32", 100, 10), candidate(LARGE, "fp32", 200, 20)
    assert front([one, other], Tier()) == {"student-small"}


def test_a_recipe_is_ruled_out_only_well_beyond_a_budget():
    ternary = prospect(SMALL, "ternary")  # 1,200 + 10,000 * 1.7 / 8 bytes = 3,325
    assert ternary.may_fit(Tier(max_wire_bytes=2600))
    assert not ternary.may_fit(Tier(max_wire_bytes=2500))
    assert not prospect(SMALL, "fp32").may_fit(Tier(max_memory_bytes=39_000))
    assert prospect(SMALL, "int8").may_fit(Tier(max_memory_bytes=39_000))
    slow = prospect(SMALL, "fp32", us=140.0)
    assert not slow.may_fit(Tier(max_latency_ms=0.1))
    assert prospect(SMALL, "int8", us=140.0).may_fit(Tier(max_latency_ms=0.1))
    assert not prospect(SMALL, "fp32", us=20.0).may_fit(Tier(max_latency_ms=0.1, slowdown=10.0))


def test_few_bits_are_tried_where_bytes_are_the_aim_or_nothing_finer_fits():
    every = [prospect(SMALL, form) for form in ("fp32", "int8", "w8", "w4", "ternary")]

    def forms(tier):
        return [each.recipe.form for each in useful(every, tier)]

    assert forms(Tier()) == ["fp32", "int8"]
    assert forms(Tier(aim="bytes")) == ["fp32", "int8", "w8", "w4", "ternary"]
    assert forms(Tier(max_wire_bytes=5000)) == ["w4"]
    assert forms(Tier(max_wire_bytes=2600)) == ["ternary"]


def test_no_tier_looks_at_more_than_some_architectures():
    sizes = [Architecture(student=f"s{i}") for i in range(20)]
    every = [prospect(each, "fp32", 1000 * (i + 1)) for i, each in enumerate(sizes)]
    largest = [each.parameters for each in useful(every, Tier())]
    assert largest == [1000 * i for i in range(21 - MOST_ARCHITECTURES, 21)]
    spread = [each.parameters for each in useful(every, Tier(aim="bytes"))]
    assert (len(spread), spread[0], spread[-1]) == (MOST_ARCHITECTURES, 1000, 20_000)


def test_what_a_recipe_loses_is_told_from_its_architecture_and_its_form():
    seen = known(
        candidate(SMALL, "fp32", 400, 10, counted(10)),
        candidate(SMALL, "ternary", 40, 10, counted(40)),
        short={LARGE: counted(20)},
    )
    assert drop_of(counted(10, wins=4)) == pytest.approx(0.006)
    assert seen.drop(Recipe(SMALL, "ternary")) == pytest.approx(0.04)
    assert seen.drop(Recipe(SMALL, "w4")) == pytest.approx(0.01 + 0.002)
    # of a short training's 12 % of errors the whole one leaves 85 %, and ternary cost 3 points before
    assert seen.drop(Recipe(LARGE, "ternary")) == pytest.approx(0.12 * 0.85 - 0.1 + 0.03)
    assert seen.drop(Recipe(Architecture(), "w4")) == pytest.approx(0.002)


def test_what_errors_a_whole_training_leaves_is_learned():
    seen = known(
        candidate(SMALL, "fp32", 400, 10, counted(10)), short={SMALL: counted(40), LARGE: counted(20)}
    )
    assert seen.drop(Recipe(LARGE, "fp32")) == pytest.approx(0.12 * 0.11 / 0.14 - 0.1)


def test_a_student_that_went_on_from_the_last_search_keeps_the_errors_it_has():
    built = {each.recipe: each for each in [candidate(SMALL, "fp32", 400, 10, counted(10))]}
    seen = Known(built, {SMALL: counted(20), LARGE: counted(20)}, {SMALL})
    assert seen.drop(Recipe(LARGE, "fp32")) == pytest.approx(0.12 * 0.85 - 0.1)
    seen = Known({}, {LARGE: counted(20)}, {LARGE})
    assert seen.drop(Recipe(LARGE, "fp32")) == pytest.approx(0.02)


def test_that_one_student_beats_its_teacher_says_little_of_a_smaller_one():
    better = counted(0, wins=15)
    seen = known(candidate(LARGE, "fp32", 400, 10, better), short={LARGE: counted(10), SMALL: counted(50)})
    assert drop_of(better) == pytest.approx(-0.015)
    assert seen.drop(Recipe(SMALL, "fp32")) == pytest.approx(0.15 * 0.085 / 0.11 - 0.1)  # 1.6 points


def test_where_accuracy_is_the_aim_the_least_drop_comes_first():
    waiting = [prospect(SMALL, "ternary"), prospect(SMALL, "w8"), prospect(LARGE, "w8", 20_000)]
    seen = known(short={SMALL: counted(20), LARGE: counted(10)})
    assert next_of(waiting, seen, Tier(), GATE, CONFIG) is waiting[2]
    assert next_of([], seen, Tier(), GATE, CONFIG) is None


def test_where_bytes_are_the_aim_the_smallest_that_should_pass_comes_first():
    tier = Tier(aim="bytes", max_drop=0.02)
    waiting = [prospect(SMALL, "binary"), prospect(SMALL, "w4"), prospect(LARGE, "w4", 20_000)]
    seen = known(short={SMALL: counted(20), LARGE: counted(20)})
    assert next_of(waiting, seen, tier, GATE, CONFIG) is waiting[1]


def test_nothing_is_built_that_cannot_be_smaller_than_what_should_pass():
    tier = Tier(aim="bytes", max_drop=0.02)
    passing = candidate(SMALL, "w4", 3000, 10, counted(5))
    assert next_of([prospect(LARGE, "w4", 20_000)], known(passing), tier, GATE, CONFIG) is None


def test_where_nothing_should_pass_the_nearest_comes_first():
    tier = Tier(aim="bytes", max_drop=0.02)
    waiting = [prospect(SMALL, "binary"), prospect(LARGE, "w8", 20_000)]
    seen = known(short={SMALL: counted(90), LARGE: counted(80)})
    assert next_of(waiting, seen, tier, GATE, CONFIG) is waiting[1]


def test_candidates_face_the_gate_by_the_aim_of_their_tier():
    good = candidate(LARGE, "fp32", 400, 5, counted(2))
    small = candidate(SMALL, "w4", 100, 10, counted(8))
    bad = candidate(SMALL, "binary", 50, 10, counted(90))

    def order(**tier):
        return [each.name for each in in_order([bad, small, good], Tier(max_drop=0.02, **tier), GATE, CONFIG)]

    assert order() == ["student-large", "student-small+w4", "student-small+binary"]
    assert order(aim="bytes") == ["student-small+w4", "student-large", "student-small+binary"]
    assert order(aim="latency") == ["student-large", "student-small+w4", "student-small+binary"]


def test_the_gate_is_expected_to_add_what_so_many_examples_leave_open():
    # 1.96 deviations of a mean over 10,000 of values that differ from 0 in 10.1 % of the cases
    assert room(counted(100), 10_000, CONFIG) == pytest.approx(1.96 * np.sqrt(0.101 / 10_000), rel=1e-3)
    assert will_pass(candidate(SMALL, "w4", 1, 1, counted(10)), Tier(max_drop=0.013), GATE, CONFIG)
    assert not will_pass(candidate(SMALL, "w4", 1, 1, counted(10)), Tier(max_drop=0.011), GATE, CONFIG)
    assert will_pass(candidate(SMALL, "w4", 1, 1), Tier(), GATE, CONFIG)


def test_each_refusal_of_the_gate_asks_for_one_more_standard_error_of_the_selection():
    # of 1,000 examples 10.1 % tell the two apart; the gate's own level rises to 98.75 %, then 99.375 %
    gate, selection = np.sqrt(0.101 / 10_000), np.sqrt(0.101 / 1000)
    for attempt, quantile in ((2, 2.2414), (3, 2.4977)):
        wanted = quantile * gate + (attempt - 1) * selection
        assert room(counted(100), 10_000, CONFIG, attempt) == pytest.approx(wanted, rel=1e-3)


def test_after_a_refusal_something_surer_is_built_though_it_is_larger():
    tier = Tier(aim="bytes", max_drop=0.02)
    small, whole = (
        candidate(SMALL, "w4", 3000, 10, counted(8)),
        candidate(LARGE, "fp32", 80_000, 10, counted(0)),
    )
    waiting = [prospect(LARGE, "w4", 20_000)]
    assert next_of(waiting, known(small, whole), tier, 10_000, CONFIG) is None
    assert next_of(waiting, known(small, whole), tier, 10_000, CONFIG, [small.recipe]) is waiting[0]


def test_a_tiers_latency_is_that_of_its_threads_on_its_processor():
    fast = candidate(SMALL, "fp32", 1, 30.0)
    assert fast.latency_us(Tier(threads=2, slowdown=4.0)) == 60.0
    assert not fast.figures(Tier(max_latency_ms=0.1, slowdown=4.0))[0].met


def test_recipes_say_what_they_are():
    assert Recipe(Architecture(Cut("unstructured", 0.9)), "int8").name == "sparse90+int8"
    assert Recipe(Architecture(Cut("structured", 0.5)), "int8").name == "prune50+int8"
    assert Recipe(Architecture(), "ternary").name == "ternary"
    assert Recipe(SMALL, "fp32").name == "student-small"
