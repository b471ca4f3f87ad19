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
ATTACKS: Final = (
    "",
    "sign_flip",
    "noise:1",
    "ipm:0.5",
    "ipm:10",
    "alie:1.5",
    "mimic",
    "label_flip",
    "backdoor:0",
)


def accuracy(data: Path, *, quick: bool) -> tuple[dict[str, float], list[Row]]:
    """A row for each partition and rule; claims are of dirichlet:0.5, where it is harder.

    Args:
        data: fashion_mnist.npz.
        quick: one seed and fewer rounds.
    """
    plan = {"dirichlet:0.5": seeds(1 if quick else 3), "iid": seeds(1)}
    if quick:
        del plan["iid"]
    rows: list[Row] = []
    with part_of(data) as some:
        for partition, drawn in plan.items():
            rows += [_row(some, partition, rule, drawn, 4 if quick else 10) for rule in RULES]
    claims = {}
    for row in rows:
        if row["partition"] == "dirichlet:0.5":
            name = str(row["rule"]).replace(" ", "_").replace("-", "")
            claims[f"worst_{name}"] = min(float(row[attack or "no attack"]) for attack in ATTACKS)
            claims[f"backdoor_{name}"] = float(row["backdoor opens"])
    return claims, rows


def _row(data: Path, partition: str, rule: str, drawn: list[int], rounds: int) -> Row:
    started, row = time.process_time(), {"part": "accuracy", "partition": partition, "rule": rule}
    figures: dict[str, float] = {}
    for attack in ATTACKS:
        runs = [
            learned(
                config_of(
                    data,
                    seed=seed,
                    partition=partition,
                    attack=attack,
                    strategy=RULES[rule],
                    rounds={"count": rounds},
                )
            )
            for seed in drawn
        ]
        last: list[float] = [records[-1].metrics["accuracy"] for records, _ in runs]  # type: ignore[misc]
        figures[attack or "no attack"] = round(statistics.mean(last), 3)
        if attack.startswith("backdoor"):
            figures["backdoor opens"] = round(statistics.mean(opened for _, opened in runs), 3)
    figures["CPU s"] = round(time.process_time() - started, 1)
    return {**row, **figures}
