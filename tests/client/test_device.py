"""A device's home from its first file to its last return: real models, a real repository in a folder."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tuf_repository import Repository

from fedge.delivery import TierMark
from fedge.errors import (
    DigestError,
    DowngradeError,
    FedgeError,
    FetchError,
    FormatError,
    HealthError,
    SignatureError,
    TrustError,
    UserError,
)
from fedge.manifest import Release
from fedge_client import installing
from fedge_client.device import Device, exists
from fedge_client.installing import return_to_previous
from fedge_client.runtime import Runtime
from fedge_client.updater import State, folder

ROOT = Path(__file__).parents[2]
X = np.zeros((8, 8), np.uint8)


@pytest.fixture
def home(tmp_path: Path, publisher: Any) -> Path:
    """A device of tier micro that trusts the publisher; nothing is installed yet."""
    return Device.create(tmp_path / "home", "micro", publisher.root).home


def install(home: Path, publisher: Any, *, again: bool = False) -> State:
    outcome = installing.install(Device.open(home), folder(publisher.folder), again=again)
    assert outcome.state == Device.open(home).store.state()
    return outcome.state


def version(home: Path) -> int:
    current = Device.open(home).store.state().current
    return current.version if current else 0


def answer(home: Path) -> str:
    return Runtime.open(home).infer(X)[0].label


def flip(path: Path, position: int = -10) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


# Installing and going back


def test_a_release_is_installed_answers_and_says_where_it_comes_from(home: Path, publisher: Any) -> None:
    release = publisher.offer(1, answer=2)
    install(home, publisher)
    runtime = Runtime.open(home)
    assert (answer(home), runtime.release, runtime.lineage) == ("two", release, release.lineage)
    assert runtime.installed.entry == release.variants[0]
    assert runtime.installed.damaged == ""
    roles = Device.open(home).metadata()
    assert [(role, found.version) for role, found in roles.items()] == [
        *(("root", 1), ("timestamp", 2), ("snapshot", 2), ("targets", 2), ("tier-micro", 2)),
    ]
    assert {found.expires for found in roles.values()} == {"2999-01-01T00:00:00Z"}


def test_installing_what_runs_already_changes_no_file(home: Path, publisher: Any) -> None:
    publisher.offer(1, answer=1)
    install(home, publisher)
    before = {
        path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file() and path.name != ".lock"
    }
    assert not installing.install(Device.open(home), folder(publisher.folder)).changed
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_runs_already_costs_no_model_and_no_trial_on_the_network(home: Path, publisher: Any) -> None:
    publisher.offer(1, answer=1)
    install(home, publisher)
    asked, ours = [], folder(publisher.folder)

    def counted(name: str, maximum: int, offset: int = 0, /) -> Any:
        asked.append(name.rpartition(".")[2])
        return ours(name, maximum, offset)

    installing.install(Device.open(home), counted)
    assert asked == ["json", "json", "manifest"]  # the next root, the timestamp


def test_a_tier_without_a_release_installs_nothing(home: Path, publisher: Any) -> None:
    publisher.mark(TierMark("micro", 0, 0))
    outcome = installing.install(Device.open(home), folder(publisher.folder))
    assert (outcome.offered, outcome.changed, version(home)) == (None, False, 0)


def test_versions_may_be_skipped_and_the_version_that_one_is_told_is_taken(
    home: Path, publisher: Any
) -> None:
    for number in (3, 900, 901):
        publisher.offer(number, answer=number % 3)
    installing.install(Device.open(home), folder(publisher.folder), told=3)
    assert version(home) == 3
    installing.install(Device.open(home), folder(publisher.folder), told=900)
    assert version(home) == 900
    with pytest.raises(TrustError, match="does not list it"):
        installing.install(Device.open(home), folder(publisher.folder), told=950)


def test_a_local_return_goes_one_release_back_and_stays_there(home: Path, publisher: Any) -> None:
    for number in (1, 2):
        publisher.offer(number, answer=number)
        install(home, publisher)
    assert return_to_previous(Device.open(home)).version == 1
    assert (version(home), answer(home)) == (1, "one")
    assert install(home, publisher).left == 2  # an agent that polls does not take it again
    assert answer(home) == "one"
    with pytest.raises(UserError, match="no previous"):
        return_to_previous(Device.open(home))


def test_after_a_return_a_newer_release_is_taken_and_the_left_one_on_demand(
    home: Path, publisher: Any
) -> None:
    for number in (1, 2):
        publisher.offer(number, answer=number)
        install(home, publisher)
    return_to_previous(Device.open(home))
    install(home, publisher, again=True)
    assert (version(home), answer(home)) == (2, "two")
    return_to_previous(Device.open(home))
    publisher.offer(3, answer=0)
    assert install(home, publisher).left == 0
    assert (version(home), answer(home)) == (3, "zero")


def test_a_release_that_no_longer_answers_here_is_not_returned_to(
    home: Path, publisher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        publisher.offer(number, answer=number)
        install(home, publisher)

    def tried(data: bytes) -> None:
        raise HealthError("variant: this onnxruntime does not load it")

    monkeypatch.setattr(installing, "model_check", lambda _: tried)
    with pytest.raises(HealthError, match="does not load it"):
        return_to_previous(Device.open(home))
    assert (version(home), answer(home)) == (2, "two")


def test_a_damaged_or_absent_previous_release_is_not_returned_to(home: Path, publisher: Any) -> None:
    publisher.offer(1, answer=1)
    install(home, publisher)
    with pytest.raises(UserError, match="no previous"):
        return_to_previous(Device.open(home))
    publisher.offer(2, answer=2)
    install(home, publisher)
    flip(home / "installed" / "slots" / "a" / "artefact")
    with pytest.raises(UserError, match="damaged on the disk"):
        return_to_previous(Device.open(home))
    assert answer(home) == "two"


# Floors


def test_the_floor_of_the_enrolment_stops_an_old_repository_from_fooling_a_new_device(
    tmp_path: Path, publisher: Any
) -> None:
    publisher.offer(4, answer=1)  # not expired, and all signatures are good
    home = Device.create(tmp_path / "home", "micro", publisher.root, floor=5).home
    with pytest.raises(DowngradeError, match="below this device's floor 5"):
        install(home, publisher)
    publisher.offer(5, answer=2)
    install(home, publisher)
    assert answer(home) == "two"


def test_a_signed_floor_is_kept_though_nothing_is_installed_with_it(home: Path, publisher: Any) -> None:
    publisher.offer(1, answer=1)
    install(home, publisher)
    publisher.offer(2, answer=2)
    install(home, publisher)
    publisher.mark(TierMark("micro", 2, 2))
    assert install(home, publisher).floor == 2
    with pytest.raises(UserError, match="below this device's floor 2"):
        return_to_previous(Device.open(home))
    assert answer(home) == "two"


# Refusing: the installed release keeps answering


def hostile(publisher: Any, tools: Any) -> dict[str, tuple[Any, type[FedgeError], str]]:
    """What publishers, mirrors and disks can do wrong: an act, the error, its words."""
    targets = publisher.repository.targets["tier-micro"].targets

    def spoilt(kind: str, spoil: Any) -> Any:
        def act() -> None:
            publisher.offer(7, answer=0)
            path = publisher.file(f"micro/7.{kind}")
            path.write_bytes(spoil(path.read_bytes()))

        return act

    def absent(kind: str) -> Any:
        def act() -> None:
            publisher.offer(7, answer=0)
            publisher.file(f"micro/7.{kind}").unlink()

        return act

    def offered(model: bytes, trial: bytes | None = None, wire: bytes | None = None, **changes: Any) -> Any:
        def act() -> None:
            spec = changes.pop("spec", tools.images)
            given = {"golden_sha256": tools.sha256(trial)} if trial else {}
            entry, packed = tools.entry_of("micro", model, **changes, **given)
            sizes = {} if wire is None else {"wire_sha256": tools.sha256(wire), "wire_bytes": len(wire)}
            release = tools.release_of(7, (replace(entry, **sizes),), spec=spec)
            publisher.place(release, (packed if wire is None else wire,), trial)

        return act

    def unlisted(kind: str) -> Any:
        def act() -> None:
            publisher.offer(7, answer=0)
            del targets[f"micro/7.{kind}"]
            publisher.mark(TierMark("micro", 0, 7))

        return act

    def other_key() -> None:
        publisher.offer(7, answer=0)
        thief = Repository(publisher.repository.expires)
        publisher.repository.publish_targets("tier-micro", thief.keys["targets"])
        publisher.write()

    def no_metadata() -> None:
        (publisher.folder / "metadata" / "timestamp.json").unlink()

    good, bomb = (
        tools.constant_model(0),
        tools.entry_of("micro", tools.constant_model(0) + bytes(5_000_000))[1],
    )
    nan = tools.linear_model(tools.images, np.zeros((64, 3)), np.array([np.nan, 0, 0]))
    other = type(tools.images)("image", (9, 9), "uint8", tools.labels)
    odd, wrong = tools.golden_bytes(b"", other), tools.golden_bytes(tools.constant_model(1))
    return {
        "metadata is absent": (no_metadata, FetchError, "timestamp.json"),
        "another key signs": (other_key, SignatureError, "not signed by enough of the keys"),
        "an older release": (lambda: publisher.offer(5, answer=1), DowngradeError, "older than the"),
        "other content": (lambda: publisher.offer(6, answer=0), TrustError, "must not be signed twice"),
        "another tier's": (
            lambda: publisher.place(
                tools.release_of(7, (tools.entry_of("mini", good)[0],)), (tools.entry_of("mini", good)[1],)
            )
            or publisher.mark(TierMark("micro", 0, 7)),
            TrustError,
            "does not list it",
        ),
        "a flipped bit": (spoilt("model", lambda d: d[:-1] + bytes([d[-1] ^ 4])), DigestError, "not those"),
        "a short model": (spoilt("model", lambda d: d[:-1]), FetchError, "ends after"),
        "an endless model": (spoilt("model", lambda d: d + b"more"), FormatError, "more than the"),
        "an absent model": (absent("model"), FetchError, "is not in"),
        "a spoilt manifest": (spoilt("manifest", lambda d: b"[" + d[1:]), DigestError, "not those"),
        "a spoilt trial": (spoilt("golden", lambda d: d[:-1] + b"x"), DigestError, "not those"),
        "an absent trial": (absent("golden"), FetchError, "is not in"),
        "an unlisted trial": (unlisted("golden"), TrustError, "does not list it"),
        "a bomb": (offered(good, wire=bomb), FormatError, "unpacks to more than"),
        "other bytes unpacked": (offered(good, installed_sha256="c" * 64), DigestError, "other bytes"),
        "another spec": (offered(good, odd, spec=other), HealthError, "its spec says"),
        "no model": (offered(b"this is no ONNX graph"), HealthError, "cannot load"),
        "no number": (offered(nan), HealthError, "not installed"),
        "other answers": (offered(good, wrong), HealthError, "golden input 0"),
        "a malformed trial": (offered(good, b"FGLD" + bytes(60)), FormatError, "golden"),
    }  # fmt: skip


@pytest.mark.slow
def test_each_hostile_offer_is_refused_and_the_installed_one_keeps_answering(
    home: Path, publisher: Any, tools: Any, tmp_path: Path
) -> None:
    for number in (5, 6):
        publisher.offer(number, answer=number - 4)
        install(home, publisher)
    for name in hostile(publisher, tools):
        mirror = copy.copy(publisher)
        mirror.folder, mirror.repository = tmp_path / name.replace(" ", "-"), _copy(publisher.repository)
        mirror.write()
        place = tmp_path / f"home-{name.replace(' ', '-')}"
        shutil.copytree(home, place, symlinks=True)
        act, error, line = hostile(mirror, tools)[name]
        act()
        with pytest.raises(error, match=line) as caught:
            install(place, mirror)
        assert "\n" not in str(caught.value), name
        assert (version(place), answer(place)) == (6, "two"), name
        assert return_to_previous(Device.open(place)).version == 5, name  # and the one before is still there


def _copy(repository: Repository) -> Repository:
    """Of its own metadata and files; the keys are shared."""
    made = copy.copy(repository)
    made.files, made.targets = dict(repository.files), copy.deepcopy(repository.targets)
    made.root, made.timestamp, made.snapshot = (
        copy.deepcopy(part) for part in (repository.root, repository.timestamp, repository.snapshot)
    )
    made.keys = dict(repository.keys)
    return made


def test_a_release_that_fails_its_trial_is_quarantined_and_not_fetched_again(
    home: Path, publisher: Any, tools: Any
) -> None:
    publisher.offer(1, answer=1)
    install(home, publisher)
    trial = tools.golden_bytes(tools.constant_model(1))
    entry, wire = tools.entry_of("micro", tools.constant_model(0), golden_sha256=tools.sha256(trial))
    publisher.place(tools.release_of(2, (entry,)), (wire,), trial)
    with pytest.raises(HealthError, match=r"version 2: failed its trial \(variant: golden input"):
        install(home, publisher)
    publisher.file("micro/2.model").unlink()
    with pytest.raises(HealthError, match="is in quarantine; publish another"):
        install(home, publisher)
    assert Device.open(home).store.state().quarantined == (entry.installed_sha256,)
    publisher.offer(3, answer=2)
    install(home, publisher)
    assert answer(home) == "two"


def test_an_outage_while_the_trial_is_fetched_is_no_failure_of_the_release(
    home: Path, publisher: Any
) -> None:
    publisher.offer(1, answer=1)
    path = publisher.file("micro/1.golden")
    kept = path.read_bytes()
    path.unlink()
    for _ in range(8):  # more often than a trial may begin without an end
        with pytest.raises(FetchError):
            install(home, publisher)
    path.write_bytes(kept)
    install(home, publisher)
    assert answer(home) == "one"


# Opening


@pytest.mark.parametrize("name", ["artefact", "notes"])
def test_a_slot_damaged_on_disk_gives_way_to_the_release_before_and_is_repaired(
    home: Path, publisher: Any, name: str
) -> None:
    for number in (1, 2):
        publisher.offer(number, answer=number)
        install(home, publisher)
    flip(home / "installed" / "slots" / "b" / name)
    assert answer(home) == "one"
    assert "install it again" in Runtime.open(home).installed.damaged
    install(home, publisher)
    assert (answer(home), Runtime.open(home).installed.damaged) == ("two", "")
    assert return_to_previous(Device.open(home)).version == 1


def test_a_release_of_the_other_slot_put_into_this_one_is_noticed(home: Path, publisher: Any) -> None:
    for number in (1, 2):
        publisher.offer(number, answer=number)
        install(home, publisher)
    slots = home / "installed" / "slots"
    shutil.rmtree(slots / "b")
    shutil.copytree(slots / "a", slots / "b")
    assert (answer(home), Runtime.open(home).installed.record.version) == ("one", 1)
    assert Runtime.open(home).installed.damaged
    shutil.rmtree(slots / "a")
    with pytest.raises(TrustError, match="cannot be read"):
        Runtime.open(home)


@pytest.mark.slow
def test_an_installed_release_is_opened_with_no_write_and_without_the_tuf_library(
    home: Path, publisher: Any
) -> None:
    publisher.offer(1, answer=1)
    install(home, publisher)
    shutil.rmtree(home / "delivery" / "metadata")
    for path in [*home.rglob("*"), home]:
        path.chmod(0o500 if path.is_dir() else 0o400)
    script = (
        "import sys; from pathlib import Path; from fedge_client.runtime import Runtime\n"
        "runtime = Runtime.open(Path(sys.argv[1]))\n"
        "print(runtime.infer(runtime.spec.zeros(1))[0].label)\n"
        "print(sorted({'tuf', 'securesystemslib', 'cryptography', 'grpc', 'PIL'} & set(sys.modules)))"
    )
    done = run(script, home)
    for path in [home, *home.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)
    assert (done.stdout, done.stderr) == ("one\n[]\n", "")


def run(script: str, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    paths = (ROOT / "common", ROOT / "client", ROOT / "tests" / "client" / "updater")
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": ":".join(map(str, paths))},
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


# The device's own files


def test_a_device_is_made_once_and_keeps_its_first_root_and_its_floor(tmp_path: Path, publisher: Any) -> None:
    home = tmp_path / "d"
    made = Device.create(home, "micro", publisher.root, floor=3)
    assert Device.open(home) == made
    other = Repository().trusted_root
    Device.create(home, "micro", other, floor=9)  # a server that renews its words
    assert made.root == publisher.root
    assert made.store.state().lowest == 3
    moved = Device.create(home, "mini", other, floor=4)  # enrolled anew, for another tier
    assert (Device.open(home).tier, moved.root, moved.store.state().lowest) == ("mini", publisher.root, 4)


def test_what_cannot_be_a_device_is_refused(tmp_path: Path, publisher: Any) -> None:
    with pytest.raises(UserError, match="no device at"):
        Device.open(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="tier"):
        Device.create(tmp_path / "d", "../up", publisher.root)
    timestamp = publisher.repository.files["timestamp.json"]
    for root in (b"", b"no root", b"[" * 9999, b"{}", b'{"signed": 3}', timestamp, b" " * 70_000):
        with pytest.raises(FormatError, match="root"):
            Device.create(tmp_path / "d", "micro", root)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FedgeError, match="cannot be made a device's home"):
        Device.create(tmp_path / "file", "micro", publisher.root)
    assert not exists(tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_another_publishers_repository_is_refused(home: Path, publisher: Any, tmp_path: Path) -> None:
    stranger = type(publisher)(tmp_path / "stranger")
    stranger.offer(1, answer=1)
    with pytest.raises(SignatureError):
        install(home, stranger)
    shutil.copy(stranger.folder / "metadata" / "1.root.json", home / "delivery" / "metadata" / "root_history")
    with pytest.raises(SignatureError):  # put beside what was verified
        install(home, stranger)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"schema": 2}', b"\xff", b"[" * 9999])
@pytest.mark.parametrize("name", ["delivery/tier.json", "installed/current"])
def test_damaged_files_of_the_device_are_one_clear_line(
    home: Path, publisher: Any, name: str, content: bytes
) -> None:
    publisher.offer(1, answer=1)
    install(home, publisher)
    (home / name).write_bytes(content)
    with pytest.raises(FormatError, match="damaged") as caught:
        Runtime.open(home)
    assert "\n" not in str(caught.value)


def test_a_damaged_root_stops_installing_and_not_answering(home: Path, publisher: Any) -> None:
    publisher.offer(1, answer=1)
    install(home, publisher)
    flip(home / "delivery" / "root.json", 0)
    with pytest.raises(FormatError, match="root"):
        install(home, publisher)
    assert answer(home) == "one"


# Faults


STEPS = [
    *[(os, name) for name in ("fsync", "replace", "mkdir", "fdopen", "unlink", "chmod", "open")],
    (tempfile, "mkstemp"),
]


class Faults:
    """Fail at one filesystem step, counted over all of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.count, self.at = 0, at
        for module, name in STEPS:
            monkeypatch.setattr(module, name, self._wrapped(getattr(module, name)))

    def _wrapped(self, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **options)

        return call


@pytest.mark.slow
def test_a_disk_that_refuses_at_any_step_of_a_poll_leaves_a_working_release(
    home: Path, publisher: Any
) -> None:
    for number in (1, 2):
        publisher.offer(number, answer=number)
        install(home, publisher)
    publisher.offer(3, answer=0)
    pristine = home.parent / "pristine"
    shutil.copytree(home, pristine, symlinks=True)
    faults, step, failed = None, 0, 0
    while faults is None or faults.count >= step:
        step += 1
        shutil.rmtree(home)
        shutil.copytree(pristine, home, symlinks=True)
        with pytest.MonkeyPatch.context() as patch:
            faults, line = Faults(patch, step), ""
            try:
                install(home, publisher)
            except FedgeError as error:
                line = str(error)
        failed += bool(line)
        assert not line or "No space left" in line or "goes on working" in line
        state = Device.open(home).store.state()
        assert (version(home), answer(home)) in [(2, "two"), (3, "zero")]
        assert state.current is not None
        assert state.current.version >= state.floor
        install(home, publisher)
        assert (version(home), answer(home)) == (3, "zero")  # and the next attempt succeeds
    assert step > 25
    assert failed > step / 2  # the others make folders that exist, or remove what need not be removed


STEP_BY_STEP = """
import sys
from pathlib import Path
from fedge_client.device import Device
from fedge_client.installing import install
from fedge_client.updater import folder
from steps import killed_at_each
home, published, copies = map(Path, sys.argv[1:])
work = lambda place: install(Device.open(place), folder(published))
print(sum(1 for _ in killed_at_each(home, copies, work)))
"""


@pytest.mark.slow
def test_a_kill_at_any_step_of_a_poll_leaves_a_working_release(
    home: Path, publisher: Any, tmp_path: Path
) -> None:
    for number in (1, 2):
        publisher.offer(number, answer=number)
        install(home, publisher)
    publisher.offer(3, answer=0)
    copies = tmp_path / "copies"
    copies.mkdir()
    done = run(STEP_BY_STEP, home, publisher.folder, copies)
    steps = int(done.stdout or f"0{done.stderr}")
    assert steps > 25
    seen = set()
    for step in range(1, steps + 1):
        place = copies / str(step)
        seen.add((version(place), answer(place)))
        install(place, publisher)
        assert (version(place), answer(place)) == (3, "zero")
        assert not list(place.rglob(".current.*"))
    assert seen == {(2, "two"), (3, "zero")}


MAKE = """
import sys
from pathlib import Path
from fedge_client.device import Device
from steps import killed_at_each
empty, root, copies = map(Path, sys.argv[1:])
work = lambda place: Device.create(place, "micro", root.read_bytes(), floor=4)
print(sum(1 for _ in killed_at_each(empty, copies, work)))
"""


@pytest.mark.slow
def test_a_device_that_is_killed_while_it_is_made_is_none_or_whole(publisher: Any, tmp_path: Path) -> None:
    for name in ("empty", "copies"):
        (tmp_path / name).mkdir()
    (tmp_path / "root.json").write_bytes(publisher.root)
    done = run(MAKE, tmp_path / "empty", tmp_path / "root.json", tmp_path / "copies")
    for step in range(1, int(done.stdout or f"0{done.stderr}") + 1):
        place = tmp_path / "copies" / str(step)
        if exists(place):
            assert Device.open(place).store.state().lowest == 4
        made = Device.create(place, "micro", publisher.root, floor=4)
        assert (made.root, made.store.state().lowest) == (publisher.root, 4)


def test_the_release_of_a_device_that_moved_to_another_tier_is_still_described(
    home: Path, publisher: Any, tools: Any
) -> None:
    both = [tools.entry_of(tier, tools.constant_model(i)) for i, tier in enumerate(("micro", "mini"))]
    release: Release = tools.release_of(1, tuple(entry for entry, _ in both))
    publisher.place(release, tuple(wire for _, wire in both))
    install(home, publisher)
    Device.create(home, "mini", publisher.root)
    assert Device.open(home).running()[0].entry.tier == "micro"
    assert json.loads((home / "delivery" / "tier.json").read_text()) == {"schema": 1, "tier": "mini"}
