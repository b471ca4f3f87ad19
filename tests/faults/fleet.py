"""A fleet on real services: hub and signer are processes, and devices verify, open, install and report.

A simulated device is an enrolled one, with a home, keys and a certificate of its own. It polls on an event
loop that all share, and installs with the client's own code; what it reports of a version is measured: how
sure the installed model is of some digits. So two hundred fit into a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx.parser
from devices import Identity as Channel
from federation import PATIENCE_S, SCRIPTS, Federation, Process, toml, wait_for

from fedge import Spec, golden
from fedge.artefact import pack
from fedge.errors import FedgeError, HealthError
from fedge.files import sha256
from fedge.identity import node_id_of
from fedge.inference import CompactModel
from fedge.manifest import Lineage, Release, VariantEntry
from fedge.wire.v1 import distribution_pb2_grpc
from fedge_client.agent.identity import Hub, Identity, commit, load_or_create_keys
from fedge_client.delivery import Delivery, Report, Standing, note_request
from fedge_client.device import Device
from fedge_client.installing import install
from fedge_server.identity.authority import Authority
from fedge_server.registry.database import Registry
from fedge_server.release.references import reference_of
from fedge_server.repository import create_key
from fedge_server.rollout.service import Rollouts
from fedge_server.rollout.state import State

TIER = "edge"  # that Federation's devices are of
SPEC = Spec("image", (8, 8), "uint8", tuple("0123456789"))
NO_PORTS: Mapping[str, int] = {"link": 1, "enrolment": 1}  # where no hub is ever up
WAIT_S, AGAIN_S = 20.0, 0.2  # of a Poll; before the next one after a failure
INSTALLING = 4  # at a time, in threads
AT_ONCE = {
    "stages": [{"name": "all", "percent": 100, "hold_h": 0, "min_installs": 1}],
    "criteria": {"install": {"tolerated": 0.02, "unacceptable": 0.5, "at_least": 1}},
}
GATE = {
    "passed": True,
    "reasons": [],
    "drop_upper": 0.008,
    "max_drop": 0.01,
    "max_class_drop": None,
    "n": 300,
}


@lru_cache
def digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Scikit-learn's, as a model takes them."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images.astype(np.uint8), bunch.target.astype(np.int64)


@lru_cache
def weights() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Softmax regression on the digits, right in more than nine of ten: (64, 10) and (10,)."""
    x, y = digits()
    rows, wanted = x.reshape(len(x), -1) / 16, np.eye(10)[y]
    w, b = np.zeros((64, 10)), np.zeros(10)
    for _ in range(200):
        given = np.exp(rows @ w + b)
        error = (given / given.sum(1, keepdims=True) - wanted) / len(rows)
        w, b = w - 2 * rows.T @ error, b - 2 * error.sum(0)
    return w / 16, b


def digits_model(*, sureness: float = 1.0, shift: int = 0, note: str = "") -> bytes:
    """That regression as a variant: less sure, or with its labels moved on; a note changes its bytes."""
    w, b = weights()
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17]>
        variant (uint8[B, 8, 8] input) => (string[B] label, float[B, 10] probabilities) {
            numbers = Cast<to = 1>(input)
            rows = Reshape(numbers, flat)
            logits = Gemm(rows, weights, bias)
            probabilities = Softmax<axis = 1>(logits)
            best = ArgMax<axis = 1, keepdims = 0>(probabilities)
            label = Gather(names, best)
        }"""
    )
    constants: dict[str, Any] = {
        "weights": (sureness * np.roll(w, shift, axis=1)).astype(np.float32),
        "bias": (sureness * np.roll(b, shift)).astype(np.float32),
        "flat": np.array([-1, 64], np.int64),
        "names": np.array(SPEC.labels, object),
    }
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in constants.items())
    model.doc_string = note
    return bytes(model.SerializeToString())


def ask(path: Path, x: Any) -> tuple[int, Any]:
    """Ask a device's service on this socket; status and JSON of its answer."""
    file = io.BytesIO()
    np.save(file, x)
    connection = http.client.HTTPConnection("localhost", timeout=30)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(path))
    connection.request("POST", "/v1/infer", file.getvalue(), {"Content-Type": "application/x-npy"})
    reply = connection.getresponse()
    found = reply.status, json.loads(reply.read())
    connection.close()
    return found


@lru_cache
def judged(model: bytes) -> tuple[float, float]:
    """Accuracy and mean confidence of a model on some digits."""
    x, y = digits()
    labels, probabilities = CompactModel(model, SPEC).run(x[:200])
    right = np.mean([int(label) == wanted for label, wanted in zip(labels, y, strict=False)])
    return float(right), float(probabilities.max(axis=1).mean())


def signer_of(tier: str, folder: Path, socket: Path) -> Process:
    """A signer's process that listens; it keeps the tier's key and what it has signed in the folder.

    Args:
        tier: whose releases it signs.
        folder: its own.
        socket: with a short path.
    """
    key = folder / f"tier-{tier}.key"
    if not key.exists():
        create_key(key)
    command = [SCRIPTS / "fedge-server", "signer", "serve", "--key", key, "--socket", socket]
    command += ["--memory", folder / "signer-memory"]
    made = Process(command, folder / "signer.log", folder, {})
    wait_for(socket.exists, "the signer listens")
    return made


class SimulatedDevice:
    """One device, enrolled as any other, on the loop of its fleet."""

    def __init__(self, home: Path) -> None:
        self.home, self.device = home, Device.open(home)
        self.versions: list[int] = []  # that it has installed, in this order
        self.errors: list[str] = []

    @property
    def device_id(self) -> str:
        """As the hub knows it."""
        return Identity.open(self.home).device_id

    @property
    def has(self) -> int:
        """The version that runs; 0: none."""
        current = self.device.store.state().current
        return current.version if current is not None else 0

    async def live(self, pool: ThreadPoolExecutor) -> None:
        """Poll, install and report, until cancelled; an outage is waited out."""
        unsent: list[Report] = []
        while True:
            try:
                async with Channel.of_home(self.home).channel() as channel:
                    await self._served(
                        distribution_pb2_grpc.DistributionStub(channel),  # type: ignore[no-untyped-call]
                        pool,
                        unsent,
                    )
            except grpc.aio.AioRpcError:
                await asyncio.sleep(AGAIN_S)

    async def _served(self, stub: Any, pool: ThreadPoolExecutor, unsent: list[Report]) -> None:
        told = 0
        while True:
            if unsent:
                await stub.Note(note_request(unsent), timeout=WAIT_S)
                unsent.clear()
            has = await asyncio.to_thread(lambda: self.has)
            request = Standing(has=has, told=told).request(WAIT_S)
            reply = await stub.Poll(request, timeout=3 * WAIT_S)
            told = reply.version
            if reply.version > has:
                unsent += await asyncio.get_running_loop().run_in_executor(pool, self._install, told)
                if not unsent:
                    told = 0
                    await asyncio.sleep(AGAIN_S)

    def _install(self, version: int) -> list[Report]:
        """Install what it was told to; what there is to report, nothing where it could not be fetched."""
        try:
            with Delivery(lambda: Identity.open(self.home)) as delivery:
                outcome = install(self.device, delivery.fetch, told=version)
        except HealthError as error:
            self.errors.append(str(error))
            return [Report(version, "install_failed")]
        except FedgeError as error:
            self.errors.append(str(error))
            return []
        if outcome.changed:
            self.versions.append(version)
        _, confidence = judged(self.device.store.open().data)
        return [
            Report(version, "installed"),
            Report(version, "healthy"),
            Report(version, "confidence", confidence),
        ]


def enrolled(
    server: Path, folder: Path, count: int, tier: str = TIER, ports: Mapping[str, int] = NO_PORTS
) -> list[Path]:
    """Homes of new devices, made as enrolment makes them: one address may enrol two a second.

    Args:
        server: its home.
        folder: where the homes lie.
        count: of devices.
        tier: of all of them.
        ports: of a hub that is up, by name.
    """
    authority, root = Authority.open(server / "ca"), server / "repository" / "metadata"
    homes = []
    with Registry.open(server) as registry:
        for number in range(count):
            home = folder / f"{tier}-{number}"
            keys = load_or_create_keys(home / "identity")
            node, token = node_id_of(keys.device_id), keys.device_id[:16]
            hub = Hub(
                f"127.0.0.1:{ports['link']}", f"127.0.0.1:{ports['enrolment']}", keys.device_id, tier, node
            )
            certificate = authority.issue_device(keys.request(), 24.0)
            until = commit(home / "identity", keys, hub, certificate, authority.bundle).not_after
            registry.devices.create_token(token_id=token, secret_sha256="", tier=tier, expires=until)
            registry.devices.enrol(
                device_id=keys.device_id,
                node_id=node,
                public_key="",
                sealing_key=keys.sealing_public.hex(),
                tier=tier,
                token_id=token,
                fedge_version="",
                wire_version=2,
                not_after=until,
            )
            Device.create(home, tier, (root / "1.root.json").read_bytes())
            homes.append(home)
    return homes


@dataclass(slots=True)
class Fleet:
    """A hub, a signer, and devices. Leaving the context ends whatever still runs.

    Args:
        folder: empty, with a short name: there are unix sockets in it.
        devices: that are simulated.
        agents: that are real agents, processes of their own.
        settings: further tables of the server's file.
        agent_settings: and of the agents'.
    """

    folder: Path
    devices: int
    agents: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    agent_settings: Mapping[str, Any] = field(default_factory=dict)
    simulated: list[SimulatedDevice] = field(default_factory=list)
    signer: Process | None = None
    federation: Federation = field(init=False)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(INSTALLING, "install"))
    _thread: threading.Thread | None = None
    _lives: list[Future[None]] = field(default_factory=list)

    def __enter__(self) -> Self:
        settings = {
            "delivery": {"signers": [str(self._socket)]},
            "limits": {"max_connection_age_s": 3600},
            **self.settings,
        }
        self.federation = Federation(
            self.folder,
            agents=self.agents,
            settings=settings,
            agent_settings={
                "link": {"backoff_max_s": 2},
                **self.agent_settings,
            },  # after each of so many kills
            before_up=lambda _: self.start_signer(),
        )
        try:
            self.federation.__enter__()
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for life in self._lives:
            life.cancel()
        if self._thread is not None:
            with contextlib.suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result(timeout=20)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=10)
        if self._thread is None or not self._thread.is_alive():
            self._loop.close()
        self._pool.shutdown(cancel_futures=True)
        if self.signer is not None:
            with contextlib.suppress(AssertionError):
                self.signer.end()
        self.federation.__exit__()

    async def _drain(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _begin(self) -> None:
        """Enrol the simulated devices, and let them live."""
        server = self.federation.home
        ports = json.loads((server / "ports.json").read_text("ascii"))
        homes = enrolled(server, self.folder, self.devices, ports=ports)
        self.simulated = [SimulatedDevice(home) for home in homes]
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet", daemon=True)
        self._thread.start()
        self._lives = [
            asyncio.run_coroutine_threadsafe(device.live(self._pool), self._loop) for device in self.simulated
        ]

    def start_agents(self) -> None:
        """The real ones; where a server has no release yet, they ask again after minutes."""
        self.federation.start_agents()

    # The server's side, as its people have it

    @property
    def _socket(self) -> Path:
        return self.folder / "signer.sock"

    def start_signer(self) -> None:
        """A process that alone holds the key of the tier, with a memory of its own."""
        self.signer = signer_of(TIER, self.folder, self._socket)

    def stop_signer(self) -> None:
        """From now on nothing can be signed for the tier."""
        assert self.signer is not None
        self.signer.end()

    def kill_hub(self) -> None:
        """SIGKILL, and start it again on the same ports."""
        assert self.federation.hub is not None
        self.federation.hub.kill()
        self.federation.start_hub()

    def publish(self, model: bytes, recipe: str, evidence: Mapping[str, Any] | None = None) -> int:
        """Draft a release of this model, whose gate has passed by its report, and publish it; its version."""
        draft = self._drafted(model, recipe, dict(evidence or {}))
        said = json.loads(self.server("release", "publish", draft, "--format", "json"))
        if said["release"] is None:
            raise AssertionError(f"not published: {said['waiting']}")
        return int(said["release"])

    def _drafted(self, model: bytes, recipe: str, evidence: dict[str, Any]) -> str:
        answers = CompactModel(model, SPEC).run_each(golden.inputs_of(SPEC, 7))
        wire, report = pack(model), json.dumps(GATE, sort_keys=True).encode()
        gold = golden.write(SPEC, 7, answers)
        known = reference_of(CompactModel(model, SPEC), digits()[0][:200])
        entry = VariantEntry(
            tier=TIER,
            recipe=recipe,
            wire_sha256=sha256(wire),
            wire_bytes=len(wire),
            installed_sha256=sha256(model),
            installed_bytes=len(model),
            evidence_sha256=sha256(report),
            golden_sha256=sha256(gold),
            reference_sha256=sha256(known),
            evidence=evidence,
        )
        release = Release(
            version=1,
            task="digits",
            created="2026-01-31T12:00:00Z",
            spec=SPEC,
            lineage=Lineage("fleet", 1, sha256(model), "b" * 64),
            variants=(entry,),
        )
        with Registry.open(self.federation.home) as registry:
            if "fleet" not in [run["id"] for run in registry.runs()]:
                registry.begin_run("fleet", task="digits", seed=0, config={}, data="")
                registry.end_run("fleet", "done", "")
            for data in (wire, report, gold, known):
                registry.store.put(data)
            return registry.drafts.add(release)

    def roll_out(self, version: int, plan: Mapping[str, Any] | None = None) -> str:
        """Start a rollout; its id."""
        arguments = ["rollout", "start", str(version), "--tier", TIER]
        if plan is not None:
            path = self.folder / f"plan-{version}.toml"
            path.write_text(plan_toml(plan), encoding="utf-8")
            arguments += ["--plan", str(path)]
        self.server(*arguments)
        return f"{TIER}-{version}"

    def server(self, *arguments: str) -> str:
        """Run fedge-server in this process, where all it needs is loaded; its standard output."""
        from fedge_server.cli import main

        with contextlib.redirect_stdout(io.StringIO()) as said:
            code = main([*arguments, "--home", str(self.federation.home)])
        if code:
            raise AssertionError(f"fedge-server {' '.join(arguments)}: exit {code}\n{said.getvalue()}")
        return said.getvalue()

    def rollout(self, rollout_id: str) -> State:
        """As the database has it."""
        with Registry.open(self.federation.home) as registry:
            return Rollouts(registry).get(rollout_id)

    def wait_rollout(
        self, rollout_id: str, *statuses: str, stage: int = 0, timeout_s: float = PATIENCE_S
    ) -> State:
        """Wait until a rollout has one of these statuses, in this stage or a later one.

        Raises:
            AssertionError: it did not come to that; with the hub's log.
        """
        try:
            wait_for(
                lambda: (found := self.rollout(rollout_id)).status in statuses and found.stage >= stage,
                f"rollout {rollout_id} is {' or '.join(statuses)}",
                timeout_s,
            )
        except TimeoutError as error:
            hub = self.federation.hub.tail() if self.federation.hub else ""
            failed = {line for device in self.simulated for line in device.errors}
            said = f"{error}: {self.rollout(rollout_id)}\n{sorted(failed)[:5]}\n{hub}"
            raise AssertionError(said) from None
        return self.rollout(rollout_id)

    def running(self) -> dict[int, int]:
        """How many devices run each version, agents too."""
        counts: dict[int, int] = {}
        homes = [
            *(device.home for device in self.simulated),
            *(agent.home for agent in self.federation.devices),
        ]
        for home in homes:
            current = Device.open(home).store.state().current
            version = current.version if current is not None else 0
            counts[version] = counts.get(version, 0) + 1
        return counts

    def wait_running(self, version: int, timeout_s: float = PATIENCE_S) -> float:
        """Wait until all devices run a version; the seconds that it took."""
        start = time.monotonic()
        everybody = len(self.simulated) + len(self.federation.devices)
        try:
            wait_for(lambda: self.running() == {version: everybody}, f"all run {version}", timeout_s)
        except TimeoutError as error:
            failed = {line for device in self.simulated for line in device.errors}
            raise AssertionError(f"{error}: {self.running()}\n{sorted(failed)[:5]}") from None
        return time.monotonic() - start


def plan_toml(plan: Mapping[str, Any]) -> str:
    """A plan as its file: tables, and a list of stages."""
    stages: Sequence[Mapping[str, Any]] = plan["stages"]
    text = toml({name: value for name, value in plan.items() if name != "stages"})
    return text + "".join(f"[[stages]]\n{toml(stage)}" for stage in stages)
