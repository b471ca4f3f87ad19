"""A Flower SuperLink with SuperNodes as processes of this machine, and what a round and a node cost there.

`deployment` starts them on loopback and ends them by their ids, also when something fails. With `Tls` the
SuperLink serves TLS and lets only registered SuperNodes in; without, everything is plain text, which costs
Flower less. `noop_rounds` times rounds of messages that ask for nothing.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent
START_S = 60.0  # a process that has not come up by then never will
STOP_S = 10.0  # from asking a process to end until it is killed
ASK_S = 10.0  # from one `flwr ls` to the next: each takes a second of CPU

ENVIRONMENT = {  # nothing is reported to anybody, and no release is looked up
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{BIN}:{os.environ.get('PATH', os.defpath)}",  # Flower starts its helpers by name
}


@dataclass(frozen=True, slots=True)
class Tls:
    """What a SuperLink with TLS and authenticated SuperNodes needs."""

    ca: Path  # the certificate that signed the SuperLink's
    certificate: Path  # the SuperLink's, valid for 127.0.0.1
    key: Path
    nodes: tuple[Path, ...]  # OpenSSH EC private keys, one per SuperNode; the public ones end in .pub


def environment(folder: Path) -> dict[str, str]:
    """The environment of everything that belongs to a folder; `processes_of` knows them by it."""
    return {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(folder / "flwr")}


def processes_of(folder: Path) -> list[int]:
    """Ids of all processes that run in the environment of this folder, whoever started them."""
    mark, found = f"FLWR_HOME={folder / 'flwr'}".encode(), []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def end_processes_of(folder: Path) -> None:
    """End them by their ids, and kill what does not end; Flower detaches some from who started them."""
    for sent, seconds in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        for pid in processes_of(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, sent)
        with suppress(TimeoutError):
            until("they end", lambda: not processes_of(folder), seconds)
            return


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(what: str, found: Callable[[], object], seconds: float = START_S, every: float = 0.2) -> None:
    """Ask again and again until the answer is true.

    Raises:
        TimeoutError: it did not become true in time.
    """
    deadline = time.monotonic() + seconds
    while not found():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(every)


def family(pid: int) -> list[int]:
    """A process and all that it started and that still run below it (Linux: proc_pid_task_children(5))."""
    found = [pid]
    for parent in found:
        with suppress(OSError):
            for file in Path(f"/proc/{parent}/task").glob("*/children"):
                found += map(int, file.read_text(encoding="ascii").split())
    return found


def memory_mb(pids: Sequence[int], kind: str = "Pss") -> float:
    """Memory of processes together: "Pss" divides what is shared among its users, "Rss" counts it in full."""
    kilobytes = 0
    for pid in pids:
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
            kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))
    return kilobytes * 1024 / 1e6


@dataclass(frozen=True, slots=True)
class Process:
    """A process of ours; everything that it says goes into a file."""

    name: str
    log: Path
    popen: subprocess.Popen[bytes]

    @classmethod
    def start(
        cls, name: str, command: Sequence[str | Path], folder: Path, further: Mapping[str, str]
    ) -> Process:
        """Start it in the environment of this folder and `further`; its log lies there."""
        log = folder / f"{name}.log"
        with log.open("ab") as file:
            popen = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**environment(folder), **further},
                start_new_session=True,
            )
        return cls(name, log, popen)

    def text(self) -> str:
        """All that it has said."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def said(self, text: str) -> bool:
        """Whether it has said that.

        Raises:
            RuntimeError: it has ended without.
        """
        ended = self.popen.poll() is not None  # asked first: what it said last is then in the file
        if text in (said := self.text()):
            return True
        if ended:
            raise RuntimeError(f"{self.name} ended with {self.popen.returncode}:\n{said[-3000:]}")
        return False


@dataclass(slots=True)
class Deployment:
    """A SuperLink and its SuperNodes, up and connected."""

    folder: Path
    app: Path  # folder of the Flower app to run
    port: int
    tls: Tls | None
    superlink: Process
    further: Mapping[str, str]  # environment of all of them
    nodes: list[Process] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)  # all but the SuperLink

    def flwr(self, *arguments: str | Path) -> str:
        """What the `flwr` command prints.

        Raises:
            RuntimeError: it failed.
        """
        done = subprocess.run(
            [BIN / "flwr", *map(str, arguments)],
            cwd=self.folder,
            env=environment(self.folder),
            capture_output=True,
            text=True,
            timeout=START_S,
        )
        if done.returncode != 0:
            raise RuntimeError(f"flwr {' '.join(map(str, arguments))}: {done.stderr}{done.stdout}")
        return done.stdout

    def online(self) -> int:
        """How many SuperNodes the SuperLink says are online."""
        nodes = json.loads(self.flwr("supernode", "ls", "here", "--format", "json"))["nodes"]
        return sum(node["status"] == "online" for node in nodes)

    def start(self, config: Mapping[str, str | int | float]) -> str:
        """Start a run of the app; its id."""
        settings = " ".join(f"{key}={_toml(value)}" for key, value in config.items())
        said = self.flwr("run", self.app, "here", "--run-config", settings, "--format", "json")
        return str(json.loads(said)["run-id"])

    def finished(self, run: str) -> bool:
        """Whether the SuperLink's log says that a run's ServerApp has ended, well or not."""
        return re.search(rf"Finished task \d+ of run {run}\b", self.superlink.text()) is not None

    def wait(self, run: str, seconds: float) -> str:
        """The status that `flwr ls` gives a run at its end, such as "finished:completed".

        Raises:
            TimeoutError: it goes on for longer.
        """
        status, asked = "", time.monotonic()

        def ended() -> bool:
            nonlocal status, asked
            if not self.finished(run) and time.monotonic() - asked < ASK_S:
                return False
            asked = time.monotonic()
            found = json.loads(self.flwr("ls", "here", "--run-id", run, "--format", "json"))["runs"]
            status = found[0]["status"]
            return status.startswith("finished")

        until(f"run {run} ends ({self.superlink.log})", ended, seconds)
        return status

    def add_node(self, config: str = "", *, port: int | None = None, ca: Path | None = None) -> Process:
        """Start another SuperNode; with TLS, register its key before.

        Args:
            config: its --node-config.
            port: of the SuperLink, or of a proxy before it.
            ca: with TLS, who signed the certificate that is shown there; the SuperLink's own CA if absent.
        """
        number = len(self.nodes)
        command: list[str | Path] = [
            BIN / "flower-supernode",
            "--superlink",
            f"127.0.0.1:{port or self.port}",
        ]
        command += ["--port", str(free_port()), "--node-config", config]
        if self.tls is None:
            command.append("--insecure")
        else:
            key = self.tls.nodes[number]
            self.flwr("supernode", "register", f"{key}.pub", "here")
            command += ["--root-certificates", ca or self.tls.ca, "--auth-supernode-private-key", key]
        self.nodes.append(self.process(f"supernode-{number}", command))
        return self.nodes[-1]

    def process(self, name: str, command: Sequence[str | Path]) -> Process:
        """Start another process that ends with the deployment."""
        started = Process.start(name, command, self.folder, self.further)
        self.processes.append(started)
        return started


def _toml(value: str | float) -> str:
    return f"'{value}'" if isinstance(value, str) else json.dumps(value)


@contextmanager
def deployment(
    folder: Path,
    app: Path,
    node_configs: Sequence[str] = (),
    tls: Tls | None = None,
    further: Mapping[str, str] | None = None,
) -> Iterator[Deployment]:
    """A SuperLink on loopback with a SuperNode for each --node-config.

    Args:
        folder: an empty folder for all that they write.
        app: folder of the Flower app to run.
        node_configs: one per SuperNode.
        tls: serve TLS and let only registered SuperNodes in; None: plain text, everybody.
        further: environment of all processes, and so of the apps.
    """
    port = free_port()
    command: list[str | Path] = [BIN / "flower-superlink", "--host", "127.0.0.1", "--port", str(port)]
    command.append("--disable-runtime-dependency-installation")
    connection = f'address = "127.0.0.1:{port}"\n'
    if tls is None:
        command.append("--insecure")
        connection += "insecure = true\n"
    else:
        command += ["--ssl-ca-certfile", tls.ca, "--ssl-certfile", tls.certificate, "--ssl-keyfile", tls.key]
        command.append("--enable-supernode-auth")
        connection += f'root-certificates = "{tls.ca}"\n'
    (folder / "flwr").mkdir(parents=True)
    settings = f'[superlink]\ndefault = "here"\n[superlink.here]\n{connection}'
    (folder / "flwr" / "config.toml").write_text(settings, encoding="utf-8")
    superlink = Process.start("superlink", command, folder, further or {})
    made = Deployment(folder, app, port, tls, superlink, further or {})
    try:
        until("the SuperLink starts", lambda: superlink.said("startup complete"))
        for config in node_configs:
            made.add_node(config)
        until("the SuperNodes connect", lambda: all(node.said("SuperNode ID") for node in made.nodes))
        yield made
    finally:
        end_processes_of(folder)
        for process in (superlink, *made.processes):
            process.popen.wait()


@dataclass(frozen=True, slots=True)
class NoopRounds:
    """What rounds of messages that ask for nothing cost."""

    round_s: tuple[float, ...]  # of each round, as the ServerApp sees it
    start_s: float  # from starting the SuperLink until all SuperNodes are connected
    idle_mb: float  # of one SuperNode, before its first message (PSS: kind to Flower)
    idle_rss_mb: float
    peak_mb: float  # of one SuperNode with the process that answers a message (PSS)


_MANIFEST = """\
[project]
name = "noop-rounds"
version = "0.1.0"
dependencies = []
[tool.flwr.app]
publisher = "fedge"
[tool.flwr.app.components]
serverapp = "noop_rounds:server"
clientapp = "{client}"
[tool.flwr.app.config]
nodes = 0
rounds = 0
out = ""
"""

_APP = """\
import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()


@client.query("ping")
def ping(message, context):
    return Message(RecordDict(), reply_to=message)


@server.main()
def main(grid, context):
    settings, seconds = context.run_config, []
    while len(nodes := list(grid.get_node_ids())) < settings["nodes"]:
        time.sleep(0.2)
    for _ in range(settings["rounds"]):
        started = time.perf_counter()
        asked = [Message(RecordDict({"config": ConfigRecord()}), node, "query.ping") for node in nodes]
        replies = list(grid.send_and_receive(asked, timeout=120))
        assert len(replies) == len(nodes) and not any(reply.has_error() for reply in replies), replies
        seconds.append(time.perf_counter() - started)
    Path(settings["out"]).write_text(json.dumps(seconds))
"""


def noop_rounds(
    folder: Path,
    nodes: int = 3,
    rounds: int = 3,
    *,
    client: str = "fedge_client.app:app",
    poll_s: float | None = None,
) -> NoopRounds:
    """Time rounds in which each SuperNode is sent one message, without TLS.

    Args:
        folder: an empty folder.
        nodes: SuperNodes.
        rounds: rounds.
        client: the ClientApp that answers: fedge's, which imports torch for each message as a real one does,
            or "noop_rounds:client", which imports nothing but Flower.
        poll_s: seconds between two looks of Flower's executors for work; None: Flower's default, 1.
    """
    app = folder / "noop-rounds"
    app.mkdir(parents=True)
    (app / "pyproject.toml").write_text(_MANIFEST.format(client=client), encoding="utf-8")
    (app / "noop_rounds.py").write_text(_APP, encoding="utf-8")
    out = folder / "seconds.json"
    further = {} if poll_s is None else {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(poll_s)}
    started = time.perf_counter()
    with deployment(folder / "deployment", app, [""] * nodes, further=further) as made:
        start_s = time.perf_counter() - started
        first = made.nodes[0].popen.pid
        until("its executor starts", lambda: made.nodes[0].said("Starting Flower SuperExec"))
        idle, idle_rss = memory_mb(family(first)), memory_mb(family(first), "Rss")
        run, peak = made.start({"nodes": nodes, "rounds": rounds, "out": str(out)}), idle

        def ended() -> bool:
            nonlocal peak
            peak = max(peak, memory_mb(family(first)))
            return made.finished(run)

        until("the rounds end", ended, 60 + 60 * rounds)
        until("their seconds are written", out.exists, 5)
    return NoopRounds(tuple(json.loads(out.read_text(encoding="utf-8"))), start_s, idle, idle_rss, peak)
