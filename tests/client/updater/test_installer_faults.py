"""Installing with real processes, a real disk that is full and a real connection that breaks."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import Server, http

from fedge.errors import FedgeError
from fedge.files import sha256
from fedge_client.updater import Artefact, Installer, State, anything

ROOT = Path(__file__).parents[3]
SOURCE = """
import hashlib, json, os, random, shutil, signal, sys, tempfile, time
from pathlib import Path
from fedge.errors import FedgeError
from fedge_client.updater import Artefact, Installer, anything

def content(version):
    return random.Random(version).randbytes(1_000_000 + version)

def artefact(version):
    data = content(version)
    return Artefact(name=str(version), version=version, length=len(data),
                    sha256=hashlib.sha256(data).hexdigest(), floor=max(version - 1, 0))

def installer(home):
    def fetch(name, maximum, offset=0):
        data = content(int(name))
        for start in range(offset, len(data), 16384):
            yield data[start : start + 16384]
    return Installer(Path(home), fetch, anything)

def whole(home):
    "Version that runs, complete and not below its floor."
    state, opened = installer(home).store.state(), installer(home).store.open()
    assert opened.data == content(opened.record.version) and not opened.returned
    assert opened.record.version == state.current.version >= state.floor
    return opened.record.version
"""


def run(script: str, *arguments: object, timeout: float = 100) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'common'}:{ROOT / 'client'}:{Path(__file__).parent}"}
    done = subprocess.run(
        [sys.executable, "-c", SOURCE + script, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


FORTY_KILLS = """
home, chance = sys.argv[1], random.Random(1)
start = time.monotonic()
installer(home).install(artefact(1))
lasts = time.monotonic() - start
kills, version, late, resumed = 0, 1, 0, 0
while kills < 40:
    child = os.fork()
    if child == 0:
        try:
            installer(home).install(artefact(version + 1))
        finally:
            os._exit(0)
    time.sleep(chance.uniform(0, 1.1 * lasts))
    os.kill(child, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    kills += killed
    now = whole(home)
    assert now in (version, version + 1)
    late += killed and now == version + 1
    resumed += any(path.stat().st_size for path in Path(home, "parts").iterdir())
    version = now
before = whole(home)
installer(home).install(artefact(before + 1))
print(json.dumps({"late": late, "resumed": resumed, "last": whole(home) - before}))
"""


@pytest.mark.slow
def test_forty_kills_at_random_moments_leave_a_whole_version_each_time(tmp_path: Path) -> None:
    found = json.loads(run(FORTY_KILLS, tmp_path / "home"))
    assert found["last"] == 1
    assert found["resumed"] > 0  # some left a part, which the next attempt took up


STEP_BY_STEP = """
from steps import killed_at_each
home, copies = Path(sys.argv[1]), Path(sys.argv[2])
for version in (1, 2):
    installer(home).install(artefact(version))
steps, seen = 0, set()
for place in killed_at_each(home, copies, lambda place: installer(place).install(artefact(3))):
    steps += 1
    seen.add(whole(place))
    installer(place).install(artefact(3))
    assert whole(place) == 3 and not list(place.rglob(".current.*")) and not list((place / "parts").iterdir())
    shutil.rmtree(place)
print(json.dumps({"steps": steps, "seen": sorted(seen)}))
"""


@pytest.mark.slow
def test_a_kill_at_each_step_of_the_file_system_leaves_a_whole_version(tmp_path: Path) -> None:
    found = json.loads(run(STEP_BY_STEP, tmp_path / "home", tmp_path))
    assert found["steps"] > 15
    assert found["seen"] == [2, 3]


LIMITED = """
import resource
home = sys.argv[1]
installer(home).install(artefact(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    installer(home).install(artefact(2))
except FedgeError as error:
    print(error)
print("runs", whole(home))
"""


@pytest.mark.slow
def test_a_disk_that_takes_no_more_in_the_middle_leaves_what_ran(tmp_path: Path) -> None:
    said = run(LIMITED, tmp_path / "home")
    assert "what was installed goes on working" in said
    assert said.endswith("runs 1\n")
    assert run(LIMITED.replace("400_000", "-1"), tmp_path / "home") == "runs 2\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def published(folder: Path, version: int, size: int = 1_000_000) -> Artefact:
    data = random.Random(version).randbytes(size + version)
    (folder / str(version)).write_bytes(data)
    return Artefact(name=str(version), version=version, length=len(data), sha256=sha256(data))


def from_folder(folder: Path, at: int = -1, then: Path | None = None) -> object:
    """Files of a folder; once `at` bytes have come the disk of `then` is filled."""

    def fetch(name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        data = (folder / name).read_bytes()
        for start in range(offset, len(data), 16384):
            if then is not None and start >= at:
                fill(then)
            yield data[start : start + 16384]

    return fetch


def fill(disk: Path) -> None:
    free = shutil.disk_usage(disk).free
    if free:
        with (disk / "ballast").open("ab") as file:
            file.write(bytes(free))


@pytest.mark.slow
def test_a_device_with_a_full_disk_answers_refuses_and_installs_once_there_is_room(
    tmp_path: Path, small_disk: Path
) -> None:
    home = small_disk / "home"
    first, second = published(tmp_path, 1), published(tmp_path, 2)
    Installer(home, from_folder(tmp_path), anything).install(first)  # type: ignore[arg-type]

    during = Installer(home, from_folder(tmp_path, 300_000, small_disk), anything)  # type: ignore[arg-type]
    with pytest.raises(FedgeError, match=r"No space left on device.*make room"):
        during.install(second)
    assert shutil.disk_usage(small_disk).free == 0
    assert during.store.open().record.version == 1  # opened anew, with no byte left

    before = Installer(home, from_folder(tmp_path), anything)  # type: ignore[arg-type]
    with pytest.raises(FedgeError, match="0 bytes are free"):
        before.install(second)
    assert before.store.open().record.version == 1

    (small_disk / "ballast").unlink()
    before.install(second)
    assert before.store.open().record.version == 2


@pytest.mark.slow
def test_a_connection_that_is_reset_every_400_kb_brings_the_whole_in_little_more_than_its_bytes(
    tmp_path: Path,
) -> None:
    offered = published(tmp_path, 1, 3_000_000)
    came = 0

    with Server(tmp_path, reset_after=400_000) as server:

        def counted(name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
            nonlocal came
            for chunk in http(server.url)(name, maximum, offset):
                came += len(chunk)
                yield chunk

        installer = Installer(tmp_path / "home", counted, anything, pause=lambda _: None)
        installer.install(offered)
        assert installer.store.open().record.version == 1
        assert len(server.paths) >= 8
        assert came == offered.length  # no byte twice
        assert server.sent <= 3 * offered.length


class Disk:
    """What a power cut would leave: contents that were synced, and names whose folder was synced since."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.step, self.commits = 0, 0
        self.synced: dict[int, int] = {}  # inode -> step
        self.named: dict[int, int] = {}  # inode of a folder -> step at which a name in it came or changed
        fsync, replace, mkdir = os.fsync, os.replace, os.mkdir

        def synced(descriptor: int) -> None:
            fsync(descriptor)
            self.step += 1
            self.synced[os.fstat(descriptor).st_ino] = self.step

        def replaced(old: Path, new: Path) -> None:
            if Path(new).name == "current":
                self.check(Path(old), Path(new).parent)
            replace(old, new)
            self.name(Path(new))

        def made(path: Path, *rest: Any) -> None:
            mkdir(path, *rest)
            self.name(Path(path))

        for name, function in (("fsync", synced), ("replace", replaced), ("mkdir", made)):
            patch.setattr(os, name, function)

    def name(self, path: Path) -> None:
        self.step += 1
        self.named[path.parent.stat().st_ino] = self.step

    def check(self, new: Path, home: Path) -> None:
        """All that a state names is safe, and so is the state."""
        state = State.from_bytes(new.read_bytes())
        assert new.stat().st_ino in self.synced
        for record in (state.current, state.previous):
            if record is None:
                continue
            slot = home / "slots" / record.slot
            assert {(slot / name).stat().st_ino for name in ("artefact", "notes")} <= self.synced.keys()
            for folder in (slot, slot.parent, home):
                assert self.is_safe(folder), f"{folder}: its names may be lost"
            self.commits += 1

    def is_safe(self, folder: Path) -> bool:
        inode = folder.stat().st_ino
        return self.synced.get(inode, 0) > self.named.get(inode, 0)


@pytest.mark.parametrize("packed", [False, True])
def test_all_that_a_commit_names_survives_a_power_cut_before_the_commit_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    data = {f"x{version}": bytes([version]) * 70_000 for version in (1, 2, 3)}
    home = tmp_path / "home"
    installer = Installer(
        home, lambda name, _, offset=0: iter([data[name][offset:]]), anything,
        expand=(lambda found, _: found[::-1]) if packed else None,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        for version, (name, content) in enumerate(data.items(), 1):
            made = {"installed_bytes": len(content), "installed_sha256": sha256(content[::-1])}
            installer.install(
                Artefact(
                    name=name, version=version, length=len(content), sha256=sha256(content),
                    notes=b"signed", **made if packed else {},
                )
            )  # fmt: skip
            assert disk.is_safe(home)
    assert disk.commits >= 5
    assert installer.store.open().record.version == 3
