"""The decision core, step by step, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedge.errors import UserError
from fedge_server.rollout.deciding import check_start, decide
from fedge_server.rollout.evidence import Criterion, Tally
from fedge_server.rollout.plan import Plan, Stage
from fedge_server.rollout.state import (
    Event,
    Note,
    Paused,
    RaiseFloor,
    Replaced,
    Republish,
    Resumed,
    RollbackOrdered,
    SetBase,
    Signed,
    Started,
    State,
    Status,
    Superseded,
    Tallied,
    Tallies,
    TimePassed,
)

PLAN = Plan(
    (Stage("canary", 5, hold_s=100, min_installs=2), Stage("all", 100, hold_s=50, min_installs=10)),
    (Criterion("install", 0.02, 0.10), Criterion("health", 0.02, 0.10)),
    false_halts=0.02,  # one in a hundred for each
)
NEW = State("micro-7", "micro", 7, 5, PLAN)


def tallied(installed: int, bad: int = 0, *, left: int = 0, kind: str = "install") -> Tallied:
    return Tallied(Tallies({kind: Tally(installed + bad, bad)}, installed, left))


def after(*events: tuple[Event, float], state: State = NEW) -> tuple[State, list[Any]]:
    """The state after events at times, and the actions of the last one."""
    actions: tuple[Any, ...] = ()
    for event, now in events:
        state, actions = decide(state, event, now)
    return state, list(actions)


RUNNING, _ = after((Started("ann", "round 40"), 10.0))
HALTED, _ = after((tallied(0, 3), 20.0), state=replace(RUNNING, plan=replace(PLAN, rollback=False)))
GOING_BACK, _ = after((tallied(0, 3), 20.0), state=RUNNING)


def test_a_good_release_goes_through_its_stages_by_installs_and_time() -> None:
    state, actions = after((Started("ann", "round 40"), 10.0))
    assert (state.status, state.stage, actions) == (
        Status.RUNNING,
        0,
        [Note("ann", "opened canary", "round 40")],
    )
    state, actions = after((tallied(1), 20.0), (TimePassed(), 1e6), state=state)
    assert (state.status, actions) == (Status.RUNNING, [])  # time alone opens nothing
    state, actions = after((tallied(2), 2e6), state=state)
    assert (state.status, state.due) == (Status.HOLDING, 2e6 + 100)
    assert [action.what for action in actions] == ["holding canary"]
    state, _ = after((TimePassed(), 2e6 + 99), state=state)
    assert state.status is Status.HOLDING
    state, actions = after((TimePassed(), 2e6 + 100), state=state)
    assert (state.status, state.stage) == (Status.RUNNING, 1)
    assert actions == [Note("rule", "opened all", "held for 0.0277778 h")]
    state, _ = after((tallied(10), 3e6), state=state)
    state, actions = after((TimePassed(), 3e6 + 50), state=state)
    assert (state.status, actions[-1]) == (Status.DONE, SetBase(7))


def test_stages_that_nothing_holds_up_are_gone_through_at_once() -> None:
    plan = replace(PLAN, stages=tuple(replace(stage, hold_s=0) for stage in PLAN.stages))
    state, actions = after((tallied(10), 20.0), state=replace(RUNNING, plan=plan))
    assert state.status is Status.DONE
    assert [a.what for a in actions if isinstance(a, Note)] == [
        "holding canary",
        "opened all",
        "holding all",
        "done",
    ]


def test_a_bad_release_halts_itself_and_asks_for_the_old_content_under_a_new_version() -> None:
    state, actions = after((tallied(2, 3), 20.0), state=RUNNING)
    why = "install: 3 of 5 devices are bad, tolerated is 2.0% (stage canary)"
    assert (state.status, state.going_back, state.reason) == (Status.AWAITING_SIGNATURE, True, why)
    assert actions == [
        Note("rule", "halted", why),
        Note("rule", "rollback ordered", why),
        SetBase(5),
        Republish(content_of=5, above=7),
    ]
    state, actions = after((tallied(3, 3), 21.0), state=RUNNING)
    assert state.status is Status.HOLDING  # 3 of 6 do not convict, see test_evidence


def test_each_criterion_convicts_for_itself_also_while_paused_or_holding() -> None:
    paused, _ = after((Paused("ann", "x"), 11.0), state=RUNNING)
    holding, _ = after((tallied(2), 11.0), state=RUNNING)
    for state in (paused, holding):
        halted, _ = after((tallied(0, 3, kind="health"), 20.0), state=state)
        assert halted.reason.startswith("health: 3 of 3")
        assert not halted.offers


def test_the_first_release_of_a_tier_halts_and_has_nothing_to_go_back_to() -> None:
    first = replace(RUNNING, base=0)
    state, actions = after((tallied(0, 3), 20.0), state=first)
    assert (state.status, len(actions)) == (Status.HALTED, 1)
    with pytest.raises(UserError, match="had no release before 7"):
        decide(state, RollbackOrdered("ann", "x"), 30.0)


def test_a_rollback_raises_base_and_floor_to_the_new_version_and_ends_when_nobody_has_the_bad_one() -> None:
    has_it, _ = after((tallied(2, 3), 20.0), state=RUNNING)
    with pytest.raises(UserError, match="a new version above 7, not 7"):
        decide(has_it, Replaced(7), 30.0)
    state, actions = after((Replaced(8, "signer"), 30.0), state=has_it)
    assert (state.status, state.replacement) == (Status.ROLLING_BACK, 8)
    assert actions[-2:] == [SetBase(8), RaiseFloor(8)]
    state, _ = after((tallied(2, 3, left=1), 40.0), state=state)
    assert state.status is Status.ROLLING_BACK
    state, _ = after((tallied(2, 3, left=2), 50.0), state=state)
    assert state.status is Status.ROLLED_BACK


def test_a_pause_holds_and_a_resumption_goes_on_where_it_was_and_holds_anew() -> None:
    holding, _ = after((tallied(2), 100.0), state=RUNNING)
    paused, actions = after((Paused("ann", "logs"), 150.0), state=holding)
    assert (paused.status, actions) == (Status.PAUSED, [Note("ann", "paused", "logs")])
    still, _ = after((TimePassed(), 1e6), state=paused)
    assert (still.status, still.stage) == (Status.PAUSED, 0)
    resumed, _ = after((Resumed("ann", "fine"), 1e6), state=still)
    assert (resumed.status, resumed.due) == (Status.HOLDING, 1e6 + 100)


@pytest.mark.parametrize("state", [HALTED, GOING_BACK])
def test_a_halted_rollout_goes_on_by_an_override_with_a_reason_alone_and_is_judged_anew(state: State) -> None:
    for event in (Resumed("ann", "broken lab"), Resumed("ann", " ", override=True)):
        with pytest.raises(UserError, match="give --override and a --reason"):
            decide(state, event, 30.0)
    resumed, actions = after((Resumed("ann", "the lab's network", override=True), 30.0), state=state)
    assert (resumed.status, resumed.going_back) == (Status.RUNNING, False)
    assert actions == [Note("ann", "resumed over a halt", "the lab's network")]
    same, _ = after((tallied(0, 3), 40.0), state=resumed)
    assert same.status is Status.RUNNING
    again, _ = after((tallied(0, 6), 50.0), state=same)
    assert again.status in (Status.HALTED, Status.AWAITING_SIGNATURE)


def test_what_is_done_can_still_be_rolled_back_and_is_offered_to_nobody_else_meanwhile() -> None:
    done = replace(RUNNING, status=Status.DONE, stage=1)
    state, actions = after((RollbackOrdered("ann", "complaints"), 1e6), state=done)
    assert (state.status, actions[1:]) == (
        Status.AWAITING_SIGNATURE,
        [SetBase(5), Republish(content_of=5, above=7)],
    )


def test_an_unsigned_release_waits() -> None:
    waiting = replace(NEW, status=Status.AWAITING_SIGNATURE)
    with pytest.raises(UserError, match="awaiting signature; it cannot be started now"):
        decide(waiting, Started("ann"), 1.0)
    with pytest.raises(UserError, match="cannot be resumed"):
        decide(waiting, Resumed("ann", "x", override=True), 1.0)
    state, _ = after((Signed("signer"), 1.0), (Started("ann"), 2.0), state=waiting)
    assert state.status is Status.RUNNING


def test_a_newer_release_takes_the_place_of_one_under_way() -> None:
    for status in (Status.PENDING, Status.RUNNING, Status.HOLDING, Status.PAUSED, Status.HALTED):
        state, actions = after((Superseded(8, "ann"), 30.0), state=replace(RUNNING, status=status))
        assert (state.status, actions) == (
            Status.SUPERSEDED,
            [Note("ann", "superseded", "by release 8")],
        )
    for status in (Status.DONE, Status.ROLLED_BACK, Status.SUPERSEDED):
        state, actions = after((Superseded(8, "ann"), 30.0), state=replace(RUNNING, status=status))
        assert (state.status, actions) == (status, [])


@pytest.mark.parametrize(
    ("version", "floor", "newest", "why"),
    [
        (4, 5, None, "below the floor 5"),
        (7, 0, RUNNING, "the tier is at 7 already"),
        (6, 0, replace(RUNNING, status=Status.DONE), "the tier is at 7 already"),
        (8, 0, replace(RUNNING, status=Status.ROLLED_BACK, replacement=8), "the tier is at 8 already"),
        (8, 0, GOING_BACK, "its rollback awaits a signature; finish that first"),
    ],
)
def test_an_older_release_or_one_before_a_rollback_is_signed_is_refused_with_why(
    version: int, floor: int, newest: State | None, why: str
) -> None:
    with pytest.raises(UserError, match=why):
        check_start(version, floor, newest)
    check_start(9, floor, None if newest is GOING_BACK else newest)


@pytest.mark.parametrize(
    "event", [Paused("a", "b"), RollbackOrdered("a", "b"), Resumed("a", "b", override=True)]
)
@pytest.mark.parametrize(
    "status", [Status.SUPERSEDED, Status.ROLLED_BACK, Status.ROLLING_BACK, Status.PENDING]
)
def test_what_a_state_does_not_allow_is_refused(event: Event, status: Status) -> None:
    with pytest.raises(UserError, match=f"rollout micro-7: is {str(status).replace('_', ' ')}"):
        decide(replace(NEW, status=status, stage=0), event, 30.0)


def test_a_clock_that_is_set_back_ends_no_hold_early_and_none_late_by_more() -> None:
    holding, _ = after((tallied(2), 1000.0), state=RUNNING)
    state, _ = after((TimePassed(), 5.0), state=holding)
    assert (state.status, state.at) == (Status.HOLDING, 1000.0)
    state, _ = after((TimePassed(), 1100.0), state=state)
    assert state.stage == 1


def test_a_state_survives_json() -> None:
    override, _ = after((Resumed("ann", "x", override=True), 30.0), state=GOING_BACK)
    paused, _ = after((Paused("ann", "x"), 40.0), state=override)
    for state in (NEW, RUNNING, HALTED, GOING_BACK, override, paused):
        assert State.from_json(state.to_json(), state.plan, state.tallies) == state


@pytest.mark.parametrize(("version", "base", "stage"), [(5, 5, 0), (5, 6, 0), (5, 4, 2)])
def test_a_state_that_makes_no_sense_is_refused(version: int, base: int, stage: int) -> None:
    with pytest.raises(ValueError, match="rollout micro-7"):
        State("micro-7", "micro", version, base, PLAN, stage=stage)
