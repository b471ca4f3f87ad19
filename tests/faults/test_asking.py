"""The global model behind a device's own answer: with a hub that is up, and once it is gone."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from federation import SCRIPTS, Process, wait_for
from fleet import AT_ONCE, SPEC, Fleet, ask, digits, digits_model

from fedge.files import sha256
from fedge.inference import CompactModel
from fedge.routing import Routing, Rule
from fedge_server.inference.exports import Exports


@pytest.mark.slow
def test_a_doubted_question_is_the_clouds_until_the_hub_is_gone_and_then_the_devices() -> None:
    """Hub, signer and `fedge-client serve` are processes; the threshold is what the release carries."""
    x, _ = digits()
    variant, whole = digits_model(), digits_model(sureness=3.0)  # the cloud's is surer of the same labels
    rows = CompactModel(variant, SPEC).run(x)[1].max(1)
    pair = x[[rows.argmax(), rows.argmin()]]
    routing = Routing("confidence", Rule("confidence", 0.3), "", "p", 0.01, 0.95, 0.0, 0.1, 900)
    asking = {"joint": {"enabled": True, "deadline_s": 5.0}}
    with (
        tempfile.TemporaryDirectory(prefix="fj") as name,  # a short one, for unix sockets
        Fleet(Path(name), 0, 1, agent_settings=asking) as fleet,
    ):
        (agent,) = fleet.federation.devices
        Exports(fleet.federation.home / "exports").put(sha256(variant), whole)
        version = fleet.publish(variant, "good", {"routing": routing.to_json()})
        fleet.roll_out(version, AT_ONCE)
        # The hub looks for what is new once a second, and offers nothing before.
        wait_for(lambda: f"release {version}" in fleet.federation.client(agent, "install"), "it is offered")
        tried = fleet.federation.client(agent, "preflight", check=False)
        assert "ok   cloud: asked above 0.3 of confidence, within 5 s" in tried
        command = [SCRIPTS / "fedge-client", "serve", "--home", agent.home, "--grpc", "off"]
        service = Process(command, fleet.folder / "serve.log", fleet.folder, {})
        try:
            sock = agent.home / "serving" / "http.sock"
            wait_for(sock.exists, "the service listens")
            wait_for(lambda: routes(sock, pair) == ["sure", "asked"], "the cloud has opened its model")
            status, found = ask(sock, pair)
            sure, asked_for = found["predictions"]
            assert (status, found["release"], found["cloud_model"]) == (200, version, sha256(variant))
            assert (sure["source"], asked_for["source"]) == ("device", "cloud")
            wanted = CompactModel(whole, SPEC).run(pair[1:])[1].max()
            assert asked_for["confidence"] == pytest.approx(wanted, abs=1e-5)
            assert fleet.federation.hub is not None
            fleet.federation.hub.end()
            began = time.monotonic()
            status, found = ask(sock, pair)
            sure, alone = found["predictions"]
            assert time.monotonic() - began < 10
            assert (status, sure["why"], alone["source"]) == (200, "sure", "device")
            assert alone["why"] in ("down", "late")
            assert alone["confidence"] == pytest.approx(rows.min(), abs=1e-5)
        finally:
            service.end()


def routes(path: Path, x: Any) -> list[str]:
    """Why each answer was given by whom it was."""
    return [each["why"] for each in ask(path, x)[1]["predictions"]]
