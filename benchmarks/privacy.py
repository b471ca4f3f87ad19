"""What privacy costs and what it is worth: attacks on updates, accuracy for epsilon, secure aggregation.

inversion  digits out of updates of fedge's real client, by formula and by optimisation, against what the
           server sees: plain, compressed, clipped and noised, summed, masked; controls beside
accuracy   Fashion-MNIST, 100 clients, at epsilon 1 to 8 and without noise, on data of your own copy
           (`--data-dir DIR` with `fashion_mnist.npz`); the picture lies beside the JSON file, as .svg
secagg     traffic and time of secure aggregation at 10, 100 and 1,000 clients, beside plain rounds
"""

from __future__ import annotations

from collections.abc import Callable

from _harness import Options, Row, machine, options, publish
from _privacy_accuracy import accuracy
from _privacy_inversion import inversion
from _privacy_secagg import secagg

Figures = tuple[dict[str, float], list[Row]]


def _inversion(asked: Options) -> Figures:
    return inversion(quick=asked.quick)


def _accuracy(asked: Options) -> Figures:
    return accuracy(asked.data / "fashion_mnist.npz", asked.json.with_suffix(".svg"), quick=asked.quick)


def _secagg(asked: Options) -> Figures:
    return secagg(quick=asked.quick)


PARTS: dict[str, Callable[[Options], Figures]] = {
    "inversion": _inversion,
    "accuracy": _accuracy,
    "secagg": _secagg,
}


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
    main(options(__doc__ or "", parts=tuple(PARTS), data=True, data_for="accuracy"))
