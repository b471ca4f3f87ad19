"""Which stage a device belongs to, and which version it is offered: functions of their arguments alone."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

from fedge_server.rollout.plan import Plan
from fedge_server.rollout.state import State


@dataclass(frozen=True, slots=True)
class Channel:
    """What a tier's devices stand at, apart from the rollout that is under way."""

    tier: str
    base: int = 0  # version that every device of the tier may have; 0: none yet
    floor: int = 0  # nothing below it is ever offered again; it only rises
    rollout: str | None = None  # id of the newest rollout

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        if min(self.base, self.floor) < 0 or (self.base and self.base < self.floor):
            raise ValueError(f"tier {self.tier}: base {self.base} is below floor {self.floor}")


def place(rollout: str, device: str) -> float:
    """Where in [0, 1) a device stands in a rollout: uniform, and another place in each rollout.

    It depends on nothing else, so no device moves when others come and go, and a percentage holds every
    device that a smaller one does.
    """
    digest = hashlib.sha256(f"{rollout}\0{device}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2.0**53  # so many bits as a double holds


def stage_of(plan: Plan, rollout: str, device: str, tags: Collection[str] = ()) -> int | None:
    """The first stage, from 0, that holds a device; None when it has no part in the rollout."""
    if not plan.only_tags <= set(tags):
        return None
    where = place(rollout, device)
    for number, stage in enumerate(plan.stages):
        if device in stage.devices or stage.tags & set(tags) or where < stage.percent / 100:
            return number
    raise AssertionError("the last stage holds all")


def offered(channel: Channel, rollout: State | None, stage: int | None, has: int) -> int | None:
    """The version that a device shall install, above the one that it has; None: it stays as it is.

    Args:
        channel: of its tier.
        rollout: the newest of the tier.
        stage: of the device in that rollout.
        has: the version that it runs; 0: none.
    """
    wanted = channel.base
    if rollout is not None and rollout.offers and stage is not None and stage <= rollout.stage:
        wanted = rollout.version
    return wanted if wanted > has and wanted >= channel.floor else None
