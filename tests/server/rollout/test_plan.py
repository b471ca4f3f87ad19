"""Plans: what is refused, and that a file and the database say the same; which device stands where."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.errors import UserError
from fedge_server.rollout.assignment import Channel, offered, place, stage_of
from fedge_server.rollout.fleet import default_plan, devices_by_stage
from fedge_server.rollout.plan import Plan, Stage, default_criteria
from fedge_server.rollout.state import State, Status

CRITERIA = default_criteria(50.0)
PLAN = Plan((Stage("canary", 10), Stage("half", 50), Stage("all", 100)), CRITERIA)

FILE = """
false_halts = 0.02
rollback = false

[[stages]]
name = "lab"
devices = ["d1"]
tags = ["lab"]
hold_h = 0.5
min_installs = 2

[[stages]]
name = "all"
percent = 100

[criteria.install]
tolerated = 0.01
unacceptable = 0.06
at_least = 4

[criteria.latency]
tolerated = 0.05
unacceptable = 0.2
max_ms = 30
"""


def test_a_plans_file_is_what_the_database_keeps(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(FILE)
    plan = Plan.load(tmp_path / "plan.toml")
    assert plan.stages[0] == Stage("lab", 0, frozenset({"d1"}), frozenset({"lab"}), 1800.0, 2)
    assert [(c.kind, c.limit, c.at_least) for c in plan.criteria] == [
        ("install", None, 4),
        ("latency", 30, 1),
    ]
    assert (plan.false_halts, plan.false_halts_each, plan.rollback) == (0.02, 0.01, False)
    assert Plan.from_mapping(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("false_halts = 0.02", "false_halt = 0.02", "unknown key 'false_halt'"),
        ("false_halts = 0.02", "false_halts = 0.9", "at most 0.5"),
        ("percent = 100", "percent = 90", "the last one must be 100"),
        ("percent = 100", "percent = 101", "must be 0 to 100"),
        ('name = "all"', 'name = "lab"', "two stages have one name"),
        ('name = "all"', "name = 3", "must be text"),
        ("hold_h = 0.5", "hold_h = -1", "hold_h = -1"),
        ("hold_h = 0.5", "hold_h = nan", "must be a number"),
        ("min_installs = 2", "min_installs = 2.5", "whole number"),
        ("min_installs = 2", "min_installs = 0", "1 or more"),
        ('devices = ["d1"]', 'devices = "d1"', "list of texts"),
        ("max_ms = 30", "max_drop = 30", "max_drop is not its key"),
        ("rollback = false", "rollback = 0", "true or false"),
        ("tolerated = 0.01", "", "needs tolerated"),
        ("percent = 100", "percent = = 100", "plan.toml"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_with_the_key(
    tmp_path: Path, before: str, after: str, why: str
) -> None:
    assert before in FILE
    (tmp_path / "plan.toml").write_text(FILE.replace(before, after))
    with pytest.raises(UserError, match=why):
        Plan.load(tmp_path / "plan.toml")


_words = st.sampled_from(
    ["stages", "criteria", "name", "percent", "tags", "install", "latency", "tolerated", "max_ms"]
)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(_words | st.text(max_size=3), inner, max_size=4)
    ),
)


@pytest.mark.slow
@given(st.dictionaries(_words, _values, max_size=4))
def test_whatever_a_file_holds_is_a_plan_or_is_refused(value: dict[str, Any]) -> None:
    try:
        plan = Plan.from_mapping(value)
    except UserError:
        return
    assert Plan.from_mapping(plan.to_json()) == plan


@given(st.sampled_from(["percent", "hold_h", "min_installs", "name", "tags", "devices"]), _values)
def test_a_key_of_a_stage_is_taken_or_refused(key: str, value: Any) -> None:
    found = PLAN.to_json()
    found["stages"][0][key] = value
    try:
        plan = Plan.from_mapping(found)
    except UserError:
        return
    assert Plan.from_mapping(plan.to_json()) == plan


def test_the_plan_in_the_documents_is_one() -> None:
    text = (Path(__file__).parents[3] / "docs" / "rollout.md").read_text("utf-8")
    shown = text.split("```toml no-test\n")[1].split("```")[0]
    plan = Plan.from_mapping(tomllib.loads(shown))
    assert [stage.name for stage in plan.stages] == ["lab", "all"]
    assert [criterion.kind for criterion in plan.criteria] == ["install", "health", "confidence", "latency"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"stages": ()}, "0 stages"),
        ({"criteria": ()}, "nothing would stop"),
        ({"criteria": CRITERIA[:1] * 2}, "twice"),
    ],
)
def test_a_plan_has_stages_and_criteria(change: Mapping[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        replace(PLAN, **change)
    with pytest.raises(UserError, match="holds no device"):
        Stage("empty")
    with pytest.raises(UserError, match="no such file"):
        Plan.load(Path("nowhere.toml"))


def test_places_are_uniform_and_another_one_in_each_rollout() -> None:
    places = [place("micro-1", f"d{number}") for number in range(2000)]
    assert all(0 <= where < 1 for where in places)
    for share in (0.05, 0.25, 0.5):
        assert sum(where < share for where in places) / 2000 == pytest.approx(share, abs=0.035)
    both = sum(where < 0.5 and place("micro-2", f"d{n}") < 0.5 for n, where in enumerate(places))
    assert both / 2000 == pytest.approx(0.25, abs=0.04)


def test_a_place_is_what_it_was_in_every_version_of_fedge() -> None:
    assert place("micro-1", "d1") == 0.039180095256956426
    assert place("micro-2", "d1") == 0.1353741112980944


@given(st.text(min_size=1, max_size=20), st.floats(0, 100), st.floats(0, 100))
def test_percentages_are_nested(device: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    plan = replace(PLAN, stages=(Stage("a", small or 1e-9), Stage("b", large or 1e-9), Stage("c", 100)))
    stage = stage_of(plan, "r", device)
    assert stage is not None
    assert (place("r", device) < small / 100) <= (stage == 0)
    if small == large and small:
        assert stage != 1


def test_a_device_is_in_the_first_stage_that_names_tags_or_holds_it() -> None:
    plan = replace(
        PLAN,
        stages=(
            Stage("canary", 0, frozenset({"named"}), frozenset({"lab"})),
            Stage("all", 100),
        ),
    )
    assert [
        stage_of(plan, "r", d, tags) for d, tags in (("named", ()), ("x", ("lab", "y")), ("x", ("y",)))
    ] == [
        0,
        0,
        1,
    ]
    only = replace(plan, only_tags=frozenset({"indoor", "gen2"}))
    assert stage_of(only, "r", "named", ("indoor",)) is None
    assert stage_of(only, "r", "named", ("indoor", "gen2", "x")) == 0


def test_the_default_plan_leaves_out_stages_that_hold_no_further_device() -> None:
    many = [f"d{number}" for number in range(400)]
    plan = default_plan("micro-1", many)
    counts = devices_by_stage(plan, "micro-1", many)
    assert [stage.name for stage in plan.stages] == ["canary", "quarter", "all"]
    assert [stage.min_installs for stage in plan.stages] == [-(-count // 2) for count in counts]
    few = default_plan("micro-1", ["d1"], max_ms=20.0)
    assert [(stage.name, stage.min_installs) for stage in few.stages] == [("canary", 1), ("all", 1)]
    assert few.criteria[-1].limit == 20.0
    assert [stage.min_installs for stage in default_plan("micro-1", []).stages] == [1]


@pytest.mark.parametrize(
    ("status", "stage", "has", "expected"),
    [
        (Status.RUNNING, 0, 0, 7),
        (Status.HOLDING, 0, 5, 7),
        (Status.RUNNING, 0, 7, None),
        (Status.RUNNING, 1, 0, 5),  # its stage is not open
        (Status.RUNNING, None, 0, 5),
        (Status.PAUSED, 0, 0, 5),
        (Status.HALTED, 0, 0, 5),
        (Status.HALTED, 0, 5, None),
        (Status.HALTED, 0, 7, None),  # never down
        (Status.AWAITING_SIGNATURE, 0, 0, 5),
    ],
)
def test_a_device_is_offered_the_rollout_in_its_stage_and_else_the_base(
    status: Status, stage: int | None, has: int, expected: int | None
) -> None:
    state = State("micro-7", "micro", 7, 5, PLAN, status, stage=0)
    assert offered(Channel("micro", 5, 4, "micro-7"), state, stage, has) == expected


def test_nothing_is_offered_where_nothing_was_ever_rolled_out_or_below_the_floor() -> None:
    assert offered(Channel("micro"), None, None, 0) is None
    assert offered(Channel("micro", 0, 4), None, None, 0) is None
    state = State("micro-7", "micro", 7, 5, PLAN, Status.RUNNING, stage=0)
    assert offered(Channel("micro", 0, 7, "micro-7"), state, 0, 0) == 7
    assert offered(Channel("micro", 0, 8, "micro-7"), state, 0, 0) is None  # it was withdrawn since
    with pytest.raises(ValueError, match="base 3 is below floor 4"):
        Channel("micro", 3, 4)
