"""What the learning loop does next: `decide(policy, state, event, now)`, and `step(state)`.

```text
watching -> running -> compressing -> releasing -> [awaiting signature] -> rolling out -> watching
```

A cycle begins by hand, by drift that stands, by new data or by schedule. Those that nobody asked for wait
for the gap after the last one, which doubles with each failure, and for the budget of cycles. A step that
fails ends the cycle. Drift that a cycle has answered with a release does not begin another: the new release
is watched anew.

Nothing here reads a clock, a database or a network; whoever calls it writes the state down first, and then
does `step(state)`, which after a kill is the same again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from fedge.errors import UserError
from fedge_server.continual.state import (
    CAUSES,
    DATA,
    DRIFT,
    HAND,
    SCHEDULE,
    Asked,
    Drift,
    Ended,
    Event,
    Examples,
    Note,
    Paused,
    Policy,
    Released,
    Resumed,
    Signed,
    State,
    Status,
    Step,
    Stopped,
    TimePassed,
)

RULE: Final = "learn"  # who, where no person did it
Decision = tuple[State, tuple[Note, ...]]
_AFTER: Final = {
    Status.RUNNING: Status.COMPRESSING,
    Status.COMPRESSING: Status.RELEASING,
    Status.ROLLING_OUT: Status.WATCHING,
}


def decide(policy: Policy, state: State, event: Event, now: float) -> Decision:
    """The state after an event at `now` (Unix seconds), and what is to be written into the audit trail.

    Raises:
        UserError: somebody asks for what this state does not allow; it says why.
    """
    state = replace(state, at=max(now, state.at))
    after, notes = _RULES[type(event)](state, event)
    begun, more = _begin(policy, after)
    return begun, (*notes, *more)


def step(state: State) -> Step:
    """What is to be done in this state."""
    return Step(state.status, state.cycle, state.version, state.why)


def reasons(policy: Policy, state: State) -> dict[str, str]:
    """By cause, why a cycle should begin now."""
    found: dict[str, str] = {}
    if state.asked is not None:
        found[HAND] = " ".join(f"asked by {state.asked[0]}: {state.asked[1]}".rstrip(": ").split())
    stands = state.alarm_since is not None and state.at - state.alarm_since >= policy.steady_s
    if policy.drift and stands and state.alarm_release > state.answered:
        found[DRIFT] = f"devices see something else than when release {state.alarm_release} was made"
    more = state.examples - state.examples_before
    if policy.new_examples is not None and more >= policy.new_examples:
        found[DATA] = f"{more} new examples"
    last = max(state.begun, default=None)
    if policy.every_s is not None and (last is None or state.at - last >= policy.every_s):
        found[SCHEDULE] = f"every {policy.every_s:g} s"
    return found


def waits_until(policy: Policy, state: State) -> float:
    """Before this time (Unix seconds) no cycle begins that nobody asked for."""
    doubled = policy.min_gap_s * 2.0 ** min(state.failures, 32)
    gap = min(doubled, max(policy.max_gap_s, policy.min_gap_s))
    within = sorted(state.begun)[-policy.most_cycles :]
    budget = within[0] + policy.within_s if len(within) == policy.most_cycles else float("-inf")
    return max(state.ended + gap, budget)


def _begin(policy: Policy, state: State) -> Decision:
    """Begin a cycle, if there is a reason and nothing against it."""
    if state.status is not Status.WATCHING or state.paused:
        return state, ()
    found = reasons(policy, state)
    cause = next((name for name in CAUSES if name in found), None)
    if cause is None or (cause != HAND and state.at < waits_until(policy, state)):
        return state, ()
    keep = max(policy.most_cycles, 1)
    who = state.asked[0] if state.asked and cause == HAND else RULE
    begun = replace(
        state,
        status=Status.RUNNING,
        since=state.at,
        cycle=state.cycle + 1,
        cause=cause,
        why=found[cause],
        begun=(*state.begun, state.at)[-keep:],
        examples_before=state.examples,
        asked=None,
        version=0,
    )
    return begun, (Note(who, f"cycle {begun.cycle} begun", f"{cause}: {found[cause]}"),)


def _time_passed(state: State, _: TimePassed) -> Decision:
    return state, ()


def _drift(state: State, event: Drift) -> Decision:
    if not event.stands:
        return replace(state, alarm_since=None), ()
    anew = state.alarm_since is None or event.release > state.alarm_release
    since = state.at if anew else state.alarm_since
    return replace(state, alarm_since=since, alarm_release=event.release), ()


def _examples(state: State, event: Examples) -> Decision:
    # Devices leave and forget: what is new counts from the least that there was.
    return replace(state, examples=event.count, examples_before=min(state.examples_before, event.count)), ()


def _asked(state: State, event: Asked) -> Decision:
    if state.status is not Status.WATCHING:
        raise UserError(f"learn: cycle {state.cycle} is {state.status.value} already; stop it first")
    if state.paused:
        raise UserError("learn: is paused; resume it first")
    return replace(state, asked=(event.who, event.why)), ()


def _paused(state: State, event: Paused) -> Decision:
    if state.paused:
        raise UserError("learn: is paused already")
    return replace(state, paused=True, asked=None), (Note(event.who, "learning paused"),)


def _resumed(state: State, event: Resumed) -> Decision:
    if not state.paused:
        raise UserError("learn: is not paused")
    return replace(state, paused=False), (Note(event.who, "learning resumed"),)


def _stopped(state: State, event: Stopped) -> Decision:
    if state.status is Status.WATCHING:
        raise UserError("learn: no cycle is under way")
    note = Note(event.who, f"cycle {state.cycle} stopped", event.why)
    return _over(state, failed=False), (note,)


def _ended(state: State, event: Ended) -> Decision:
    if (event.cycle, event.step) != (state.cycle, state.status) or state.status is Status.WATCHING:
        return state, ()  # told twice, or of a cycle that was stopped
    if event.failed:
        return _over(state, failed=True), (Note(RULE, f"cycle {state.cycle} failed", event.failed),)
    if event.step not in _AFTER:
        return state, ()  # it ends with a release
    after = _AFTER[event.step]
    if after is Status.WATCHING:
        done = replace(_over(state, failed=False), answered=max(state.answered, state.alarm_release))
        return done, (Note(RULE, f"cycle {state.cycle} done", f"release {state.version}"),)
    return replace(state, status=after, since=state.at), ()


def _released(state: State, event: Released) -> Decision:
    if (event.cycle, state.status) != (state.cycle, Status.RELEASING):
        return state, ()
    if event.signed:
        after, told = Status.ROLLING_OUT, f"release {event.version}"
    else:
        after, told = Status.AWAITING_SIGNATURE, "awaits a signature"
    note = Note(RULE, f"cycle {state.cycle}: {told}")
    return replace(state, status=after, since=state.at, version=event.version), (note,)


def _signed(state: State, event: Signed) -> Decision:
    if (event.cycle, state.status) != (state.cycle, Status.AWAITING_SIGNATURE):
        return state, ()
    note = Note(RULE, f"cycle {state.cycle}: release {event.version}", "signed")
    return replace(state, status=Status.ROLLING_OUT, since=state.at, version=event.version), (note,)


def _over(state: State, *, failed: bool) -> State:
    failures = state.failures + 1 if failed else 0
    return replace(
        state, status=Status.WATCHING, since=state.at, ended=state.at, failures=failures, cause="", why=""
    )


_RULES: Final[dict[type, Callable[[State, Any], Decision]]] = {
    TimePassed: _time_passed,
    Drift: _drift,
    Examples: _examples,
    Asked: _asked,
    Paused: _paused,
    Resumed: _resumed,
    Stopped: _stopped,
    Ended: _ended,
    Released: _released,
    Signed: _signed,
}
