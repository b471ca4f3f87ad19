"""What the jobs of one round have in common: a proven way to train, and the data as its steps take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedge.dataset import Array, Examples, Indices
from fedge.learning import local
from fedge.learning.freezing import training
from fedge.learning.lessons import answered
from fedge.learning.local import Job
from fedge.learning.messages import Instructions
from fedge.learning.threads import limited
from fedge.statistics import Moments
from fedge_simulations.engine import gradients
from fedge_simulations.engine.choice import Way, anywhere, choose
from fedge_simulations.engine.stack import Layout
from fedge_simulations.engine.steppers import Recipe

Say = Callable[[str], None]
Key = tuple[Instructions, bytes]

WHOLE_BYTES = 64 * 1024**2  # of a data set that is pre-processed once and kept, at most
PREPROCESSED = 256  # examples at a time
TRIED = 10  # examples that a model is put to the proof with


def key_of(instructions: Instructions) -> Key:
    """What a preparation holds for: rounds, seeds and learning rates may differ."""
    train, moments = instructions.train, instructions.moments
    # A proof makes two passes at most, and holds for every learning rate.
    alike = replace(train, epochs=min(train.epochs, 2), learning_rate=1.0)
    own = b"" if moments is None else _bytes_of(moments)
    return replace(instructions, round=0, seed=0, moments=None, void=None, train=alike), own


@dataclass(slots=True)
class Prepared:
    """A way to train, and the data set's examples as it takes them.

    Args:
        recipe: what is trained, on its way's device.
        preprocess: raw input to the model's.
        way: how.
        least: examples of a batch.
        data: the whole data set.
        teacher: of a lesson, where the models are.
    """

    recipe: Recipe
    preprocess: torch.nn.Module
    way: Way
    least: int
    data: Examples
    teacher: torch.nn.Module | None = None
    _keep: bool = False  # whether the data set is small enough to be pre-processed once
    _inputs: torch.Tensor | None = None  # all of it, once that is done
    _classes: torch.Tensor | None = None  # of it, where the inputs are; in a lesson, targets
    _targets: torch.Tensor | None = (
        None  # (N, 1 + C) of the data set, once a lesson's teacher has answered it
    )

    @classmethod
    def of(cls, job: Job, data: Examples, devices: Sequence[torch.device], say: Say) -> Prepared:
        """Choose how clients of such a job are trained, and prove it.

        Args:
            job: of one of them.
            data: the whole data set.
            devices: where they may be trained, first choice first.
            say: hears why a model is not trained on the first device, or not batched.
        """
        instructions = job.instructions
        model = training(
            local.blank(job.task, instructions.model, instructions.spec, instructions.terms.frozen)
        )
        preprocess = job.task.preprocess(instructions.spec, instructions.moments, instructions.noise_filter)
        whole, terms = instructions.update == "gradient", instructions.terms
        settings = gradients.in_batches(instructions.train) if whole else instructions.train
        recipe = Recipe(
            model,
            Layout.of(job.state),
            settings,
            instructions.proximal_mu,
            terms.control,
            lesson=terms.lesson,
        )
        way = _way(recipe, job, data, devices, preprocess)
        if way.aside:
            say(f"model {instructions.model}: {way.aside}; its clients are trained on the CPU")
        if way.why:
            say(f"model {instructions.model}: {way.why}; its clients are trained one by one")
        teacher = local.teacher_of(job)
        return cls(
            replace(recipe, device=way.device),
            preprocess,
            way,
            local.least_batch(model),
            data,
            None if teacher is None else teacher.to(way.device),
            4 * data.x.size <= WHOLE_BYTES,
        )

    def follow(self, instructions: Instructions) -> None:
        """Go by the settings of the round at hand."""
        if instructions.update == "weights" and self.recipe.settings != instructions.train:
            self.recipe = replace(self.recipe, settings=instructions.train)
            if self.way.stepper is not None:
                self.way.stepper.recipe = self.recipe

    def inputs(self, examples: Examples, indices: Indices) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pre-processed examples and their classes, where the models are, and which `indices` names."""
        device = self.way.device
        if examples is self.data and self._keep:
            self._keep = False  # if this raises, because of one client, others are pre-processed apart
            self._inputs = _preprocessed(self.preprocess, self.data.x).to(device)
            self._classes = self._truth(self.data, slice(None)).to(device)
        if self._inputs is not None and self._classes is not None and examples is self.data:
            return self._inputs, self._classes, torch.from_numpy(indices)
        own = examples.take(indices) if examples is self.data else examples
        x = _preprocessed(self.preprocess, own.x)
        y = self._truth(examples, indices) if examples is self.data else self._told(x, own.y)
        return x.to(device), y.to(device), torch.arange(len(own))

    def _truth(self, examples: Examples, indices: Indices | slice) -> torch.Tensor:
        """Classes of examples of the data set; in a lesson targets, of which all are made once.

        So a teacher answers in the same parts, whoever is batched with whom.
        """
        if self.teacher is None or self.recipe.settings.augment:
            return torch.from_numpy(examples.y[indices])
        if self._targets is None:
            parts = [
                self._told(_preprocessed(self.preprocess, part.x), part.y)
                for start in range(0, len(examples), PREPROCESSED)
                for part in (examples.take(np.arange(start, min(start + PREPROCESSED, len(examples)))),)
            ]
            self._targets = torch.cat(parts)
        return self._targets[indices]

    def _told(self, x: torch.Tensor, y: Array) -> torch.Tensor:
        """Classes of pre-processed examples; in a lesson its answers too, unless steps alter the examples."""
        classes, teacher = torch.from_numpy(y), self.teacher
        if teacher is None or self.recipe.settings.augment:
            return classes
        device = self.way.device
        return answered(teacher, x.to(device), classes.to(device)).cpu()


def _way(
    recipe: Recipe,
    job: Job,
    data: Examples,
    devices: Sequence[torch.device],
    preprocess: torch.nn.Module,
) -> Way:
    guard = job.instructions.guard
    if guard is not None and guard.kind == "example":
        return Way(None)  # DP-SGD batches the examples of one client instead
    tried = replace(job, examples=data.take(np.arange(min(len(data), TRIED))))
    choosing = gradients.choose if job.instructions.update == "gradient" else choose
    with limited(1):
        return anywhere(recipe, devices, lambda there: choosing(there, tried, preprocess))


def _preprocessed(preprocess: torch.nn.Module, x: Array) -> torch.Tensor:
    """All of x, some at a time: what comes up on the way is never in memory for all of it."""
    found: torch.Tensor | None = None
    for start in range(0, len(x), PREPROCESSED):
        part = preprocess(torch.from_numpy(np.ascontiguousarray(x[start : start + PREPROCESSED])))
        if found is None:
            found = torch.empty(len(x), *part.shape[1:], dtype=part.dtype)
        found[start : start + len(part)] = part
    assert found is not None  # noqa: S101 - a client has one example at least
    return found


def _bytes_of(moments: Moments) -> bytes:
    return moments.count.tobytes() + moments.total.tobytes() + moments.squares.tobytes()
