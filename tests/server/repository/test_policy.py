"""The rules for a tier: each has a case that it stops, and whatever cannot be judged is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from places import SPEC, golden_of, model_of, release_of, report_of
from tuf.api.metadata import DelegatedRole, Delegations, Targets
from tuf.api.serialization.json import CanonicalJSONSerializer

from fedge.artefact import pack
from fedge.delivery import Kind, ReleaseNote, TierMark, lineage_digest, role_of
from fedge.files import sha256
from fedge.manifest import Lineage, Release
from fedge.routing import Routing
from fedge.spec import Spec
from fedge.telemetry.reference import Reference
from fedge_server.repository import Evidence, Request, reasons_against
from fedge_server.repository.content import FileEntry, Offered, TierContent


def made(version: int, *, report: bytes = report_of(), **changes: Any) -> tuple[Release, Offered, Evidence]:
    release = release_of(version, "micro", report=report, **changes)[0](version)
    manifest = release.to_bytes()
    note = ReleaseNote(version, sha256(manifest), lineage_digest(release.lineage))
    files = {"manifest": manifest, "model": pack(model_of(version)), "report": report, "golden": golden_of()}
    offered = Offered(note, {kind: FileEntry.of(data) for kind, data in files.items()})  # type: ignore[misc]
    return release, offered, Evidence(manifest, report, golden_of())


def payload(content: TierContent, version: int) -> bytes:
    return CanonicalJSONSerializer().serialize(Targets(version=version, targets=content.to_targets()))


def content(*versions: int, floor: int = 0, newest: int | None = None) -> TierContent:
    releases = {version: made(version)[1] for version in versions}
    return TierContent(
        TierMark("micro", floor, max(versions, default=0) if newest is None else newest), releases
    )


def request(old: TierContent | None, new: TierContent, **changes: Any) -> Request:
    evidence = {version: made(version)[2] for version in new.releases}
    previous = None if old is None else payload(old, 4)
    return replace(Request(role_of("micro"), payload(new, 5), previous, evidence), **changes)


def test_what_keeps_all_rules_may_be_signed() -> None:
    assert reasons_against(request(None, content())) == ()
    assert reasons_against(request(None, content(1, 3, floor=1))) == ()
    assert reasons_against(request(content(1, 3), content(3, 4, floor=3))) == ()
    assert reasons_against(request(content(3), content(3))) == ()


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (content(1, 3, floor=2), content(3, floor=1), "may not be lowered from 2 to 1"),
        (content(1), content(1, floor=2), "a floor of 2 is above the newest version 1"),
        (content(1, 3), content(1, 3, floor=2), "version 1 is offered below the floor 2"),
        (content(1, 3), content(1, 2, 3), "version 2 is not above 3, the last that was signed"),
        (content(3), content(1, newest=1), "version 1 is not above 3"),
        (content(1, 3), content(1, newest=1), "newest version is 3, not 1"),
        (content(1, 3), content(1, newest=3), "version 3 must stay on offer"),
        (content(1), content(1, newest=9), "newest version is 1, not 9"),
        (None, content(*range(1, 18)), "17 versions are offered, over 16"),
    ],
)
def test_versions_and_floors_only_rise(old: TierContent | None, new: TierContent, why: str) -> None:
    assert any(why in reason for reason in reasons_against(request(old, new))), reasons_against(
        request(old, new)
    )


def test_a_version_is_not_signed_with_other_content() -> None:
    changed = made(1, task="other")[1]
    new = TierContent(TierMark("micro", 0, 1), {1: changed})
    assert "version 1 is signed already, with other content" in reasons_against(request(content(1), new))


def test_the_version_of_the_role_rises() -> None:
    asked = request(content(1), content(1), previous=payload(content(1), 5))
    assert reasons_against(asked) == ("version 5 of the role is not above 5",)


@pytest.mark.parametrize(
    ("report", "why"),
    [
        (report_of(passed=False), "its gate has not passed"),
        (report_of(passed=1), "its gate has not passed"),
        (report_of(reasons=["recall"]), "its gate has not passed"),
        (report_of(drop_upper=0.02), "drop_upper = 0.02, of max_drop = 0.01"),
        (report_of(drop_upper=None), "drop_upper = None"),
        (report_of(drop_upper=float("nan")), "drop_upper = nan"),
        (report_of(max_class_drop=0.1), "worst_class_drop_upper = None, of max_class_drop = 0.1"),
        (report_of(max_class_drop=0.1, worst_class_drop_upper=0.2), "worst_class_drop_upper = 0.2"),
        (b"{}", "its gate has not passed"),
        (b"[]", "its gate has not passed"),
        (b"nonsense", "report is not JSON"),
    ],
)
def test_the_gate_must_have_passed_by_its_own_figures(report: bytes, why: str) -> None:
    _, offered, evidence = made(1, report=report)
    new = TierContent(TierMark("micro", 0, 1), {1: offered})
    reasons = reasons_against(request(None, new, evidence={1: evidence}))
    assert len(reasons) == 1
    assert reasons[0].startswith("version 1: ")
    assert why in reasons[0]


def with_note(**changes: Any) -> TierContent:
    offered = made(1)[1]
    return TierContent(TierMark("micro", 0, 1), {1: replace(offered, note=replace(offered.note, **changes))})


@pytest.mark.parametrize(
    ("new", "evidence", "why"),
    [
        (content(1), {}, "version 1: there is no evidence"),
        (content(1), {1: made(2)[2]}, "manifest is not the one that is offered"),
        (content(1), {1: replace(made(1)[2], report=b"{}")}, "report is not the one that the manifest names"),
        (with_note(lineage="c" * 64), {1: made(1)[2]}, "its lineage is not the manifest's"),
        (with_note(manifest="c" * 64), {1: made(1)[2]}, "manifest is not the one that is offered"),
    ],
)
def test_each_release_has_manifest_report_and_lineage(
    new: TierContent, evidence: dict[int, Evidence], why: str
) -> None:
    reasons = reasons_against(request(None, new, evidence=evidence))
    assert any(why in reason for reason in reasons), reasons


def test_lineage_stands_for_run_round_model_and_updates() -> None:
    lineage = Lineage("run-1", 3, "a" * 64, "b" * 64)
    expected = b'{"global_model":"' + b"a" * 64 + b'","round":3,"run":"run-1","updates":"' + b"b" * 64 + b'"}'
    assert lineage_digest(lineage) == sha256(expected)


def test_a_manifest_of_another_version_tier_or_model_is_found_out() -> None:
    for other, why in (
        (release_of(1, "micro")[0](2), "its manifest is of version 2"),
        (release_of(1, "board")[0](1), "has no variant for tier 'micro'"),
        (release_of(2, "micro")[0](1), "its model is not the manifest's variant"),
    ):
        manifest = other.to_bytes()
        note = ReleaseNote(1, sha256(manifest), lineage_digest(other.lineage))
        files = {**made(1)[1].files, "manifest": FileEntry.of(manifest)}
        new = TierContent(TierMark("micro", 0, 1), {1: Offered(note, files)})
        reasons = reasons_against(
            request(None, new, evidence={1: Evidence(manifest, report_of(), golden_of())})
        )
        assert any(why in reason for reason in reasons), reasons


def with_entry(offered: bytes = b"", shown: bytes = b"", **changes: Any) -> tuple[str, ...]:
    """What speaks against a release whose variant is changed, and which offers and shows references."""
    release = made(1)[0]
    entry = replace(release.variants[0], **changes)
    manifest = replace(release, variants=(entry,)).to_bytes()
    note = ReleaseNote(1, sha256(manifest), lineage_digest(release.lineage))
    files: dict[Kind, FileEntry] = {**made(1)[1].files, "manifest": FileEntry.of(manifest)}
    if offered:
        files["reference"] = FileEntry.of(offered)
    new = TierContent(TierMark("micro", 0, 1), {1: Offered(note, files)})
    evidence = Evidence(manifest, report_of(), golden_of(), shown)
    return reasons_against(request(None, new, evidence={1: evidence}))


def with_reference(named: bytes, offered: bytes, shown: bytes) -> tuple[str, ...]:
    """The same where the manifest names one reference, and others are offered and shown."""
    return with_entry(offered, shown, reference_sha256=sha256(named) if named else "")


def test_a_report_or_golden_inputs_that_the_manifest_does_not_name_are_found_out() -> None:
    assert with_entry() == ()
    (reason,) = with_entry(golden_sha256="1" * 64)
    assert reason.endswith("its golden inputs are not those that the manifest names")
    (reason,) = with_entry(evidence_sha256="1" * 64)
    assert reason.endswith("the gate's report is not the one that the manifest names")


def test_thresholds_that_no_device_can_read_are_not_signed() -> None:
    routing = Routing(reason="9 examples are few", shares={0.1: 0.5}).to_json()
    assert with_entry(evidence={"routing": routing}) == ()
    (reason,) = with_entry(evidence={"routing": routing | {"measure": "hunch"}})
    assert "doubt 'hunch' is unknown" in reason


def test_a_telemetry_reference_is_the_one_that_the_manifest_names_and_of_its_spec() -> None:
    draw = np.random.default_rng(0)

    def reference(spec: Spec) -> bytes:
        x = draw.integers(0, 255, (100, *spec.shape)).astype(spec.dtype)
        return Reference.of(x, np.full((100, spec.classes), 1 / spec.classes), spec).to_bytes()

    good, other = reference(SPEC), reference(SPEC)
    foreign = reference(Spec("features", (3,), "float32", ("a", "b", "c")))
    assert with_reference(good, good, good) == ()
    assert with_reference(b"", b"", b"") == ()
    for case, why in (
        ((good, other, other), "is not the one that the manifest names"),
        ((good, good, b""), "is not the one that the manifest names"),
        ((good, b"", good), "is not the one that the manifest names"),
        ((b"", good, good), "which the manifest does not name"),
        ((foreign, foreign, foreign), "is of another model"),
        ((b"nonsense", b"nonsense", b"nonsense"), "malformed"),
    ):
        (reason,) = with_reference(*case)
        assert why in reason


def targets(**changes: Any) -> bytes:
    value = Targets(version=5, targets=content(1).to_targets(), **changes)
    return CanonicalJSONSerializer().serialize(value)


GUEST = DelegatedRole("guest", [], 1, terminating=False, paths=["micro/*"])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"role": "targets"}, "'targets' is no role of a tier"),
        ({"role": "tier-board"}, "none of its paths"),
        ({"payload": b"nonsense"}, "the rules could not be applied"),
        ({"payload": targets() + b" "}, "not in canonical form"),
        ({"payload": b"x" * (512 * 1024 + 1)}, "over the 524288 it may have"),
        ({"payload": targets(delegations=Delegations({}, {"guest": GUEST}))}, "may delegate nothing"),
        ({"payload": targets(unrecognized_fields={"more": 1})}, "has no further fields"),
        ({"previous": b"nonsense"}, "the rules could not be applied"),
    ],
)
def test_what_cannot_be_judged_is_refused(changes: dict[str, Any], why: str) -> None:
    reasons = reasons_against(request(content(1), content(1), **changes))
    assert len(reasons) == 1
    assert why in reasons[0]


def test_targets_that_are_no_files_of_a_release_are_refused() -> None:
    for wrong, why in (
        ("micro/x.model", "no file of a release"),
        ("micro/01.model", "no file of a release"),
        ("micro/1.sealed", "none of its paths"),
        ("micro/2.model", "micro/2.manifest is missing"),
        ("micro/a/1.model", "none of its paths"),
        ("other/1.model", "none of its paths"),
    ):
        value = json.loads(targets())
        value["targets"][wrong] = dict(value["targets"]["micro/1.model"])
        changed = CanonicalJSONSerializer().serialize(Targets.from_dict(value))
        reasons = reasons_against(request(None, content(1), payload=changed))
        assert len(reasons) == 1
        assert why in reasons[0], wrong
