"""How often each class occurs now, from answers alone: black-box shift estimation.

Z. Lipton, Y.-X. Wang, A. Smola, "Detecting and Correcting for Label Shift with Black Box Predictors" (ICML
2018). If only the shares of the classes have changed, the shares q of the answers are C w, where C[i, j] is
the share of examples that were answered i and are j, and w[j] how much more often class j occurs now than
then. For a person to look at: it is wrong where inputs of a class have changed too.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from fedge.errors import FedgeError

Floats = npt.NDArray[np.float64]
_LEAST_SINGULAR: Final = 1e-3  # below it the answers say nothing of some class


def class_shares(confusion: Floats, answers: Floats) -> Floats:
    """The shares (K,) of the true classes now.

    Args:
        confusion: (K, K) counts on labelled examples of before: answered i, is j.
        answers: (K,) counts of answers now.

    Raises:
        FedgeError: the model tells some classes apart so badly that nothing follows.
    """
    joint = confusion / confusion.sum()
    if np.linalg.svd(joint, compute_uv=False)[-1] < _LEAST_SINGULAR / len(joint):
        raise FedgeError("label shift: the model does not tell all classes apart, so nothing follows")
    weights = np.linalg.solve(joint, np.maximum(answers, 0) / np.maximum(answers, 0).sum())
    shares = np.maximum(weights, 0.0) * joint.sum(0)
    found: Floats = shares / shares.sum()
    return found
