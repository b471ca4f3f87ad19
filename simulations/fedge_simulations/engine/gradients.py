"""Gradients of many clients at once, for strategies whose server steps (FedSGD).

What `fedge.learning.local.gradient` gives for each: the gradient of the mean loss over all its examples at
the weights that it was sent, in batches of at least GRADIENT_BATCH, with weight decay, and the buffers as
the batches move them.

Legend as in `stack`.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from fedge.config import Train
from fedge.learning import draws, local
from fedge.learning.local import Job
from fedge_simulations.engine.choice import TOLERANCE, Way
from fedge_simulations.engine.stack import Layout, Named, Stacked, train
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

    def begin(self, flat: torch.Tensor) -> None:
        """Take over a stack at the weights where the gradients are wanted."""
        self._views = self._recipe.layout.views(flat)
        self._found = {name: torch.zeros_like(self._views[name]) for name in self._recipe.trainable}
        self._counts = {n: v.expand(len(flat), *v.shape).clone() for n, v in self._counters.items()}
        self._seen = flat.new_zeros(len(flat))

    def step(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None, keys: torch.Tensor
    ) -> torch.Tensor:
        """One batch of the first k clients; no weight moves."""
        k = len(x)
        views = {name: value[:k] for name, value in self._views.items()}
        gradients, loss = self.gradients(views, x, y, weight, keys)
        rows = torch.full((k,), float(x.shape[1]), dtype=loss.dtype) if weight is None else weight.sum(1)
        for name, value in gradients.items():
            self._found[name][:k].addcmul_(value, rows.view(-1, *[1] * (value.dim() - 1)))
        self._seen[:k] += rows
        return loss

    def end(self) -> None:
        """Put the gradients where the weights were."""
        decay = self._recipe.settings.weight_decay
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
    everything = sum(1 for _ in recipe.model.named_parameters(remove_duplicate=False))
    if everything != sum(1 for _ in recipe.model.parameters()):
        return Way(None, why="two names stand for one parameter")
    if any(isinstance(module, nn.Conv2d) for module in recipe.model.modules()):
        return Way(None)
    try:
        far = difference(recipe, job, preprocess)
    except Exception as error:  # noqa: BLE001 - a user's module may raise anything under a transform
        line = next(iter(str(error).splitlines()), "")[:160]
        return Way(None, why=f"its gradients cannot be batched ({type(error).__name__}: {line})")
    if not far <= TOLERANCE:
        return Way(None, why=f"its gradients cannot be batched (they differ from a device's by {far:.1e})")
    return Way(Gradients(recipe))


def difference(recipe: Recipe, job: Job, preprocess: nn.Module) -> float:
    """The largest relative difference of two small clients' gradients in float64 from a device's.

    The clients are of unequal size where such are stacked, and have several batches.
    """
    least = local.least_batch(recipe.model)
    settings = replace(recipe.settings, batch_size=_SMALL)
    with torch.no_grad():
        x = preprocess(torch.from_numpy(np.ascontiguousarray(job.examples.x)))
    x, y = x.double() if x.is_floating_point() else x, torch.from_numpy(job.examples.y)
    double = replace(recipe, model=copy.deepcopy(recipe.model).double(), settings=settings)
    start = Layout.of(job.state).flat(job.state, torch.float64)
    sizes = [len(x), len(x) if least > 1 else max(len(x) // 2, 1)]
    seeds = [1, 2]
    rows = torch.cat([torch.arange(n) for n in sizes])
    data = Stacked(x, y, rows, torch.tensor(sizes), draws.key(torch.tensor(seeds)))
    flat = start.expand(2, -1).clone()
    with torch.no_grad():
        losses = train(Gradients(double), flat, data, settings, least)
    far = 0.0
    for i, (n, seed) in enumerate(zip(sizes, seeds, strict=True)):
        expected, loss = _alone(double, start, x[:n], y[:n], seed)
        far = max(far, float((flat[i] - expected).norm() / expected.norm().clamp(min=1e-12)))
        far = max(far, abs(float(losses[i]) - loss) / max(1.0, loss))
    return far


def _alone(
    recipe: Recipe, start: torch.Tensor, x: torch.Tensor, y: torch.Tensor, seed: int
) -> tuple[torch.Tensor, float]:
    """A device's gradients and buffers (D,), and its loss."""
    model = copy.deepcopy(recipe.model)
    with torch.no_grad():
        state = model.state_dict()
        for name, value in recipe.layout.views(start[None]).items():
            state[name].copy_(value[0])
    found, result = local.gradient(model, x, y, recipe.settings, seed=seed, at_least=_SMALL)
    everything = {**model.state_dict(), **found}
    return torch.cat([everything[name].reshape(-1) for name in recipe.layout.shapes]), result.loss
