"""The decision core as a state machine: whatever happens, in whatever order, its promises hold."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedge.errors import UserError
from fedge_server.rollout.assignment import Channel, offered, stage_of
from fedge_server.rollout.deciding import check_start, decide
from fedge_server.rollout.evidence import Criterion, Tally, devices_to_halt, halts
from fedge_server.rollout.plan import Plan, Stage
from fedge_server.rollout.state import (
    OFFERING,
    Event,
    Note,
    Paused,
    RaiseFloor,
    Replaced,
    Republish,
    Resumed,
    RollbackOrdered,
    SetBase,
    Started,
    State,
    Status,
    Superseded,
    Tallied,
    Tallies,
    TimePassed,
)

DEVICES = [f"d{number}" for number in range(24)]
PLAN = Plan(
    (
        Stage("canary", 25, frozenset({"d0"}), hold_s=10, min_installs=2),
        Stage("half", 50, hold_s=10, min_installs=5),
        Stage("all", 100, hold_s=0, min_installs=10),
    ),
    (Criterion("install", 0.05, 0.5), Criterion("health", 0.05, 0.5, at_least=2)),
    false_halts=0.2,
)
RUNS = (Status.RUNNING, Status.HOLDING)
device = st.sampled_from(DEVICES)


class Fleet(RuleBasedStateMachine):
    """A tier with devices that ask, install, fail and report; and people who pause, resume and go back."""

    @initialize(base=st.integers(0, 1))
    def begin(self, base: int) -> None:
        self.channel = Channel("micro", base, base)
        self.highest = base
        self.newest: State | None = None
        self.now = 1000.0
        self.trail: list[Note] = []
        self.has = dict.fromkeys(DEVICES, base)
        self.stage: dict[tuple[str, str], int] = {}
        self.outcomes: dict[str, dict[str, tuple[bool, bool]]] = {}  # by rollout, by device: failed, sick
        self.left: dict[str, set[str]] = {}

    def happen(self, event: Event) -> None:
        """Let the newest rollout decide, and hold what it does to its promises."""
        before = self.newest
        assert before is not None
        after, actions = decide(before, event, self.now)
        assert after.at >= before.at
        assert after.stage >= before.stage
        assert not before.going_back or after.going_back or isinstance(event, Resumed)
        notes = [action for action in actions if isinstance(action, Note)]
        if (after.status, after.stage) != (before.status, before.stage):
            assert notes
        for action in actions:
            if isinstance(action, SetBase):
                self.channel = Channel("micro", action.version, self.channel.floor, after.id)
            elif isinstance(action, RaiseFloor):
                assert action.version >= self.channel.floor
                self.channel = Channel("micro", self.channel.base, action.version, after.id)
            elif isinstance(action, Republish):
                assert (action.content_of, action.above) == (after.base, after.version)
        self.trail += notes
        self.newest = after

    def attempt(self, event: Event) -> bool:
        before = self.newest
        try:
            self.happen(event)
        except UserError:
            assert self.newest == before
            return False
        return True

    @rule(newer=st.integers(0, 2))
    @precondition(lambda self: self.newest is None or self.newest.status not in RUNS or self.now > 3000)
    def start(self, newer: int) -> None:
        version = self.highest + newer
        try:
            check_start(version, self.channel.floor, self.newest)
        except UserError:
            assert newer == 0 or (self.newest and self.newest.going_back)
            return
        if version <= self.channel.base:  # nothing was ever rolled out: the base itself is no rollout
            return
        if self.newest is not None:
            self.happen(Superseded(version, "ann"))
            assert self.newest.status in (Status.SUPERSEDED, Status.DONE, Status.ROLLED_BACK)
        self.highest = version
        self.newest = State(f"micro-{version}", "micro", version, self.channel.base, PLAN, at=self.now)
        self.channel = Channel("micro", self.channel.base, self.channel.floor, self.newest.id)
        self.happen(Started("ann"))

    @rule(device=device, failed=st.booleans(), sick=st.booleans())
    def asks(self, device: str, failed: bool, sick: bool) -> None:
        self.ask(device, failed, sick)

    def ask(self, device: str, failed: bool, sick: bool) -> None:
        rollout = self.newest
        stage = stage_of(PLAN, rollout.id, device) if rollout else None
        if rollout and stage is not None:
            assert self.stage.setdefault((rollout.id, device), stage) == stage
        version = offered(self.channel, rollout, stage, self.has[device])
        if version is None:
            return
        assert version > self.has[device]
        assert version >= self.channel.floor
        if rollout and version == rollout.version and version != self.channel.base:
            assert rollout.status in OFFERING
            assert stage is not None
            assert stage <= rollout.stage
            known = self.outcomes.setdefault(rollout.id, {}).get(device, (False, False))
            self.outcomes[rollout.id][device] = (known[0] or failed, known[1] or sick)
        if not failed:
            self.has[device] = version
        if rollout and version == rollout.replacement and not failed:
            self.left.setdefault(rollout.id, set()).add(device)
        if rollout:
            self.happen(Tallied(self.tallies(rollout)))

    @rule(first=st.integers(0, 23), count=st.integers(5, 24), bad=st.sampled_from([0, 0, 0, 1, 3]))
    def many_ask(self, first: int, count: int, bad: int) -> None:
        for number in range(count):
            self.ask(DEVICES[(first + number) % 24], failed=number < bad, sick=False)

    @rule()
    @precondition(lambda self: self.newest is not None and self.newest.status in RUNS)
    def a_good_stage(self) -> None:
        for device in DEVICES:
            self.ask(device, failed=False, sick=False)
        self.now += 1000
        self.happen(TimePassed())

    @rule()
    @precondition(lambda self: self.newest is not None and self.newest.status in RUNS)
    def a_bad_stage(self) -> None:
        for device in DEVICES:
            self.ask(device, failed=False, sick=True)

    def tallies(self, rollout: State) -> Tallies:
        found = self.outcomes.get(rollout.id, {})
        left = self.left.get(rollout.id, set())
        there = {d for d, (failed, _) in found.items() if not failed}
        health = [sick for failed, sick in found.values() if not failed]
        by_kind = {
            "install": Tally(len(found), sum(failed for failed, _ in found.values())),
            "health": Tally(len(health), sum(health)),
        }
        return Tallies(by_kind, len(there), len(there & left))

    @rule(seconds=st.sampled_from([-50.0, 0.0, 1.0, 10.0, 1000.0]))
    @precondition(lambda self: self.newest is not None)
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.happen(TimePassed())

    @rule()
    @precondition(lambda self: self.newest is not None)
    def pause(self) -> None:
        if self.attempt(Paused("ann", "why")):
            assert self.newest
            assert self.newest.status is Status.PAUSED

    @rule(override=st.booleans(), why=st.sampled_from(["", "because"]))
    @precondition(lambda self: self.newest is not None)
    def resume(self, override: bool, why: str) -> None:
        before = self.newest
        assert before
        if self.attempt(Resumed("ann", why, override)) and before.status is not Status.PAUSED:
            assert override
            assert why

    @rule()
    @precondition(lambda self: self.newest is not None)
    def roll_back(self) -> None:
        self.attempt(RollbackOrdered("ann", "why"))

    @rule()
    @precondition(lambda self: self.newest is not None and self.newest.status is Status.DONE)
    def roll_back_what_is_done(self) -> None:
        assert self.newest
        assert self.attempt(RollbackOrdered("ann", "complaints")) == (self.newest.base > 0)

    @rule(higher=st.integers(-1, 2))
    @precondition(lambda self: self.newest is not None)
    def replace(self, higher: int) -> None:
        assert self.newest
        version = self.newest.version + higher
        if self.attempt(Replaced(version)):
            assert version > self.newest.version
            self.highest = max(self.highest, version)
            assert self.channel.floor == self.channel.base == version

    @invariant()
    def a_halted_rollout_offers_nothing_new(self) -> None:
        rollout = self.newest
        if rollout is None or rollout.status in OFFERING:
            return
        for name in DEVICES:
            version = offered(self.channel, rollout, 0, self.has[name])
            assert version in (None, self.channel.base)
        if rollout.status in (Status.HALTED, Status.AWAITING_SIGNATURE, Status.PAUSED):
            assert self.channel.base < rollout.version

    @invariant()
    def what_is_bad_stops_by_itself(self) -> None:
        rollout = self.newest
        if rollout is None:
            return
        for criterion in PLAN.criteria:
            evidence = rollout.evidence(criterion.kind)
            if rollout.status in (*RUNS, Status.PAUSED):
                assert not halts(criterion, evidence, PLAN.false_halts_each)
                all_bad = evidence.judged == evidence.bad
                assert not all_bad or evidence.bad < devices_to_halt(criterion, PLAN.false_halts_each)

    @invariant()
    def the_base_is_never_below_the_floor(self) -> None:
        assert self.channel.floor <= self.channel.base or not self.channel.base


Fleet.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestFleet = pytest.mark.slow(Fleet.TestCase)
