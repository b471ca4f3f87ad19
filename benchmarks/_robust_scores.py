"""How often honest clients stand out, and how often attackers do, in rounds of the median."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from _harness import Row
from _robust_runs import attackers_of, config_of, learned, part_of, seeds

from fedge_server.rounds.record import THRESHOLD, Score

PARTITIONS: Final = ("iid", "dirichlet:0.5", "dirichlet:0.1")
ATTACKS: Final = (
    *("sign_flip", "noise:1", "noise:0.1", "ipm:0.5", "ipm:10"),
    *("alie:1.5", "mimic", "label_flip", "backdoor:0", "free_rider"),
)


def scores(data: Path, *, quick: bool) -> tuple[dict[str, float], list[Row]]:
    """A row for each partition and attack; claims are of rounds without attack.

    Args:
        data: fashion_mnist.npz.
        quick: fewer attacks, rounds and seeds.
    """
    drawn, rounds = (seeds(1), 3) if quick else (seeds(3), 6)
    attacks = ("", *(ATTACKS[::4] if quick else ATTACKS))
    with part_of(data) as some:
        rows = [_row(some, each, attack, drawn, rounds) for each in PARTITIONS for attack in attacks]
    quiet = {str(row["partition"]): float(row["honest stand out"]) for row in rows if not row["attack"]}
    return {
        f"false_alarms_{partition.replace(':', '_').replace('.', '')}": share
        for partition, share in quiet.items()
    }, rows


def _row(data: Path, partition: str, attack: str, drawn: list[int], rounds: int) -> Row:
    honest: list[Score] = []
    hostile: list[Score] = []
    for seed in drawn:
        attackers = attackers_of(seed) if attack else set()
        config = config_of(
            data,
            seed=seed,
            partition=partition,
            attack=attack,
            strategy={"name": "fedmedian"},
            rounds={"count": rounds},
        )
        for record in learned(config)[0]:
            for score in record.anomalies:
                (hostile if score.client in attackers else honest).append(score)
    return {
        "part": "scores",
        "partition": partition,
        "attack": attack,
        "updates": len(honest) + len(hostile),
        "honest stand out": _share(honest),
        "attackers stand out": _share(hostile),
        "mean of honest": _mean(honest),
        "mean of attackers": _mean(hostile),
        "threshold": THRESHOLD,
    }


def _share(found: list[Score]) -> float:
    return sum(score.stands_out for score in found) / max(len(found), 1)


def _mean(found: list[Score]) -> float:
    return sum(score.value for score in found) / max(len(found), 1)
