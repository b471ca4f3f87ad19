"""A registry with devices and releases; a clock that tests turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from fedge_server.registry import schema
from fedge_server.registry.database import Registry
from fedge_server.registry.engine import writing

TIER = "micro"


@dataclass
class Clock:
    """Unix seconds, as a test says."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def add_devices(registry: Registry, names: list[str], tier: str = TIER) -> None:
    """Enrol devices, straight into the table."""
    rows = [
        {
            "id": name,
            "node_id": number,
            "tier": tier,
            "public_key": "",
            "sealing_key": "",
            "status": "active",
            "reason": "",
            "enrolled": 0.0,
            "certificate_not_after": 0.0,
            "wire_version": 1,
            "fedge_version": "",
            "bundle": "",
        }
        for number, name in enumerate(names)
    ]
    with writing(registry.engine) as connection:
        connection.execute(schema.devices.insert(), rows)


def add_release(
    registry: Registry, version: int, content: str = "", tiers: tuple[str, ...] = (TIER,)
) -> None:
    """Write a release down; `content` names what it installs."""
    variants = [
        {
            "tier": tier,
            "recipe": "int8",
            "wire": "w",
            "installed": content or f"model {version}",
            "evidence": "e",
        }
        for tier in tiers
    ]
    registry.record_release(
        version=version, run_id="r", round_number=1, global_model="g", manifest=b"{}", variants=variants
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def devices() -> list[str]:
    return [f"device-{number:03}" for number in range(40)]


@pytest.fixture
def filled(registry: Registry, devices: list[str]) -> Registry:
    """Forty devices of tier micro, three releases, the third with the content of the first."""
    config = {"tiers": {TIER: {"max_latency_ms": 50.0}}}
    registry.begin_run("r", task="digits", seed=0, config=config, data="d")
    add_devices(registry, devices)
    for version, content in ((1, "old"), (2, "new"), (3, "old")):
        add_release(registry, version, content)
    return registry


@pytest.fixture
def release(filled: Registry) -> Callable[[int, str], None]:
    return lambda version, content: add_release(filled, version, content)
