"""A publisher that dies at any moment leaves the old state or the new, and the next one goes on."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from dying import dies_at
from places import TOP, Client, Place, keys_of, new_key

from fedge.errors import UserError
from fedge_server.repository import create_key
from fedge_server.repository.folder import Folder
from fedge_server.repository.state import kept, load


def leftovers(place: Place) -> set[str]:
    """Files that devices could read and no kept snapshot needs; there are none after tidying up."""
    folder = Folder(place.path)
    state = load(folder)
    assert state is not None
    metadata, targets = kept(folder, state)
    found = {name for name in place.files() if not name.endswith(".root.json")}
    return found - {f"metadata/{name}" for name in metadata} - {f"targets/{name}" for name in targets}


def publish(place: Place) -> None:
    place.publish(7, "micro")


def rotate_timestamp(place: Place) -> None:
    place.repository.rotate("timestamp", keys_of(*place.keys["new"]), place.all())


@pytest.mark.slow
@pytest.mark.parametrize("work", [publish, rotate_timestamp])
def test_dying_at_each_write_in_turn_leaves_old_or_new(
    place: Place, client: Client, tmp_path: Path, work: Callable[[Place], None]
) -> None:
    place.keys["new"] = [new_key()]
    assert place.publish(1).version == 1
    assert client.mark().newest == 1
    old, point, done = place.path, 0, False
    while not done:
        shutil.copytree(old, tmp_path / f"p{point}")
        shutil.copytree(client.home, tmp_path / f"d{point}")
        place.path = tmp_path / f"p{point}"
        done = not dies_at(point, lambda: work(place))
        seen = Client(tmp_path / f"d{point}", place).mark().newest
        assert seen in ({2} if done and work is publish else {1, 2} if work is publish else {1})
        assert place.publish(8, "micro", signing=place.all()).version > seen
        assert Client(tmp_path / f"d{point}", place).mark().newest > seen
        if point % 4 == 0 or done:
            place.repository.status()  # tidies up
            assert leftovers(place) == set()
            assert not list((place.path / "state").glob(".*"))
        point += 1
    assert point > 5


@pytest.mark.slow
def test_dying_at_each_write_of_its_creation_leaves_no_repository_or_a_whole_one(tmp_path: Path) -> None:
    point, done = 0, False
    while not done:
        place = Place(tmp_path / f"p{point}")

        def create(place: Place = place) -> None:
            keys = {role: keys_of(*place.keys[role]) for role in TOP}
            place.repository.create(keys, place.all())  # type: ignore[arg-type]

        done = not dies_at(point, create)
        try:
            create()
        except UserError:
            assert "root" in {role.role for role in place.repository.status()}
        place.first_root = place.repository.root(1)
        place.repository.add_tier("micro", keys_of(*place.keys["tier-micro"]), place.all())
        assert Client(tmp_path / f"d{point}", place).mark().newest == 0
        point += 1
    assert point > 10


PUBLISHER = """
import sys
from pathlib import Path
from places import Place
from fedge_server.repository import load_key
path, keys, tier = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
held = {name: [load_key(keys / name)] for name in ("snapshot", "timestamp", "tier-micro", "tier-board")}
place = Place(path, keys=held)
print("ready", flush=True)
for number in range(10**6):
    print(place.publish(number, tier).version, flush=True)
"""


@pytest.mark.slow
def test_killed_at_random_moments_no_version_is_used_twice(tmp_path: Path) -> None:
    """Two publishers at once, of which one is killed; then both."""
    keys = tmp_path / "keys"
    place = Place(tmp_path / "repository")
    for role in ("snapshot", "timestamp", "tier-micro", "tier-board"):
        place.keys[role] = [create_key(keys / role)]
    place.make()
    client, rng = Client(tmp_path / "device", place), random.Random(0)
    path = [*sys.path, str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": ":".join(path), "OMP_NUM_THREADS": "1"}

    def start(tier: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PUBLISHER, str(place.path), str(keys), tier]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    published: list[int] = []
    for _ in range(5):
        before = client.mark("micro").newest
        both = [start("micro"), start("board")]
        for process in both:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in both:
            time.sleep(rng.uniform(0.01, 0.25))
            process.kill()
        for process in both:
            published += [int(line) for line in process.communicate()[0].split()]
        assert client.mark("micro").newest >= before
        client.mark("board")
    assert len(published) == len(set(published)) >= 5
    last = place.publish(1)
    assert last.version > max(published)
    assert client.mark("micro").newest == client.mark("board").newest == last.version
    place.repository.status()
    assert leftovers(place) == set()
