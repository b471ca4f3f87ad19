"""Robust aggregation: what each rule keeps under attack, what it costs without, and how well scores warn.

accuracy   Fashion-MNIST on 20 clients of which four attack, each rule beside the plain mean, under each
           attack and under none; of your own copy (`--data-dir DIR` with `fashion_mnist.npz`)
cost       seconds and memory of each rule on 20 updates of 10 MB, in memory and in files
scores     how often honest and attacking clients stand out (same data)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from _harness import Options, Row, machine, options, publish
from _robust_accuracy import accuracy
from _robust_cost import cost
from _robust_scores import scores

Figures = tuple[dict[str, float], list[Row]]
DATA = "fashion_mnist.npz"


def _accuracy(asked: Options) -> Figures:
    return accuracy(_data(asked), quick=asked.quick)


def _cost(asked: Options) -> Figures:
    return cost(quick=asked.quick)


def _scores(asked: Options) -> Figures:
    return scores(_data(asked), quick=asked.quick)


def _data(asked: Options) -> Path:
    return asked.data / DATA


PARTS: dict[str, Callable[[Options], Figures]] = {"accuracy": _accuracy, "cost": _cost, "scores": _scores}


def main(asked: Options) -> None:
    """Measure, print, write."""
    before = machine()
    claims: dict[str, float] = {}
    rows: list[Row] = []
    for part in asked.only or PARTS:
        found, table = PARTS[part](asked)
        claims |= found
        rows += table
    publish(asked, before, claims, rows)


if __name__ == "__main__":
    main(options(__doc__ or "", parts=tuple(PARTS), data=True))
