"""What a device trusts: the whole workflow of The Update Framework over a fetcher of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf_repository import NOW, YEAR, Repository

from fedge import files
from fedge.errors import (
    AbsentError,
    DigestError,
    DowngradeError,
    ExpiredError,
    FedgeError,
    FetchError,
    ForbiddenError,
    FormatError,
    SignatureError,
    TrustError,
)
from fedge_client.updater import Fetcher, Limits, Pace, Trust, Trusted, within

DAY = timedelta(days=1)


@pytest.fixture
def repository() -> Repository:
    return Repository()


class Client:
    """A device's folder, polled again and again."""

    def __init__(self, folder: Path, repository: Repository) -> None:
        self.folder, self.repository = folder, repository
        self.root = repository.trusted_root
        self.fetch: Fetcher = repository.fetch

    def poll(self, now: datetime = NOW, **options: Any) -> Trusted:
        return Trust(self.folder, self.root, self.fetch, clock=lambda: now, **options).refresh()

    def version(self, role: str) -> int:
        version = json.loads((self.folder / f"{role}.json").read_bytes())["signed"]["version"]
        return int(version)


@pytest.fixture
def client(tmp_path: Path, repository: Repository) -> Client:
    return Client(tmp_path / "metadata", repository)


# The order of things


def test_a_first_poll_asks_for_exactly_what_the_specification_says(client: Client) -> None:
    assert client.poll().versions() == {"root": 1, "timestamp": 1, "snapshot": 1, "targets": 1}
    assert client.repository.requests == [
        "2.root.json", "timestamp.json", "1.snapshot.json", "1.targets.json",
    ]  # fmt: skip


def test_a_poll_that_finds_nothing_new_asks_for_two_files_and_writes_none(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.poll()
    client.repository.requests.clear()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # so a full disk does not matter either
    client.poll()
    assert client.repository.requests == ["2.root.json", "timestamp.json"]


def test_a_target_is_found_with_what_its_signers_say_of_it(client: Client) -> None:
    client.repository.add("targets", "a/model", b"12345", {"floor": 3})
    client.repository.publish_targets()
    client.repository.publish()
    found = client.poll().target("a/model")
    assert found is not None
    assert (found.path, found.length, found.custom) == ("a/model", 5, {"floor": 3})
    assert found.sha256 == files.sha256(b"12345")
    assert client.poll().target("a/other") is None
    assert client.repository.files[found.file] == b"12345"


def test_names_below_a_folder_are_asked_for_there(client: Client) -> None:
    asked = []

    def fetch(name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        asked.append(name)
        return client.repository.fetch(name.removeprefix("metadata/"), maximum, offset)

    client.fetch = within("metadata", fetch)
    client.poll()
    assert asked[1] == "metadata/timestamp.json"


# Roots


def test_a_root_chain_is_walked_kept_and_not_walked_again(client: Client) -> None:
    for _ in range(3):
        old = client.repository.rotate("root")
        client.repository.publish_root(old)
    assert client.poll().versions()["root"] == 4
    client.repository.requests.clear()
    assert client.poll().versions()["root"] == 4
    assert client.repository.requests[0] == "5.root.json"
    assert (client.folder / "root_history" / "4.root.json").exists()


@pytest.mark.parametrize("damage", ["lost", "dangling", "empty", "a file", "all history"])
def test_a_lost_root_link_or_a_damaged_history_does_not_stop_a_device(client: Client, damage: str) -> None:
    old = client.repository.rotate("root")
    client.repository.publish_root(old)
    client.poll()
    link = client.folder / "root.json"
    link.unlink()
    if damage == "dangling":
        link.symlink_to("root_history/9.root.json")
    elif damage == "empty":
        (client.folder / "root_history" / "2.root.json").write_bytes(b"")
    elif damage == "a file":
        link.write_bytes(b"{")
    elif damage == "all history":
        for path in (client.folder / "root_history").iterdir():
            path.unlink()
    assert client.poll().versions()["root"] == 2
    assert client.version("root") == 2


@pytest.mark.parametrize("new_is_missing", [False, True])
def test_a_root_must_be_signed_by_the_old_keys_and_by_its_own(client: Client, new_is_missing: bool) -> None:
    old = client.repository.rotate("root")
    if new_is_missing:
        client.repository.keys["root"] = [old]
    client.repository.publish_root()
    with pytest.raises(SignatureError, match="not signed by enough"):
        client.poll()


def test_a_root_whose_threshold_is_not_reached_is_refused(client: Client) -> None:
    client.repository.root.roles["root"].threshold = 2
    second = CryptoSigner.generate_ed25519()
    client.repository.root.add_key(second.public_key, "root")
    client.repository.publish_root()
    with pytest.raises(SignatureError):
        client.poll()
    client.repository.root.version -= 1
    client.repository.publish_root(second)
    assert client.poll().versions()["root"] == 2


def test_a_root_that_skips_a_version_is_refused(client: Client) -> None:
    client.repository.publish_root()
    client.repository.publish_root()
    client.repository.files["2.root.json"] = client.repository.files["3.root.json"]
    with pytest.raises(DowngradeError, match="Expected root version 2"):
        client.poll()


@pytest.mark.parametrize("root", [b"", b"{}", b"[" * 5000, b"\xff"])
def test_a_trusted_root_that_is_none_is_refused_before_anything_is_fetched(
    client: Client, root: bytes
) -> None:
    client.root = root
    with pytest.raises(TrustError):
        client.poll()
    assert client.repository.requests == []


def test_an_unsigned_trusted_root_is_refused_before_anything_is_fetched(client: Client) -> None:
    value = json.loads(client.root)
    value["signatures"][0]["sig"] = "00" * 64
    client.root = json.dumps(value).encode()
    with pytest.raises(SignatureError):
        client.poll()
    assert client.repository.requests == []


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_rotated_key_counts_and_the_old_one_does_not(client: Client, role: str) -> None:
    client.poll()
    old = client.repository.rotate(role)
    client.repository.publish_root()
    new, client.repository.keys[role] = client.repository.keys[role], [old]
    client.repository.publish_targets()
    client.repository.publish()
    with pytest.raises(SignatureError):
        client.poll()
    client.repository.keys[role] = new
    client.repository.publish_targets()
    client.repository.publish()
    assert client.poll().versions()["root"] == 2


@pytest.mark.parametrize("role", ["timestamp", "snapshot"])
def test_new_keys_recover_from_a_thief_who_signed_very_high_versions(client: Client, role: str) -> None:
    repository = client.repository
    repository.timestamp.version = repository.snapshot.version = 10**6
    repository.publish()
    client.poll()
    for each in ("timestamp", "snapshot"):
        repository.rotate(each)
    repository.publish_root()
    payload = repository.snapshot if role == "snapshot" else repository.timestamp
    payload.version = 5
    if role == "snapshot":
        repository.timestamp.version = 5
    repository.publish()
    assert client.poll().versions()[role] == 6


# Dates


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_expired_metadata_is_refused_and_the_message_names_the_clock(client: Client, role: str) -> None:
    repository = client.repository
    client.poll()
    role_of: dict[str, Any] = {**vars(repository), "targets": repository.targets["targets"]}
    role_of[role].expires = NOW - DAY
    repository.publish_root()
    repository.publish_targets()
    repository.publish()
    with pytest.raises(ExpiredError, match=r"expired.*clock says 2026-03-01 12:00 UTC"):
        client.poll()
    assert client.version("root") == 2  # a newer root is kept all the same: it may be the way out
    assert client.version("targets") == 1


def test_what_expired_on_the_device_is_still_the_way_to_what_is_newer(client: Client) -> None:
    repository = client.repository
    repository.timestamp.expires = NOW + 7 * DAY
    repository.publish()
    client.poll()
    repository.timestamp.expires = NOW + 21 * DAY
    repository.publish_targets()
    repository.publish()
    assert client.poll(NOW + 18 * DAY).versions()["targets"] == 2


def test_an_expired_tier_role_is_refused_on_the_server_and_in_the_folder(client: Client) -> None:
    repository = client.repository
    repository.delegate("targets", "tier-a", "a/*")
    repository.targets["tier-a"].expires = NOW + 7 * DAY
    repository.add("tier-a", "a/model", b"x")
    repository.publish_targets("tier-a")
    repository.publish_targets()
    repository.publish()
    assert client.poll().target("a/model")
    late = client.poll(NOW + 18 * DAY)
    with pytest.raises(ExpiredError, match="tier-a is expired"):
        late.target("a/model")
    repository.targets["tier-a"].expires = NOW + 21 * DAY
    repository.publish_targets("tier-a")
    repository.publish()
    assert client.poll(NOW + 18 * DAY).target("a/model")


@pytest.mark.parametrize(("lifetime", "wrong", "works"), [(2, 1, True), (2, -1, True), (0.5, 1, False)])
def test_a_clock_a_day_wrong_is_no_matter_with_timestamps_of_two_days(
    client: Client, lifetime: float, wrong: int, works: bool
) -> None:
    client.repository.timestamp.expires = NOW + lifetime * DAY
    client.repository.publish_timestamp()
    if works:
        client.poll(NOW + wrong * DAY)
    else:
        with pytest.raises(ExpiredError, match="set the clock if it is wrong"):
            client.poll(NOW + wrong * DAY)
    client.poll()


def test_a_clock_without_a_time_zone_is_refused(client: Client) -> None:
    with pytest.raises(FormatError, match="without a time zone"):
        client.poll(datetime(2026, 3, 1))  # noqa: DTZ001 - the test is about one


# Old and mixed metadata


def test_an_old_timestamp_an_old_snapshot_and_old_targets_are_refused(client: Client) -> None:
    repository = client.repository
    before = dict(repository.files)
    repository.publish_targets()
    repository.publish()
    client.poll()
    repository.files["timestamp.json"] = before["timestamp.json"]
    with pytest.raises(DowngradeError, match="older than what this device has seen"):
        client.poll()
    repository.snapshot.version = 0
    repository.publish()  # a new timestamp for snapshot 1
    with pytest.raises(DowngradeError):
        client.poll()
    repository.snapshot.version = 2
    repository.targets["targets"].version = 1
    repository.put_targets("targets")
    repository.publish()  # a new snapshot for targets 1
    with pytest.raises(DowngradeError):
        client.poll()
    assert client.version("targets") == 2


def test_a_snapshot_that_leaves_a_role_out_is_refused(client: Client) -> None:
    repository = client.repository
    repository.delegate("targets", "tier-a", "a/*")
    repository.publish_targets()
    repository.publish()
    client.poll()
    del repository.snapshot.meta["tier-a.json"]
    repository.publish()
    with pytest.raises(TrustError, match=r"missing info for 'tier-a\.json'"):
        client.poll()


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_parts_of_two_publications_do_not_mix(client: Client, role: str) -> None:
    repository = client.repository
    first = repository.files[f"1.{role}.json"]
    repository.publish_targets()
    repository.publish()
    repository.files[f"2.{role}.json"] = first
    with pytest.raises(DigestError, match="not the file that was signed"):
        client.poll()


def test_a_timestamp_of_the_same_version_with_other_content_changes_nothing(client: Client) -> None:
    client.poll()
    kept = (client.folder / "timestamp.json").read_bytes()
    client.repository.timestamp.expires = YEAR + DAY
    client.repository.files["timestamp.json"] = client.repository.signed(
        client.repository.timestamp, "timestamp"
    )
    client.poll()
    assert (client.folder / "timestamp.json").read_bytes() == kept


# Tiers


def tiers(repository: Repository) -> None:
    for tier in ("a", "b"):
        repository.delegate("targets", f"tier-{tier}", f"{tier}/*")
        repository.add(f"tier-{tier}", f"{tier}/model", tier.encode())
        repository.publish_targets(f"tier-{tier}")
    repository.publish_targets()
    repository.publish()


def test_a_tier_role_forged_with_all_online_keys_is_refused(client: Client) -> None:
    repository = client.repository
    tiers(repository)
    repository.add("tier-a", "a/model", b"bad")
    repository.publish_targets("tier-a", [*repository.keys["snapshot"], *repository.keys["timestamp"]])
    repository.publish()
    with pytest.raises(SignatureError):
        client.poll().target("a/model")


def test_a_tier_role_signed_with_another_tiers_key_is_refused(client: Client) -> None:
    repository = client.repository
    tiers(repository)
    repository.publish_targets("tier-a", repository.keys["tier-b"])
    repository.publish()
    with pytest.raises(SignatureError):
        client.poll().target("a/model")
    assert client.poll().target("b/model")


def test_a_tiers_role_cannot_speak_of_another_tiers_files(client: Client) -> None:
    repository = client.repository
    tiers(repository)
    repository.add("tier-b", "a/extra", b"bad")
    repository.add("tier-b", "a/model", b"bad")
    repository.publish_targets("tier-b")
    repository.publish()
    trusted = client.poll()
    assert trusted.target("a/extra") is None
    found = trusted.target("a/model")
    assert found is not None
    assert found.sha256 == files.sha256(b"a")


def test_a_role_trusted_under_one_delegator_does_not_serve_another(client: Client) -> None:
    repository = client.repository
    repository.delegate("targets", "one", "1/*")
    repository.delegate("targets", "two", "2/*")
    repository.delegate("one", "shared", "1/*")
    repository.delegate("two", "shared", "2/*")  # with another key
    repository.add("shared", "1/model", b"x")
    repository.add("shared", "2/model", b"x")
    for role in ("shared", "one", "two", "targets"):
        repository.publish_targets(role)
    repository.publish()
    trusted = client.poll()
    assert trusted.target("1/model")
    with pytest.raises(TrustError, match="a role name has one delegator"):
        trusted.target("2/model")
    with pytest.raises(SignatureError):  # in the folder, for a new poll, it serves no other either
        client.poll().target("2/model")
    repository.put_targets("shared", repository.keys["two>shared"])
    repository.publish()
    assert client.poll().target("2/model")
    with pytest.raises(SignatureError):
        client.poll().target("1/model")


GRAPHS = {
    "one": ([("targets", "A")], ["A"]),
    "in order of appearance": ([("targets", "A"), ("targets", "B")], ["A", "B"]),
    "depth first": ([("targets", "A"), ("targets", "B"), ("A", "C"), ("A", "D")], ["A", "C", "D", "B"]),
    "a cycle": (
        [("targets", "A"), ("targets", "B"), ("B", "C"), ("C", "D"), ("D", "B")], ["A", "B", "C", "D"],
    ),
    "a third one twice": ([("targets", "A"), ("targets", "B"), ("B", "C"), ("A", "C")], ["A", "C", "B"]),
    "a terminating one": (
        [("targets", "A"), ("targets", "B"), ("A", "C", "*", True), ("A", "D")], ["A", "C"],
    ),
    "below a terminating one": (
        [("targets", "A"), ("targets", "B"), ("A", "C", "*", True), ("C", "D")], ["A", "C", "D"],
    ),
    "other paths": ([("targets", "A", "*.py"), ("targets", "B"), ("A", "C")], ["B"]),
}  # fmt: skip


@pytest.mark.parametrize("graph", GRAPHS)
def test_delegations_are_searched_depth_first_in_order(client: Client, graph: str) -> None:
    edges, order = GRAPHS[graph]
    for delegator, role, *rest in edges:
        path, terminating = [*rest, "*", False][:2] if len(rest) < 2 else rest
        client.repository.delegate(delegator, role, str(path), terminating=terminating is True)
    for role in client.repository.targets:
        keys = [key for name, (key,) in client.repository.keys.items() if name.endswith(f">{role}")]
        client.repository.publish_targets(role, keys or None)
    client.repository.publish()
    trusted = client.poll()
    client.repository.requests.clear()
    assert trusted.target("missing") is None
    assert client.repository.requests == [f"2.{role}.json" for role in order]


@pytest.mark.parametrize("role", ["?", "#", "/delegated", "../delegated", ".."])
def test_an_unusual_role_name_is_quoted_and_stays_in_the_folder(client: Client, role: str) -> None:
    client.repository.delegate("targets", role, "*")
    client.repository.publish_targets()
    client.repository.publish()
    assert client.poll().target("missing") is None
    names = {path.name for path in client.folder.iterdir() if path.suffix == ".json"}
    assert len(names) == 5
    assert not list(client.folder.parent.glob("*.json"))


def test_no_more_roles_are_visited_and_no_more_roots_followed_than_the_limits_say(client: Client) -> None:
    repository = client.repository
    for i in range(9):
        repository.delegate("targets", f"r{i}", "*", terminating=False)
    repository.publish_targets()
    repository.publish()
    trusted = client.poll(limits=Limits(delegations=3))
    repository.requests.clear()
    assert trusted.target("missing") is None
    assert len(repository.requests) == 3
    for _ in range(4):
        repository.publish_root()
    assert client.poll(limits=Limits(rotations=2)).versions()["root"] == 3
    with pytest.raises(FormatError, match="rotations is 0"):
        Limits(rotations=0)


def test_a_repository_without_consistent_snapshots_is_asked_for_plain_names(client: Client) -> None:
    repository = client.repository
    repository.root.consistent_snapshot = False
    repository.publish_root()
    repository.add("targets", "a/model", b"12345")
    repository.publish_targets()
    repository.publish()
    for role in ("snapshot", "targets"):
        repository.files[f"{role}.json"] = repository.files[f"2.{role}.json"]
    found = client.poll().target("a/model")
    assert found is not None
    assert found.file == "a/model"
    assert repository.requests[-2:] == ["snapshot.json", "targets.json"]


# Hostile and broken transports


@pytest.mark.parametrize("name", ["2.root.json", "timestamp.json", "1.snapshot.json", "1.targets.json"])
def test_an_endless_file_is_cut_whatever_length_online_keys_sign(client: Client, name: str) -> None:
    given = 0

    def fetch(asked: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        nonlocal given
        if asked != name:
            yield from client.repository.fetch(asked, maximum, offset)
            return
        while given < 64 * 1024**2:  # as good as endless, and what does not cut it fails soon
            given += 4096
            yield bytes(4096)

    client.fetch = fetch
    if name == "1.snapshot.json":
        client.repository.timestamp.snapshot_meta.length = 10**12
        client.repository.publish_timestamp()
    with pytest.raises(FormatError, match="more than the"):
        client.poll()
    assert given <= 512 * 1024 + 4096


@pytest.mark.parametrize("name", ["timestamp.json", "1.snapshot.json", "1.targets.json"])
@pytest.mark.parametrize("change", [lambda d: d[:-9], lambda d: b"", lambda d: d.replace(b"_type", b"_tyqe")])
def test_a_short_an_empty_and_a_damaged_file_are_refused(
    client: Client, name: str, change: Callable[[bytes], bytes]
) -> None:
    client.repository.files[name] = change(client.repository.files[name])
    with pytest.raises(TrustError):
        client.poll()


class Status:
    def __init__(self, name: str) -> None:
        self.name = name


class CallError(Exception):
    """As a gRPC call raises: the status is behind a method."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._name = name

    def code(self) -> Status:
        return Status(self._name)


class HttpError(OSError):
    def __init__(self, code: int) -> None:
        super().__init__(f"status {code}")
        self.code = code


class StatusError(OSError):
    """As aiohttp raises, and python-tuf's fetchers; requests and httpx have it in a response."""

    def __init__(self, where: str, status: int) -> None:
        super().__init__(f"status {status}")
        first, _, second = where.partition(".")
        setattr(self, first, SimpleNamespace(**{second: status}) if second else status)


def failing(client: Client, name: str, error: Exception, after: bytes = b"") -> Fetcher:
    def fetch(asked: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        if asked == name:  # a generator: nothing is raised before the first chunk is asked for
            if after:
                yield after
            raise error
        yield from client.repository.fetch(asked, maximum, offset)

    return fetch


@pytest.mark.parametrize(
    "error",
    [CallError("NOT_FOUND"), CallError("PERMISSION_DENIED"), HttpError(404), HttpError(403),
     StatusError("status", 404), StatusError("status_code", 403), StatusError("response.status_code", 404),
     AbsentError("gone"), ForbiddenError("not yours"), FileNotFoundError(2, "no such file")],
)  # fmt: skip
def test_only_a_source_that_says_so_ends_the_chain_of_roots(client: Client, error: Exception) -> None:
    client.fetch = failing(client, "2.root.json", error)
    assert client.poll().versions()["root"] == 1


@pytest.mark.parametrize(
    "error",
    [
        CallError("UNAVAILABLE"),
        HttpError(503),
        StatusError("response.status_code", 500),
        TimeoutError("slow"),
        RuntimeError("odd"),
    ],
)
@pytest.mark.parametrize("after", [b"", b"{"])
def test_an_outage_does_not_freeze_the_chain_of_roots(client: Client, error: Exception, after: bytes) -> None:
    old = client.repository.rotate("root")
    client.repository.publish_root(old)
    client.fetch = failing(client, "2.root.json", error, after)
    with pytest.raises(FetchError, match=r"2\.root\.json: cannot be fetched now"):
        client.poll()


def test_a_missing_timestamp_is_said_to_be_missing(client: Client) -> None:
    del client.repository.files["timestamp.json"]
    with pytest.raises(AbsentError, match="not here"):
        client.poll()


def test_a_stream_that_drips_is_cut(client: Client) -> None:
    def fetch(name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        for _ in range(10**6):  # as good as endless
            yield b""

    client.fetch = fetch
    with pytest.raises(FetchError, match="under the floor"):
        client.poll(pace=Pace(bytes_per_s=1000, window_s=0.05))


def test_a_fetcher_that_gives_text_is_told_so(client: Client) -> None:
    client.fetch = lambda *_: iter(["text"])  # type: ignore[assignment, return-value]
    with pytest.raises(FormatError, match="gave str, not bytes"):
        client.poll()


# The folder


def test_a_disk_that_refuses_is_said_so_and_the_next_poll_goes_on(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.poll()
    client.repository.publish_targets()
    client.repository.publish()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(FedgeError, match="No space left on device"):
            client.poll()
    assert client.version("targets") == 1
    assert client.poll().versions()["targets"] == 2


@pytest.mark.slow
def test_two_polls_at_once_with_one_folder_are_refused(client: Client) -> None:
    client.poll()
    with files.sole_holder(client.folder / ".lock"), pytest.raises(FedgeError, match="another process"):
        client.poll()


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot.json", "targets.json"])
def test_a_damaged_file_in_the_folder_is_fetched_anew(client: Client, name: str) -> None:
    client.poll()
    (client.folder / name).write_bytes(b"\0" * 100)
    client.poll()
    assert client.version(name.removesuffix(".json")) == 1


def test_a_target_without_sha256_or_with_odd_custom_values_is_refused(client: Client) -> None:
    repository = client.repository
    repository.add("targets", "a", b"x")
    repository.targets["targets"].targets["a"].hashes = {"sha512": "00" * 64}
    repository.add("targets", "b", b"x")
    repository.targets["targets"].targets["b"].unrecognized_fields["custom"] = [1]
    repository.publish_targets()
    repository.publish()
    trusted = client.poll()
    with pytest.raises(FormatError, match="has no SHA-256"):
        trusted.target("a")
    with pytest.raises(FormatError, match="no JSON object"):
        trusted.target("b")
