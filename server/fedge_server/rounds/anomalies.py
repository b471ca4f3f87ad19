"""How much each update stands out from those of its round: a signal for whoever watches, and no rule.

Two robust z-scores (Iglewicz and Hoaglin 1993: medians instead of means), both around the median m of all
changes, value by value:

    distance_k  = z of log |x_k - m|       far away, or, below 0, strangely near
    direction_k = -z of cos(x_k, m)        it goes another way than the crowd

A client stands out where either is THRESHOLD or more; how often an honest one does is measured, in
docs/robust.md. What hides in the spread of honest updates does not stand out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message

from fedge.learning.messages import ARRAYS, to_record
from fedge.wire.arrays import records_of
from fedge_server.rounds.record import Score
from fedge_server.strategies.robust.updates import Floats, Updates, median

LEAST: Final = 5  # updates: of fewer nobody can say who is the odd one
MOST: Final = 1000
# Spreads are never taken for less: where updates are almost alike, a hair's breadth is not conspicuous.
_LEAST_OF_LOG: Final = 0.05
_LEAST_OF_COSINE: Final = 0.02
_TO_DEVIATION: Final = 1.4826  # of a normal distribution, from the median absolute deviation
_SMALLEST: Final = 1e-12  # of a distance, in the median one


def scored(updates: Sequence[Message], origin: Mapping[str, npt.NDArray[np.generic]]) -> tuple[Score, ...]:
    """A score for each update, in their order; none where they are too few or too many.

    Args:
        updates: of one client each, validated; their arrays may lie in files.
        origin: what changes are measured from.
    """
    if not LEAST <= len(updates) <= MOST:
        return ()
    records = [records_of(update.content, ArrayRecord)[ARRAYS] for update in updates]
    distances, cosines = around_the_median(Updates(records, to_record(origin)))
    middle = float(np.median(distances))
    logs = np.log(np.maximum(distances, _SMALLEST * middle or 1.0))
    far, other = z_scores(logs, _LEAST_OF_LOG), -z_scores(cosines, _LEAST_OF_COSINE)
    return tuple(
        Score(update.metadata.src_node_id, round(distance, 2) + 0.0, round(direction, 2) + 0.0)  # no -0.0
        for update, distance, direction in zip(updates, far.tolist(), other.tolist(), strict=True)
    )


def around_the_median(updates: Updates) -> tuple[Floats, Floats]:
    """(K,) distances of the changes from their median, and (K,) cosines of their angles to it."""
    away, along, norms = np.zeros((3, len(updates)))
    square = 0.0
    for name in updates.records[0]:
        for _, _, changes in updates.blocks(name):
            middle = median(changes)
            along += changes @ middle
            norms += np.einsum("kn,kn->k", changes, changes)
            square += float(middle @ middle)
            changes -= middle
            away += np.einsum("kn,kn->k", changes, changes)
    scale = np.sqrt(norms * square)
    cosines = np.divide(along, scale, out=np.zeros_like(along), where=scale > 0)
    return np.sqrt(away), cosines


def z_scores(values: Floats, least: float) -> Floats:
    """(K,) distances from the median in robust deviations, which are taken for no less than `least`."""
    away = values - np.median(values)
    found: Floats = away / max(_TO_DEVIATION * float(np.median(np.abs(away))), least)
    return found
