"""A halted rollout is taken back without a hand on it, once, when it can be signed; the floor follows."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedge_server.registry.database import Registry
from fedge_server.release import ReleasePlace, publish_draft
from fedge_server.release.lineage import release_of, released
from fedge_server.release.returning import Step, take_back
from fedge_server.rollout.plan import Plan, Stage, default_criteria
from fedge_server.rollout.reports import Report
from fedge_server.rollout.service import Rollouts
from fedge_server.rollout.state import Status

AT_ONCE = Plan((Stage("all", percent=100, hold_s=0),), default_criteria())
Drafted = Callable[..., str]


@pytest.fixture
def halted(server: ReleasePlace, registry: Registry, drafted: Drafted) -> Rollouts:
    """Release 1 is the base of tier micro; release 2 was halted: it fails on all of eight devices."""
    server.make(["micro"])
    for number in range(8):
        registry.devices.create_token(token_id=f"t{number}", secret_sha256="", tier="micro", expires=2e9)
        registry.devices.enrol(
            device_id=f"d{number}",
            node_id=number,
            public_key="",
            sealing_key="",
            tier="micro",
            token_id=f"t{number}",
            fedge_version="",
            wire_version=1,
            not_after=2e9,
        )
    rollouts = Rollouts(registry)
    for version in (1, 2):
        publish_draft(server, registry, drafted("micro", answer=version))
        rollouts.start(version, "micro", AT_ONCE, who="ann")
        for number in range(8):
            if rollouts.offer(f"d{number}", has=version - 1) == version:
                kind = "installed" if version == 1 else "install_failed"
                rollouts.note(Report(f"d{number}", version, kind))
        rollouts.tick()
    assert rollouts.get("micro-2").status is Status.AWAITING_SIGNATURE
    return rollouts


def look(server: ReleasePlace, registry: Registry) -> list[Step]:
    def mark(tier: str) -> tuple[int, int]:
        found = server.repository.content(tier).mark
        return found.floor, found.newest

    return take_back(server, registry, mark)


@pytest.mark.slow
def test_the_old_content_is_published_above_the_bad_version_and_the_signed_floor_is_raised(
    server: ReleasePlace, registry: Registry, halted: Rollouts
) -> None:
    steps = look(server, registry)
    assert [step.is_done for step in steps] == [True]
    state = halted.get("micro-2")
    assert (state.status, state.replacement) == (Status.ROLLED_BACK, 3)  # nobody had installed it
    first, third = (release_of(registry, version).variants for version in (1, 3))
    assert first == third
    mark = server.repository.content("micro").mark
    assert (mark.floor, mark.newest) == (3, 3) == (halted.channel("micro").floor, 3)
    assert halted.offer("d0", has=1) == 3
    assert look(server, registry) == []


@pytest.mark.slow
def test_where_it_cannot_be_signed_it_waits_with_one_draft_and_is_done_later(
    server: ReleasePlace, registry: Registry, halted: Rollouts
) -> None:
    key = server.keys / "tier-micro.key"
    away = key.rename(server.keys / "away")
    for _ in range(3):
        (step,) = look(server, registry)
        assert not step.is_done
        assert "micro-2: the content of release 1 awaits its signature" in step.what
    assert len(registry.drafts.all(unpublished=True)) == 1
    assert halted.get("micro-2").status is Status.AWAITING_SIGNATURE
    away.rename(key)
    assert all(step.is_done for step in look(server, registry))
    assert halted.get("micro-2").replacement == 3
    assert registry.drafts.all(unpublished=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("step", ["record_release", "replaced"])
def test_whoever_is_killed_half_way_goes_on_and_publishes_nothing_twice(
    server: ReleasePlace,
    registry: Registry,
    halted: Rollouts,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    class Killed(BaseException):
        """As nothing catches it."""

    def kill(*_: object, **__: object) -> None:
        raise Killed

    where = {"record_release": Registry, "replaced": Rollouts}[step]
    with monkeypatch.context() as patched:
        patched.setattr(where, step, kill)
        with pytest.raises(Killed):
            look(server, registry)
    assert all(step.is_done for step in look(server, registry))
    assert look(server, registry) == []
    assert [release.version for release in released(registry)] == [1, 2, 3]
    assert server.repository.content("micro").mark.floor == 3
    assert halted.get("micro-2").replacement == 3


@pytest.mark.slow
def test_a_way_back_that_a_person_has_taken_only_needs_its_floor(
    server: ReleasePlace, registry: Registry, halted: Rollouts
) -> None:
    from fedge_server.release import draft_again

    publish_draft(server, registry, draft_again(registry, 1, ["micro"]))
    halted.replaced("micro-2", 3, who="ann")
    (step,) = look(server, registry)
    assert step == Step("tier micro: its floor is 3 now", is_done=True)


def test_where_nothing_was_halted_nothing_is_done(server: ReleasePlace, registry: Registry) -> None:
    assert look(server, registry) == []
