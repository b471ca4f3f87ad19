"""What secure aggregation costs: the same rounds plainly and under masks, all clients in one process.

A multilayer perceptron of 199,210 parameters, 32 examples a client, one epoch. Plain rounds run each client's
app too (no partial sums), so that what differs is the protocol. Seconds are those of one core that does the
work of all clients and of the server; a real device does a client's share.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _harness import Row
from _sim_fedge import Modded, World, config

from fedge_server.rounds.record import RoundRecord
from fedge_simulations.simulate import learn
from fedge_simulations.world import prepare

SECURE = {"privacy": {"secure_aggregation": True}}


def secagg(*, quick: bool) -> tuple[dict[str, float], list[Row]]:
    """The claims and a pair of rows for each number of clients."""
    torch.set_num_threads(1)
    claims: dict[str, float] = {}
    rows: list[Row] = []
    for clients, rounds in ((10, 5), (100, 3)) if quick else ((10, 9), (100, 5), (1000, 2)):
        plain, secure = _rounds(clients, rounds, {}), _rounds(clients, rounds, SECURE)
        seconds = [_seconds(records) for records in (plain, secure)]
        travelled = [sum(_bytes(records[-1])) for records in (plain, secure)]
        for name, records, took, total in zip(
            ("plain", "secure"), (plain, secure), seconds, travelled, strict=True
        ):
            down, up = _bytes(records[-1])
            rows.append(
                {
                    "clients": clients,
                    "round": name,
                    "neighbours": int(records[-1].privacy.get("secure_neighbours", 0)),
                    "seconds a round": took,
                    "ms a client": 1000 * took / clients,
                    "kB down": down / clients / 1000,
                    "kB up": up / clients / 1000,
                    "bytes to plain": total / travelled[0],
                    "error bound": float(records[-1].privacy.get("secure_error", 0.0)),
                }
            )
        claims[f"secagg_overhead_bytes_ratio_{clients}"] = travelled[1] / travelled[0]
        claims[f"secagg_round_s_{clients}"] = seconds[1]
    return claims, rows


def _rounds(clients: int, count: int, changes: dict[str, Any]) -> list[RoundRecord]:
    """The records of so many rounds, the first of which warms up."""
    made = prepare(config("mlp", clients, {"rounds": {"count": count}, **changes}))
    kind = World if changes else Modded  # a mod keeps plain rounds from being summed without their apps
    world = kind(**{name: getattr(made, name) for name in made.__dataclass_fields__})
    records: list[RoundRecord] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        learn(world, Path(home), "benchmark", records.append)
    print(f"{clients} clients, {'secure' if changes else 'plain'}: {time.perf_counter() - started:.0f} s")
    assert all(record.clients == clients for record in records), records[-1].rejected[:1]
    return records


def _seconds(records: list[RoundRecord]) -> float:
    return statistics.median(record.seconds for record in records[1:])


def _bytes(record: RoundRecord) -> tuple[int, int]:
    return record.bytes_down, record.bytes_up
