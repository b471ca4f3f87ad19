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
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from fedge import signing
from fedge.artefact import pack
from fedge.errors import FedgeError, FormatError, SignatureError
from fedge.files import sha256
from fedge.manifest import Lineage, Release, VariantEntry
from fedge.spec import Spec
from fedge_server.registry.publish import load_or_create_key, publish, published

PRIVATE, PUBLIC = signing.generate_key()
REPORT = b'{"gate":"passed"}'
SPEC = Spec("image", (8, 8), "uint8", ("no", "yes"))


def model_of(number: int) -> bytes:
    return f"model {number}".encode() * 50


@lru_cache
def wire_of(number: int) -> bytes:
    return pack(model_of(number))


def draft(number: int, **changes: Any) -> Callable[[int], Release]:
    model = model_of(number)
    wire = wire_of(number)
    values: dict[str, Any] = {
        "tier": "micro", "recipe": "int8", "wire_sha256": sha256(wire), "wire_bytes": len(wire),
        "installed_sha256": sha256(model), "installed_bytes": len(model), "evidence_sha256": sha256(REPORT),
    }  # fmt: skip
    entry = VariantEntry(**{**values, **changes})

    def make(version: int) -> Release:
        return Release(
            version=version, task="digits", created="2026-01-31T12:00:00Z", spec=SPEC,
            lineage=Lineage("run-1", number, "a" * 64, "b" * 64), variants=(entry,),
        )  # fmt: skip

    return make


def send(folder: Path, number: int, **changes: Any) -> Release:
    return publish(folder, draft(number, **changes), [wire_of(number), REPORT], PRIVATE)


def check(folder: Path) -> list[Release]:
    """What a device and an auditor would see; every object that a release names is there and whole."""
    releases = published(folder, [PUBLIC])
    for release in releases:
        for entry in release.variants:
            assert sha256((folder / "objects" / entry.wire_sha256).read_bytes()) == entry.wire_sha256
            assert (folder / "objects" / entry.evidence_sha256).read_bytes() == REPORT
    if releases:
        newest = (folder / "release.json").read_bytes()
        assert newest == (folder / "releases" / f"{releases[-1].version}.json").read_bytes()
    return releases


def test_releases_get_rising_versions_and_are_all_kept(tmp_path: Path) -> None:
    assert published(tmp_path) == []
    first, second = send(tmp_path, 1), send(tmp_path, 2)
    assert (first.version, second.version) == (1, 2)
    assert check(tmp_path) == [first, second]
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json"))
    assert names == ["release.json", "releases/1.json", "releases/2.json"]


def test_the_same_content_can_be_published_again_under_a_higher_version(tmp_path: Path) -> None:
    send(tmp_path, 1)
    send(tmp_path, 2)
    again = publish(tmp_path, draft(1), [], PRIVATE)  # a fleet rollback: the objects are there already
    assert (again.version, again.lineage.round) == (3, 1)
    check(tmp_path)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"wire_bytes": 5}, "wire bytes, not 5"),
        ({"installed_bytes": 5}, r"unpacks to \d+ bytes, not to the 5 declared"),
        ({"installed_sha256": "c" * 64}, "does not unpack to its installed_sha256"),
        ({"wire_sha256": "c" * 64}, "cannot be read"),
        ({"evidence_sha256": "c" * 64}, "cannot be read"),
    ],
)
def test_what_a_device_would_refuse_is_not_published(
    tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    before = send(tmp_path, 1)
    with pytest.raises(FormatError, match=line):
        send(tmp_path, 2, **changes)
    assert check(tmp_path) == [before]


def test_a_draft_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="the draft has version 9, not 1"):
        publish(tmp_path, lambda _: draft(1)(9), [wire_of(1), REPORT], PRIVATE)
    assert published(tmp_path) == []


def test_a_damaged_object_of_an_earlier_release_is_noticed(tmp_path: Path) -> None:
    release = send(tmp_path, 1)
    (tmp_path / "objects" / release.variants[0].wire_sha256).write_bytes(
        b"x" * release.variants[0].wire_bytes
    )
    with pytest.raises(FormatError, match="damaged; hand it in again"):
        publish(tmp_path, draft(1), [], PRIVATE)
    assert send(tmp_path, 1).version == 2
    check(tmp_path)


def test_a_folder_that_holds_something_else_is_not_published_into(tmp_path: Path) -> None:
    (tmp_path / "release.json").write_text("{}")
    with pytest.raises(FormatError, match=r"release\.json: envelope"):
        send(tmp_path, 1)
    assert (tmp_path / "release.json").read_text() == "{}"


def test_listing_can_insist_on_signatures(tmp_path: Path) -> None:
    release = send(tmp_path, 1)
    assert published(tmp_path) == published(tmp_path, [PUBLIC]) == [release]
    with pytest.raises(SignatureError):
        published(tmp_path, [signing.generate_key()[1]])


def test_a_release_under_another_version_s_name_is_noticed(tmp_path: Path) -> None:
    send(tmp_path, 1)
    send(tmp_path, 2)
    shutil.copy(tmp_path / "releases" / "2.json", tmp_path / "releases" / "1.json")
    with pytest.raises(FormatError, match="holds version 2"):
        published(tmp_path)


def test_an_uncommitted_envelope_is_not_listed_and_its_version_is_not_used_again(tmp_path: Path) -> None:
    first = send(tmp_path, 1)
    orphan = signing.sign(draft(2)(2).to_bytes(), PRIVATE)
    (tmp_path / "releases" / "2.json").write_bytes(orphan)  # killed before release.json was replaced
    assert check(tmp_path) == [first]
    third = send(tmp_path, 3)
    assert third.version == 3
    assert check(tmp_path) == [first, third]
    assert not (tmp_path / "releases" / "2.json").exists()


# The key


def test_the_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    pem = load_or_create_key(tmp_path / "keys")
    assert load_or_create_key(tmp_path / "keys") == pem
    assert (tmp_path / "keys" / "signing.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "keys" / "signing.pub").read_bytes() == signing.public_of(pem)
    (tmp_path / "keys" / "signing.pub").unlink()
    assert load_or_create_key(tmp_path / "keys") == pem
    assert (tmp_path / "keys" / "signing.pub").read_bytes() == signing.public_of(pem)


def test_a_key_that_others_can_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    load_or_create_key(tmp_path)
    (tmp_path / "signing.key").chmod(0o644)
    with pytest.raises(FedgeError, match="chmod 600"):
        load_or_create_key(tmp_path)
    (tmp_path / "signing.key").write_bytes(b"")
    (tmp_path / "signing.key").chmod(0o600)
    with pytest.raises(FormatError, match="signing key"):
        load_or_create_key(tmp_path)


# Faults

STEPS = [
    *[(os, name) for name in ("fsync", "replace", "mkdir", "fdopen", "unlink", "chmod", "open")],
    (tempfile, "mkstemp"),
]


def test_a_fault_at_any_filesystem_step_leaves_the_old_or_the_new_release(tmp_path: Path) -> None:
    pristine, folder = tmp_path / "pristine", tmp_path / "folder"
    old = send(pristine, 1)
    count, step = 0, 0

    def wrapped(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **options)

        return call

    while count >= step:
        count, step, line = 0, step + 1, ""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pristine, folder)
        with pytest.MonkeyPatch.context() as patch:
            for module, name in STEPS:
                patch.setattr(module, name, wrapped(getattr(module, name)))
            try:
                send(folder, 2)
            except FedgeError as error:
                line = str(error)
        assert not line or "No space left on device" in line
        assert check(folder)[0] == old
        assert len(check(folder)) <= 2
        assert send(folder, 3).version >= 2
        check(folder)
    assert step > 15


PUBLISH = f"""
import os, shutil, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_publish as ours
ours.PRIVATE = Path(sys.argv[1]).read_bytes()
folder = Path(sys.argv[2])
"""

FOREVER = """
print("ready", flush=True)
number = 1
while True:
    number += 1
    ours.send(folder, number)
"""

STEP_BY_STEP = """
copies = Path(sys.argv[3])
ours.wire_of(2)  # once, not in every child
step = 0
while True:
    step += 1
    place = copies / str(step)
    shutil.copytree(folder, place)
    child = os.fork()
    if child == 0:
        count = 0
        def wrapped(function):
            def call(*arguments, **options):
                global count
                count += 1
                if count == step:
                    os._exit(9)
                return function(*arguments, **options)
            return call
        for module, name in ours.STEPS:
            setattr(module, name, wrapped(getattr(module, name)))
        ours.send(place, 2)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
print(step)
"""


def start(script: str, tmp_path: Path, *folders: Path) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    (tmp_path / "key.pem").write_bytes(PRIVATE)
    environment = {**os.environ, "PYTHONPATH": f"{root / 'common'}:{root / 'server'}"}
    return subprocess.Popen(
        [sys.executable, "-c", PUBLISH + script, str(tmp_path / "key.pem"), *map(str, folders)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_kill_at_any_filesystem_step_leaves_the_old_or_the_new_release(tmp_path: Path) -> None:
    folder, copies = tmp_path / "folder", tmp_path / "copies"
    old = send(folder, 1)
    copies.mkdir()
    out, err = start(STEP_BY_STEP, tmp_path, folder, copies).communicate(timeout=120)
    steps = int(out or f"0{err}")
    assert steps > 15
    seen = set()
    for step in range(1, steps + 1):
        place = copies / str(step)
        found = check(place)
        assert found[0] == old
        seen.add(len(found))
        later = send(place, 3)
        assert check(place)[-1] == later
        assert not [path for path in place.rglob(".*.*") if path.is_file()]  # nothing half-written is left
    assert seen == {1, 2}


@pytest.mark.slow
def test_kills_at_random_moments_leave_a_whole_release(tmp_path: Path) -> None:
    folder, moments = tmp_path / "folder", random.Random(0)
    send(folder, 1)
    versions = []
    for _ in range(20):
        process = start(FOREVER, tmp_path, folder)
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.wait(timeout=moments.uniform(0.01, 0.3))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        versions.append(check(folder)[-1].version)
        assert json.loads((folder / "release.json").read_bytes())["signatures"]
    assert versions == sorted(versions)
    assert versions[-1] > 10
