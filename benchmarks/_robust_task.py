"""Images with a perceptron of 32 units: small enough for hundreds of runs, and it can learn a trigger."""

from __future__ import annotations

from dataclasses import replace

from fedge.learning import models
from fedge.tasks import images

TASK = replace(images.TASK, models={"mlp-32": models.mlp(32)}, default_model="mlp-32")
