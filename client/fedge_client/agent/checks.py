"""What `preflight` tries on an enrolled device: certificate, server, clock, and each task with its data."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import grpc

import fedge
from fedge.errors import FedgeError
from fedge.wire import WIRE_VERSION
from fedge.wire.v1 import link_pb2 as pb
from fedge_client.agent import settings, status
from fedge_client.agent.connection import Link, said
from fedge_client.agent.diagnosis import diagnose
from fedge_client.agent.identity import Identity
from fedge_client.agent.offers import digests_of
from fedge_client.agent.settings import AskingSettings, OfferedTask

Check = Callable[[], str]

_TRIES: Final = 10  # to hear the hub's reason
_PAUSE_S: Final = 0.2  # between them: on a busy device the next one would end the same way
_MAX_SKEW_S: Final = 300.0
_PROBE_TIMEOUT_S: Final = 600

_PROBE = """
import json, sys
from pathlib import Path
from fedge.errors import FedgeError
from fedge.task import Source, resolve
sys.path.append(sys.argv[1])
name, data, label, size = json.loads(sys.argv[2])
found = {}
try:
    task = resolve(name)
    found["models"] = sorted(task.models)
    source = Source(Path(data) if data else None, label=label or "y", size=tuple(size) if size else None)
    found["examples"] = len(task.read(source))
except Exception as error:
    found["fault"] = str(error) if isinstance(error, FedgeError) else f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(found))
"""


def of(home: Path) -> Iterator[tuple[str, Check]]:
    """The checks of an enrolled device, by name."""
    reached = cache(partial(_skew, home))
    yield "certificate", partial(_certificate, home)
    yield "server", partial(_server, home, reached)
    yield "server clock", partial(_clock, reached)
    yield "settings", partial(_settings, home)
    try:
        own = settings.load(home / settings.FILE)
    except FedgeError:
        return  # the check of the settings says so
    if own.joint.enabled:
        yield "cloud", partial(_cloud, home, own.joint)
    for task in own.tasks:
        probed = cache(partial(_probe, home, task))
        yield f"task {task.name}", partial(_task, home, task, probed)
        yield f"data {task.name}", partial(_data, task, probed)


def _cloud(home: Path, asking: AskingSettings) -> str:
    """When the cloud is asked; whether it can be reached, the server's check says."""
    from fedge_client.device import Device
    from fedge_client.joint.asking import joint_settings
    from fedge_client.joint.joint import carried_rule

    joint, device = joint_settings(asking), Device.open(home)
    if joint.private:
        return "nothing is asked: joint.private"
    rule, why = joint.rule, ""
    if rule is None:
        if device.store.state().current is None:
            return "not known before a release is installed"
        rule, why = carried_rule(device.running()[0].entry, joint.wanted)
    if rule is None:
        raise FedgeError(f"nothing is asked: {why}")
    return f"asked above {rule.threshold:.3g} of {rule.doubt}, within {asking.deadline_s:g} s"


def _certificate(home: Path) -> str:
    identity = Identity.open(home)
    days = (identity.not_after - time.time()) / 86400
    if days < 0:
        raise FedgeError(
            f"it ended {-days:.1f} days ago; fedge-client run renews it, if the server is reached and the "
            "clock is right"
        )
    return f"device {identity.device_id[:16]}, tier {identity.hub.tier}, {days:.1f} days left"


def _skew(home: Path) -> float:
    """Seconds by which this device's clock is ahead of the server's, asked over the link.

    The hub keeps one stream for a device, so while the agent is connected its own finding is used.
    """
    agent = status.read(home)
    if status.is_running(home) and agent.get("state") == "connected":
        return float(agent.get("clock_skew_s", 0.0))
    identity = Identity.open(home)
    for tries_left in reversed(range(_TRIES)):
        try:
            return asyncio.run(_ask(identity))
        except grpc.RpcError as error:
            # A call that is refused while it still sends may end as INTERNAL instead of with the reason.
            if tries_left and error.code() == grpc.StatusCode.INTERNAL:
                time.sleep(_PAUSE_S)
                continue
            found = diagnose(identity, identity.hub.link_address)
            why = said(error) if found.kind == "ok" else f"{found.kind}: {found.detail}"
            raise FedgeError(why) from error
    raise AssertionError("the last try returns or raises")


async def _ask(identity: Identity) -> float:
    hello = pb.Hello(
        wire_version=WIRE_VERSION,
        fedge_version=fedge.__version__,
        bundle_sha256=identity.bundle_sha256,
    )
    async with Link(lambda: identity) as link:
        welcome = await link.greet(hello)
        return time.time() - welcome.server_time


def _server(home: Path, reached: Callable[[], float]) -> str:
    address = Identity.open(home).hub.link_address
    reached()
    return f"{address} answers and takes this device's certificate"


def _clock(reached: Callable[[], float]) -> str:
    try:
        skew = reached()
    except FedgeError as error:
        raise FedgeError("cannot be compared: the server was not reached") from error
    if abs(skew) > _MAX_SKEW_S:
        raise FedgeError(f"this device's clock is {skew:+.0f} s off the server's; set the clock")
    return f"{skew:+.0f} s off the server's"


def _settings(home: Path) -> str:
    found = settings.load(home / settings.FILE)
    if not found.tasks and not found.delivery.enabled:
        raise FedgeError(f"{home / settings.FILE}: offers no task and takes no releases; see docs/agent.md")
    releases = "takes releases" if found.delivery.enabled else "takes no releases"
    return f"{home / settings.FILE}: {len(found.tasks)} task(s), {releases}"


def _probe(home: Path, task: OfferedTask) -> dict[str, Any]:
    """Load a task and read its data in a process of their own, as training will."""
    what = json.dumps([task.name, str(task.data) if task.data else None, task.label, task.size])
    command = [sys.executable, "-P", "-c", _PROBE, str(home.absolute()), what]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError) as error:
        raise FedgeError(f"cannot be tried ({error})") from error
    except (ValueError, IndexError) as error:
        last = next(iter(reversed(done.stderr.decode(errors="replace").splitlines())), "no message")
        raise FedgeError(f"cannot be tried: {last}; is 'fedge[train]' installed?") from error
    return found


def _task(home: Path, task: OfferedTask, probed: Callable[[], dict[str, Any]]) -> str:
    digest = digests_of([task], home)[task.name]
    found = probed()
    if "models" not in found:
        raise FedgeError(str(found.get("fault")))
    return f"digest {digest}"


def _data(task: OfferedTask, probed: Callable[[], dict[str, Any]]) -> str:
    found = probed()
    if "examples" not in found:
        raise FedgeError(str(found.get("fault")))
    return f"{found['examples']} examples in {task.data or 'the task itself'}"
