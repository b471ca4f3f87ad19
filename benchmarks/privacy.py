"""What privacy costs and what it is worth: attacks on updates, accuracy for epsilon, secure aggregation.

inversion  digits out of updates of fedge's real client, by formula and by optimisation, against what the
           server sees: plain, compressed, clipped and noised, summed, masked; controls beside
accuracy   Fashion-MNIST, 100 clients, at epsilon 1 to 8 and without noise, on data of your own copy
           (`--data-dir DIR` with `fashion_mnist.npz`); the picture lies beside the JSON file, as .svg
"""

from __future__ import annotations

from _harness import Options, Row, machine, options, publish
from _privacy_accuracy import accuracy
from _privacy_inversion import inversion

PARTS = ("inversion", "accuracy")


def main(asked: Options) -> None:
    """Measure, print, write."""
    before = machine()
    claims: dict[str, float] = {}
    rows: list[Row] = []
    for part in asked.only or PARTS:
        if part == "inversion":
            found, table = inversion(quick=asked.quick)
        else:
            data, plot = asked.data / "fashion_mnist.npz", asked.json.with_suffix(".svg")
            found, table = accuracy(data, plot, quick=asked.quick)
        claims |= found
        rows += table
    publish(asked, before, claims, rows)


if __name__ == "__main__":
    main(options(__doc__ or "", parts=PARTS, data=True, data_for="accuracy"))
