"""What a round over the link costs, beside Flower's SuperLink; a thousand connected devices; a 500 MB model.

Parts, each of which can be measured by itself with --only:

    noop    a round of empty messages to 3 agents, in turns with the same on a SuperLink with 3 SuperNodes
            (plain text and unauthenticated, which costs Flower less; ours has mutual TLS)
    digits  rounds of `digits` with 3 agents, from one committed round to the next
    agent   memory of an agent without a training process, and its time from start to connected
    fleet   1,000 connected devices: the hub's memory, its CPU time while nothing happens, and a round that
            sends an 800 kB model to all and takes as much back from each; stubs, hub and worker share the
            machine
    big     a round of a 500 MB model (--quick: 100 MB) with 2 devices: highest memory of worker and hub above
            what they had before, in models

Hub, worker, agents and SuperLink are processes started from the commands that users have.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _faults  # noqa: F401 - makes federation importable
import numpy as np
from _harness import Options, Row, machine, options, publish
from _stubs import raise_file_limit, register, stubs
from _superlink import NoopRounds, noop_rounds
from federation import Federation, cpu_s, memory_mb, reset_peak, wait_for

if TYPE_CHECKING:
    from fedge_server.link.grid import LinkGrid

AGENTS = 3
BIG_TASK = '''\
"""One tensor after the other that nobody trains: what a large model costs on its way."""

from dataclasses import replace

import torch
from torch import nn

from fedge.tasks.digits import TASK as DIGITS

TENSORS, COLUMNS = 10, 1000


class Big(nn.Module):
    """A linear layer that answers, and ballast."""

    def __init__(self, spec):
        super().__init__()
        self.answer = nn.Linear(64, spec.classes)
        self.ballast = nn.ParameterList(torch.full((ROWS, COLUMNS), 0.5) for _ in range(TENSORS))

    def forward(self, x):
        return self.answer(x.flatten(1))


TASK = replace(DIGITS, name="big", models={"big": Big}, default_model="big", students={})
'''

Figures = tuple[dict[str, float], list[Row]]


@contextmanager
def deployed(
    agents: int, task: str = "digits", before_up: Callable[[Federation], None] | None = None
) -> Iterator[Federation]:
    """A hub, and agents that are enrolled but not started, in a folder that goes afterwards."""
    with tempfile.TemporaryDirectory(prefix="fedge-link-") as name:
        folder = Path(name)
        made = Federation(folder, agents, task, environment={"PYTHONPATH": name}, before_up=before_up)
        with made:
            yield made


def _row(part: str, what: str, value: float, unit: str, detail: str = "") -> Row:
    return {"part": part, "what": what, "value": float(value), "unit": unit, "detail": detail}


def _median_row(part: str, what: str, values: list[float], unit: str) -> Row:
    detail = f"median of {len(values)}: {min(values):.3g} to {max(values):.3g}"
    return _row(part, what, statistics.median(values), unit, detail)


# Empty rounds


def measure_noop(quick: bool) -> Figures:
    """Empty rounds here and on a SuperLink, in turns."""
    turns, each, rounds = (1, 30, 3) if quick else (3, 100, 4)
    ours: list[float] = []
    theirs: list[float] = []
    superlink: list[NoopRounds] = []
    for _ in range(turns):
        ours += _link_rounds(each)
        with tempfile.TemporaryDirectory(prefix="fedge-superlink-") as name:
            superlink.append(noop_rounds(Path(name), AGENTS, rounds))
        theirs += [1e3 * seconds for seconds in superlink[-1].round_s]
    ours += _link_rounds(each)
    claims = {"noop_round_ms": statistics.median(ours), "superlink_noop_round_ms": statistics.median(theirs)}
    rows = [
        _median_row("noop", "link, mutual TLS", ours, "ms"),
        _median_row("noop", "SuperLink, plain text", theirs, "ms"),
        _median_row("noop", "SuperNode's resident memory at rest", [s.idle_rss_mb for s in superlink], "MB"),
        _median_row("noop", "SuperLink and SuperNodes start", [s.start_s for s in superlink], "s"),
    ]
    return claims, rows


def _link_rounds(count: int) -> list[float]:
    """Milliseconds of empty rounds, through the Grid that a worker uses; this process is the worker."""
    from fedge.task_digest import task_digest
    from fedge.wire.v1 import admin_pb2
    from fedge_server.hub.home import Home
    from fedge_server.link.grid import LinkGrid

    with deployed(AGENTS) as federation:
        federation.start_agents()
        selection = admin_pb2.Selection(task="digits", task_digest=task_digest("digits"))
        grid = LinkGrid(Home(federation.home), _run_of_ours(federation), selection)
        nodes = grid.wait_for(AGENTS)
        _ping(grid, nodes)  # loads torch in the training processes
        milliseconds = [_ping(grid, nodes) for _ in range(count)]
        grid.close()
    return milliseconds


def _ping(grid: LinkGrid, nodes: Sequence[int]) -> float:
    """Milliseconds of a message to each node and its answer."""
    from flwr.app import Message, RecordDict

    started = time.perf_counter()
    asked = [Message(RecordDict(), node, "query.ping") for node in nodes]
    replies = list(grid.send_and_receive(asked, timeout=60))
    ms = (time.perf_counter() - started) * 1e3
    assert [reply.has_error() for reply in replies] == [False] * len(nodes), replies
    return ms


def _run_of_ours(federation: Federation) -> str:
    """A run that the hub knows and starts no worker for: this process is the worker."""
    from fedge_server.registry import schema
    from fedge_server.registry.database import Registry

    values = {"task": "digits", "seed": 0, "config": {}, "data": "", "status": "done", "reason": ""}
    with Registry.open(federation.home) as registry, registry.engine.begin() as connection:
        connection.execute(
            schema.runs.insert().values(id="noop", created="2000-01-01T00:00:00+00:00", **values)
        )
    return "noop"


# Digits


def measure_digits(quick: bool) -> Figures:
    """Rounds with three agents, from commit to commit."""
    count = 10 if quick else 40
    with deployed(AGENTS) as federation:
        federation.start_agents()
        started = time.monotonic()
        run_id = federation.start_run({"rounds": {"count": count}})
        first = _when_committed(federation, run_id, 1)
        last = _when_committed(federation, run_id, count)
        federation.wait_run(run_id)
        records = [record for _, record, _ in federation.rounds(run_id)[1:]]
    whole = (last - first) / (count - 1)
    rows = [
        _row("digits", "round, commit to commit", whole, "s", f"mean of {count - 1}"),
        _median_row("digits", "round, as recorded", [record["seconds"] for record in records], "s"),
        _row("digits", "run start to round 1", first - started, "s", "worker and training processes start"),
        _row("digits", "accuracy at the end", records[-1]["accuracy"], ""),
    ]
    return {"digits_round_s": whole}, rows


def _when_committed(federation: Federation, run_id: str, number: int) -> float:
    wait_for(lambda: len(federation.rounds(run_id)) > number, f"round {number} is committed", 120)
    return time.monotonic()


# The agent


def measure_agent(quick: bool) -> Figures:
    """An agent at rest, and its start."""
    with deployed(1) as federation:
        (device,) = federation.devices
        seconds, memory = [], []
        for _ in range(3 if quick else 9):
            started = time.time()
            federation.start_agent(device)
            (online,) = federation.status().devices
            seconds.append(online.connected_since - started)
            time.sleep(2.0)  # what it does after connecting has settled
            assert device.child() is None
            memory.append(memory_mb(device.pid))
            assert device.process is not None
            device.process.end()
    rows = [
        _median_row("agent", "resident memory at rest", memory, "MB"),
        _median_row("agent", "start until connected", seconds, "s"),
    ]
    return {"idle_agent_mb": statistics.median(memory), "connect_s": statistics.median(seconds)}, rows


# A thousand devices


def measure_fleet(quick: bool) -> Figures:
    """Many connected devices: at rest, and in rounds."""
    claims: dict[str, float] = {}
    rows: list[Row] = []
    for count in (1000,) if quick else (100, 1000):
        found = _fleet(count, idle_s=20.0 if quick else 60.0, rounds=2 if quick else 4)
        rows += [_row("fleet", f"{count} devices: {what}", *figure) for what, figure in found.items()]
    claims["hub_mb_1000"] = found["hub's memory at rest"][0]
    claims["hub_idle_core_share"] = found["hub's share of a core at rest"][0]
    claims["round_s_1000"] = found["round of 800 kB each way"][0]
    return claims, rows


def _fleet(count: int, idle_s: float, rounds: int) -> dict[str, tuple[float, str, str]]:
    identities: list[tuple[str, str]] = []

    def before_up(federation: Federation) -> None:
        _images(federation.folder / "server.npz")
        identities.extend(register(federation, count))

    with deployed(0, "images", before_up) as federation:
        assert federation.hub is not None
        hub = federation.hub.pid
        alone = memory_mb(hub)
        started = time.monotonic()
        with stubs(federation, identities, "images"):
            connected = time.monotonic() - started
            time.sleep(3.0)
            before, at = cpu_s(hub), time.monotonic()
            time.sleep(idle_s)
            share = (cpu_s(hub) - before) / (time.monotonic() - at)
            resting = memory_mb(hub)
            records, worker = _rounds(federation, {"model": {"name": "mlp", "standardise": False}}, rounds)
            peak = memory_mb(hub, "VmHWM")
    assert all(record["clients"] == count for record in records), records
    seconds = [record["seconds"] for record in records]
    each = f"{min(seconds):.3g} to {max(seconds):.3g}"
    return {
        "hub's memory alone": (alone, "MB", ""),
        "all connect": (connected, "s", ""),
        "hub's memory at rest": (resting, "MB", f"highest so far {peak:.0f}"),
        "hub's share of a core at rest": (share, "", f"over {idle_s:g} s"),
        "round of 800 kB each way": (statistics.median(seconds), "s", f"median of {len(seconds)}: {each}"),
        "hub's highest memory in rounds": (peak, "MB", ""),
        "worker's highest memory": (worker, "MB", f"{_imports_mb():.0f} after imports"),
    }


def _images(path: Path) -> None:
    """Random pictures of MNIST's size: the network for them has 199,210 parameters, 797 kB."""
    rng = np.random.default_rng(0)
    np.savez(path, x=rng.integers(0, 256, (400, 28, 28), np.uint8), y=np.arange(400) % 10)


def _rounds(
    federation: Federation, config: Mapping[str, Any], count: int
) -> tuple[list[dict[str, Any]], float]:
    """Records of a run's rounds, and the highest memory of its worker in MB."""
    run_id = federation.start_run({"rounds": {"count": count, "deadline_s": 300.0}, **config})
    pid = wait_for(lambda: federation.worker(run_id), "the run has a worker")
    peak = 0.0
    ended = ("done", "failed", "stopped")
    while federation.run_row(run_id)["status"] not in ended:
        with suppress(OSError):  # it has ended
            peak = max(peak, memory_mb(pid, "VmHWM"))
        time.sleep(0.1)
    federation.wait_run(run_id)
    return [record for _, record, _ in federation.rounds(run_id)[1:]], peak


def _imports_mb() -> float:
    """Resident memory of a worker that has imported all it needs and done nothing."""
    script = (
        "import torch, flwr.serverapp, fedge.tasks.digits, fedge_server.link.worker, fedge_server.link.grid\n"
        "import fedge_server.app, fedge_server.pipeline, fedge_server.rounds.loop\n"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS')][0])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024 / 1e6


# A large model


def measure_big(quick: bool) -> Figures:
    """The highest memory of worker and hub above what they had, in models."""
    megabytes, devices = (100 if quick else 500), 2
    identities: list[tuple[str, str]] = []

    def before_up(federation: Federation) -> None:
        source = BIG_TASK.replace("ROWS", str(megabytes * 1_000_000 // 10 // 4 // 1000))
        (federation.folder / "big_task.py").write_text(source, encoding="utf-8")
        identities.extend(register(federation, devices))

    with deployed(0, "big_task:TASK", before_up) as federation:
        assert federation.hub is not None
        hub = federation.hub.pid
        sys.path.insert(0, str(federation.folder))  # for the digest of the task
        with stubs(federation, identities, "big_task:TASK", processes=1):
            before = memory_mb(hub)
            reset_peak(hub)
            config = {"model": {"standardise": False}, "evaluate": {"metrics": ["accuracy"]}}
            records, worker = _rounds(federation, config, 2)
            above_hub = memory_mb(hub, "VmHWM") - before
    assert all(record["clients"] == devices for record in records), records
    above_worker = worker - _imports_mb()
    claims = {
        "big_model_worker_ratio": above_worker / megabytes,
        "big_model_hub_ratio": above_hub / megabytes,
    }
    rows = [
        _row(
            "big",
            f"worker above its imports, {megabytes} MB model",
            above_worker,
            "MB",
            f"{worker:.0f} in all",
        ),
        _row("big", f"hub above what it had, {megabytes} MB model", above_hub, "MB", f"{before:.0f} before"),
        _median_row("big", "round with 2 devices", [record["seconds"] for record in records], "s"),
    ]
    return claims, rows


PARTS: Mapping[str, Callable[[bool], Figures]] = {
    "agent": measure_agent,
    "noop": measure_noop,
    "digits": measure_digits,
    "fleet": measure_fleet,
    "big": measure_big,
}


def main(asked: Options) -> None:
    """Measure, print, write."""
    before = machine()
    raise_file_limit()
    claims: dict[str, float] = {}
    rows: list[Row] = []
    for name, measure in PARTS.items():
        if not asked.only or name in asked.only:
            found, more = measure(asked.quick)
            claims |= found
            rows += more
    publish(asked, before, claims, rows)


if __name__ == "__main__":
    main(options(__doc__ or "", parts=list(PARTS)))
