"""Gradients of many clients at once, for strategies whose server steps (FedSGD).

What `fedge.learning.local.gradient` gives for each: the gradient of the mean loss over all its examples at
the weights that it was sent, in batches of at least GRADIENT_BATCH, with weight decay, and the buffers as
the batches move them.

Legend as in `stack`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from fedge.config import Train
from fedge.learning import local
from fedge.learning.local import Job
from fedge_simulations.engine.choice import TOLERANCE, Make, Way, distance, first_that
from fedge_simulations.engine.stack import CPU, NO_PULL, Named, Pull
from fedge_simulations.engine.steppers import Recipe
from fedge_simulations.engine.vmapped import Vmapped

_SMALL = 4  # examples of a batch in the proof, so that there are several


class Gradients(Vmapped):
    """Leaves in each row of a stack the client's gradients in place of its weights."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._frozen = [n for n, _ in recipe.model.named_parameters() if n not in recipe.trainable]
        self._views: Named = {}
        self._found: Named = {}
        self._seen = torch.empty(0)  # (K,) examples so far

    def begin(self, flat: torch.Tensor, pull: Pull = NO_PULL) -> None:
        """Take over a stack at the weights where the gradients are wanted."""
        self._views = self.recipe.layout.views(flat)
        self._found = {name: torch.zeros_like(self._views[name]) for name in self.recipe.trainable}
        self._counts = {n: v.expand(len(flat), *v.shape).clone() for n, v in self._counters.items()}
        self._seen = flat.new_zeros(len(flat))

    def step(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None, keys: torch.Tensor
    ) -> torch.Tensor:
        """One batch of the first k clients; no weight moves."""
        k = len(x)
        views = {name: value[:k] for name, value in self._views.items()}
        gradients, loss = self.gradients(views, x, y, weight, keys)
        rows = loss.new_full((k,), float(x.shape[1])) if weight is None else weight.sum(1)
        for name, value in gradients.items():
            self._found[name][:k].addcmul_(value, rows.view(-1, *[1] * (value.dim() - 1)))
        self._seen[:k] += rows
        return loss

    def end(self) -> None:
        """Put the gradients where the weights were."""
        decay = self.recipe.settings.weight_decay
        for name, value in self._found.items():
            value.div_(self._seen.view(-1, *[1] * (value.dim() - 1)))
            self._views[name].mul_(decay).add_(value)
        for name in self._frozen:
            self._views[name].zero_()
        self._views, self._found = {}, {}


def in_batches(settings: Train, at_least: int = local.GRADIENT_BATCH) -> Train:
    """The one pass that a gradient over all examples takes."""
    return replace(settings, epochs=1, batch_size=max(settings.batch_size, at_least))


def choose(recipe: Recipe, job: Job, preprocess: nn.Module) -> Way:
    """Gradients together where they agree with the device's, else one by one.

    Where convolutions fill the processor, nothing is gained by stacking them.

    Args:
        recipe: of the gradients, its settings those of `in_batches`.
        job: gives the state, and examples to try with.
        preprocess: raw input to the model's.
    """
    convolves = any(isinstance(module, nn.Conv2d) for module in recipe.model.modules())
    convolves = convolves and recipe.device == CPU
    candidates = [] if convolves else [(Gradients, False)]
    return first_that(candidates, recipe, lambda make, _: difference(make, recipe, job, preprocess))


def difference(make: Make, recipe: Recipe, job: Job, preprocess: nn.Module) -> str:
    """How gradients differ from a device's, in one line; empty when they agree."""
    settings = replace(recipe.settings, batch_size=_SMALL)

    def alone(
        model: nn.Module, x: torch.Tensor, y: torch.Tensor, seed: int, pull: local.Pull
    ) -> tuple[Named, float]:
        found, result = local.gradient(model, x, y, settings, seed=seed, at_least=_SMALL)
        return {**model.state_dict(), **found}, result.loss

    far = distance(make, replace(recipe, settings=settings), job, preprocess, alone)
    return "" if far <= TOLERANCE else f"its gradients differ from a device's by {far:.1e}"
