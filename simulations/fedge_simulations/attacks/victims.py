"""Clients to attack: fedge's real client app trains over its share and answers with its real message."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

from fedge.config import Train
from fedge.dataset import Examples
from fedge.learning.local import blank
from fedge.learning.messages import ARRAYS, CONFIG, Instructions, arrays_named, from_record, to_record
from fedge.learning.state import NamedArrays, arrays_of, load_arrays
from fedge.spec import Spec
from fedge.statistics import Moments
from fedge.task import Task
from fedge_client import app as client_app
from fedge_simulations.attacks.inversion import Gradients, gradients_of

_RUN_ID, _NODE_ID = 1, 1


@dataclass(frozen=True, slots=True)
class Federation:
    """A run at its first round as its server knows it: model, weights, instructions."""

    task: Task
    instructions: Instructions
    state: NamedArrays  # the global model's, which clients are sent

    @classmethod
    def of(
        cls,
        task: Task,
        spec: Spec,
        *,
        model: str = "",
        moments: Moments | None = None,
        update: Literal["weights", "gradient"] = "weights",
        seed: int = 0,
        epochs: int = 1,
        learning_rate: float = 0.05,
    ) -> Federation:
        """A fresh model, trained by SGD without momentum on all of a client's examples at a time.

        Args:
            task: what is learned.
            spec: the raw input.
            model: one of the task's; empty: its default.
            moments: the federated ones, which the server knows; None: inputs are not standardised.
            update: what clients answer with: their weights, or gradients (fedsgd).
            seed: of the initial weights.
            epochs: local steps, since a batch is all of a client's examples.
            learning_rate: of the clients.
        """
        train = Train(epochs=epochs, batch_size=2**20, learning_rate=learning_rate, momentum=0.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = arrays_of(task.model(model)(spec))
        asked = Instructions(task.name, spec, model, "none", moments, train, seed, update, round=1)
        return cls(task, asked, state)

    def update_of(self, examples: Examples) -> NamedArrays:
        """The arrays of a client's answer, from its real message; the client holds these raw examples."""
        client = client_app.build(lambda context, instructions: (self.task, examples))
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN_ID, _NODE_ID, 1
        arrays: ArrayRecord = to_record(self.state)
        content = RecordDict({ARRAYS: arrays, CONFIG: self.instructions.to_config()})
        reply = client(Message(content, _NODE_ID, "train"), Context(_RUN_ID, _NODE_ID, {}, RecordDict(), {}))
        return from_record(arrays_named(reply.content, ARRAYS))

    def gradients_of(self, update: NamedArrays) -> Gradients:
        """The gradient that the server reads off an answer."""
        if self.instructions.update == "gradient":
            return {name: np.asarray(value, np.float64) for name, value in update.items()}
        return gradients_of(self.state, update, self.instructions.train.learning_rate)

    def network(self) -> nn.Module:
        """The network at the weights that clients are sent."""
        network = blank(self.task, self.instructions.model, self.instructions.spec)
        load_arrays(network, self.state)
        return network

    def raw(self, inputs: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Pre-processed images or rows (B, ...) as raw ones, for whoever knows the run's moments."""
        moments, spec = self.instructions.moments, self.instructions.spec
        if moments is None:
            return inputs * 255 if spec.dtype == "uint8" else inputs
        axes = (1, -1, 1, 1) if spec.kind == "image" else (1, -1)
        return inputs * moments.std.reshape(axes) + moments.mean.reshape(axes)

    def with_weights(self, state: NamedArrays) -> Federation:
        """The same run at other weights, such as those after some rounds."""
        return replace(self, state=state)
