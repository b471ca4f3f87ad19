"""Metrics of a classifier from its probabilities, by scikit-learn, named as in the configuration."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn import metrics as sk

from fedge.config import MetricName

Probabilities = npt.NDArray[np.floating]


def evaluate(
    probabilities: Probabilities, y: npt.NDArray[np.int64], names: Sequence[MetricName]
) -> dict[str, float | list[float]]:
    """The named metrics plus `loss` and `accuracy`, which are always there.

    Args:
        probabilities: (N, K), rows sum to 1.
        y: (N,) true classes.
        names: 'recall' gives a list of K (NaN-free: a class without examples is left at 0); 'auc' is the
            area under the ROC curve and is left out unless there are two classes and both occur.
    """
    n, classes = probabilities.shape
    predicted = probabilities.argmax(1)
    chosen = np.clip(probabilities[np.arange(n), y].astype(np.float64), 1e-12, 1.0)
    result: dict[str, float | list[float]] = {
        "loss": float(-np.log(chosen).mean()),
        "accuracy": float((predicted == y).mean()),
    }
    every = np.arange(classes)
    if "macro_f1" in names:
        result["macro_f1"] = float(
            sk.f1_score(y, predicted, average="macro", labels=every, zero_division=0.0)
        )
    if "recall" in names:
        recall = sk.recall_score(y, predicted, average=None, labels=every, zero_division=0.0)
        result["recall"] = [float(value) for value in recall]
    if "auc" in names and classes == 2 and len(np.unique(y)) == 2:
        result["auc"] = float(sk.roc_auc_score(y, probabilities[:, 1]))
    return result
