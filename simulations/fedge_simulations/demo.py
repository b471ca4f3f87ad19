"""The demonstration: a hub and real agents on loopback, from enrolment to devices that answer.

Nothing here is simulated but the distance: certificates, connections, processes and files are those of a
deployment. Only the data is dealt out first, one file for each device and one for the server.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedge.artefact import unpack
from fedge.config import Config
from fedge.dataset import Examples
from fedge.errors import FedgeError, UserError
from fedge.files import write_atomically
from fedge.inference import CompactModel
from fedge_server.data import own_data
from fedge_server.registry.database import Registry
from fedge_server.release.lineage import released
from fedge_simulations.devices import DEVICES, DeviceHome, deliver
from fedge_simulations.processes import completed, lines, service, wait_until
from fedge_simulations.world import World, prepare

Say = Callable[[str], None]

SERVER, DATA = "server", "data"  # folders of a demonstration beside DEVICES
RUN = "demo"  # name of its run
# Of the device that asks the cloud; which opens its model for the first question.
JOINT = b"\n[joint]\nenabled = true\nshare = 0.2\ndeadline_s = 30.0\n"
COPIED = ("history.jsonl", "model.safetensors", "report.html", "summary.json")


@dataclass(frozen=True, slots=True)
class Folders:
    """Where a demonstration keeps what."""

    out: Path

    @property
    def server(self) -> Path:
        """The server's home."""
        return self.out / SERVER

    @property
    def server_data(self) -> Path:
        """The server's own examples."""
        return self.out / DATA / "server.npz"

    def device(self, name: str) -> Path:
        """A device's home."""
        return self.out / DEVICES / name

    def device_data(self, name: str) -> Path:
        """A device's own examples."""
        return self.out / DATA / f"{name}.npz"


def demonstrate(
    config: Config, source: Path, overrides: Sequence[str], out: Path, *, overwrite: bool, say: Say
) -> tuple[dict[str, Any], list[str]]:
    """Deploy, train, compress, release and answer; returns the summary, and what ends the demonstration.

    Args:
        config: the run; it has one client for each device.
        source: the file that `config` was read from.
        overrides: what `config` changes in it.
        out: folder of the demonstration.
        overwrite: replace an earlier demonstration there.
        say: hears of each step.

    Raises:
        UserError: the folder holds something else, or the configuration cannot be used.
        FedgeError: the work failed.
    """
    if config.task != "digits" or config.data is not None:
        raise UserError("the demonstration deals out task 'digits'; for other data see docs/deploy-server.md")
    _check(out, overwrite=overwrite)  # in a moment, unlike whether the budgets can be kept
    world = prepare(config)
    folders = Folders(out)
    _clear(out)
    names = device_names(list(config.tiers), len(world.clients))
    say(_describe(world, names))
    _deal(world, names, folders)
    deployed = [*overrides, *_for_the_server(world, folders)]
    with ExitStack() as hub:
        _hub(hub, names, folders, say)
        with ExitStack() as agents:
            _agents(agents, names, folders, say)
            _run(source, deployed, folders, say)
        for name in COPIED:
            shutil.copyfile(folders.server / "runs" / RUN / name, out / name)
        summary, doubts = _deliver(Config.load(source, deployed), names, folders)
        said = _ask(doubts, names, folders, summary) if doubts else []
    write_atomically(out / "summary.json", json.dumps(summary, indent=2).encode())
    return summary, said


def device_names(tiers: Sequence[str], count: int) -> dict[str, str]:
    """Names of `count` devices with their tiers, each tier in turn and the last ones of the last tier."""
    chosen = [tiers[min(i, len(tiers) - 1)] if tiers else "device" for i in range(count)]
    return {f"{tier}-{chosen[: i + 1].count(tier)}": tier for i, tier in enumerate(chosen)}


def _check(out: Path, *, overwrite: bool) -> None:
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / SERVER / "server.toml").exists():
        raise UserError(f"{out} is not empty and holds no demonstration; choose another --out")
    if not overwrite:
        raise UserError(f"{out} holds a demonstration; choose another --out, or --overwrite it")


def _clear(out: Path) -> None:
    for name in (SERVER, DEVICES, DATA):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in COPIED:
        (out / name).unlink(missing_ok=True)


def _describe(world: World, names: dict[str, str]) -> str:
    sizes = ", ".join(f"{name} {len(part)}" for name, part in zip(names, world.clients, strict=True))
    server = world.server
    return (
        f"task {world.config.task}: {len(names)} devices with examples of their own ({sizes}); "
        f"the server holds {len(server.proxy) + len(server.test) + len(server.gate)} others"
    )


def _deal(world: World, names: dict[str, str], folders: Folders) -> None:
    (folders.out / DATA).mkdir(parents=True)
    for name, part in zip(names, world.clients, strict=True):
        _save(folders.device_data(name), [world.dataset.examples.take(part)])
    _save(folders.server_data, [world.server.proxy, world.server.test, world.server.gate])


def _save(path: Path, parts: Sequence[Examples]) -> None:
    np.savez(path, x=np.concatenate([p.x for p in parts]), y=np.concatenate([p.y for p in parts]))


def _for_the_server(world: World, folders: Folders) -> list[str]:
    """Overrides by which the server splits its own file in the proportions of the world's."""
    proxy, test, gate = len(world.server.proxy), len(world.server.test), len(world.server.gate)
    return [
        f"data={json.dumps(str(folders.server_data.resolve()))}",
        f"evaluate.holdout_fraction={(test + gate) / (proxy + test + gate)}",
        f"evaluate.gate_fraction={gate / (test + gate)}",
        f"clients.count={len(world.clients)}",
        "clients.partition='iid'",
    ]


def _hub(stack: ExitStack, names: dict[str, str], folders: Folders, say: Say) -> None:
    """A hub that is up, and ends with the stack."""
    home = ("--home", str(folders.server))
    completed(
        "fedge_server", "init", *home, "--name", "127.0.0.1", "--listen", "127.0.0.1",
        "--link-port", "0", "--enrolment-port", "0",
        *(word for tier in dict.fromkeys(names.values()) for word in ("--tier", tier)), name="server",
    )  # fmt: skip
    log = folders.out / DATA / "hub.log"
    hub = stack.enter_context(service("fedge_server", "up", *home, log=log))
    wait_until((folders.server / "ports.json").exists, hub, log, "hub")
    ports = json.loads((folders.server / "ports.json").read_text("utf-8"))
    say(f"hub up on 127.0.0.1: devices on port {ports['link']}, enrolment on port {ports['enrolment']}")


def _agents(stack: ExitStack, names: dict[str, str], folders: Folders, say: Say) -> None:
    """An enrolled and connected agent for each device; all end with the stack."""
    home = ("--home", str(folders.server))
    for name, tier in names.items():
        answer = json.loads(
            completed(
                "fedge_server", "token", "create", "--tier", tier, "--format", "json", *home, name="server"
            )
        )
        device = ("--home", str(folders.device(name)))
        completed("fedge_client", "enroll", answer[0]["join"], *device, name=f"device {name}")
        write_atomically(folders.device(name) / "agent.toml", _agent_file(folders.device_data(name)))
        stack.enter_context(service("fedge_client", "run", *device, log=folders.device(name) / "agent.log"))
        say(f"device {name}: enrolled with a key of its own, agent running")


def _agent_file(data: Path) -> bytes:
    return f"[tasks.digits]\ndata = {json.dumps(str(data.resolve()))}\n\n[training]\nthreads = 1\n".encode()


def _run(source: Path, overrides: Sequence[str], folders: Folders, say: Say) -> None:
    sets = [word for override in overrides for word in ("--set", override)]
    for line in lines(
        "fedge_server", "run", "start", str(source), *sets, "--name", RUN, "--wait",
        "--home", str(folders.server), name="run",
    ):  # fmt: skip
        say(line)


def _stick(folders: Folders) -> Path:
    """What the devices need of the repository, with keys of sealed models wrapped for each of them."""
    home, stick = ("--home", str(folders.server)), folders.out / DATA / "stick"
    rows = json.loads(completed("fedge_server", "devices", "ls", "--format", "json", *home, name="server"))
    chosen = [word for row in rows for word in ("--device", row["id"])]
    completed("fedge_server", "release", "export", str(stick), *chosen, *home, name="server")
    return stick


def _deliver(
    config: Config, names: dict[str, str], folders: Folders
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Install on every device what was released for its tier, and add what they answer to the summary.

    Returns:
        The summary; and for each tier two inputs of the gate (2, ...), the one that its variant is surest of
        and the one that it doubts most: nothing where there is no release.
    """
    from fedge.task import resolve

    summary: dict[str, Any] = json.loads((folders.out / "summary.json").read_text("utf-8"))
    server, scored = own_data(config, resolve(config.task)), {}
    with Registry.open(folders.server) as registry:
        if not (releases := released(registry)):
            return summary, {}
        for entry in releases[-1].variants:
            wire = registry.store.get(entry.wire_sha256, entry.wire_bytes)
            model = CompactModel(unpack(wire, entry.installed_bytes), server.spec)
            scored[entry.tier] = model.run_each(server.gate.x)
    homes = [DeviceHome(name, tier, folders.device(name)) for name, tier in names.items()]
    results = deliver(_stick(folders), homes, scored, server.gate, server.spec.labels)
    for result in results:
        claimed = next(v["accuracy"] for v in summary["variants"] if v["tier"] == result.tier)
        if abs(result.accuracy - claimed) > 1e-9:
            raise FedgeError(
                f"device {result.id}: accuracy {result.accuracy:.4f} is not the {claimed:.4f} of the gate"
            )
    summary["devices"] = [result.to_json() for result in results]
    extremes = {tier: [rows.max(1).argmax(), rows.max(1).argmin()] for tier, rows in scored.items()}
    return summary, {tier: server.gate.x[those] for tier, those in extremes.items()}


def _ask(
    doubts: dict[str, npt.NDArray[Any]], names: dict[str, str], folders: Folders, summary: dict[str, Any]
) -> list[str]:
    """Let a device answer jointly with the cloud; what it printed, and where that release comes from."""
    name, tier = next((name, tier) for name, tier in reversed(names.items()) if tier in doubts)
    inputs, agent = folders.out / DATA / "asked.npy", folders.device(name) / "agent.toml"
    np.save(inputs, doubts[tier])
    write_atomically(agent, agent.read_bytes() + JOINT)
    answers = completed(
        "fedge_client", "infer", str(inputs), "--home", str(folders.device(name)), name=f"device {name}"
    ).splitlines()
    release = str(summary["devices"][0]["release"])
    story = completed(
        "fedge_server", "release", "show", release, "--home", str(folders.server), name="server"
    )
    summary["joint"] = {"device": name, "answers": answers}
    return [
        f"device {name} may ask the cloud now, and answers the digits that it is surest of and doubts most:",
        *(f"  {line}" for line in answers),
        "where these answers come from:",
        *(f"  {line}" for line in story.splitlines()),
    ]
