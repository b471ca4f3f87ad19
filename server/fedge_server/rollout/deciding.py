"""What a rollout does next: `decide(state, event, now)` gives its new state and what is to be done.

Nothing here reads a clock, a database or a network. A clock that is set back stands still here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from fedge.errors import UserError
from fedge_server.rollout.evidence import Criterion, halts
from fedge_server.rollout.state import (
    OFFERING,
    OVER,
    RULE,
    WATCHED,
    Action,
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
    TimePassed,
)

Decision = tuple[State, tuple[Action, ...]]


def decide(state: State, event: Event, now: float) -> Decision:
    """The state after an event at `now` (Unix seconds), and what is to be done, in order.

    Raises:
        UserError: somebody asks for what this state does not allow; it says why.
    """
    return _RULES[type(event)](replace(state, at=max(now, state.at)), event)


def check_start(version: int, floor: int, newest: State | None) -> None:
    """Whether a rollout of a version may begin, given the tier's newest one.

    A newer release takes the place of an older one that is under way: a mended release must not wait until a
    bad one has failed everywhere. It waits only while the way back from a bad one is ordered and not yet
    signed: that comes first.

    Raises:
        UserError: it may not.
    """
    if version < floor:
        raise UserError(f"release {version}: is below the floor {floor} of its tier; publish it anew")
    if newest is None:
        return
    highest = max(newest.version, newest.replacement or 0)
    if version <= highest:
        raise UserError(
            f"release {version}: the tier is at {highest} already (rollout {newest.id}), and versions only "
            "rise; publish it as a new one"
        )
    if newest.status is Status.AWAITING_SIGNATURE and newest.going_back:
        raise UserError(
            f"rollout {newest.id}: its rollback awaits a signature; finish that first, or let it go on with: "
            f"fedge-server rollout resume {newest.id} --override --reason TEXT"
        )


def _signed(state: State, event: Signed) -> Decision:
    if state.status is not Status.AWAITING_SIGNATURE or state.going_back:
        raise _not_now(state, "signed")
    return _to(state, Status.PENDING, event.who, "signed", "")


def _started(state: State, event: Started) -> Decision:
    if state.status is not Status.PENDING:
        raise _not_now(state, "started")
    return _open(state, event.who, event.why)


def _tallied(state: State, event: Tallied) -> Decision:
    return _go_on(state.told(event.tallies))


def _time_passed(state: State, _: TimePassed) -> Decision:
    return _go_on(state)


def _paused(state: State, event: Paused) -> Decision:
    if state.status not in OFFERING:
        raise _not_now(state, "paused")
    paused = replace(state, before_pause=state.status)
    return _to(paused, Status.PAUSED, event.who, "paused", event.why)


def _resumed(state: State, event: Resumed) -> Decision:
    if state.status is Status.PAUSED and state.before_pause is not None:
        # It holds anew: while it was paused nobody has watched.
        resumed = replace(state, before_pause=None, since=state.at)
        return _to(resumed, state.before_pause, event.who, "resumed", event.why)
    halted = state.status is Status.HALTED or (state.status is Status.AWAITING_SIGNATURE and state.going_back)
    if not halted or state.stage < 0:
        raise _not_now(state, "resumed")
    if not event.override or not event.why.strip():
        raise UserError(
            f"rollout {state.id}: was halted ({state.reason}); give --override and a --reason to let it go on"
        )
    resumed = replace(
        state, going_back=False, before_pause=None, forgiven=dict(state.tallies.by_kind), since=state.at
    )
    return _to(resumed, Status.RUNNING, event.who, "resumed over a halt", event.why)


def _rollback_ordered(state: State, event: RollbackOrdered) -> Decision:
    allowed = state.status in WATCHED | {Status.HALTED, Status.DONE}
    if not allowed or state.going_back:
        raise _not_now(state, "rolled back")
    if not state.base:
        raise UserError(
            f"rollout {state.id}: the tier had no release before {state.version}; pause it, and publish a "
            "better one"
        )
    return _go_back(state, event.who, event.why)


def _replaced(state: State, event: Replaced) -> Decision:
    if state.status is not Status.AWAITING_SIGNATURE or not state.going_back:
        raise _not_now(state, "replaced")
    if event.version <= state.version:
        raise UserError(
            f"rollout {state.id}: a rollback is a new version above {state.version}, not {event.version}"
        )
    replaced = replace(state, replacement=event.version)
    why = f"release {event.version} holds the content of {state.base}"
    after, noted = _to(replaced, Status.ROLLING_BACK, event.who, "rolling back", why)
    settled, more = _go_on(after)
    return settled, (*noted, SetBase(event.version), RaiseFloor(event.version), *more)


def _superseded(state: State, event: Superseded) -> Decision:
    if state.status in OVER:
        return state, ()
    check_start(event.version, 0, state)
    return _to(state, Status.SUPERSEDED, event.who, "superseded", f"by release {event.version}")


def _go_on(state: State) -> Decision:
    """What follows from the tallies and the time alone."""
    if state.status in WATCHED and (guilty := _convicted(state)) is not None:
        return _halt(state, guilty)
    if state.status is Status.ROLLING_BACK and state.tallies.left >= state.tallies.installed:
        return _to(state, Status.ROLLED_BACK, RULE, "rolled back", "no device is known to have it any more")
    stage = state.current
    if state.status is Status.RUNNING and stage is not None:
        if state.tallies.installed < stage.min_installs:
            return state, ()
        why = f"{state.tallies.installed} devices have it; holds for {stage.hold_s / 3600:g} h"
        held, actions = _to(
            replace(state, since=state.at), Status.HOLDING, RULE, f"holding {stage.name}", why
        )
        return _then(held, actions)
    if state.due is not None and state.at >= state.due:
        if state.stage + 1 == len(state.plan.stages):
            done, actions = _to(state, Status.DONE, RULE, "done", "held in its last stage")
            return done, (*actions, SetBase(state.version))
        return _then(*_open(state, RULE, f"held for {stage.hold_s / 3600:g} h" if stage else ""))
    return state, ()


def _then(state: State, actions: tuple[Action, ...]) -> Decision:
    """Go on at once where nothing is to be waited for; each step opens a stage or ends, so it ends."""
    after, more = _go_on(state)
    return after, (*actions, *more)


def _convicted(state: State) -> Criterion | None:
    each = state.plan.false_halts_each
    return next((c for c in state.plan.criteria if halts(c, state.evidence(c.kind), each)), None)


def _halt(state: State, guilty: Criterion) -> Decision:
    tally = state.evidence(guilty.kind)
    stage = state.current
    why = (
        f"{guilty.kind}: {tally.bad} of {tally.judged} devices are bad, tolerated is {guilty.tolerated:.1%}"
        f" (stage {stage.name if stage else '-'})"
    )
    halted, actions = _to(replace(state, before_pause=None), Status.HALTED, RULE, "halted", why)
    if not (state.plan.rollback and state.base):
        return halted, actions
    back, more = _go_back(halted, RULE, why)
    return back, (*actions, *more)


def _go_back(state: State, who: str, why: str) -> Decision:
    """Order the way back; until it is signed all are offered the release before, and no device goes down."""
    ordered = replace(state, going_back=True, before_pause=None)
    after, actions = _to(ordered, Status.AWAITING_SIGNATURE, who, "rollback ordered", why)
    return after, (*actions, SetBase(state.base), Republish(content_of=state.base, above=state.version))


def _open(state: State, who: str, why: str) -> Decision:
    opened = replace(state, stage=state.stage + 1)
    name = opened.plan.stages[opened.stage].name
    return _to(opened, Status.RUNNING, who, f"opened {name}", why)


def _to(state: State, status: Status, who: str, what: str, why: str) -> Decision:
    return replace(state, status=status, reason=why), (Note(who, what, why),)


def _not_now(state: State, what: str) -> UserError:
    words = str(state.status).replace("_", " ")
    why = f" ({state.reason})" if state.reason else ""
    return UserError(f"rollout {state.id}: is {words}{why}; it cannot be {what} now")


_RULES: Final[dict[type, Callable[[State, Any], Decision]]] = {
    Signed: _signed,
    Started: _started,
    Tallied: _tallied,
    TimePassed: _time_passed,
    Paused: _paused,
    Resumed: _resumed,
    RollbackOrdered: _rollback_ordered,
    Replaced: _replaced,
    Superseded: _superseded,
}
