"""Runs of fedge on a part of Fashion-MNIST in which exactly four of 20 clients attack."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedge.config import Config, Scenario
from fedge.errors import RoundError
from fedge_server.rounds.record import RoundRecord
from fedge_simulations.scenario.traits import Traits
from fedge_simulations.simulate import backdoors, learn
from fedge_simulations.world import prepare

CLIENTS, ATTACKERS = 20, 4
TRAINED, TESTED = 8000, 2000  # images: 400 for a client on average


@contextmanager
def part_of(data: Path) -> Iterator[Path]:
    """The first images of the data set, in a file that is read at once."""
    with tempfile.TemporaryDirectory(prefix="fedge-robust-") as folder, np.load(data) as file:
        some = {
            f"{name}_{split}": file[f"{name}_{split}"][:count]
            for split, count in (("train", TRAINED), ("test", TESTED))
            for name in ("x", "y")
        }
        path = Path(folder) / "some.npz"
        np.savez(path, **some)
        yield path


def attackers_of(seed: int) -> set[int]:
    """Node ids of those that attack with this seed, whatever they do."""
    nodes = np.arange(1, CLIENTS + 1)
    drawn = Traits(Scenario(attackers=ATTACKERS / CLIENTS), seed).attacks(nodes)
    return set(nodes[drawn != ""].tolist())


def seeds(count: int) -> list[int]:
    """The first ones for which four attack: a scenario draws each attacker by itself."""
    found: list[int] = []
    seed = 0
    while len(found) < count:
        found += [seed] if len(attackers_of(seed)) == ATTACKERS else []
        seed += 1
    return found


def config_of(
    data: Path, *, seed: int, partition: str, attack: str, strategy: Mapping[str, Any], **sections: Any
) -> Config:
    """A run; the settings are the same for all, chosen by looking at the mean without attack."""
    scenario = {"attackers": ATTACKERS / CLIENTS, "attacks": [attack]} if attack else {}
    return Config.from_mapping(
        {
            "task": "_robust_task:TASK",
            "data": str(data),
            "seed": seed,
            "clients": {"count": CLIENTS, "partition": partition},
            "train": {"epochs": 2, "batch_size": 32, "learning_rate": 0.05, "momentum": 0.9},
            "strategy": strategy,
            "scenario": {"record": False, **scenario},
            "simulation": {"workers": 1},
            "evaluate": {"metrics": ["accuracy"], "proxy_fraction": 0.0, "gate_fraction": 0.01},
            **sections,
        }
    )


def learned(config: Config) -> tuple[list[RoundRecord], float]:
    """The rounds that came to be, and how often a backdoor opened; a run that broke down ends early."""
    world, records, opened = prepare(config), list[RoundRecord](), 0.0
    with tempfile.TemporaryDirectory(prefix="fedge-robust-") as home:
        try:
            result = learn(world, Path(home), "benchmark", records.append)
            opened = max((each["success"] for each in backdoors(world, result.model)), default=0.0)
        except RoundError:  # updates that no round can use any more, since the model is spoilt
            pass
    return records, opened
