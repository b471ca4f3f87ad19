"""Answer from the installed variant, with numpy and onnxruntime and nothing of the training side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from fedge.errors import FormatError
from fedge.inference import CompactModel
from fedge.manifest import Lineage, Release
from fedge.spec import Spec
from fedge_client.device import Device, Installed
from fedge_client.inputs import fit, read_input, read_text

__all__ = ["Prediction", "Runtime", "read_input", "read_text"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one example."""

    label: str
    confidence: float  # probability of the label, 0 .. 1
    probabilities: Mapping[str, float]  # of every label, in the order of the model's outputs


class Runtime:
    """An installed variant, verified and open. It answers with no network, and writes nothing."""

    def __init__(self, installed: Installed, model: CompactModel) -> None:
        self.installed = installed
        self._model = model

    @classmethod
    def open(cls, home: Path, *, threads: int = 1) -> Runtime:
        """Load what is installed at a device's home; it is held to the digest that was committed.

        Where the disk has damaged it, the release before answers, and `installed.damaged` says so.

        Raises:
            UserError: there is no device, or nothing is installed.
            TrustError: what is installed is damaged, and there is nothing to return to.
        """
        installed, model = Device.open(home).running()
        return cls(installed, CompactModel(model, installed.release.spec, threads=threads))

    @property
    def release(self) -> Release:
        """The release that answers."""
        return self.installed.release

    @property
    def spec(self) -> Spec:
        """What goes in and what comes out."""
        return self.release.spec

    @property
    def lineage(self) -> Lineage:
        """The run, round, global model and updates that the running variant comes from."""
        return self.release.lineage

    def infer(self, x: npt.NDArray[Any]) -> list[Prediction]:
        """One prediction for each example of x: a batch (B, *spec.shape), or one example (*spec.shape).

        Examples are run one by one, as the gate ran them: an answer does not depend on its neighbours.

        Raises:
            DataError: x does not fit the spec.
            FormatError: the model fails on it.
        """
        spec = self.spec
        batch = fit(x, spec)
        if len(batch) == 1:
            return [self._answer(batch, spec)]
        return [self._answer(batch[i : i + 1], spec) for i in range(len(batch))]

    def _answer(self, example: npt.NDArray[Any], spec: Spec) -> Prediction:
        (label,), rows = self._model.run(example)
        values: list[float] = rows[0].tolist()  # a tenth of what numpy takes to look at so few
        probabilities = dict(zip(spec.labels, values, strict=True))
        confidence = probabilities.get(label)
        if confidence is None or not math.isfinite(sum(values)):
            raise FormatError(
                f"model: gives no usable answer ({label[:40]!r}); go back or install another release"
            )
        return Prediction(label, confidence, probabilities)
