"""When a device should ask the cloud: calibrated on what orders candidates, never on the gate's data.

The variant was chosen among others by its answers to the same examples, so each promise is made at the
confidence that holds for all of them together (Bonferroni): whichever was chosen, it is kept.

Shapes: N examples, C classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedge.config import Calibration
from fedge.counts import rightly
from fedge.errors import DataError
from fedge.inference import Float32
from fedge.routing import DOUBTS, Routing, calibrated


def routing_of(
    answers: Float32,
    teacher: Float32,
    truth: npt.NDArray[np.int64],
    settings: Calibration,
    *,
    among: int,
    labelled: bool,
) -> Routing:
    """What a release says about routing a variant's answers.

    Args:
        answers: (N, C) probabilities of the variant.
        teacher: (N, C) of the global model.
        truth: (N,) classes; those that the teacher gives, where nothing else is known.
        settings: measure of doubt, gap and confidence.
        among: recipes and versions that the variant was chosen from, tried or not, itself included.
        labelled: whether the truth is known.
    """
    try:
        return calibrated(
            DOUBTS[settings.doubt](answers),
            rightly(answers, truth),
            rightly(teacher, truth),
            settings.gap,
            doubt=settings.doubt,
            confidence=1 - (1 - settings.confidence) / among,
            labelled=labelled,
        )
    except DataError as error:  # the variant gives NaN there
        return Routing(settings.doubt, reason=str(error))
