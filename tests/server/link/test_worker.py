"""A run's worker as a process: from waiting for devices to the summary, killed, stopped and restarted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fedge.config import Config
from fedge.errors import HubAwayError
from fedge_client import app as client_app
from fedge_server.link import worker as module
from fedge_server.registry.database import Registry
from fedge_simulations.world import prepare

SECTIONS = {
    "model": {"name": "logistic"},
    "clients": {"count": 3},
    "rounds": {"count": 3},
    "train": {"epochs": 1},
}
pytestmark = pytest.mark.slow


def until(condition, seconds=40.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.05)


class Deployment:
    """A home, a small hub with digits on its devices, and the workers of one run."""

    def __init__(self, hub, home):
        self.hub, self.home = hub, home
        home.settings.write_text("")
        self.workers = []

    def queue(self, **sections):
        config = Config.from_mapping({**SECTIONS, **sections})
        app, one_at_a_time = (
            client_app.build(prepare(Config.from_mapping(SECTIONS)).share_of),
            threading.Lock(),
        )

        def honest(message, context):
            with one_at_a_time:  # a ClientApp keeps its model from one message to the next
                return app(message, context)

        self.honest = honest
        with Registry.open(self.home.root) as registry:
            registry.queue_run("run", task="digits", seed=0, config=config.to_mapping())

    def online(self, *nodes, device=None):
        for node in nodes:
            self.hub.join(node, device or self.honest)

    def start(self):
        command = [
            sys.executable, "-m", "fedge_server.link.worker", "--home", str(self.home.root), "--run", "run",
        ]  # fmt: skip
        self.home.run("run").mkdir(parents=True, exist_ok=True)
        with self.home.run_log("run").open("ab") as log:
            self.workers.append(subprocess.Popen(command, stdout=log, stderr=log))
        return self.workers[-1]

    def log(self):
        return self.home.run_log("run").read_text()

    def run(self):
        with Registry.open(self.home.root) as registry:
            return registry.run("run"), registry.records("run")

    def file(self, name):
        return self.home.run("run") / name


@pytest.fixture
def deployment(hub, home):
    made = Deployment(hub, home)
    yield made
    for worker in made.workers:
        worker.kill()
        worker.wait()


def test_a_run_goes_from_waiting_for_devices_to_its_summary(deployment):
    deployment.queue()
    deployment.online(1)
    worker = deployment.start()
    until(lambda: deployment.hub.asked)
    deployment.online(2, 3)
    assert worker.wait(60) == 0, deployment.log()
    row, records = deployment.run()
    assert row["status"] == "done"
    assert [record.clients for record in records] == [0, 3, 3, 3]
    assert records[1].bytes_up == records[1].bytes_down == 3 * 650 * 4
    assert "round 3/3" in deployment.log()
    summary = json.loads(deployment.file("summary.json").read_text())
    assert (summary["rounds"], summary["clients"]) == (3, 3)
    assert len(deployment.file("history.jsonl").read_text().splitlines()) == 3
    report = deployment.file("report.html").read_text()
    assert "Learning" in report
    assert "Who holds what" not in report
    assert deployment.file("model.safetensors").stat().st_size > 2600


def test_killed_in_a_round_it_goes_on_from_the_last_committed_one(deployment):
    deployment.queue()
    stuck, go = threading.Event(), threading.Event()

    def hesitant(message, context):
        if len(deployment.run()[1]) == 2 and not go.is_set():
            stuck.set()
            go.wait(60)
        return deployment.honest(message, context)

    deployment.online(1, 2)
    deployment.online(3, device=hesitant)
    worker = deployment.start()
    assert stuck.wait(60), deployment.log()
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    go.set()
    assert deployment.start().wait(60) == 0, deployment.log()
    row, records = deployment.run()
    assert row["status"] == "done"
    assert [(record.round, record.clients) for record in records] == [(0, 0), (1, 3), (2, 3), (3, 3)]
    assert deployment.hub.sessions == 2
    assert len(deployment.file("history.jsonl").read_text().splitlines()) == 3


def test_asked_to_stop_it_closes_what_is_open_and_leaves_the_status(deployment):
    deployment.queue()
    never = threading.Event()
    working = threading.Event()

    def silent(message, context):
        working.set()
        never.wait(60)

    deployment.online(1, 2)
    deployment.online(3, device=silent)
    worker = deployment.start()
    assert working.wait(60), deployment.log()
    worker.terminate()
    assert worker.wait(20) == 0
    never.set()
    assert deployment.run()[0]["status"] in ("queued", "running")
    assert not deployment.hub.open
    assert deployment.log().splitlines()[-1] == "asked to stop"


DEAF = """
import sys, time
from fedge_server.link import worker

def deaf(*_):
    while True:
        try:
            print("working", flush=True)
            time.sleep(60)
        except worker.Stopped:
            pass

worker.TIDYING_S = 0.2
worker._guarded = deaf
sys.exit(worker.main(["--home", "h", "--run", "r"]))
"""


def test_a_wish_to_stop_that_a_library_drops_ends_the_process_all_the_same():
    with subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout.readline() == "working\n"
        worker.terminate()
        assert worker.communicate(timeout=60)[0] == "working\nasked to stop\n"
    assert worker.returncode == 0


def test_a_failed_run_says_why_in_the_database_and_in_the_last_line(deployment):
    deployment.queue()

    def broken(message, context):
        raise ValueError("no such sensor")

    deployment.online(1, 2, 3, device=broken)
    assert deployment.start().wait(60) == 1
    row, _ = deployment.run()
    assert row["status"] == "failed"
    assert "no such sensor" in row["reason"]
    assert deployment.log().splitlines()[-1] == f"failed: {row['reason']}"


def test_a_mistake_of_the_user_exits_with_2(deployment):
    deployment.queue(data="absent.npz", task="images")
    assert deployment.start().wait(60) == 2
    assert deployment.run()[0]["status"] == "failed"


def test_two_workers_of_one_run_are_one_too_many(deployment):
    deployment.queue()
    deployment.start()
    until(lambda: deployment.hub.asked)
    assert deployment.start().wait(60) == 1
    assert "another worker has this run" in deployment.log()


def test_a_hub_that_stays_away_leaves_the_run_to_the_next_one(home, monkeypatch, caplog):
    home.root.mkdir(exist_ok=True)
    home.settings.write_text("")
    with Registry.open(home.root) as registry:
        registry.begin_run("run", task="digits", seed=0, config={}, data="")

    def gone(*_):
        raise HubAwayError("hub: away for 600 s; is it up?")

    monkeypatch.setattr(module, "_work", gone)
    with caplog.at_level("INFO", "fedge.run"):
        assert module._guarded(home, "run") == 1
    assert caplog.messages == ["failed: hub: away for 600 s; is it up?"]
    with Registry.open(home.root) as registry:
        assert registry.run("run")["status"] == "running"
