"""What the specification of The Update Framework (1.0.34) says beyond the plain way, clause by clause."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.metadata import DelegatedRole, Delegations, MetaFile, SuccinctRoles, Targets
from tuf_repository import NOW, Repository

from fedge.errors import (
    DigestError,
    DowngradeError,
    ExpiredError,
    FormatError,
    SignatureError,
    TrustError,
)
from fedge_client.updater import Limits, Trust, Trusted

DAY = timedelta(days=1)
SECOND = timedelta(seconds=1)
KEYS = [CryptoSigner.generate_ed25519() for _ in range(8)]
Keys = tuple[tuple[int, ...], int, tuple[int, ...]]  # those named, the threshold, those that sign


@pytest.fixture
def repository() -> Repository:
    return Repository()


@pytest.fixture
def poll(tmp_path: Path, repository: Repository) -> Callable[..., Trusted]:
    def once(now: datetime = NOW, **options: Any) -> Trusted:
        trust = Trust(
            tmp_path / "metadata", repository.trusted_root, repository.fetch, clock=lambda: now, **options
        )
        return trust.refresh()

    return once


def kept(tmp_path: Path, role: str) -> int:
    return int(json.loads((tmp_path / "metadata" / f"{role}.json").read_bytes())["signed"]["version"])


# 5.3: roots. Each step: keys, threshold, signatures; the last one is accepted or not.

ROOTS: dict[str, tuple[bool, list[Keys]]] = {
    "another key, signed by both": (True, [((1,), 1, (1,)), ((2,), 1, (2, 1)), ((2,), 1, (2,))]),
    "further signatures do not matter": (True, [((1,), 1, (3, 1, 4)), ((2,), 1, (3, 2, 1, 4))]),
    "three of five in turns": (
        True,
        [((0, 1, 2, 3, 4), 3, (0, 2, 4)), ((0, 1, 2, 3, 4), 3, (0, 4, 1)), ((0, 1, 2, 3, 4), 3, (1, 2, 3))],
    ),
    "one of five replaced": (True, [((0, 1, 2, 3, 4), 3, (0, 2, 4)), ((0, 1, 3, 4, 5), 3, (0, 4, 1))]),
    "all replaced at once": (
        True,
        [((0, 1, 2), 2, (0, 1)), ((5, 6, 7), 2, (0, 2, 5, 6)), ((5, 6, 7), 2, (6, 7))],
    ),
    "the threshold rises": (True, [((1, 2, 3), 1, (1,)), ((1, 2, 3), 2, (1, 2))]),
    "the threshold falls": (
        True,
        [((1, 2, 3), 2, (1, 2)), ((1, 2, 3), 1, (1, 2)), ((1, 2, 3), 1, (3,))],
    ),
    "without the old key": (False, [((1,), 1, (1,)), ((2,), 1, (2, 3, 4))]),
    "without the new key": (False, [((1,), 1, (1,)), ((2,), 1, (1, 3, 4))]),
    "too few of the old keys": (False, [((0, 1, 2, 3, 4), 3, (0, 2, 4)), ((0, 1, 3, 4, 5), 3, (0, 4, 5))]),
    "too few of the new keys": (False, [((0, 1, 2, 3, 4), 3, (0, 2, 4)), ((0, 1, 3, 4, 5), 3, (0, 2, 4))]),
    "a rising threshold is the new one's": (False, [((1, 2, 3), 1, (1,)), ((1, 2, 3), 2, (2,))]),
    "a falling threshold is the old one's": (False, [((1, 2, 3), 2, (1, 2)), ((1, 2, 3), 1, (1,))]),
}


@pytest.mark.parametrize("chain", ROOTS)
def test_a_chain_of_roots_goes_as_far_as_old_and_new_keys_have_signed_it(
    repository: Repository, poll: Callable[..., Trusted], tmp_path: Path, chain: str
) -> None:
    accepted, steps = ROOTS[chain]
    repository.root.version = 0
    for named, threshold, signing in steps:
        set_keys(repository, "root", named, threshold)
        repository.keys["root"] = [KEYS[i] for i in signing]
        repository.publish_root()
    repository.trusted_root = repository.files["1.root.json"]
    if accepted:
        assert poll().versions()["root"] == len(steps)
    else:
        with pytest.raises(SignatureError):
            poll()
    assert kept(tmp_path, "root") == len(steps) - (not accepted)


def set_keys(repository: Repository, role: str, named: tuple[int, ...], threshold: int) -> None:
    for keyid in list(repository.root.roles[role].keyids):
        repository.root.revoke_key(keyid, role)
    for i in named:
        repository.root.add_key(KEYS[i].public_key, role)
    repository.root.roles[role].threshold = threshold


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
@pytest.mark.parametrize(
    ("named", "threshold", "signing", "accepted"),
    [((1, 2, 3, 4, 5), 3, (1, 5, 3), True), ((1, 2, 3, 4, 5), 3, (1, 5), False),
     ((1, 2), 3, (1, 2), False), ((1, 3, 4, 5, 6), 3, (1, 2, 4), False), ((1,), 1, (7, 1, 6), True)],
    ids=["three of five", "two of five", "more than there are", "one is another's", "further signatures"],
)  # fmt: skip
def test_a_role_needs_as_many_of_its_own_keys_as_its_threshold(
    repository: Repository,
    poll: Callable[..., Trusted],
    role: str,
    named: tuple[int, ...],
    threshold: int,
    signing: tuple[int, ...],
    accepted: bool,
) -> None:
    set_keys(repository, role, named, threshold)
    repository.publish_root()
    repository.keys[role] = [KEYS[i] for i in signing]
    repository.publish_targets()
    repository.publish()
    if accepted:
        assert poll().versions()[role] == 2
    else:
        with pytest.raises(SignatureError):
            poll()


def test_a_source_that_gives_the_trusted_root_once_more_has_no_newer_one(
    repository: Repository, poll: Callable[..., Trusted]
) -> None:
    repository.publish_root()
    repository.files["3.root.json"] = repository.files["2.root.json"]
    assert poll().versions()["root"] == 2
    repository.files["3.root.json"] = repository.files["1.root.json"]  # an older one is no such thing
    with pytest.raises(DowngradeError, match="Expected root version 3 instead got version 1"):
        poll()
    forged = repository.signed(repository.root, "root", [KEYS[0]])
    repository.files["3.root.json"] = forged  # nor one that others have signed
    with pytest.raises(SignatureError):
        poll()


def test_only_the_last_root_must_be_within_its_date(
    repository: Repository, poll: Callable[..., Trusted], tmp_path: Path
) -> None:
    repository.root.expires = NOW - DAY
    repository.publish_root()
    with pytest.raises(ExpiredError):
        poll()
    assert kept(tmp_path, "root") == 2
    repository.root.expires = NOW + DAY
    repository.publish_root()
    assert poll().versions()["root"] == 3
    fresh = Trust(tmp_path / "other", repository.files["2.root.json"], repository.fetch, clock=lambda: NOW)
    assert fresh.refresh().versions()["root"] == 3  # and the root that came with the device may be old


def test_a_date_is_past_at_its_very_second(repository: Repository, poll: Callable[..., Trusted]) -> None:
    repository.timestamp.expires = NOW + SECOND
    repository.publish_timestamp()
    poll(NOW)
    with pytest.raises(ExpiredError):
        poll(NOW + SECOND)


def test_the_time_of_a_poll_is_that_of_its_beginning(tmp_path: Path, repository: Repository) -> None:
    repository.delegate("targets", "tier-a", "a/*")
    repository.add("tier-a", "a/model", b"x")
    for payload in (repository.targets["tier-a"], repository.snapshot, repository.timestamp):
        payload.expires = NOW + SECOND
    repository.publish_targets("tier-a")
    repository.publish_targets()
    repository.publish()
    times = iter([NOW])  # asked once, however long it takes
    trust = Trust(
        tmp_path, repository.trusted_root, repository.fetch, clock=lambda: next(times, NOW + 9 * DAY)
    )
    assert trust.refresh().target("a/model")


def twin_of(key: CryptoSigner) -> CryptoSigner:
    """The same key under another name."""
    return CryptoSigner(key._private_key, SSlibKey.from_dict("ab" * 32, key.public_key.to_dict()))


def test_one_key_under_two_names_does_not_reach_a_threshold_of_two(
    repository: Repository, poll: Callable[..., Trusted], tmp_path: Path
) -> None:
    repository.delegate("targets", "tier-a", "a/*")
    delegated = repository.targets["targets"]
    twin = twin_of(repository.keys["tier-a"][0])
    delegated.add_key(twin.public_key, "tier-a")
    delegated.get_delegated_role("tier-a").threshold = 2
    repository.publish_targets("tier-a", [*repository.keys["tier-a"], twin])
    repository.publish_targets()
    repository.publish()
    with pytest.raises(TrustError, match="targets: names one key twice"):
        poll()
    twin = twin_of(repository.keys["snapshot"][0])
    repository.root.add_key(twin.public_key, "targets")  # in another role it is one key more
    repository.targets["targets"].delegations = None
    repository.publish_root()
    repository.publish_targets()
    repository.publish()
    assert poll().versions()["root"] == 2
    repository.root.add_key(twin.public_key, "snapshot")
    repository.root.roles["snapshot"].threshold = 2
    repository.publish_root()
    with pytest.raises(TrustError, match="root version 3: names one key twice"):
        poll()
    assert kept(tmp_path, "root") == 2


def in_capitals(public: str) -> str:
    return public.upper()


def after_a_line(public: str) -> str:
    return f"the same key\n{public}"


def with_its_point_compressed(public: str) -> str:
    point = load_pem_public_key(public.encode()).public_bytes(Encoding.X962, PublicFormat.CompressedPoint)  # type: ignore[union-attr]
    head = bytes.fromhex("3039301306072a8648ce3d020106082a8648ce3d030107032200")  # P-256, 33 bytes follow
    der = base64.encodebytes(head + point).decode()
    return f"-----BEGIN PUBLIC KEY-----\n{der}-----END PUBLIC KEY-----\n"


@pytest.mark.parametrize(
    ("make", "spelled"),
    [
        (CryptoSigner.generate_ed25519, in_capitals),
        (CryptoSigner.generate_ecdsa, after_a_line),
        (CryptoSigner.generate_ecdsa, with_its_point_compressed),
        (CryptoSigner.generate_rsa, after_a_line),
    ],
    ids=["ed25519 in capitals", "EC after a line", "EC compressed", "RSA after a line"],
)
def test_one_key_in_two_spellings_does_not_reach_a_threshold_of_two(
    repository: Repository,
    poll: Callable[..., Trusted],
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], CryptoSigner],
    spelled: Callable[[str], str],
) -> None:
    key, other = make(), make()
    value = key.public_key.to_dict()
    value["keyval"] = {"public": spelled(value["keyval"]["public"])}
    twin = CryptoSigner(key._private_key, SSlibKey.from_dict("cd" * 32, value))
    set_keys(repository, "timestamp", (), 2)
    for one in (key, other):
        repository.root.add_key(one.public_key, "timestamp")
    repository.keys["timestamp"] = [key, other]
    repository.publish_root()
    repository.publish_timestamp()
    assert poll().versions()["root"] == 2  # two keys are two
    repository.root.revoke_key(other.public_key.keyid, "timestamp")
    repository.root.add_key(twin.public_key, "timestamp")
    repository.keys["timestamp"] = [key, twin]
    repository.publish_root()
    repository.publish_timestamp()
    with pytest.raises(TrustError, match="root version 3: names one key twice"):
        poll()
    monkeypatch.setattr("fedge_client.updater.trust.check_keys", lambda *_: None)
    assert poll().versions()["root"] == 3  # both would verify


def test_keys_that_cannot_be_loaded_are_compared_as_they_are_written(
    repository: Repository, poll: Callable[..., Trusted]
) -> None:
    for name, public in (("ab" * 32, "no key"), ("cd" * 32, "no other key")):
        repository.root.add_key(
            SSlibKey(name, "ecdsa", "ecdsa-sha2-nistp256", {"public": public}), "timestamp"
        )
    repository.publish_root()
    assert poll().versions()["root"] == 2
    repository.root.add_key(
        SSlibKey("ef" * 32, "rsa", "rsassa-pss-sha256", {"public": "no\nkey"}), "timestamp"
    )
    repository.publish_root()
    with pytest.raises(TrustError, match="root version 3: names one key twice"):
        poll()


def test_a_root_that_was_kept_before_keys_were_compared_is_refused_until_its_publisher_mends_it(
    repository: Repository, poll: Callable[..., Trusted], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repository.publish_root()
    good = copy.deepcopy(repository.root)
    repository.root.add_key(twin_of(repository.keys["snapshot"][0]).public_key, "snapshot")
    repository.publish_root()
    repository.root = copy.deepcopy(good)
    repository.root.version = 3
    repository.publish_root()  # the last one is as it should be again
    with monkeypatch.context() as earlier:
        earlier.setattr("fedge_client.updater.trust.check_keys", lambda *_: None)
        assert poll().versions()["root"] == 4
    with pytest.raises(TrustError, match="root version 3: names one key twice"):
        poll()
    assert kept(tmp_path, "root") == 2
    repository.root = good
    repository.publish_root()
    assert poll().versions()["root"] == 4
    assert kept(tmp_path, "root") == 4


def test_a_poll_that_finds_nothing_new_leaves_the_link_to_the_newest_root_alone(
    repository: Repository, poll: Callable[..., Trusted], tmp_path: Path
) -> None:
    repository.publish_root()
    poll()
    before = (tmp_path / "metadata" / "root.json").lstat()
    poll()
    after = (tmp_path / "metadata" / "root.json").lstat()
    assert (before.st_ino, before.st_ctime_ns) == (after.st_ino, after.st_ctime_ns)


def test_a_root_with_a_key_of_an_unknown_kind_is_refused_with_the_kind(
    repository: Repository, poll: Callable[..., Trusted], tmp_path: Path
) -> None:
    key = SSlibKey("ab" * 32, "lattice", "lattice-9", {"public": "00"})
    repository.root.add_key(key, "timestamp")
    repository.publish_root()
    with pytest.raises(
        TrustError, match=r"metadata: 2\.root\.json: .*Unsupported public key lattice/lattice-9"
    ):
        poll()
    assert kept(tmp_path, "root") == 1


def test_one_key_that_signs_twice_counts_for_none(
    repository: Repository, poll: Callable[..., Trusted]
) -> None:
    set_keys(repository, "timestamp", (1, 2), 2)
    repository.publish_root()
    repository.keys["timestamp"] = [KEYS[1]]
    repository.publish_timestamp()
    value = json.loads(repository.files["timestamp.json"])
    value["signatures"] *= 2
    repository.files["timestamp.json"] = json.dumps(value).encode()
    with pytest.raises(TrustError):
        poll()


def test_fields_that_nobody_knows_are_signed_with_the_rest(
    repository: Repository, poll: Callable[..., Trusted]
) -> None:
    key = repository.root.roles["root"].keyids[0]
    repository.root.unrecognized_fields["new"] = "value"
    repository.root.keys[key].unrecognized_fields["new"] = {"a": [1, None, True]}
    repository.root.roles["root"].unrecognized_fields["new"] = "value"
    repository.publish_root()
    repository.targets["targets"].unrecognized_fields["new"] = {"b": "ä"}
    repository.publish_targets()
    repository.publish()
    assert poll().versions()["root"] == 2
    changed = repository.files["2.targets.json"].replace(b'"b"', b'"c"')
    repository.files["3.targets.json"] = changed.replace(b'"version":2', b'"version":3')
    repository.targets["targets"].version = 3
    repository.snapshot.meta["targets.json"] = MetaFile(3)
    repository.publish()
    with pytest.raises(TrustError):
        poll()


# 5.4 to 5.6: versions, and what a file is named by


def test_length_and_digests_of_metadata_may_be_left_out(
    repository: Repository, poll: Callable[..., Trusted]
) -> None:
    repository.publish_targets()
    repository.snapshot.meta["targets.json"] = MetaFile(2)
    repository.publish()
    repository.timestamp.snapshot_meta = MetaFile(repository.snapshot.version)
    repository.publish_timestamp()
    assert poll().versions()["targets"] == 2
    other = repository.signed(repository.targets["targets"], "targets")  # version 2, named as 3
    repository.files["3.targets.json"] = other
    repository.snapshot.meta["targets.json"] = MetaFile(3)
    repository.publish()
    with pytest.raises(DowngradeError):
        poll()


def test_a_snapshot_of_another_version_than_the_timestamp_says_is_refused(
    repository: Repository, poll: Callable[..., Trusted]
) -> None:
    repository.timestamp.snapshot_meta = MetaFile(2)
    repository.files["2.snapshot.json"] = repository.files["1.snapshot.json"]
    repository.publish_timestamp()
    with pytest.raises(DowngradeError):
        poll()


@pytest.mark.parametrize("algorithms", [{"sha256": False}, {"sha256": True, "sha512": False}])
def test_each_digest_of_metadata_that_is_named_must_be_right(
    repository: Repository, poll: Callable[..., Trusted], algorithms: dict[str, bool]
) -> None:
    data = repository.files["1.snapshot.json"]
    hashes = {
        name: hashlib.new(name, data if right else b"other").hexdigest() for name, right in algorithms.items()
    }
    repository.timestamp.snapshot_meta = MetaFile(1, len(data), hashes)
    repository.publish_timestamp()
    with pytest.raises(DigestError):
        poll()


def test_new_keys_of_the_snapshot_recover_from_very_high_versions_of_targets(
    repository: Repository, poll: Callable[..., Trusted]
) -> None:
    repository.targets["targets"].version = 10**6
    repository.put_targets("targets")
    repository.publish()
    poll()
    repository.targets["targets"].version = 1
    repository.publish_targets()
    repository.publish()
    with pytest.raises(DowngradeError):
        poll()
    repository.rotate("snapshot")
    repository.rotate("timestamp")
    repository.publish_root()
    repository.publish()
    assert poll().versions()["targets"] == 2


def test_a_role_stays_listed_once_it_was(repository: Repository, poll: Callable[..., Trusted]) -> None:
    repository.snapshot.meta["later.json"] = MetaFile(4)
    repository.publish()
    poll()
    repository.snapshot.meta["later.json"] = MetaFile(3)
    repository.publish()
    with pytest.raises(DowngradeError):
        poll()


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "root"])
def test_metadata_of_another_role_is_none_whoever_signed_it(
    repository: Repository, poll: Callable[..., Trusted], role: str
) -> None:
    set_keys(repository, "root", (0,), 1)
    for each in ("timestamp", "snapshot", "targets"):
        set_keys(repository, each, (0,), 1)
        repository.keys[each] = [KEYS[0]]
    repository.keys["root"] = [*repository.keys["root"], KEYS[0]]
    repository.publish_root()
    repository.publish_targets()
    repository.publish()
    assert poll().versions()["root"] == 2
    name = {"timestamp": "timestamp.json", "root": "3.root.json"}.get(role, f"3.{role}.json")
    other = repository.files["2.snapshot.json" if role != "snapshot" else "2.targets.json"]
    if role == "targets":
        repository.snapshot.meta["targets.json"] = MetaFile(3)
        repository.publish()
    elif role == "snapshot":
        repository.timestamp.snapshot_meta = MetaFile(3)
        repository.publish_timestamp()
    repository.files[name] = other
    with pytest.raises(TrustError):
        poll()


@pytest.mark.parametrize("version", ["2", "10.0.0", "x", "", 1])
def test_metadata_of_another_specification_is_refused(
    repository: Repository, poll: Callable[..., Trusted], version: object
) -> None:
    repository.timestamp.spec_version = version  # type: ignore[assignment]
    repository.publish_timestamp()
    with pytest.raises(TrustError):
        poll()


# 5.6.7: delegations


@pytest.mark.parametrize(
    ("pattern", "path", "found"),
    [("a/*", "a/model", True), ("a/*", "a/b/model", False), ("*", "a/model", False),
     ("a/?.bin", "a/1.bin", True), ("a/?.bin", "a/12.bin", False), ("*/*", "a/model", True),
     ("a/[0-9]", "a/5", True), ("a/*", "A/model", False), ("ä/*", "ä/modèle ☃", True),
     ("a/model", "a/model", True), ("a/*", "a/", True)],
)  # fmt: skip
def test_a_pattern_matches_within_one_folder(
    repository: Repository, poll: Callable[..., Trusted], pattern: str, path: str, found: bool
) -> None:
    repository.delegate("targets", "tier", pattern)
    repository.add("tier", path, b"x")
    repository.publish_targets("tier")
    repository.publish_targets()
    repository.publish()
    assert (poll().target(path) is not None) == found


def test_a_target_must_be_within_all_delegations_on_the_way(
    repository: Repository, poll: Callable[..., Trusted]
) -> None:
    repository.delegate("targets", "outer", "x/*")
    repository.delegate("outer", "inner", "*/*")
    for path in ("x/model", "y/model"):
        repository.add("inner", path, b"x")
    for role in ("inner", "outer", "targets"):
        repository.publish_targets(role)
    repository.publish()
    trusted = poll()
    assert trusted.target("x/model")
    assert trusted.target("y/model") is None


def test_prefixes_of_digests_lead_to_their_bin(repository: Repository, poll: Callable[..., Trusted]) -> None:
    path = "a/model"
    digest = hashlib.sha256(path.encode()).hexdigest()
    other = f"{(int(digest[0], 16) + 1) % 16:x}"
    for role, prefix in (("right", digest[:2]), ("wrong", other)):
        repository.delegate("targets", role, "*", terminating=False)
        delegations = repository.targets["targets"].delegations
        assert delegations is not None
        assert delegations.roles is not None
        keys = delegations.roles[role].keyids
        delegations.roles[role] = DelegatedRole(role, keys, 1, False, None, [prefix])
        repository.add(role, path, role.encode())
        repository.publish_targets(role)
    repository.publish_targets()
    repository.publish()
    found = poll().target(path)
    assert found is not None
    assert found.sha256 == hashlib.sha256(b"right").hexdigest()


def test_succinct_bins_are_found(repository: Repository, poll: Callable[..., Trusted]) -> None:
    key = CryptoSigner.generate_ed25519()
    succinct = SuccinctRoles([], 1, 4, "bin")
    repository.targets["targets"].delegations = Delegations({}, None, succinct)
    repository.targets["targets"].add_key(key.public_key)
    for role in succinct.get_roles():
        repository.keys[role] = [key]
        repository.targets[role] = Targets(expires=repository.expires)
    where = succinct.get_role_for_target("a/model")
    repository.add(where, "a/model", b"x")
    for role in succinct.get_roles():
        repository.put_targets(role)
    repository.publish_targets()
    repository.publish()
    assert poll().target("a/model")
    assert repository.requests[-1] == f"1.{where}.json"


def test_a_terminating_delegation_ends_the_search_though_a_later_role_has_it(
    repository: Repository, poll: Callable[..., Trusted]
) -> None:
    repository.delegate("targets", "first", "a/*", terminating=True)
    repository.delegate("targets", "second", "a/*")
    repository.add("second", "a/model", b"x")
    for role in ("first", "second", "targets"):
        repository.publish_targets(role)
    repository.publish()
    assert poll().target("a/model") is None


def test_the_first_role_that_has_a_target_is_heard(
    repository: Repository, poll: Callable[..., Trusted]
) -> None:
    for role in ("first", "second"):
        repository.delegate("targets", role, "a/*", terminating=False)
        repository.add(role, "a/model", role.encode())
        repository.publish_targets(role)
    repository.publish_targets()
    repository.publish()
    found = poll().target("a/model")
    assert found is not None
    assert found.sha256 == hashlib.sha256(b"first").hexdigest()


def test_a_role_that_cannot_be_verified_on_the_way_ends_the_search(
    repository: Repository, poll: Callable[..., Trusted]
) -> None:
    repository.delegate("targets", "first", "a/*", terminating=False)
    repository.delegate("targets", "second", "a/*", terminating=False)
    repository.add("second", "a/model", b"x")
    repository.publish_targets("first", [KEYS[0]])
    repository.publish_targets("second")
    repository.publish_targets()
    repository.publish()
    with pytest.raises(SignatureError):
        poll().target("a/model")


def test_a_delegated_role_that_no_snapshot_names_is_refused(
    repository: Repository, poll: Callable[..., Trusted]
) -> None:
    repository.delegate("targets", "tier", "a/*")
    repository.publish_targets()
    del repository.snapshot.meta["tier.json"]
    repository.publish()
    with pytest.raises(TrustError, match="snapshot"):
        poll().target("a/model")


def test_a_target_with_several_digests_is_looked_for_by_its_sha256(
    repository: Repository, poll: Callable[..., Trusted]
) -> None:
    repository.add("targets", "a/model", b"x")
    repository.targets["targets"].targets["a/model"].hashes = {
        "sha512": hashlib.sha512(b"x").hexdigest(),
        "sha256": hashlib.sha256(b"x").hexdigest(),
    }
    repository.publish_targets()
    repository.publish()
    found = poll().target("a/model")
    assert found is not None
    assert found.file == f"a/{hashlib.sha256(b'x').hexdigest()}.model"


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_no_role_is_longer_than_its_limit_though_it_is_signed(
    repository: Repository, poll: Callable[..., Trusted], role: str
) -> None:
    payload: Any = getattr(repository, role) if role != "targets" else repository.targets["targets"]
    payload.unrecognized_fields["long"] = "x" * 5000
    repository.publish_root()
    repository.publish_targets()
    repository.publish()
    with pytest.raises(FormatError, match="more than the 4000 bytes"):
        poll(limits=Limits(**{f"{role}_bytes": 4000}))
