"""Devices that get releases from a real hub, over real networks, disks and clocks that fail."""

from __future__ import annotations

import contextlib
import json
import lzma
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import PATIENCE_S, SCRIPTS, Agent, Federation, wait_for
from places import Clock, Place, forge
from proxy import NONE, FaultProxy, Faults
from tuf.api.metadata import Metadata, Targets

from fedge.delivery import TierMark, mark_path
from fedge.errors import ForbiddenError
from fedge.manifest import Release
from fedge_client.agent.identity import Identity
from fedge_client.delivery import Delivery
from fedge_client.device import Device
from fedge_client.runtime import Runtime
from fedge_client.updater import whole
from fedge_server.registry.database import Registry
from fedge_server.release import ReleasePlace
from fedge_server.release.publishing import publish_draft
from fedge_server.rollout.plan import Plan, Stage, default_criteria
from fedge_server.rollout.service import Rollouts

TIER, OTHER = "edge", "other"
REPORT = {"passed": True, "reasons": [], "drop_upper": 0.008, "max_drop": 0.01, "max_class_drop": None}


class Publisher:
    """Signs releases of models that always give one answer into a server's repository."""

    def __init__(self, home: Path, tools: Any) -> None:
        self.place, self._tools = ReleasePlace.of(home), tools
        self.random = random.Random(1)

    def made(
        self, answer: int, *, filler: int = 0, tried_as: int | None = None
    ) -> tuple[Release, list[bytes]]:
        """A release of tier `edge`, its wire bytes about as many as `filler`, and its objects."""
        tools, report = self._tools, json.dumps(REPORT, sort_keys=True).encode()
        model = tools.constant_model(answer, filler=self.random.randbytes(filler))
        wire = lzma.compress(model, preset=0)  # packing it well takes seconds
        trial = tools.golden_bytes(tools.constant_model(answer if tried_as is None else tried_as))
        entry, _ = tools.entry_of(TIER, tools.constant_model(answer))
        entry = replace(
            entry,
            wire_sha256=tools.sha256(wire),
            wire_bytes=len(wire),
            installed_sha256=tools.sha256(model),
            installed_bytes=len(model),
            evidence_sha256=tools.sha256(report),
            golden_sha256=tools.sha256(trial),
        )
        return tools.release_of(1, (entry,)), [wire, report, trial]

    def publish(self, answer: int, *, filler: int = 0, floor: int | None = None) -> Release:
        """Sign a release; the registry knows nothing of it, and devices get the newest."""
        made, objects = self.made(answer, filler=filler)
        release: Release = self.place.repository.publish(
            lambda version: replace(made, version=version),
            objects,
            self.place.at_hand().of(TIER),
            floors={} if floor is None else {TIER: floor},
        )
        return release

    def roll_out(self, answer: int, *, filler: int = 0, tried_as: int | None = None) -> int:
        """Publish a release as a run does, and offer it to all devices; its version."""
        made, objects = self.made(answer, filler=filler, tried_as=tried_as)
        with Registry.open(self.place.home) as registry:
            registry.begin_run("run-1", task="digits", seed=0, config={}, data="")
            registry.end_run("run-1", "done", "")  # before the hub sees it and starts a worker
            model = registry.store.put(b"a model")
            for data in objects:
                registry.store.put(data)
            draft = registry.drafts.add(replace(made, lineage=replace(made.lineage, global_model=model)))
            done = publish_draft(self.place, registry, draft)
            assert done.release is not None, done.waiting
            plan = Plan((Stage("all", percent=100, hold_s=0),), default_criteria())
            Rollouts(registry).start(done.release.version, TIER, plan, who="test")
            return done.release.version

    def target(self, version: int, kind: str) -> Path:
        """A file of a release."""
        (found,) = (self.place.home / "repository" / "targets" / TIER).glob(f"*.{version}.{kind}")
        return found


def with_tiers(made: Federation) -> None:
    ReleasePlace.of(made.home).make([TIER, OTHER])


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with Federation(tmp_path_factory.mktemp("delivery"), agents=0, before_up=with_tiers) as made:
        yield made


@pytest.fixture(scope="module")
def publisher(federation: Federation, tools: Any) -> Publisher:  # type: ignore[override]
    return Publisher(federation.home, tools)


@pytest.fixture
def device(federation: Federation, publisher: Publisher, tmp_path: Path) -> Agent:
    """Enrolled, with a first release that answers `zero`."""
    return enrolled(federation, publisher, tmp_path)


def enrolled(federation: Federation, publisher: Publisher, tmp_path: Path) -> Agent:
    made = federation.enrol("d", home=tmp_path / "d", data=tmp_path / "none.npz")
    (made.home / "agent.toml").write_text("[delivery]\npoll_s = 2\n[link]\nbackoff_max_s = 1\n")
    publisher.publish(0)
    hub_knows(federation, made, publisher)
    assert install(made)[0] == 0
    return made


def hub_knows(federation: Federation, device: Agent, publisher: Publisher) -> None:
    """Wait until the hub has seen what was published."""
    mark = publisher.place.repository.content(TIER).mark
    with Delivery(lambda: Identity.open(device.home)) as service:
        from fedge_client.delivery import Standing

        wait_for(lambda: service.poll(Standing()).version == mark.newest, "the hub sees the release")


def install(device: Agent, *, prefix: tuple[str, ...] = ()) -> tuple[int, str]:
    """`fedge-client install`: asks the hub once."""
    done = subprocess.run(
        [*prefix, SCRIPTS / "fedge-client", "install", "--home", device.home],
        capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def runs(device: Agent) -> tuple[int, str]:
    """Version that answers, whole, not below its floor, and its answer."""
    runtime, state = Runtime.open(device.home), Device.open(device.home).store.state()
    assert not runtime.installed.damaged
    assert runtime.release.version >= state.floor
    return runtime.release.version, runtime.infer(np.zeros((8, 8), np.uint8))[0].label


# Enrolment


@pytest.mark.slow
def test_a_device_is_given_root_tier_and_floor_with_its_certificate(
    federation: Federation, publisher: Publisher, tmp_path: Path
) -> None:
    floor = publisher.publish(0, floor=1).version
    assert floor
    made = federation.enrol("fresh", home=tmp_path / "fresh", data=tmp_path / "none.npz")
    device = Device.open(made.home)
    assert device.tier == TIER
    roots = federation.home / "repository" / "metadata"
    assert device.root in {path.read_bytes() for path in roots.glob("*.root.json")}
    assert device.store.state().lowest == 1


# Networks


@pytest.mark.slow
def test_a_connection_that_is_reset_every_400_kb_brings_the_release_in_few_bytes(
    federation: Federation, publisher: Publisher, device: Agent
) -> None:
    """Reset once what it has carried has arrived, so that the bytes do not depend on who is how fast."""
    release = publisher.publish(1, filler=1_500_000)
    hub_knows(federation, device, publisher)
    length, parts = release.variants[0].wire_bytes, device.home / "installed" / "parts"

    def have() -> int:
        with contextlib.suppress(FileNotFoundError):
            return sum(path.stat().st_size for path in parts.glob("*"))
        return 0

    offsets: list[int] = []  # that the model was asked for from
    resets: list[tuple[int, int]] = []  # so many of them came before it, and so many bytes were there

    def anew() -> bool:
        return any(offset < there for asked, there in resets for offset in offsets[asked:])

    def arrived(going: Future[tuple[int, str]], enough: int) -> bool:
        return going.done() or have() >= enough or anew()

    with FaultProxy("127.0.0.1", federation.link_port) as proxy, ThreadPoolExecutor(1) as pool:
        device.reach_link_at(proxy.address)
        proxy.faults = Faults(hold_after=400_000)
        attempts = 0
        try:
            while runs(device)[0] != release.version:
                attempts += 1
                assert attempts < 10
                going = pool.submit(brought, device, release.version, offsets)
                while not going.done():
                    enough = (
                        have() + 240_000
                    )  # of 400 kB: the others may be metadata, and a message in pieces
                    wait_for(partial(arrived, going, enough), "bytes arrive")
                    assert not anew(), "what had arrived was fetched anew"
                    if not going.done() and enough < length:
                        resets.append((len(offsets), have()))
                        proxy.reset_all()
        finally:
            proxy.faults = NONE  # what failed need not be waited for
        assert len(resets) >= 3
        assert len(offsets) > 3
        assert proxy.carried < 3 * length
    assert runs(device) == (release.version, "one")


@pytest.mark.slow
def test_a_flipped_bit_on_the_wire_costs_a_connection_and_one_on_the_servers_disk_the_release(
    federation: Federation, publisher: Publisher, device: Agent
) -> None:
    before = runs(device)
    release = publisher.publish(1, filler=200_000)
    hub_knows(federation, device, publisher)
    with FaultProxy("127.0.0.1", federation.link_port) as proxy:
        device.reach_link_at(proxy.address)
        proxy.faults = Faults(flip_down=60_000)  # of each connection
        code, said = install(device)
        assert (code, runs(device)) == (1, before), said
        proxy.faults = NONE
        path = publisher.target(release.version, "model")
        data = path.read_bytes()
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        shutil.rmtree(device.home / "installed" / "parts", ignore_errors=True)
        code, said = install(device)
        assert code == 1
        assert "not those that were signed" in said
        assert runs(device) == before
        path.write_bytes(data)
        assert install(device)[0] == 0
    assert runs(device) == (release.version, "one")


@pytest.mark.slow
def test_another_tiers_files_are_not_given_to_a_device(federation: Federation, device: Agent) -> None:
    with Delivery(lambda: Identity.open(device.home)) as service, pytest.raises(ForbiddenError):
        whole(service.fetch, f"targets/{OTHER}/{'0' * 64}.1.model", 1000)


# The agent


@pytest.mark.slow
def test_an_agent_takes_what_a_rollout_offers_and_a_bad_release_ends_neither_it_nor_the_one_before(
    tmp_path: Path, tools: Any
) -> None:
    """On a hub of its own: a tier that has had a rollout is offered nothing that none brings."""
    folder = tmp_path / "hub"
    folder.mkdir()
    with Federation(folder, agents=0, before_up=with_tiers) as federation:
        publisher = Publisher(federation.home, tools)
        device = enrolled(federation, publisher, tmp_path)
        (device.home / "agent.toml").write_text("[delivery]\npoll_s = 5\n")
        good = publisher.roll_out(1)
        process = federation.start_agent(device, wait=False)
        wait_for(lambda: runs(device)[0] == good, "the release is installed")
        wait_for(
            lambda: reported(federation, device, good) == {"installed", "healthy", "latency_ms"},
            "it is reported",
        )
        bad = publisher.roll_out(2, tried_as=0)
        wait_for(lambda: reported(federation, device, bad) == {"install_failed"}, "its failure is reported")
        assert runs(device) == (good, "one")
        mended = publisher.roll_out(2, filler=16)  # of other content: that of the bad one is in quarantine
        wait_for(lambda: "healthy" in reported(federation, device, mended), "the next one is installed")
        assert runs(device) == (mended, "two")
        assert process.alive
        assert process.end() == 0


def reported(federation: Federation, device: Agent, version: int) -> set[str]:
    """Kinds of reports that the hub has of a version from a device."""
    query = "SELECT kind FROM rollout_reports WHERE version = ? AND device_id = ?"
    with closing(sqlite3.connect(federation.home / "fedge.db")) as database:
        return {kind for (kind,) in database.execute(query, (version, device.device_id))}


# Kills


BEFORE, AFTER, ANYWHERE = 18, 10, 12  # kills


@pytest.mark.slow
def test_forty_kills_at_random_moments_of_an_installation_leave_a_signed_release_each_time(
    federation: Federation, publisher: Publisher, device: Agent, tmp_path: Path
) -> None:
    """At random steps before and after the commit, and at random moments wherever those fall."""
    chance, published = random.Random(2), {runs(device)[0]: "zero"}
    manifests: dict[int, bytes] = publisher.place.repository.manifests(TIER)

    def version_after(current: int) -> int:
        """The next one; where there is none, four are published."""
        if max(published) == current:
            for number in range(len(published), len(published) + 4):
                release = publisher.publish(number % 3, filler=150_000, floor=current)
                published[release.version] = ("zero", "one", "two")[number % 3]
            manifests.update(publisher.place.repository.manifests(TIER))
            hub_knows(federation, device, publisher)
        return current + 1

    with (tmp_path / "err").open("wb") as errors, subprocess.Popen(
        [sys.executable, Path(__file__).with_name("mortal.py"), str(device.home)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        env={**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"},
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None

        def attempt(version: int, place: str, number: float = 0) -> dict[str, Any]:
            process.stdin.write(json.dumps([version, place, number]) + "\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            return answer

        newest = version_after(runs(device)[0])
        start = time.monotonic()
        steps = attempt(newest, "never")["steps"]
        lasts = time.monotonic() - start
        assert runs(device) == (newest, published[newest]), (tmp_path / "err").read_text()
        assert steps["before"] > 30  # metadata, chunks, the trial, the slot
        assert steps["after"] > 5  # the commit's own folder, the part, the reports
        places = ["before"] * BEFORE + ["after"] * AFTER + ["time"] * ANYWHERE
        chance.shuffle(places)
        for place in places:
            before = runs(device)[0]
            newest = version_after(before)
            moment = chance.uniform(0, 1.1 * lasts) if place == "time" else chance.randrange(steps[place])
            killed = attempt(newest, place, moment)["killed"]
            version, answer = runs(device)
            assert answer == published[version]
            allowed = {"before": {before}, "after": {newest}, "time": {before, newest}}[place]
            assert version in allowed, (place, (tmp_path / "err").read_text())
            assert killed or (place == "time" and version == newest), (tmp_path / "err").read_text()
            assert Device.open(device.home).store.open().notes == manifests[version]
        process.stdin.close()
    assert install(device)[0] == 0
    assert runs(device)[0] == max(published)


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, leave: int) -> None:
    (folder / "ballast").write_bytes(b"")
    (folder / "ballast").write_bytes(bytes(max(shutil.disk_usage(folder).free - leave, 0)))


@pytest.mark.slow
def test_a_disk_that_is_full_before_or_during_an_installation_leaves_what_ran(
    federation: Federation, publisher: Publisher, small_disk: Path, tmp_path: Path
) -> None:
    device = federation.enrol("small", home=small_disk / "d", data=tmp_path / "none.npz")
    publisher.publish(0)
    hub_knows(federation, device, publisher)
    assert install(device)[0] == 0
    before = runs(device)
    release = publisher.publish(2, filler=1_000_000)
    hub_knows(federation, device, publisher)

    fill(small_disk, 1_000_000)  # metadata has room, the release has not
    code, said = install(device)
    assert code == 1
    assert "are free, the installation of version" in said
    assert runs(device) == before

    (small_disk / "ballast").unlink()
    with FaultProxy("127.0.0.1", federation.link_port) as proxy:
        device.reach_link_at(proxy.address)
        proxy.faults = Faults(bytes_per_s=500_000)
        going = subprocess.Popen(
            [SCRIPTS / "fedge-client", "install", "--home", device.home],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        parts = device.home / "installed" / "parts"
        wait_for(lambda: any(path.stat().st_size for path in parts.glob("*")), "the download has begun")
        fill(small_disk, 0)
        said, _ = going.communicate(timeout=PATIENCE_S)
    assert going.returncode == 1
    assert "make room, what was installed goes on working" in said
    assert runs(device) == before
    preflight = [SCRIPTS / "fedge-client", "preflight", "--home", device.home]
    done = subprocess.run(preflight, capture_output=True, text=True, check=False)
    assert f"release {before[0]} loads and answers" in done.stdout  # with no byte left

    (small_disk / "ballast").unlink()
    device.reach_link_at(federation.link_address)
    assert install(device)[0] == 0
    assert runs(device) == (release.version, "two")


# Clocks and metadata


def other_clock(shift: str) -> tuple[str, ...]:
    """A prefix for commands whose wall clock is off by so much."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found:
        pytest.skip("libfaketime (of Debian's package faketime) is not installed")
    return ("env", f"LD_PRELOAD={found[0]}", f"FAKETIME={shift}", "FAKETIME_DONT_FAKE_MONOTONIC=1")


@pytest.mark.slow
@pytest.mark.parametrize("shift", ["+1d", "-1d"])
def test_a_clock_that_is_a_day_off_does_not_stop_an_installation(
    federation: Federation, publisher: Publisher, device: Agent, shift: str
) -> None:
    release = publisher.publish(1)
    hub_knows(federation, device, publisher)
    code, said = install(device, prefix=other_clock(shift))
    assert code == 0, said
    assert runs(device) == (release.version, "one")


@pytest.mark.slow
def test_a_clock_that_is_four_days_fast_refuses_and_says_why(
    federation: Federation, publisher: Publisher, device: Agent
) -> None:
    before = runs(device)
    publisher.publish(1)
    hub_knows(federation, device, publisher)
    code, said = install(device, prefix=other_clock("+4d"))
    assert code == 1
    assert "this device's clock says" in said
    assert runs(device) == before
    assert install(device)[0] == 0


@pytest.mark.slow
def test_a_lost_link_to_the_root_is_found_again(
    federation: Federation, publisher: Publisher, device: Agent
) -> None:
    (device.home / "delivery" / "metadata" / "root.json").unlink()
    release = publisher.publish(1)
    hub_knows(federation, device, publisher)
    assert install(device)[0] == 0
    assert runs(device) == (release.version, "one")


@pytest.mark.slow
def test_a_server_that_was_put_back_or_mixed_is_refused_until_it_is_whole_again(
    federation: Federation, publisher: Publisher, device: Agent, tmp_path: Path
) -> None:
    metadata = federation.home / "repository" / "metadata"
    shutil.copytree(metadata, tmp_path / "old")
    publisher.publish(1)
    hub_knows(federation, device, publisher)
    assert install(device)[0] == 0
    before = runs(device)
    release = publisher.publish(2)
    hub_knows(federation, device, publisher)
    shutil.copytree(metadata, tmp_path / "new")
    for name in ("timestamp.json", "snapshot"):  # the old time, then the new time with the old content
        stamp = metadata / "timestamp.json"
        if name == "timestamp.json":
            shutil.copy(tmp_path / "old" / name, stamp)
        else:
            newest = max(metadata.glob("*.snapshot.json"), key=lambda path: int(path.name.split(".")[0]))
            oldest = max((tmp_path / "old").glob("*.snapshot.json"), key=lambda p: int(p.name.split(".")[0]))
            shutil.copy(oldest, newest)
        code, said = brought(device, release.version)
        assert code == 1, (name, said)
        assert runs(device) == before, name
        for path in (tmp_path / "new").iterdir():
            shutil.copy(path, metadata / path.name)
    assert brought(device, release.version)[0] == 0
    assert runs(device) == (release.version, "two")


def brought(device: Agent, version: int, offsets: list[int] | None = None) -> tuple[int, str]:
    """Install what a hub says that no longer sees its own repository; notes where the model is taken up."""
    from fedge_client.agent.installation import bring

    with Delivery(lambda: Identity.open(device.home)) as service:

        def fetch(name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
            if offsets is not None and name.endswith(".model"):
                offsets.append(offset)
            return service.fetch(name, maximum, offset)

        done = bring(Device.open(device.home), fetch, version)
    return int(bool(done.fault)), done.fault


@pytest.mark.slow
def test_a_tier_that_is_forged_with_the_online_keys_ships_nothing_over_the_service(
    federation: Federation, publisher: Publisher, device: Agent, tmp_path: Path
) -> None:
    before, repository = runs(device), federation.home / "repository"
    kept = tmp_path / "kept"
    shutil.copytree(repository / "metadata", kept)
    top = publisher.place.at_hand().top
    thief = Place(repository, clock=_Now(), keys={role: [key] for role, key in top.items()})
    files = (repository / "metadata").glob(f"*.tier-{TIER}.json")
    path = max(files, key=lambda path: int(path.name.split(".")[0]))
    tier = Metadata[Targets].from_bytes(path.read_bytes())
    tier.signed.version += 1
    mark = TierMark(TIER, 0, before[0] + 1)
    tier.signed.targets[mark_path(TIER)].unrecognized_fields["custom"] = mark.to_json()
    tier.signatures.clear()
    for role in ("snapshot", "timestamp"):
        tier.sign(top[role]._signer, append=True)
    try:
        forge(thief, **{TIER: tier.to_bytes()})
        code, said = brought(device, before[0] + 1)
        assert code == 1
        assert "not signed by enough of the keys" in said
        assert runs(device) == before
    finally:  # the thief's timestamp is newer than ours: sign past it
        for path in kept.iterdir():
            if not path.name.endswith("timestamp.json"):
                shutil.copy(path, repository / "metadata" / path.name)


class _Now(Clock):
    """The time as it is."""

    def __init__(self) -> None:
        super().__init__()
        from datetime import UTC, datetime

        self.now = datetime.now(UTC)
