from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import FormatError, TrustError
from fedge.manifest import MAX_BYTES, Lineage, Release, VariantEntry
from fedge.spec import Spec

SPEC = Spec("image", (8, 8), "uint8", ("no", "yes"))
LINEAGE = Lineage("run-1", 7, "a" * 64, "b" * 64)
ENTRY = VariantEntry(
    "micro", "distil + int8", "c" * 64, 100, "d" * 64, 400, "e" * 64, "f" * 64, {"drop_upper": 0.008}
)
RELEASE = Release(
    version=3, task="digits", created="2026-01-31T12:00:00Z", spec=SPEC, lineage=LINEAGE, variants=(ENTRY,)
)

HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
WORDS = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=8)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
RELEASES = st.builds(
    Release,
    version=st.integers(1, 2**53 - 1),
    task=WORDS,
    created=st.datetimes().map(lambda moment: moment.strftime("%Y").zfill(4) + "-02-28T23:59:59Z"),
    spec=st.lists(WORDS, min_size=2, max_size=5, unique=True).map(
        lambda labels: Spec("features", (3,), "float32", tuple(labels), ("a", "b", "c"))
    ),
    lineage=st.builds(Lineage, WORDS, st.integers(0, 10**6), HEX, HEX),
    variants=st.lists(
        st.builds(
            VariantEntry,
            st.from_regex(r"[a-z][a-z0-9_-]{0,31}", fullmatch=True),
            WORDS,
            HEX,
            st.integers(1, 2**31 - 1),
            HEX,
            st.integers(1, 2**31 - 1),
            HEX,
            HEX,
            st.dictionaries(WORDS, JSON, max_size=3),
        ),
        min_size=1,
        max_size=3,
        unique_by=lambda entry: entry.tier,
    ).map(tuple),
)


@pytest.mark.slow
@settings(max_examples=20)
@given(RELEASES)
def test_a_release_read_back_is_the_one_written(release: Release) -> None:
    assert Release.from_bytes(release.to_bytes()) == release


def test_the_bytes_are_those_worked_by_hand() -> None:
    assert RELEASE.to_bytes().decode() == (
        '{"created":"2026-01-31T12:00:00Z",'
        f'"lineage":{{"global_model":"{"a" * 64}","round":7,"run":"run-1","updates":"{"b" * 64}"}},'
        '"schema":1,'
        '"spec":{"dtype":"uint8","features":[],"kind":"image","labels":["no","yes"],"shape":[8,8]},'
        '"task":"digits","variants":[{"evidence":{"drop_upper":0.008},'
        f'"evidence_sha256":"{"e" * 64}","golden_sha256":"{"f" * 64}",'
        f'"installed_bytes":400,"installed_sha256":"{"d" * 64}",'
        f'"recipe":"distil + int8","tier":"micro",'
        f'"wire_bytes":100,"wire_sha256":"{"c" * 64}"}}],"version":3}}'
    )


def test_a_reference_is_named_only_where_there_is_one() -> None:
    named = replace(RELEASE, variants=(replace(ENTRY, reference_sha256="9" * 64),))
    assert f'"recipe":"distil + int8","reference_sha256":"{"9" * 64}","tier"' in named.to_bytes().decode()
    assert Release.from_bytes(named.to_bytes()) == named
    for wrong, why in (("", "not in canonical form"), ("no digest", "64 lower-case hexadecimal digits")):
        with pytest.raises(FormatError, match=why):
            Release.from_bytes(changed("variants.0.reference_sha256", wrong))


def test_a_tier_finds_its_variant_or_learns_which_there_are() -> None:
    assert RELEASE.variant("micro") is ENTRY
    with pytest.raises(TrustError, match="release 3 has no variant for tier 'mega'; it has: micro"):
        RELEASE.variant("mega")


def changed(path: str, value: Any) -> bytes:
    """The manifest with one value replaced (or, with ..., removed), canonically spelt."""
    document: Any = json.loads(RELEASE.to_bytes())
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = document
    for part in parents:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("schema", 2, "schema 2 is unknown; this fedge reads schema 1"),
        ("schema", True, "schema True"),
        ("schema", ..., "schema None"),
        ("version", 0, "version = 0; it must be an integer from 1"),
        ("version", True, "version = True"),
        ("version", 1.0, r"version = 1\.0"),
        ("version", "3", "version = '3'"),
        ("version", 2**53, "version = 9007199254740992"),
        ("task", "", "task = ''"),
        ("task", "a\x1b[2J", "printable"),
        ("task", ["digits"], "task = "),
        ("created", "2026-01-31", "write it as"),
        ("created", "2026-02-31T12:00:00Z", "write it as"),
        ("created", "2026-01-31T12:00:00+01:00", "write it as"),
        ("created", 5, "write it as"),
        ("spec", None, "spec"),
        ("spec.labels", "ab", "spec: malformed"),
        ("spec.shape", [2**40, 2**40], "larger than"),
        ("spec.extra", 1, "canonical"),
        ("spec.features", ..., "canonical"),
        ("lineage", [], "lineage must be an object"),
        ("lineage.round", -1, "lineage.round = -1"),
        ("lineage.updates", "B" * 64, "lineage.updates"),
        ("lineage.updates", ..., "lineage: field 'updates' is missing"),
        ("lineage.more", 1, "lineage: field 'more' is unknown"),
        ("more", 1, "manifest: field 'more' is unknown"),
        ("variants", {}, "variants must be a list"),
        ("variants", [], "0 variants"),
        ("variants.0", 5, r"variants\[0\] must be an object"),
        ("variants.0.tier", "../etc", "tier '../etc'"),
        ("variants.0.tier", 5, "tier 5"),
        ("variants.0.wire_sha256", "c" * 63, "wire_sha256"),
        ("variants.0.wire_sha256", "/" * 64, "wire_sha256"),
        ("variants.0.wire_bytes", -1, "wire_bytes = -1"),
        ("variants.0.installed_bytes", 2**31, "installed_bytes"),
        ("variants.0.evidence", [], "evidence"),
        ("variants.0.evidence", {"a": "x" * 20_000}, "over 16384"),
        ("variants.0.recipe", ..., r"variants\[0\]: field 'recipe' is missing"),
    ],
)
def test_each_wrong_field_is_named(path: str, value: Any, line: str) -> None:
    with pytest.raises(FormatError, match=line) as caught:
        Release.from_bytes(changed(path, value))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "data",
    [
        b"", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b" " * (MAX_BYTES + 1), b'{"schema":1}',
        RELEASE.to_bytes() + b" ",
        RELEASE.to_bytes().replace(b'"version":3', b'"version":3,"version":3'),
        RELEASE.to_bytes().replace(b'"digits"', b'"\\u0064igits"'),
        RELEASE.to_bytes().replace(b":3}", b":3e0}"),
        RELEASE.to_bytes().replace(b"0.008", b"NaN"), RELEASE.to_bytes().replace(b'"digits"', b'"\\ud800"'),
        RELEASE.to_bytes().replace(b":3}", b":" + b"9" * 5000 + b"}"),
        RELEASE.to_bytes().replace(b'"no"', b'"\\ud800"'),
    ],
)  # fmt: skip
def test_any_other_spelling_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        Release.from_bytes(data)
    assert "\n" not in str(caught.value)


def test_every_truncation_is_refused() -> None:
    data = RELEASE.to_bytes()
    for length in range(len(data)):
        with pytest.raises(FormatError):
            Release.from_bytes(data[:length])


@given(st.data())
def test_flipped_bits_are_refused_or_give_another_release(data: st.DataObject) -> None:
    bad = bytearray(RELEASE.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        release = Release.from_bytes(bytes(bad))
    except FormatError:
        return
    assert release.to_bytes() == bytes(bad)


@pytest.mark.parametrize(
    "evidence",
    [{"a": float("nan")}, {"a": (1, 2)}, {1: "a"}, {"a": {"b": [object()]}}, {"a": b"x"}, {"a": "\ud800"}],
)
def test_evidence_that_json_would_change_is_refused(evidence: Any) -> None:
    with pytest.raises(FormatError):
        replace(ENTRY, evidence=evidence)


def test_a_tier_occurs_once() -> None:
    with pytest.raises(FormatError, match="each tier named once"):
        replace(RELEASE, variants=(ENTRY, ENTRY))
