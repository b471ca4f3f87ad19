"""Rollouts in the database, on SQLite and PostgreSQL: what happened and what it changed come together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from fedge.errors import FormatError, TrustError, UserError
from fedge.telemetry.sketch import Sketch
from fedge.telemetry.window import Window
from fedge_server.registry import schema
from fedge_server.registry.database import Registry
from fedge_server.registry.engine import reading
from fedge_server.rollout import service
from fedge_server.rollout.audit import Audit
from fedge_server.rollout.evidence import Criterion, Tally
from fedge_server.rollout.plan import Plan, Stage, default_criteria
from fedge_server.rollout.reports import Report
from fedge_server.rollout.service import Rollouts, wanted_content
from fedge_server.rollout.state import State, Status
from fedge_server.telemetry.store import Sender, Telemetry

PLAN = Plan(
    (Stage("canary", 25, hold_s=100, min_installs=3), Stage("all", 100, hold_s=100, min_installs=20)),
    default_criteria(50.0),
)


@pytest.fixture
def rollouts(filled: Registry, clock: Callable[[], float]) -> Rollouts:
    """Version 1 has reached all."""
    made = Rollouts(filled, clock)
    plan = replace(PLAN, stages=(Stage("all", 100, hold_s=0),))
    made.start(1, "micro", plan, who="ann")
    assert made.offer("device-000") == 1
    made.note(Report("device-000", 1, "installed"))
    assert made.channel("micro").base == 1
    return made


@pytest.fixture
def running(rollouts: Rollouts) -> State:
    return rollouts.start(2, "micro", PLAN, who="ann", why="round 40")


def asked(rollouts: Rollouts, devices: list[str], version: int, has: int = 0) -> list[str]:
    """Devices that are offered a version."""
    return [device for device in devices if rollouts.offer(device, has) == version]


@pytest.mark.slow
def test_a_good_release_goes_from_the_canary_to_all(rollouts, running, devices, clock) -> None:
    canary = asked(rollouts, devices, 2, has=1)
    assert 3 <= len(canary) < 20
    assert asked(rollouts, devices, 2, has=1) == canary
    for device in canary:
        assert rollouts.note(Report(device, 2, "installed"))
    assert rollouts.get("micro-2").status is Status.HOLDING
    assert asked(rollouts, devices, 2, has=1) == canary
    clock.now += 101
    everyone = asked(rollouts, devices, 2, has=1)  # a device that asks lets the time pass
    assert set(everyone) | set(canary) == set(devices)
    for device in devices:
        rollouts.note(Report(device, 2, "installed"))
    clock.now += 101
    (state,) = [state for state in rollouts.tick() if state.id == "micro-2"]
    assert (state.status, rollouts.channel("micro").base) == (Status.DONE, 2)
    assert asked(rollouts, devices, 2, has=2) == []


def test_devices_that_took_a_release_before_its_tiers_first_rollout_count_as_witnesses(
    filled, clock, devices
) -> None:
    rollouts = Rollouts(filled, clock)
    rollouts.start(1, "micro", PLAN, who="ann")
    early = next(device for device in devices if rollouts.offer(device) != 1)
    assert rollouts.note(Report(early, 1, "installed"))
    assert rollouts.get("micro-1").tallies.installed == 1


def test_what_devices_said_of_a_release_before_its_tiers_first_rollout_began_counts_in_it(
    filled, clock, devices
) -> None:
    rollouts = Rollouts(filled, clock)
    for device in devices[:3]:  # they say it once, and never again
        assert rollouts.note(Report(device, 1, "installed"))
    rollouts.note(Report(devices[0], 1, "unhealthy"))
    plan = replace(PLAN, stages=(Stage("all", 100, hold_s=0, min_installs=3),))
    state = rollouts.start(1, "micro", plan, who="ann")
    assert (state.status, state.tallies.installed) == (Status.DONE, 3)
    assert (state.tallies.of("install"), state.tallies.of("health")) == (Tally(3, 0), Tally(1, 1))
    assert rollouts.offer(devices[0], has=1) is None


def test_a_bad_release_stops_in_the_canary_and_the_old_content_comes_back_for_all(
    rollouts, running, devices, filled
) -> None:
    canary = asked(rollouts, devices, 2, has=1)
    rollouts.note(Report(canary[0], 2, "installed"))
    for device in canary[1:6]:
        rollouts.note(Report(device, 2, "install_failed"))
    state = rollouts.get("micro-2")
    assert (state.status, state.going_back, wanted_content(state)) == (Status.AWAITING_SIGNATURE, True, 1)
    assert asked(rollouts, devices, 2) == []
    assert rollouts.offer(canary[0], 2) is None  # no device goes down
    assert rollouts.offer(devices[-1], 0) == 1
    with pytest.raises(UserError, match="rollback awaits a signature"):
        rollouts.start(3, "micro", PLAN, who="ann")
    rollouts.replaced("micro-2", 3, who="signer")
    channel = rollouts.channel("micro")
    assert (channel.base, channel.floor) == (3, 3)
    assert asked(rollouts, devices, 3, has=1) == devices
    assert rollouts.offer(canary[0], 2) == 3
    rollouts.note(Report(canary[0], 3, "installed"))
    assert rollouts.get("micro-2").status is Status.ROLLED_BACK
    whats = [entry.what for entry in Audit(filled.engine).entries("micro-2")]
    assert whats == [
        "planned",
        "opened canary",
        "halted",
        "rollback ordered",
        "rolling back",
        "rolled back",
    ]
    assert Audit(filled.engine).verify().broken is None


def test_a_rollback_brings_back_the_old_content_and_no_other(rollouts, running, release) -> None:
    rollouts.rollback("micro-2", who="ann", why="complaints")
    release(4, "other")
    with pytest.raises(UserError, match="a rollback publishes the old content anew"):
        rollouts.replaced("micro-2", 4, who="signer")
    with pytest.raises(UserError, match="release 9: there is none"):
        rollouts.replaced("micro-2", 9, who="signer")
    with pytest.raises(UserError, match="a new version above 2, not 1"):
        rollouts.replaced("micro-2", 1, who="signer")
    assert rollouts.channel("micro").floor == 0


def test_a_report_counts_once_and_a_failure_after_a_success_turns_the_verdict(
    rollouts, running, devices
) -> None:
    first, second = asked(rollouts, devices, 2, has=1)[:2]
    assert rollouts.note(Report(first, 2, "installed"))
    assert not rollouts.note(Report(first, 2, "installed"))
    rollouts.note(Report(first, 2, "healthy"))
    tallies = rollouts.get("micro-2").tallies
    assert (tallies.installed, tallies.of("install"), tallies.of("health")) == (1, Tally(1, 0), Tally(1, 0))
    rollouts.note(Report(first, 2, "unhealthy"))
    assert not rollouts.note(Report(first, 2, "unhealthy"))
    assert rollouts.get("micro-2").tallies.of("health") == Tally(1, 1)
    rollouts.note(Report(second, 2, "install_failed"))
    rollouts.note(Report(second, 2, "installed"))  # a second attempt
    tallies = rollouts.get("micro-2").tallies
    assert (tallies.installed, tallies.of("install")) == (2, Tally(2, 1))


def test_confidence_is_held_against_the_same_devices_own_and_latency_against_the_budget(
    rollouts, running, devices
) -> None:
    one, two, three = asked(rollouts, devices, 2, has=1)[:3]
    for device, before in ((one, 0.9), (two, 0.9)):
        rollouts.note(Report(device, 1, "confidence", before))
    for device, after in ((one, 0.85), (two, 0.6), (three, 0.1)):
        rollouts.note(Report(device, 2, "confidence", after))
    rollouts.note(Report(one, 2, "latency_ms", 60.0))
    rollouts.note(Report(two, 2, "latency_ms", 40.0))
    tallies = rollouts.get("micro-2").tallies
    assert (tallies.of("confidence"), tallies.of("latency")) == (Tally(2, 1), Tally(2, 1))


def test_confidence_is_held_against_what_the_version_before_says_now_where_devices_tell_it(
    rollouts, running, devices, filled
) -> None:
    device = asked(rollouts, devices, 2, has=1)[0]
    rollouts.note(Report(device, 1, "confidence", 0.9))  # once: the world has changed since
    telemetry = Telemetry(filled.engine, now=lambda: 3600.0 * 480_000)
    for slot in (479_990, 479_991):
        sketch = Sketch.empty(features=0, classes=2)
        sketch.answers[0] = sketch.confidence[12] = sketch.latency[20] = sketch.routes[0] = 20  # .6 to .65
        sent = Window(slot=slot, period_s=3600, version=1, sketch=sketch).to_bytes()
        assert [outcome.kind for outcome in telemetry.take(Sender(device, "micro"), [sent])] == ["counted"]
    rollouts.note(Report(device, 2, "confidence", 0.6))
    assert rollouts.get("micro-2").tallies.of("confidence") == Tally(1, 0)


def test_a_device_that_may_not_speak_changes_nothing(rollouts, running, devices, filled) -> None:
    canary = asked(rollouts, devices, 2, has=1)
    outside = next(device for device in devices if device not in canary)
    filled.devices.revoke(canary[0], "stolen")
    before = rollouts.get("micro-2").tallies
    for report, why in (
        (Report(outside, 2, "install_failed"), "version 2 was not offered to it"),
        (Report(canary[0], 2, "installed"), "is revoked"),
        (Report("nobody", 2, "installed"), "is not enrolled"),
        (Report("no\0body", 2, "installed"), "is not enrolled"),
        (Report(canary[1], 77, "installed"), "release 77: there is none"),
    ):
        with pytest.raises(TrustError, match=why):
            rollouts.note(report)
    with pytest.raises(TrustError, match="is revoked"):
        rollouts.offer(canary[0])
    assert rollouts.get("micro-2").tallies == before


@pytest.mark.parametrize(
    ("kind", "value", "version"),
    [
        ("confidence", float("nan"), 2),
        ("confidence", 1.5, 2),
        ("latency_ms", float("inf"), 2),
        ("latency_ms", -1.0, 2),
        ("exploded", 1.0, 2),
        ("installed", 1.0, 0),
        ("installed", 1.0, 2**31),
    ],
)
def test_a_report_that_no_honest_device_sends_is_refused(kind: str, value: float, version: int) -> None:
    with pytest.raises(FormatError, match="report of device d"):
        Report("d", version, kind, value)


def test_what_a_device_stays_at_when_its_tags_change(rollouts, devices) -> None:
    plan = replace(
        PLAN,
        stages=(Stage("lab", 0, tags=frozenset({"lab"})), Stage("all", 100)),
    )
    rollouts.start(2, "micro", plan, who="ann")
    assert rollouts.offer(devices[5], 1) is None
    assert rollouts.offer(devices[5], 1, ("lab", "x")) == 2
    assert rollouts.offer(devices[5], 1) == 2  # it never leaves a stage that it is in


def test_a_pause_stops_offers_and_a_resumption_goes_on(rollouts, running, devices) -> None:
    canary = asked(rollouts, devices, 2, has=1)
    rollouts.pause("micro-2", who="ann", why="logs")
    assert asked(rollouts, devices, 2, has=1) == []
    rollouts.resume("micro-2", who="ann", why="fine")
    assert asked(rollouts, devices, 2, has=1) == canary


def test_a_halted_rollout_goes_on_by_override_alone(rollouts, running, devices) -> None:
    canary = asked(rollouts, devices, 2, has=1)
    for device in canary[:4]:
        rollouts.note(Report(device, 2, "install_failed"))
    with pytest.raises(UserError, match="give --override"):
        rollouts.resume("micro-2", who="ann", why="it was the lab")
    rollouts.resume("micro-2", who="ann", why="it was the lab", override=True)
    assert asked(rollouts, devices, 2, has=1) == canary
    rollouts.note(Report(canary[4], 2, "installed"))
    assert rollouts.get("micro-2").status is Status.RUNNING


@pytest.mark.slow
def test_a_newer_release_supersedes_and_what_comes_late_of_the_older_is_harmless(
    rollouts, running, devices, release
) -> None:
    canary = asked(rollouts, devices, 2, has=1)
    release(5, "better")
    rollouts.start(5, "micro", PLAN, who="ann")
    assert rollouts.get("micro-2").status is Status.SUPERSEDED
    assert asked(rollouts, devices, 2, has=1) == []
    for device in canary[:5]:
        rollouts.note(Report(device, 2, "install_failed"))
    assert (rollouts.get("micro-5").status, rollouts.channel("micro").base) == (Status.RUNNING, 1)
    for version in (2, 5):
        with pytest.raises(UserError, match="the tier is at 5 already"):
            rollouts.start(version, "micro", PLAN, who="ann")


def test_what_reached_all_can_be_rolled_back_and_counts_those_who_have_it(rollouts, devices) -> None:
    plan = replace(PLAN, stages=(Stage("all", 100, hold_s=0),))
    rollouts.start(2, "micro", plan, who="ann")
    rollouts.offer(devices[0], 1)
    rollouts.note(Report(devices[0], 2, "installed"))
    assert rollouts.get("micro-2").status is Status.DONE
    assert rollouts.offer(devices[1], 1) == 2
    rollouts.note(Report(devices[1], 2, "installed"))  # it was no part of a stage: all may have it
    rollouts.rollback("micro-2", who="ann", why="complaints")
    assert rollouts.offer(devices[2], 1) is None
    rollouts.replaced("micro-2", 3, who="signer")
    for device, status in ((devices[0], Status.ROLLING_BACK), (devices[1], Status.ROLLED_BACK)):
        rollouts.note(Report(device, 3, "installed"))
        assert rollouts.get("micro-2").status is status


def test_what_a_newer_rollout_has_followed_is_not_rolled_back(rollouts, running, devices) -> None:
    with pytest.raises(UserError, match="micro-2 came after it in tier 'micro'"):
        rollouts.rollback("micro-1", who="ann", why="complaints")
    assert (rollouts.get("micro-1").status, rollouts.channel("micro").base) == (Status.DONE, 1)
    assert asked(rollouts, devices, 2, has=1)


@pytest.mark.parametrize(
    ("version", "tier", "plan", "why"),
    [
        (9, "micro", PLAN, "release 9: there is none"),
        (2**40, "micro", PLAN, "there is none"),
        (2, "board", PLAN, "holds nothing for tier 'board'; tiers: micro"),
        (1, "micro", PLAN, "the tier is at 1 already"),
        (
            2,
            "micro",
            replace(PLAN, stages=(Stage("all", 100, min_installs=41),)),
            "holds 40 of the 40 devices",
        ),
        (2, "micro", replace(PLAN, stages=(Stage("all", 100, frozenset({"x"})),)), "'x' is no active device"),
    ],
)
def test_a_rollout_that_cannot_work_is_refused_and_leaves_no_trace(
    rollouts, filled, version: int, tier: str, plan: Plan, why: str
) -> None:
    before = Audit(filled.engine).verify().entries
    with pytest.raises(UserError, match=why):
        rollouts.start(version, tier, plan, who="ann")
    assert Audit(filled.engine).verify().entries == before
    assert [state.id for state in rollouts.all()] == ["micro-1"]
    with pytest.raises(UserError, match="rollout 'x': there is none"):
        rollouts.get("x")


def test_without_a_plan_one_is_made_for_the_tiers_devices_and_budget(rollouts) -> None:
    state = rollouts.start(2, "micro", who="ann")
    assert state.plan.criterion("latency") == Criterion("latency", 0.05, 0.25, at_least=3, limit=50.0)
    assert state.plan.stages[-1].min_installs == 20


def test_an_unsigned_release_waits_for_its_signature(rollouts, devices) -> None:
    rollouts.start(2, "micro", PLAN, who="ann", signed=False)
    assert asked(rollouts, devices, 2, has=1) == []
    rollouts.signed("micro-2", who="signer")
    assert asked(rollouts, devices, 2, has=1)


def test_what_happened_and_what_it_changed_are_committed_together(
    rollouts, running, devices, filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = asked(rollouts, devices, 2, has=1)
    for device in canary[:2]:
        rollouts.note(Report(device, 2, "installed"))
    before, entries = rollouts.get("micro-2"), Audit(filled.engine).verify().entries

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(service.audit, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            rollouts.note(Report(canary[2], 2, "installed"))
    assert rollouts.get("micro-2") == before
    assert Audit(filled.engine).verify().entries == entries
    assert rollouts.note(Report(canary[2], 2, "installed"))  # the device sends it again
    assert rollouts.get("micro-2").status is Status.HOLDING


@pytest.mark.slow
def test_a_new_server_goes_on_where_the_old_one_was(
    rollouts, running, devices, clock, tmp_path: Path, database_url
) -> None:
    canary = asked(rollouts, devices, 2, has=1)
    for device in canary[:3]:
        rollouts.note(Report(device, 2, "installed"))
    with Registry.open(tmp_path, database_url) as registry:
        again = Rollouts(registry, clock)
        assert again.get("micro-2") == rollouts.get("micro-2")
        clock.now += 100
        again.tick()
        assert again.get("micro-2").stage == 1


def test_an_offer_reads_a_few_rows_whatever_the_fleet(rollouts, running, devices, filled) -> None:
    statements: list[str] = []
    sa.event.listen(filled.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    canary = asked(rollouts, devices, 2, has=1)
    statements.clear()
    assert rollouts.offer(canary[0], 1) == 2
    assert 1 <= len([each for each in statements if each.startswith("SELECT")]) <= 5
    assert not [each for each in statements if each.split()[0] in ("INSERT", "UPDATE")]
    with reading(filled.engine) as connection:
        offered = connection.scalar(sa.select(sa.func.count()).select_from(schema.rollout_devices))
    assert offered == len(canary) + 1  # and the one of the first rollout
