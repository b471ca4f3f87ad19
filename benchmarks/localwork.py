"""Adaptive local work: simulated seconds to a target accuracy on digits, beside fixed numbers of passes.

10 clients, the 2NN, three links whose travelling takes about a fifth of a pass, twice and ten times as long
as one, and three ways to deal the digits out. Every run is fedge's own on the simulated clock. Without
deadlines a run with fixed passes learns the same over every link, so that it is done once, and each of its
rounds takes as much longer or shorter as the link's travelling does. `best fixed` is chosen in hindsight,
for each link and partition.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _harness import Options, Row, machine, options, publish

from fedge.config import Config
from fedge_simulations import Result, run

LINKS = {
    "fast": 1_000_000.0,
    "middle": 100_000.0,
    "slow": 20_000.0,
}  # bytes a second up; ten times as many down
PARTITIONS = {"iid": 0.94, "dirichlet:0.3": 0.94, "shards:2": 0.90}  # and the accuracy that is wanted
PASSES = (1, 2, 5, 10, 20)
MOST = 150  # rounds


def config_of(partition: str, link: str, seed: int, epochs: int | None) -> Config:
    """A run with so many passes; None: adaptive."""
    up = LINKS[link]
    sections: dict[str, Any] = {
        "model": {"name": "mlp"},
        "clients": {"count": 10, "partition": partition},
        "rounds": {"count": MOST, "target": f"accuracy>={PARTITIONS[partition]}"},
        "train": {"epochs": epochs or 1, "batch_size": 20, "learning_rate": 0.02, "momentum": 0.0},
        "scenario": {"seconds_per_example": 0.01, "up_bytes_per_s": up, "down_bytes_per_s": 10 * up},
        "evaluate": {"metrics": ["accuracy"], "proxy_fraction": 0.0},
    }
    if epochs is None:
        sections["rounds"]["local_work"] = "adaptive"
    return Config.from_mapping({"seed": seed, **sections})


def _run(config: Config) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        return run(config, Path(folder) / "run")


def _row(partition: str, link: str, seed: int, who: str, result: Result, extra_s: float, cpu_s: float) -> Row:
    last, wanted = result.history[-1], PARTITIONS[partition]
    made = [record.passes or 0 for record in result.history]
    seconds = (last.simulated_s or 0.0) + extra_s * last.round
    return {
        "partition": partition,
        "link": link,
        "seed": seed,
        "passes": who,
        "simulated s": seconds if result.accuracy >= wanted else float("inf"),
        "accuracy": result.accuracy,
        "rounds": last.round,
        "passes in all": sum(made) if any(made) else int(who) * last.round,
        "most": max(made) or int(who),
        "CPU s": cpu_s,
    }


def _rows(partition: str, seed: int, passes: tuple[int, ...]) -> list[Row]:
    rows = []
    for epochs in passes:
        began = time.process_time()
        found, spent = _run(config_of(partition, "middle", seed, epochs)), time.process_time() - began
        bytes_up = found.history[0].bytes_up / found.history[0].clients
        for link, up in LINKS.items():
            extra_s = 1.1 * bytes_up * (1 / up - 1 / LINKS["middle"])
            rows.append(_row(partition, link, seed, str(epochs), found, extra_s, spent))
    for link in LINKS:
        began = time.process_time()
        found = _run(config_of(partition, link, seed, None))
        rows.append(_row(partition, link, seed, "adaptive", found, 0.0, time.process_time() - began))
    return rows


def main(asked: Options) -> None:
    """Measure, print, write."""
    before, seeds = machine(), (0,) if asked.quick else (0, 1, 2)
    passes = PASSES[::2] if asked.quick else PASSES
    parts = asked.only or tuple(PARTITIONS)
    rows = [row for part in parts for seed in seeds for row in _rows(part, seed, passes)]
    claims = {}
    for part in parts:
        for link in LINKS:
            own = [row for row in rows if (row["partition"], row["link"]) == (part, link)]
            took = {
                str(who): statistics.median(float(row["simulated s"]) for row in own if row["passes"] == who)
                for who in dict.fromkeys(row["passes"] for row in own)
            }
            adaptive = took.pop("adaptive")
            name = f"{part}, {link} link"
            claims[f"{name}: best fixed over adaptive"] = min(took.values()) / adaptive
            claims[f"{name}: one pass over adaptive"] = took["1"] / adaptive
            claims[f"{name}: worst fixed over adaptive"] = max(took.values()) / adaptive
    publish(asked, before, claims, rows)


if __name__ == "__main__":
    main(options(__doc__ or "", parts=tuple(PARTITIONS)))
