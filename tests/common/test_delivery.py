"""Names and values of a repository: what one side writes, the other reads, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.delivery import ReleaseNote, Sealing, TierMark, key_path, mark_path, role_of, target_path, tier_of
from fedge.errors import FormatError
from fedge.manifest import MAX_VERSION

TIERS = st.text("abcxyz019_-", min_size=1, max_size=31).map("t".__add__)
VERSIONS = st.integers(0, MAX_VERSION)
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


@given(TIERS, VERSIONS, VERSIONS)
def test_a_mark_is_read_as_it_was_written(tier: str, floor: int, newest: int) -> None:
    mark = TierMark(tier, floor, newest)
    assert TierMark.from_json(mark.to_json()) == mark
    assert len(mark.to_bytes()) < 512
    assert tier_of(role_of(tier)) == tier


@given(
    st.integers(1, MAX_VERSION), DIGESTS, DIGESTS, st.none() | st.builds(Sealing, st.integers(1, 9), DIGESTS)
)
def test_a_note_is_read_as_it_was_written(
    version: int, manifest: str, lineage: str, sealing: Sealing | None
) -> None:
    note = ReleaseNote(version, manifest, lineage, sealing)
    assert ("sealing" in note.to_json()) == (sealing is not None)
    assert ReleaseNote.from_json(note.to_json()) == note


@given(ANYTHING)
def test_anything_else_is_refused(value: object) -> None:
    for kind in (TierMark, ReleaseNote):
        with pytest.raises(FormatError):
            kind.from_json(value)


MARK = TierMark("micro", 1, 2).to_json()
NOTE = ReleaseNote(1, "a" * 64, "b" * 64).to_json()


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        (TierMark, {**MARK, "schema": 2}, "update it"),
        (TierMark, {**MARK, "schema": True}, "update it"),
        (TierMark, {**MARK, "more": 1}, "'more' is unknown"),
        (TierMark, {"schema": 1, "tier": "micro", "floor": 1}, "'newest' is missing"),
        (TierMark, {**MARK, "floor": -1}, "must be an integer from 0"),
        (TierMark, {**MARK, "floor": True}, "must be an integer from 0"),
        (TierMark, {**MARK, "newest": 2**53}, "must be an integer from 0"),
        (TierMark, {**MARK, "tier": "../x"}, "lower-case letters"),
        (ReleaseNote, {**NOTE, "version": 0}, "must be an integer from 1"),
        (ReleaseNote, {**NOTE, "manifest": "A" * 64}, "must be a SHA-256"),
        (ReleaseNote, {**NOTE, "lineage": 7}, "must be a SHA-256"),
        (ReleaseNote, {**NOTE, "more": 7}, "'more' is unknown"),
        (ReleaseNote, {**NOTE, "sealing": 7}, "must be a mapping"),
        (ReleaseNote, {**NOTE, "sealing": {"format": 1}}, "'key' is missing"),
        (ReleaseNote, {**NOTE, "sealing": {"format": 1, "key": "a"}}, "must be a SHA-256"),
        (ReleaseNote, {**NOTE, "sealing": {"format": 0, "key": "a" * 64}}, "must be an integer from 1"),
        (ReleaseNote, {**NOTE, "sealing": {"format": 1, "key": "a" * 64, "more": 1}}, "'more' is unknown"),
    ],
)
def test_what_is_wrong_is_named(kind: Any, value: dict[str, Any], why: str) -> None:
    with pytest.raises(FormatError, match=why):
        kind.from_json(value)


def test_paths_have_two_parts_as_a_tiers_delegation_wants_them() -> None:
    assert mark_path("micro") == "micro/tier.json"
    assert target_path("micro", 8, "model") == "micro/8.model"
    assert key_path("micro", 8, "ab" * 32) == "keys/micro/8/" + "ab" * 32
    assert role_of("micro") == "tier-micro"
    assert [tier_of(role) for role in ("targets", "tier-", "tier-A", "micro")] == [None] * 4
    with pytest.raises(FormatError):
        target_path("micro", 0, "model")
    with pytest.raises(FormatError):
        mark_path("a/b")
    for device in ("ab", "../" + "ab" * 30 + "a", "AB" * 32):
        with pytest.raises(FormatError, match="hexadecimal"):
            key_path("micro", 8, device)
