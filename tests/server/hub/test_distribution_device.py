"""A device over the distribution service: its own client and installer against a hub that is up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import places
import pytest
from cryptography.hazmat.primitives import serialization
from onnx import numpy_helper
from places import Place, released, repository

from fedge.errors import AbsentError, FetchError, ForbiddenError
from fedge_client import delivery as delivery_module
from fedge_client.delivery import Delivery, Report, Standing
from fedge_client.updater import Installer, Trust, anything, offer, unpacked, whole, within
from fedge_client.updater.patching import patching

_PEM = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def grown(number: int) -> bytes:
    """Int8 graphs of 60,000 weights, each a little further than the one before."""
    rng = np.random.default_rng(0)
    codes = np.clip(rng.normal(0, 16, (200, 300)).round(), -64, 64).astype(np.int8)
    for _ in range(number):
        codes = np.clip(codes + rng.choice([-1, 0, 1], p=[0.02, 0.96, 0.02], size=codes.shape), -64, 64)
    made = onnx.GraphProto(name="g")
    made.initializer.append(numpy_helper.from_array(codes.astype(np.int8), "w"))
    found: bytes = onnx.ModelProto(ir_version=10, graph=made).SerializeToString(deterministic=True)
    return found


class Counted:
    """A device's fetcher, and how many bytes came of what."""

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery
        self.bytes: dict[str, int] = {}

    def __call__(self, name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        kind = "model" if name.endswith(".model") else name.partition("/")[0]
        for chunk in self.delivery.fetch(name, maximum, offset):
            self.bytes[kind] = self.bytes.get(kind, 0) + len(chunk)
            yield chunk


def install(home: Path, place: Place, delivery: Delivery, told: int) -> tuple[int, bytes, dict[str, int]]:
    """One update as a device makes it: what runs afterwards, and what came for it."""
    fetch = Counted(delivery)
    trust = Trust(home / "metadata", place.first_root, within("metadata", fetch), clock=place.clock)
    targets = within("targets", fetch)
    offered = offer(trust.refresh(), targets, "micro", told)
    assert offered is not None
    patch = patching(fetch, "micro")
    installer = Installer(home, targets, anything, expand=unpacked, patch=patch)
    installer.install(offered.artefact)
    opened = installer.store.open()
    return opened.record.version, opened.data, fetch.bytes


@pytest.mark.slow
def test_a_device_installs_over_the_service_and_the_next_version_by_its_delta(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "model_of", grown)

    async def play(rig: Any) -> None:
        place = repository(rig)
        device = rig.device()
        identity = SimpleNamespace(
            bundle=device.roots,
            key_pem=device.key.private_bytes(*_PEM),
            certificate=device.certificate,
            hub=SimpleNamespace(link_address=f"localhost:{device.port()}"),
        )
        with Delivery(lambda: identity) as delivery:  # type: ignore[arg-type,return-value]
            came = []
            for number in (1, 2):
                released(rig, place, number, "micro")
                await rig.hub.refresh()
                told = await asyncio.to_thread(delivery.poll, Standing(has=number - 1))
                assert told.version == number
                found = await asyncio.to_thread(install, tmp_path / "device", place, delivery, told.version)
                assert found[:2] == (number, grown(number))
                came.append(found[2])
            assert came[0]["model"] > 15 * came[1]["deltas"]
            assert "model" not in came[1]
            reports = [Report(2, "installed"), Report(7, "installed")]
            (refusal,) = await asyncio.to_thread(delivery.note, reports)
            assert refusal.report == reports[1]
            assert "release 7" in refusal.reason
            for name, error in (
                ("metadata/9.root.json", AbsentError),
                ("metadata/1.tier-board.json", ForbiddenError),
                ("keys/micro/2/x", AbsentError),
                ("deltas/micro/2/1", AbsentError),
                ("deltas/micro/x", AbsentError),
            ):
                with pytest.raises(error):
                    await asyncio.to_thread(whole, delivery.fetch, name, 1000)
        back = released(rig, place, 1, "micro")  # the old content again: it has to travel as a delta at most
        await rig.hub.refresh()
        with Delivery(lambda: identity) as delivery:  # type: ignore[arg-type,return-value]
            found = await asyncio.to_thread(install, tmp_path / "device", place, delivery, back)
            assert found[:2] == (back, grown(1))
            assert "model" not in found[2]

    hub(play)


def test_a_stream_that_brings_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "STILL_S", 0.2)
    cancelled = threading.Event()
    with delivery_module._watched(SimpleNamespace(cancel=cancelled.set)):
        assert cancelled.wait(5)


def test_an_outage_is_neither_absence_nor_refusal() -> None:
    identity = SimpleNamespace(
        bundle=None, key_pem=None, certificate=None, hub=SimpleNamespace(link_address="localhost:1")
    )
    with Delivery(lambda: identity) as delivery:  # type: ignore[arg-type,return-value]
        with pytest.raises(FetchError) as caught:
            whole(delivery.fetch, "metadata/2.root.json", 1000)
        assert not isinstance(caught.value, AbsentError | ForbiddenError)
        with pytest.raises(FetchError, match="UNAVAILABLE"):
            delivery.poll(Standing())
