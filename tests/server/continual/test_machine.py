"""The decision as a state machine: whatever happens, in whatever order, its promises hold."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fedge.errors import UserError
from fedge_server.continual.deciding import decide, step
from fedge_server.continual.state import (
    HAND,
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

ORDER = [Status.RUNNING, Status.COMPRESSING, Status.RELEASING, Status.AWAITING_SIGNATURE, Status.ROLLING_OUT]


class Loop(RuleBasedStateMachine):
    """A loop that is told true things, stale things and false things."""

    @initialize(
        gap=st.sampled_from([0.0, 10.0]),
        every=st.sampled_from([None, 30.0]),
        examples=st.sampled_from([None, 50]),
        most=st.integers(1, 3),
    )
    def begin(self, gap: float, every: float | None, examples: int | None, most: int) -> None:
        self.policy = Policy(every, True, 5.0, examples, gap, most, 100.0, 40.0)
        self.state, self.now = State(), 1000.0
        self.unasked: list[float] = []
        self.ends: list[float] = []

    def happen(self, event: Event) -> None:
        before = self.state
        try:
            after, notes = decide(self.policy, before, event, self.now)
        except UserError:
            assert not isinstance(event, (TimePassed, Drift, Examples, Ended, Released, Signed))
            return
        assert State.from_json(after.to_json()) == after
        assert after.cycle - before.cycle in (0, 1)
        if after.cycle > before.cycle:
            assert not after.paused
            assert notes
            if after.cause != HAND:
                assert all(self.now - end >= self.policy.min_gap_s for end in self.ends)
            self.unasked.append(self.now)
        elif after.status is not before.status:
            forward = after.status is Status.WATCHING or ORDER.index(after.status) > ORDER.index(
                before.status
            )
            assert forward
            if after.status is Status.WATCHING:
                self.ends.append(self.now)
        if after.status is Status.ROLLING_OUT:
            assert after.version > 0
        self.state = after

    @rule(seconds=st.sampled_from([1.0, 6.0, 50.0]))
    def waits(self, seconds: float) -> None:
        self.now += seconds
        self.happen(TimePassed())

    @rule(stands=st.booleans(), release=st.integers(1, 4))
    def drift(self, stands: bool, release: int) -> None:
        self.happen(Drift(stands, release))

    @rule(count=st.integers(0, 300))
    def data(self, count: int) -> None:
        self.happen(Examples(count))

    @rule(event=st.sampled_from([Asked("ann"), Paused("ann"), Resumed("ann"), Stopped("ann")]))
    def person(self, event: Event) -> None:
        self.happen(event)

    @rule(stale=st.integers(0, 1), status=st.sampled_from(list(Status)), failed=st.sampled_from(["", "why"]))
    def ended(self, stale: int, status: Status, failed: str) -> None:
        self.happen(Ended(self.state.cycle - stale, status, failed))

    @rule()
    def goes_on(self) -> None:
        self.happen(Ended(self.state.cycle, self.state.status))

    @rule(version=st.integers(1, 5), signed=st.booleans())
    def released(self, version: int, signed: bool) -> None:
        self.happen(Released(self.state.cycle, version, signed))

    @rule(stale=st.integers(0, 1), version=st.integers(1, 5))
    def signed(self, stale: int, version: int) -> None:
        self.happen(Signed(self.state.cycle - stale, version))

    @invariant()
    def a_step_is_what_the_state_says(self) -> None:
        assert step(self.state) == step(State.from_json(self.state.to_json()))
        assert len(self.state.begun) <= self.policy.most_cycles


TestLoop = pytest.mark.slow(Loop.TestCase)
TestLoop.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
