"""When a cycle begins, and why not; worked through by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fedge.errors import UserError
from fedge_server.continual.deciding import decide, step, waits_until
from fedge_server.continual.state import (
    Asked,
    Drift,
    Ended,
    Event,
    Examples,
    Paused,
    Policy,
    Released,
    Resumed,
    Signed,
    State,
    Status,
    Stopped,
    TimePassed,
)

DAY = 86_400.0
POLICY = Policy(min_gap_s=DAY, most_cycles=3, within_s=7 * DAY, max_gap_s=4 * DAY)


def through(policy: Policy, state: State, *events: tuple[float, Event]) -> State:
    for now, event in events:
        state, _ = decide(policy, state, event, now)
    return state


def cycle(number: int, now: float, version: int) -> tuple[tuple[float, Event], ...]:
    """A whole one, in no time."""
    return (
        (now, Ended(number, Status.RUNNING)),
        (now, Ended(number, Status.COMPRESSING)),
        (now, Released(number, version, signed=True)),
        (now, Ended(number, Status.ROLLING_OUT)),
    )


def test_nothing_happens_without_a_reason() -> None:
    state = through(POLICY, State(), (DAY, TimePassed()), (900 * DAY, TimePassed()))
    assert step(state).status is Status.WATCHING
    assert state.cycle == 0


def test_drift_begins_a_cycle_which_goes_from_run_to_rollout() -> None:
    state, notes = decide(POLICY, State(), Drift(True, 1), DAY)
    assert [(note.who, note.what) for note in notes] == [("learn", "cycle 1 begun")]
    assert (step(state).status, state.cause) == (Status.RUNNING, "drift")
    statuses = []
    for now, event in cycle(1, DAY, 2):
        state, _ = decide(POLICY, state, event, now)
        statuses.append(state.status.value)
    assert statuses == ["compressing", "releasing", "rolling out", "watching"]


def test_drift_that_was_answered_begins_no_other_cycle_but_that_of_the_new_release_does() -> None:
    state = through(POLICY, State(), (DAY, Drift(True, 1)), *cycle(1, DAY, 2), (9 * DAY, Drift(True, 1)))
    assert state.status is Status.WATCHING
    assert through(POLICY, state, (9 * DAY, Drift(True, 2))).cycle == 2


def test_an_alarm_must_stand_for_a_while() -> None:
    policy = replace(POLICY, steady_s=100.0)
    flickering = through(
        policy, State(), (0, Drift(True, 1)), (90, Drift(False, 1)), (95, Drift(True, 1)), (190, TimePassed())
    )
    assert flickering.status is Status.WATCHING
    assert through(policy, flickering, (195, TimePassed())).status is Status.RUNNING


def test_a_release_waits_for_its_signature() -> None:
    begun = through(POLICY, State(), (0, Drift(True, 1)), *cycle(1, 0, 2)[:2])
    waits = through(POLICY, begun, (0, Released(1, 0, signed=False)), (9, Signed(7, 2)), (DAY, TimePassed()))
    assert step(waits).status is Status.AWAITING_SIGNATURE
    assert step(through(POLICY, waits, (2 * DAY, Signed(1, 2)))).status is Status.ROLLING_OUT


def test_any_step_may_fail_and_only_some_end_by_themselves() -> None:
    begun = through(POLICY, State(), (0, Drift(True, 1)), *cycle(1, 0, 2)[:2])
    assert through(POLICY, begun, (1, Ended(1, Status.RELEASING))).status is Status.RELEASING
    for events in ((), ((1, Released(1, 0, signed=False)),)):
        state = through(POLICY, begun, *events)
        after, notes = decide(POLICY, state, Ended(1, state.status, "the signer has refused"), 2)
        assert (after.status, after.failures, notes[0].what) == (Status.WATCHING, 1, "cycle 1 failed")


def test_the_gap_after_a_cycle_doubles_with_each_failure_up_to_its_most() -> None:
    policy, state, now, gaps = replace(POLICY, most_cycles=100), State(), 0.0, []
    state = through(policy, state, (now, Drift(True, 1)))
    for number in range(1, 5):
        state = through(policy, state, (now, Ended(number, Status.RUNNING, "no device came")))
        gaps.append((waits_until(policy, state) - now) / DAY)
        now = waits_until(policy, state)
        assert through(policy, state, (now - 1, TimePassed())).status is Status.WATCHING
        state = through(policy, state, (now, TimePassed()))
        assert state.cycle == number + 1
    assert gaps == [2, 4, 4, 4]


def test_no_more_cycles_than_the_budget_has() -> None:
    policy, state = replace(POLICY, min_gap_s=0.0, every_s=DAY), State()
    begun = []
    for hour in range(24 * 14):
        now = hour * 3600.0
        before = state.cycle
        state = through(policy, state, (now, TimePassed()))
        if state.cycle > before:
            begun.append(now / DAY)
            state = through(policy, state, *cycle(state.cycle, now, state.cycle))
    assert begun == [0, 1, 2, 7, 8, 9]


def test_a_person_waits_for_neither_gap_nor_budget_and_is_named() -> None:
    state = through(POLICY, State(), (0, Drift(True, 1)), *cycle(1, 0, 2))
    state, notes = decide(POLICY, state, Asked("ann", "new sensors"), 10)
    assert (state.cycle, state.cause) == (2, "hand")
    assert (notes[0].who, notes[0].why) == ("ann", "hand: asked by ann: new sensors")
    with pytest.raises(UserError, match="running already"):
        decide(POLICY, state, Asked("bob"), 11)


def test_new_data_counts_from_the_last_cycle() -> None:
    policy = replace(POLICY, new_examples=100)
    state = through(policy, State(), (0, Examples(99)))
    assert state.cycle == 0
    state = through(policy, state, (1, Examples(100)), *cycle(1, 1, 2), (2 * DAY, Examples(150)))
    assert state.cycle == 1
    state = through(policy, state, (2 * DAY, Examples(20)), (2 * DAY, Examples(119)))
    assert state.cycle == 1  # many have forgotten
    assert through(policy, state, (3 * DAY, Examples(120))).cycle == 2


def test_paused_nothing_begins_and_what_is_under_way_goes_on() -> None:
    state = through(POLICY, State(), (0, Paused("ann")), (0, Drift(True, 1)))
    assert state.status is Status.WATCHING
    with pytest.raises(UserError, match="resume it first"):
        decide(POLICY, state, Asked("ann"), 0)
    state = through(POLICY, state, (5, Resumed("ann")))
    assert state.status is Status.RUNNING
    state = through(POLICY, state, (6, Paused("ann")), (7, Ended(1, Status.RUNNING)))
    assert state.status is Status.COMPRESSING


def test_a_stopped_cycle_takes_no_more_news() -> None:
    state = through(POLICY, State(), (0, Drift(True, 1)), (5, Stopped("ann", "wrong data")))
    assert state.status is Status.WATCHING
    assert (
        through(POLICY, state, (6, Ended(1, Status.RUNNING)), (6, Released(1, 2, True))).status
        is Status.WATCHING
    )
    with pytest.raises(UserError, match="no cycle"):
        decide(POLICY, state, Stopped("ann"), 7)


def test_news_that_come_twice_count_once() -> None:
    state = through(
        POLICY, State(), (0, Drift(True, 1)), (1, Ended(1, Status.RUNNING)), (2, Ended(1, Status.RUNNING))
    )
    assert state.status is Status.COMPRESSING


def test_a_clock_that_is_set_back_stands_still() -> None:
    state = through(POLICY, State(), (DAY, Drift(True, 1)), (10, Ended(1, Status.RUNNING)))
    assert (state.at, state.since) == (DAY, DAY)


def test_a_state_survives_json() -> None:
    state = through(POLICY, State(), (0, Drift(True, 1)), (1, Ended(1, Status.RUNNING)))
    for each in (State(), state, replace(state, asked=("ann", ""))):
        assert State.from_json(json.loads(json.dumps(each.to_json()))) == each


@pytest.mark.parametrize(
    "values",
    [
        {"every_s": 0.0},
        {"min_gap_s": -1.0},
        {"most_cycles": 0},
        {"new_examples": 0},
        {"within_s": float("inf")},
    ],
)
def test_a_policy_that_is_none_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="learn"):
        Policy(**values)  # type: ignore[arg-type]
