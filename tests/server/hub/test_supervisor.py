"""Real worker processes, which do what a line of Python says."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedge.config import Config
from fedge.wire.v1 import admin_pb2 as admin
from fedge_server.continual.learnings import Learnings
from fedge_server.continual.state import Asked
from fedge_server.continual.terms import Terms
from fedge_server.hub.home import Home
from fedge_server.hub.supervisor import Supervisor, _flock_owner, lock_holder, tail
from fedge_server.registry.database import Registry

# A worker that holds its lock, as a real one does; `{}` is what it does then.
WORKER = """
import fcntl, os, pathlib, signal, sys, time
home, run = pathlib.Path(sys.argv[1]), sys.argv[2]
folder = home / "runs" / run
folder.mkdir(parents=True, exist_ok=True)
lock = (folder / "worker.lock").open("w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
sys.path[:0] = {path!r}
from fedge_server.registry.database import Registry
registry = Registry.open(home)
print("working", flush=True)
{work}
"""
SLEEP = "time.sleep(600)"
DONE = "registry.end_run(run, 'done', 'all rounds done')"


def worker(work: str) -> str:
    return WORKER.format(path=sys.path, work=work)


def queue(rig: Any, run_id: str = "run-1") -> None:
    rig.registry.queue_run(run_id, task="digits", seed=0, config={})


def status(rig: Any, run_id: str = "run-1") -> str:
    return str(rig.registry.run(run_id)["status"])


async def refresh(rig: Any) -> None:
    await rig.admin.Refresh(admin.RefreshRequest())


async def pid_of_worker(rig: Any, tools: Any) -> int:
    """The process of the only run, once it works."""
    await tools.until(lambda: "working" in tail(rig.home.run_log("run-1")))
    workers = await tools.until(rig.hub._supervisor.workers)
    return int(workers[0].pid)


@pytest.mark.slow
def test_a_queued_run_is_started_and_its_output_kept(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        rig.script = worker(DONE)
        queue(rig)
        await refresh(rig)
        await tools.until(lambda: status(rig) == "done")
        assert tail(rig.home.run_log("run-1")) == "working\n"

    hub(scenario)


@pytest.mark.slow
def test_a_worker_that_dies_is_started_again_and_then_given_up(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        rig.script = worker("print('no room left'); sys.exit(1)")
        queue(rig)
        await refresh(rig)
        await tools.until(lambda: status(rig) == "failed")
        run = rig.registry.run("run-1")
        assert (run["reason"], run["restarts"]) == ("no room left", 1)

    hub(scenario)


@pytest.mark.slow
def test_a_users_mistake_is_not_tried_again(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        rig.script = "import sys; print('no such data'); sys.exit(2)"
        queue(rig)
        await refresh(rig)
        await tools.until(lambda: status(rig) == "failed")
        run = rig.registry.run("run-1")
        assert (run["reason"], run["restarts"]) == ("no such data", 0)

    hub(scenario)


@pytest.mark.slow
def test_a_run_is_stopped_on_request_and_resumed(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        rig.script = worker(SLEEP)
        queue(rig)
        await refresh(rig)
        await pid_of_worker(rig, tools)
        assert rig.registry.request_stop("run-1") == "stopping"
        await refresh(rig)
        await tools.until(lambda: status(rig) == "stopped")
        assert lock_holder(rig.home.worker_lock("run-1")) == 0
        rig.script = worker(DONE)
        rig.registry.set_status("run-1", "queued")
        await refresh(rig)
        await tools.until(lambda: status(rig) == "done")

    hub(scenario)


@pytest.mark.slow
def test_runs_go_on_after_the_hub_was_stopped(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        rig.script = worker(SLEEP)
        queue(rig)
        await refresh(rig)
        await pid_of_worker(rig, tools)
        await rig.down()
        assert status(rig) == "running"
        assert lock_holder(rig.home.worker_lock("run-1")) == 0
        rig.script = worker(DONE)
        await rig.up()
        await tools.until(lambda: status(rig) == "done")

    hub(scenario)


@pytest.mark.slow
def test_a_worker_that_outlived_its_hub_is_not_doubled_and_can_be_stopped(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        await rig.down()
        queue(rig)
        rig.home.run("run-1").mkdir(parents=True)
        with rig.home.run_log("run-1").open("ab") as log:
            orphan = subprocess.Popen(
                [sys.executable, "-c", worker(SLEEP), str(rig.home.root), "run-1"], stdout=log
            )
        try:
            await tools.until(lambda: "working" in tail(rig.home.run_log("run-1")))
            assert lock_holder(rig.home.worker_lock("run-1")) == orphan.pid
            await rig.up()
            assert await pid_of_worker(rig, tools) == orphan.pid
            rig.registry.begin_run("run-1", task="digits", seed=0, config={}, data="")
            rig.registry.request_stop("run-1")
            await refresh(rig)
            await tools.until(lambda: status(rig) == "stopped")
            assert await asyncio.to_thread(orphan.wait, 10) == -signal.SIGTERM
        finally:
            orphan.kill()
            orphan.wait()

    hub(scenario)


def test_a_file_that_nobody_locks_has_no_holder(tmp_path: Any) -> None:
    assert lock_holder(tmp_path / "absent") == 0
    (tmp_path / "free").touch()
    assert lock_holder(tmp_path / "free") == 0


def test_a_process_that_locks_another_file_of_the_same_inode_is_not_the_holder(tmp_path: Any) -> None:
    path, table = tmp_path / "lock", tmp_path / "locks"
    with path.open("w") as held:
        state = os.fstat(held.fileno())
        here = f"2: FLOCK  ADVISORY  WRITE {os.getpid()} 08:01:{state.st_ino} 0 EOF\n"
        other = f"1: FLOCK  ADVISORY  WRITE {os.getppid()} 08:02:{state.st_ino} 0 EOF\n"
        table.write_text(other + here)
        assert _flock_owner(state, table) == os.getpid()
        table.write_text(other)
        assert _flock_owner(state, table) == 0


def test_a_hub_begins_the_run_of_a_learning_as_soon_as_it_is_told(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        learnings = Learnings(rig.registry.engine)
        config = Config.from_mapping({"task": "digits", "tiers": {"micro": {}}}).to_mapping()
        learnings.start("digits", "digits", config, Terms(), who="ann")
        learnings.happened("digits", Asked("ann"))
        await rig.admin.Refresh(admin.RefreshRequest())
        await tools.until(lambda: (rig.registry.run("digits-1") or {}).get("status") == "running")

    hub(scenario)


def test_what_runs_have_left_that_were_over_before_the_hub_was_killed_goes_at_its_next_start(
    tmp_path: Path,
) -> None:
    home = Home(tmp_path)
    with Registry.open(tmp_path) as registry:
        for run, state in (("done", "done"), ("going", "running")):
            registry.begin_run(run, task="digits", seed=0, config={}, data="d")
            registry.set_status(run, state)
        for run in ("done", "going", "forgotten"):
            for folder in (home.objects(run), home.spool(run)):
                folder.mkdir(parents=True)
                (folder / "tensors").write_bytes(b"0" * 9)

        async def forget(_: str) -> None:
            raise AssertionError("nothing is over now")

        asyncio.run(Supervisor(home, registry, restarts=0, forget=forget).tidy())
    assert [path.name for path in (*home.all_objects.iterdir(), *home.all_spools.iterdir())] == ["going"] * 2
