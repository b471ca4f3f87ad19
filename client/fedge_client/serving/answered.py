"""The answer to one request, with who gave it and why, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy.typing as npt

from fedge_client.joint.joint import Answer, Local, Source, Why
from fedge_client.runtime import Prediction

Array = npt.NDArray[Any]

# As telemetry counts it (`fedge.telemetry.sketch.ROUTES`): what was sent in vain, or would have been.
_IN_VAIN: Final = {
    "late": "cloud_timeout",
    **dict.fromkeys(("down", "busy", "refused", "version", "garbage", "open"), "cloud_failed"),
}


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer to one request: B examples, in their order."""

    version: int  # of the release that has answered
    model: str  # SHA-256 of the variant's installed bytes
    labels: tuple[str, ...]
    predictions: Sequence[Prediction]  # as given to whoever has asked
    route: tuple[Source, ...]  # who has answered each
    why: tuple[Why, ...]  # and for what reason
    cloud_model: str  # SHA-256 of the global model's file, where it has answered some; empty: none
    own: Sequence[Prediction]  # what the device itself would have said
    x: Array = field(repr=False)  # (B, *spec.shape), as the model has seen it
    seconds: float = 0.0  # from the request to the answer

    @classmethod
    def of(cls, local: Local, answers: Sequence[Answer], seconds: float) -> Answered:
        """What came of a request."""
        return cls(
            local.version,
            local.model,
            local.spec.labels,
            [each.prediction for each in answers],
            tuple(each.source for each in answers),
            tuple(each.why for each in answers),
            next((each.model for each in answers if each.source == "cloud"), ""),
            local.predictions,
            local.x,
            seconds,
        )


def route_of(source: Source, why: Why) -> str:
    """How an answer came, in telemetry's words."""
    return "cloud" if source == "cloud" else _IN_VAIN.get(why, "local")


def answer_json(found: Answered) -> dict[str, Any]:
    """An answer as `fedge-client infer --format json` gives it."""
    predictions = [
        {
            "label": p.label,
            "confidence": p.confidence,
            "probabilities": dict(p.probabilities),
            "source": source,
            "why": why,
        }
        for p, source, why in zip(found.predictions, found.route, found.why, strict=True)
    ]
    asked = {"cloud_model": found.cloud_model} if found.cloud_model else {}
    return {"release": found.version, "model": found.model, **asked, "predictions": predictions}
