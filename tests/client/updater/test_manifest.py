from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge import signing
from fedge.errors import (
    DigestError,
    DowngradeError,
    FedgeError,
    FormatError,
    SignatureError,
    TrustError,
    UserError,
)
from fedge_client.device import Current, Device
from fedge_client.runtime import Runtime
from fedge_client.updater import Offer, Updater, decide, floor_after, folder_fetch

X = np.zeros((8, 8), np.uint8)


@pytest.fixture
def home(tmp_path: Path, publisher: Any) -> Path:
    """A device of tier micro that trusts the publisher; nothing is installed yet."""
    return Device.create(tmp_path / "home", "micro", publisher.trusted).home


def updater(home: Path, publisher: Any) -> Updater:
    return Updater.of(Device.open(home), folder_fetch(publisher.folder))


def answer(home: Path) -> str:
    return Runtime.open(home).infer(X)[0].label


def state(home: Path) -> Current:
    current = Device.open(home).current()
    assert current is not None
    return current


# Installing


def test_a_release_is_installed_and_answers(home: Path, publisher: Any) -> None:
    release = publisher.offer(1, answer=2)
    assert updater(home, publisher).check() == release
    installed = updater(home, publisher).install()
    assert (installed.release, installed.slot) == (release, "a")
    assert answer(home) == "two"
    assert Runtime.open(home).lineage == release.lineage
    assert updater(home, publisher).check() is None


def test_the_next_release_goes_into_the_other_slot_and_the_first_is_kept(home: Path, publisher: Any) -> None:
    for version in (1, 2, 3):
        publisher.offer(version, answer=version - 1)
        updater(home, publisher).install()
    assert state(home) == Current("a", 3, state(home).identity, floor=2)
    assert Device.open(home).verified("b")[0].release.version == 2
    assert answer(home) == "two"


def test_installing_what_runs_already_changes_nothing(home: Path, publisher: Any) -> None:
    publisher.offer(1, answer=1)
    first = updater(home, publisher).install()
    before = {
        path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file() and path.name != ".lock"
    }
    assert updater(home, publisher).install() == first
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_versions_may_be_skipped(home: Path, publisher: Any) -> None:
    publisher.offer(3, answer=0)
    updater(home, publisher).install()
    publisher.offer(900, answer=1)
    updater(home, publisher).install()
    assert (answer(home), state(home).floor) == ("one", 3)


# Going back


def test_a_local_return_goes_one_release_back_and_stays_there(home: Path, publisher: Any) -> None:
    for version in (1, 2):
        publisher.offer(version, answer=version)
        updater(home, publisher).install()
    back = updater(home, publisher).return_to_previous()
    assert (back.release.version, answer(home), state(home).left) == (1, "one", 2)
    assert updater(home, publisher).check() is None  # an agent that polls does not take it again
    assert updater(home, publisher).install().release.version == 1
    with pytest.raises(UserError, match="no previous"):
        updater(home, publisher).return_to_previous()


def test_after_a_return_a_newer_release_is_taken_and_the_left_one_on_demand(
    home: Path, publisher: Any
) -> None:
    for version in (1, 2):
        publisher.offer(version, answer=version)
        updater(home, publisher).install()
    updater(home, publisher).return_to_previous()
    assert updater(home, publisher).install(again=True).release.version == 2
    assert (answer(home), state(home).left, state(home).floor) == ("two", 0, 1)
    updater(home, publisher).return_to_previous()
    publisher.offer(3, answer=0)
    assert updater(home, publisher).install().release.version == 3
    assert (answer(home), state(home).left, state(home).floor) == ("zero", 0, 1)


def test_there_is_nothing_to_return_to_after_the_first_installation(home: Path, publisher: Any) -> None:
    publisher.offer(1, answer=1)
    updater(home, publisher).install()
    with pytest.raises(UserError, match="no previous"):
        updater(home, publisher).return_to_previous()


def test_a_damaged_previous_release_is_not_returned_to(home: Path, publisher: Any) -> None:
    for version in (1, 2):
        publisher.offer(version, answer=version)
        updater(home, publisher).install()
    flip(home / "slots" / "a" / "model.onnx")
    with pytest.raises(UserError, match="no previous"):
        updater(home, publisher).return_to_previous()
    assert answer(home) == "two"


# Refusing: the installed release keeps answering


def flip(path: Path, position: int = -10) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def test_each_hostile_offer_is_refused_and_the_installed_one_keeps_answering(
    home: Path, publisher: Any, tools: Any
) -> None:
    publisher.offer(5, answer=1)
    updater(home, publisher).install()
    publisher.offer(6, answer=2)
    updater(home, publisher).install()
    pristine = publisher.folder.parent / "pristine"
    shutil.copytree(publisher.folder, pristine)
    before = (state(home), answer(home))
    newest = publisher.folder / "release.json"

    def unsigned() -> None:
        envelope = json.loads(newest.read_bytes())
        newest.write_text(json.dumps({**envelope, "signatures": []}))

    def tampered_object() -> None:
        release = publisher.offer(7, answer=0)
        flip(publisher.folder / "objects" / release.variants[0].wire_sha256)

    def truncated_object() -> None:
        release = publisher.offer(7, answer=0)
        path = publisher.folder / "objects" / release.variants[0].wire_sha256
        path.write_bytes(path.read_bytes()[:-1])

    def endless_object() -> None:
        release = publisher.offer(7, answer=0)
        path = publisher.folder / "objects" / release.variants[0].wire_sha256
        path.write_bytes(path.read_bytes() + b"more")

    def absent_object() -> None:
        release = publisher.offer(7, answer=0)
        (publisher.folder / "objects" / release.variants[0].wire_sha256).unlink()

    def bomb() -> None:
        entry, wire = tools.entry_of("micro", tools.constant_model(0) + bytes(5_000_000))
        publisher.place(tools.release_of(7, (tools.entry_of("micro", b"x")[0],)), ())
        small = tools.entry_of("micro", b"x", wire_sha256=entry.wire_sha256, wire_bytes=len(wire))[0]
        publisher.place(tools.release_of(7, (small,)), (wire,))

    def other_unpacked() -> None:
        entry, wire = tools.entry_of("micro", tools.constant_model(0), installed_sha256="c" * 64)
        publisher.place(tools.release_of(7, (entry,)), (wire,))

    def wrong_spec() -> None:
        entry, wire = tools.entry_of("micro", tools.constant_model(0))
        spec = type(tools.images)("image", (9, 9), "uint8", tools.labels)
        publisher.place(tools.release_of(7, (entry,), spec=spec), (wire,))

    def no_model() -> None:
        entry, wire = tools.entry_of("micro", b"this is no ONNX graph")
        publisher.place(tools.release_of(7, (entry,)), (wire,))

    def not_finite() -> None:
        model = tools.linear_model(tools.images, np.zeros((64, 3)), np.array([np.nan, 0, 0]))
        entry, wire = tools.entry_of("micro", model)
        publisher.place(tools.release_of(7, (entry,)), (wire,))

    def other_key() -> None:
        entry, wire = tools.entry_of("micro", tools.constant_model(0))
        publisher.place(tools.release_of(7, (entry,)), (wire,), private=signing.generate_key()[0])

    cases: list[tuple[Any, type[FedgeError], str]] = [
        (lambda: newest.unlink(), FormatError, "cannot be read"),
        (lambda: newest.write_bytes(newest.read_bytes()[:-20]), FormatError, "truncated"),
        (lambda: newest.write_bytes(b""), FormatError, "malformed"),
        (lambda: flip(newest, 200), TrustError, "envelope|not signed"),
        (unsigned, SignatureError, "not signed"),
        (other_key, SignatureError, "not signed"),
        (lambda: publisher.offer(4, answer=0), DowngradeError, "below this device's floor 5"),
        (lambda: publisher.offer(5, answer=1), DowngradeError, "older than the installed 6"),
        (lambda: publisher.offer(6, answer=0), TrustError, "other content"),
        (
            lambda: publisher.offer(7, answer=0, tier="mini"),
            TrustError,
            "no variant for tier 'micro'; it has: mini",
        ),
        (tampered_object, DigestError, "not those that were signed"),
        (truncated_object, DigestError, "not those that were signed"),
        (endless_object, FormatError, "longer than"),
        (absent_object, FormatError, "cannot be read"),
        (bomb, FormatError, "unpacks to more than 1 bytes"),
        (other_unpacked, DigestError, "other bytes than were signed"),
        (wrong_spec, FormatError, "its spec says"),
        (no_model, FormatError, "cannot load"),
        (not_finite, FormatError, "not installed"),
    ]
    for number, (attack, error, line) in enumerate(cases):
        shutil.rmtree(publisher.folder)
        shutil.copytree(pristine, publisher.folder)
        attack()
        with pytest.raises(error, match=line) as caught:
            updater(home, publisher).install()
        assert "\n" not in str(caught.value), number
        assert (state(home), answer(home)) == before, number
    assert Device.open(home).verified("a")[0].release.version == 5  # and the previous one is still there


def test_a_fetcher_that_ignores_the_maximum_is_caught(home: Path, publisher: Any) -> None:
    publisher.offer(1, answer=1)
    greedy = Updater.of(
        Device.open(home), lambda name, maximum: (publisher.folder / name).read_bytes() + b"x" * maximum
    )
    with pytest.raises(FormatError, match="over the"):
        greedy.install()


def test_a_broken_network_is_one_clear_line(home: Path, publisher: Any) -> None:
    def broken(name: str, maximum: int) -> bytes:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    with pytest.raises(FedgeError, match=r"release\.json: cannot be fetched \(Connection reset by peer\)"):
        Updater.of(Device.open(home), broken).install()


@pytest.mark.parametrize("name", ["model.onnx", "release.json"])
def test_a_slot_damaged_on_disk_does_not_answer_and_is_repaired_without_losing_the_previous(
    home: Path, publisher: Any, name: str
) -> None:
    for version in (1, 2):
        publisher.offer(version, answer=version)
        updater(home, publisher).install()
    flip(home / "slots" / "b" / name)
    with pytest.raises(TrustError):
        Runtime.open(home)
    assert updater(home, publisher).check() is not None
    repaired = updater(home, publisher).install()
    assert (repaired.slot, answer(home), state(home).floor) == ("b", "two", 1)
    assert updater(home, publisher).return_to_previous().release.version == 1


def test_a_signed_release_swapped_into_the_slot_is_noticed(home: Path, publisher: Any) -> None:
    for version in (1, 2):
        publisher.offer(version, answer=version)
        updater(home, publisher).install()
    shutil.rmtree(home / "slots" / "b")
    shutil.copytree(home / "slots" / "a", home / "slots" / "b")
    with pytest.raises(DigestError, match="another release than was committed"):
        Runtime.open(home)


def test_a_second_installation_at_the_same_time_is_refused(home: Path, publisher: Any) -> None:
    publisher.offer(1, answer=1)
    device = Device.open(home)
    with device.locked(), pytest.raises(FedgeError, match="under way"):
        updater(home, publisher).install()


# The rules alone


def offer(tools: Any, version: int, identity: str = "1" * 64) -> Offer:
    return Offer(tools.release_of(version, (tools.entry_of("micro", b"x")[0],)), b"", identity)


def test_the_decision_follows_version_floor_and_what_was_left(tools: Any) -> None:
    current = Current("a", 5, "1" * 64, floor=4)
    returned = Current("a", 4, "1" * 64, floor=4, left=5)
    assert decide(None, offer(tools, 1), sound=False)
    assert decide(current, offer(tools, 6), sound=True)
    assert not decide(current, offer(tools, 5), sound=True)
    assert decide(current, offer(tools, 5), sound=False)
    assert not decide(returned, offer(tools, 5), sound=True)
    assert decide(returned, offer(tools, 5), sound=True, again=True)
    assert decide(returned, offer(tools, 6), sound=True)
    for version in (1, 3, 4):
        with pytest.raises(DowngradeError):
            decide(current, offer(tools, version), sound=True, again=True)
    with pytest.raises(TrustError, match="other content"):
        decide(current, offer(tools, 5, "2" * 64), sound=False)


@pytest.mark.parametrize(
    ("floor", "kept", "version", "expected"), [(0, None, 3, 3), (3, 3, 4, 3), (3, 4, 9, 4), (4, 3, 9, 4)]
)
def test_the_floor_is_the_version_that_is_kept_and_never_falls(
    floor: int, kept: int | None, version: int, expected: int
) -> None:
    assert floor_after(floor, kept, version) == expected


# The device's own files


def test_a_device_is_made_once_and_found_again(tmp_path: Path, publisher: Any) -> None:
    made = Device.create(tmp_path / "d", "micro", publisher.trusted)
    assert Device.open(tmp_path / "d") == made
    with pytest.raises(UserError, match="already"):
        Device.create(tmp_path / "d", "micro", publisher.trusted)


def test_what_cannot_be_a_device_is_refused(tmp_path: Path, publisher: Any) -> None:
    with pytest.raises(UserError, match="no device at"):
        Device.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="tier"):
        Device.create(tmp_path / "d", "../up", publisher.trusted)
    with pytest.raises(UserError, match="0 trusted keys"):
        Device.create(tmp_path / "d", "micro", [])
    with pytest.raises(UserError, match="public key"):
        Device.create(tmp_path / "d", "micro", [b"no key"])
    assert not (tmp_path / "d").exists()


def test_a_key_put_into_the_folder_by_hand_is_not_trusted(home: Path, publisher: Any, tools: Any) -> None:
    private, public = signing.generate_key()
    (home / "trusted" / f"{signing.key_id(public)}.pem").write_bytes(public)
    entry, wire = tools.entry_of("micro", tools.constant_model(0))
    publisher.place(tools.release_of(1, (entry,)), (wire,), private=private)
    with pytest.raises(SignatureError):
        updater(home, publisher).install()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"schema": 2}', b"\xff", b"[" * 9999])
@pytest.mark.parametrize("name", ["device.json", "current.json"])
def test_damaged_files_of_the_device_are_one_clear_line(
    home: Path, publisher: Any, name: str, content: bytes
) -> None:
    publisher.offer(1, answer=1)
    updater(home, publisher).install()
    (home / name).write_bytes(content)
    with pytest.raises(FormatError, match="damaged") as caught:
        Runtime.open(home)
    assert "\n" not in str(caught.value)


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


def test_a_fault_at_any_filesystem_step_leaves_a_working_release(home: Path, publisher: Any) -> None:
    for version in (1, 2):
        publisher.offer(version, answer=version)
        updater(home, publisher).install()
    publisher.offer(3, answer=0)
    pristine = home.parent / "pristine"
    shutil.copytree(home, pristine)
    faults, step, failed = None, 0, 0
    while faults is None or faults.count >= step:
        step += 1
        shutil.rmtree(home)
        shutil.copytree(pristine, home)
        ours = updater(home, publisher)
        with pytest.MonkeyPatch.context() as patch:
            faults, line = Faults(patch, step), ""
            try:
                ours.install()
            except FedgeError as error:
                line = str(error)
        failed += bool(line)
        assert not line or "No space left" in line or "goes on working" in line
        now = state(home)
        assert (now.version, answer(home)) in [(2, "two"), (3, "zero")]
        assert now.version >= now.floor
        assert updater(home, publisher).install().release.version == 3  # and the next attempt succeeds
    assert step > 15
    assert failed == step - 5  # the last has no fault, four make folders that exist


def test_a_full_disk_is_seen_before_anything_is_fetched(
    home: Path, publisher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.offer(1, answer=1)
    updater(home, publisher).install()
    publisher.offer(2, answer=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(FedgeError, match="1000 bytes are free"):
        updater(home, publisher).install()
    assert answer(home) == "one"


INSTALL = """
import sys
from pathlib import Path
from fedge_client.updater import Device, Updater, folder_fetch
home, published = map(Path, sys.argv[1:])
print("ready", flush=True)
Updater.of(Device.open(home), folder_fetch(published)).install()
"""

LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n" + INSTALL

STEP_BY_STEP = """
import sys
from pathlib import Path
from fedge_client.updater import Device, Updater, folder_fetch
from steps import killed_at_each
home, published, copies = map(Path, sys.argv[1:])

def install(place):
    Updater.of(Device.open(place), folder_fetch(published)).install()

print(sum(1 for _ in killed_at_each(home, copies, install)))
"""


def run(script: str, *arguments: Path) -> subprocess.Popen[str]:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'common'}:{root / 'client'}:{Path(__file__).parent}"}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_kill_at_any_filesystem_step_leaves_a_working_release(
    home: Path, publisher: Any, tmp_path: Path
) -> None:
    for version in (1, 2):
        publisher.offer(version, answer=version)
        updater(home, publisher).install()
    publisher.offer(3, answer=0)
    copies = tmp_path / "copies"
    copies.mkdir()
    out, err = run(STEP_BY_STEP, home, publisher.folder, copies).communicate(timeout=120)
    steps = int(out or f"0{err}")
    assert steps > 15
    seen = set()
    for step in range(1, steps + 1):
        place = copies / str(step)
        seen.add((state(place).version, answer(place)))
        assert state(place).version >= state(place).floor
        assert updater(place, publisher).install().release.version == 3
        assert not list(place.glob(".current.json.*"))
    assert seen == {(2, "two"), (3, "zero")}


def test_a_disk_that_refuses_large_files_leaves_the_installed_one_working(
    home: Path, publisher: Any, tools: Any
) -> None:
    publisher.offer(1, answer=1)
    updater(home, publisher).install()
    entry, wire = tools.entry_of("micro", tools.constant_model(2, filler=random.Random(0).randbytes(20_000)))
    publisher.place(tools.release_of(2, (entry,)), (wire,))
    process = run(LIMITED, home, publisher.folder)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "goes on working" in err
    assert (state(home).version, answer(home)) == (1, "one")
    assert not (home / "slots" / "b").exists()
    assert updater(home, publisher).install().release.version == 2


@pytest.mark.slow
def test_forty_kills_at_random_moments_always_leave_a_working_release(
    home: Path, publisher: Any, tools: Any
) -> None:
    filler = random.Random(1)
    publisher.offer(1, answer=1)
    updater(home, publisher).install()
    kills, version, reached = 0, 1, set()
    while kills < 40:
        version += 1
        model = tools.constant_model(version % 3, filler=filler.randbytes(50_000))
        entry, wire = tools.entry_of("micro", model)
        publisher.place(tools.release_of(version, (entry,)), (wire,))
        process = run(INSTALL, home, publisher.folder)
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.wait(timeout=filler.uniform(0.0, 0.1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        now = state(home)
        release = Runtime.open(home).release
        assert release.version == now.version >= now.floor
        assert answer(home) == tools.labels[now.version % 3]
        reached.add(now.version == version)
    assert reached == {True, False}  # some were too late to stop the new release, and some were not
