"""Accuracy of each rule under each attack, and under none."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, Final

from _harness import Row
from _robust_runs import ATTACKERS, CLIENTS, config_of, learned, part_of, seeds

SHARE: Final = ATTACKERS / CLIENTS
KRUM: Final = {"num_malicious_nodes": ATTACKERS}
SELECTED: Final = {"num_nodes_to_select": CLIENTS - 2 * ATTACKERS}
RULES: Final[dict[str, dict[str, Any]]] = {
    "mean": {"name": "fedavg"},
    "median": {"name": "fedmedian"},
    "trimmed mean": {"name": "fedtrimmedavg", "beta": SHARE},
    "krum": {"name": "krum", **KRUM},
    "multi-krum": {"name": "multikrum", **KRUM, **SELECTED},
    "bulyan": {"name": "bulyan", **KRUM},
    "mixed median": {"name": "fedmedian", "mixing": SHARE},
    "mixed trimmed mean": {"name": "fedtrimmedavg", "beta": SHARE, "mixing": SHARE},
    "mixed krum": {"name": "krum", **KRUM, "mixing": SHARE},
    "mixed multi-krum": {"name": "multikrum", **KRUM, **SELECTED, "mixing": SHARE},
    "geometric median": {"name": "geometricmedian"},
    "centred clipping": {"name": "centredclipping"},
}
ROUNDS: Final = 8
QUIET, OPENS = "no attack", "backdoor opens"  # columns
ATTACKS: Final = (
    "",
    "sign_flip",
    "noise:1",
    "ipm:0.5",
    "ipm:10",
    "alie:1.5",
    "label_flip",
    "backdoor:0",
)


def accuracy(data: Path, *, quick: bool) -> tuple[dict[str, float], list[Row]]:
    """A row for each partition, seed and rule; claims are means over the seeds of dirichlet:0.5.

    Args:
        data: fashion_mnist.npz.
        quick: one seed, one partition and fewer rounds.
    """
    plan = [("dirichlet:0.5", seed) for seed in seeds(1 if quick else 3)]
    plan += [] if quick else [("iid", seed) for seed in seeds(1)]
    with part_of(data) as some:
        rows = [
            row_of(some, partition, seed, rule, 3 if quick else ROUNDS)
            for partition, seed in plan
            for rule in RULES
        ]
    claims: dict[str, float] = {}
    for rule in RULES:
        own = [row for row in rows if (row["partition"], row["rule"]) == ("dirichlet:0.5", rule)]
        name = rule.replace(" ", "_").replace("-", "")
        claims[f"worst_{name}"] = min(_mean(own, attack or QUIET) for attack in ATTACKS)
        claims[f"backdoor_{name}"] = _mean(own, OPENS)
    return claims, rows


def row_of(data: Path, partition: str, seed: int, rule: str, rounds: int) -> Row:
    """One rule under each attack."""
    started, figures = time.process_time(), dict[str, float]()
    for attack in ATTACKS:
        config = config_of(
            data,
            seed=seed,
            partition=partition,
            attack=attack,
            strategy=RULES[rule],
            rounds={"count": rounds},
        )
        records, opened = learned(config)
        figures[attack or QUIET] = float(records[-1].metrics["accuracy"])  # type: ignore[arg-type]
        if attack.startswith("backdoor"):
            figures[OPENS] = opened
    row = {"part": "accuracy", "partition": partition, "seed": seed, "rule": rule}
    return {**row, **figures, "CPU s": time.process_time() - started}


def _mean(rows: list[Row], column: str) -> float:
    return statistics.mean(float(row[column]) for row in rows)
