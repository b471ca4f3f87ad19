"""A signer signs what keeps the rules, its limits, and what it remembers; whatever the publisher says."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from places import Place, release_of, report_of

from fedge.errors import ConfigError, FedgeError, FormatError, RefusedError
from fedge_server.repository import Request
from fedge_server.signer.judging import Judge
from fedge_server.signer.limits import Limits, TierLimits
from fedge_server.signer.memory import Memory


class Recorder:
    """Passes requests on to a signer, and keeps them."""

    def __init__(self, judge) -> None:
        self.judge, self.seen = judge, []

    @property
    def key(self):
        return self.judge.key

    def sign(self, request: Request):
        self.seen.append(request)
        return self.judge.sign(request)


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path / "memory", "tier-micro")


def judge_of(place: Place, memory: Memory, limits: Limits | None = None) -> Judge:
    return Judge("micro", place.keys["tier-micro"][0], memory, limits or Limits(), place.clock)


def publish(place: Place, number: int, signer, **options):
    online = [*place.keys["snapshot"], *place.keys["timestamp"]]
    return place.publish(number, "micro", signing=[signer, *online], **options)


@pytest.mark.slow
def test_it_signs_a_release_and_remembers_the_very_bytes(place, memory):
    signer = Recorder(judge_of(place, memory))
    assert publish(place, 1, signer).version == 1
    assert memory.last() == signer.seen[-1].payload
    assert place.repository.content("micro").mark.newest == 1


def test_a_lost_reply_is_given_again_for_the_same_bytes_alone(place, memory):
    signer = Recorder(judge_of(place, memory))
    publish(place, 1, signer)
    (request,) = signer.seen
    assert signer.judge.sign(request) == signer.judge.sign(request)
    other = json.loads(request.payload)
    other["expires"] = "2026-03-02T00:00:00Z"
    changed = json.dumps(other, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(RefusedError, match=r"version 2 of the role is not above 2"):
        signer.judge.sign(replace(request, payload=changed))


def test_it_does_not_go_back_whatever_the_publisher_shows_as_previous(place, memory):
    signer = Recorder(judge_of(place, memory))
    for number in (1, 2):
        publish(place, number, signer)
    first, second = signer.seen
    for previous in (None, first.previous, first.payload):
        with pytest.raises(RefusedError, match="version 2 of the role is not above 3"):
            signer.judge.sign(replace(first, previous=previous))
    assert memory.last() == second.payload


def test_an_earlier_state_under_a_higher_version_is_refused_too(place, memory, tmp_path):
    """A publisher that was taken back to a backup, or taken over, cannot lower the newest version."""
    import shutil

    signer = Recorder(judge_of(place, memory))
    publish(place, 1, signer)
    shutil.copytree(place.path, tmp_path / "backup")
    publish(place, 2, signer)
    shutil.rmtree(place.path)
    shutil.copytree(tmp_path / "backup", place.path)
    (place.path / "state/used.json").write_text('{"release": 0, "roles": {"tier-micro": 40}}')
    with pytest.raises(RefusedError, match="version 2 is signed already, with other content"):
        publish(place, 3, signer)


@pytest.mark.parametrize(
    ("report", "why"),
    [
        (report_of(passed=False, reasons=["bad"]), "its gate has not passed"),
        (report_of(drop_upper=0.02), "passed with drop_upper = 0.02, of max_drop = 0.01"),
    ],
)
def test_forged_evidence_is_refused_by_the_signer_though_the_publishers_policy_is_switched_off(
    place, memory, report, why
):
    place.options["policy"] = lambda _: ()
    draft, objects = release_of(1, "micro", report=report)
    online = [*place.keys["snapshot"], *place.keys["timestamp"]]
    with pytest.raises(RefusedError, match=why):
        place.repository.publish(draft, objects, [judge_of(place, memory), *online])
    assert memory.last() is None
    assert place.repository.content("micro").mark.newest == 0


def test_evidence_of_another_release_is_refused(place, memory):
    class Forger(Recorder):
        def sign(self, request):
            evidence = {v: replace(e, report=report_of(max_drop=0.02)) for v, e in request.evidence.items()}
            return super().sign(replace(request, evidence=evidence))

    with pytest.raises(RefusedError, match="report is not the one that the manifest names"):
        publish(place, 1, Forger(judge_of(place, memory)))


def test_other_roles_are_not_signed(place, memory):
    signer = judge_of(place, memory)
    for role in ("tier-board", "timestamp", "root", "../x"):
        with pytest.raises(RefusedError, match="signs for tier 'micro' alone"):
            signer.sign(Request(role, b"{}"))


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        (Limits(max_drop=0.005), "its gate allowed a drop of 0.01, over 0.005"),
        (Limits(tiers={"micro": TierLimits(max_drop=0.005)}), "its gate allowed a drop of 0.01, over 0.005"),
        (Limits(min_examples=10), "its gate saw None examples, fewer than 10"),
        (Limits(tasks=("images", "signals")), "task 'digits' is none of images, signals"),
        (Limits(runs=("night-*",)), r"run 'run-1' is none of night-\*"),
        (Limits(max_days=30), "it would be good until 2026-05-30, and this signer signs for 30 days"),
    ],
)
def test_its_own_limits_narrow_the_rules(place, memory, limits, why):
    with pytest.raises(RefusedError, match=why):
        publish(place, 1, judge_of(place, memory, limits))
    assert memory.last() is None


def test_limits_hold_for_what_is_new_alone(place, memory):
    publish(place, 1, judge_of(place, memory))
    tighter = judge_of(place, memory, Limits(max_drop=0.005))
    place.repository.raise_floor("micro", 1, [tighter, *place.keys["snapshot"], *place.keys["timestamp"]])
    with pytest.raises(RefusedError, match="version 2: its gate allowed"):
        publish(place, 2, tighter)


def test_a_fresh_signer_judges_everything_on_offer(place, memory, tmp_path):
    publish(place, 1, judge_of(place, memory))
    fresh = judge_of(place, Memory(tmp_path / "other", "tier-micro"), Limits(max_drop=0.005))
    with pytest.raises(RefusedError, match="version 1: its gate allowed"):
        publish(place, 2, fresh)


@pytest.mark.slow
def test_a_memory_that_cannot_be_read_or_written_signs_nothing(place, memory, tmp_path):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "tier-micro.json").write_text("{}")
    with pytest.raises(FormatError, match="without a version"):
        publish(place, 1, judge_of(place, memory))
    (tmp_path / "memory" / "tier-micro.json").unlink()
    (tmp_path / "memory").rmdir()
    (tmp_path / "memory").write_text("a file")
    with pytest.raises((FedgeError, OSError)):
        publish(place, 1, judge_of(place, memory))
    assert place.repository.content("micro").mark.newest == 0


def test_limits_are_read_from_a_file_that_is_checked(tmp_path):
    path = tmp_path / "limits.toml"
    path.write_text('tasks = ["digits"]\nmax_drop = 0.02\n[tiers.micro]\nmin_examples = 200\n')
    assert Limits.load(path) == Limits(
        tasks=("digits",), max_drop=0.02, tiers={"micro": TierLimits(min_examples=200)}
    )
    for text, why in (("max_drip = 1", "max_drip"), ("max_drop = 2", "max_drop"), ("[", "cannot be read")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=why):
            Limits.load(path)


def test_the_life_of_a_signature_is_bounded_by_the_signers_clock(place, memory):
    late = Judge(
        "micro", place.keys["tier-micro"][0], memory, Limits(), lambda: datetime(2026, 1, 1, tzinfo=UTC)
    )
    with pytest.raises(RefusedError, match="it would be good until"):
        publish(place, 1, late)
