"""Which stepper a model gets, and the proof at first use that its steps are the device's own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from fedge.learning import draws, local
from fedge.learning.lessons import answered
from fedge.learning.local import Job
from fedge_simulations.engine.stack import CPU, Layout, Named, Pull, Stacked, Stepper, train
from fedge_simulations.engine.steppers import Linears, Recipe, Single, linear_layers
from fedge_simulations.engine.vmapped import Vmapped

TOLERANCE = 1e-9  # of the change that steps in float64 make, relative

Make = Callable[[Recipe], Stepper]
Alone = Callable[[nn.Module, torch.Tensor, torch.Tensor, int, local.Pull], tuple[Named, float]]
"""What a device does with a model at the global weights, examples, classes, a seed and a pull: the state, or
the gradients and buffers, that it sends, and its loss."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a model's clients are trained."""

    stepper: Stepper | None  # None: one by one, by the device's own code
    single: bool = False  # the stepper takes stacks of one
    why: str = ""  # nothing batches this model: what it was
    device: torch.device = CPU  # where its stacks lie
    aside: str = ""  # why it is no other device


def choose(recipe: Recipe, job: Job, preprocess: nn.Module) -> Way:
    """The fastest stepper whose steps agree with the device's.

    Two small clients, of unequal size where such are stacked, take the steps of up to two passes in
    float64, once by the stepper and once by `fedge.learning.local.train`; a stepper that differs or raises
    is not used.

    Args:
        recipe: what is trained.
        job: gives the state, and examples to try with.
        preprocess: raw input to the model's.
    """
    return first_that(
        _candidates(recipe), recipe, lambda make, one: difference(make, recipe, job, preprocess, single=one)
    )


def anywhere(recipe: Recipe, devices: Sequence[torch.device], choosing: Callable[[Recipe], Way]) -> Way:
    """The way on the first of the devices that has one.

    Args:
        recipe: what is trained.
        devices: those that should be tried first, first; the last is the CPU.
        choosing: the way of a recipe on its own device.
    """
    reasons: list[str] = []
    for device in devices:
        way = replace(choosing(replace(recipe, device=device)), device=device)
        if way.stepper is not None:
            return replace(way, aside="; ".join(reasons))
        reasons.append(f"not on {device.type}: {way.why or 'nothing is gained'}")
    return way


def first_that(
    candidates: Iterable[tuple[Make, bool]], recipe: Recipe, differs: Callable[[Make, bool], str]
) -> Way:
    """The first of the steppers that does not differ.

    Args:
        candidates: makers, and whether theirs take stacks of one.
        recipe: what is trained.
        differs: how one differs from a device, in a line; empty: not at all. It may raise anything.
    """
    everything = sum(1 for _ in recipe.model.named_parameters(remove_duplicate=False))
    if everything != sum(1 for _ in recipe.model.parameters()):
        return Way(None, why="two names stand for one parameter")
    reason = ""
    for make, single in candidates:
        try:
            reason = differs(make, single)
        except Exception as error:  # noqa: BLE001 - a user's module may raise anything under a transform
            reason = _first_line(error)
        if not reason:
            return Way(make(recipe), single)
    return Way(None, why=f"it cannot be batched ({reason})" if reason else "")


def _candidates(recipe: Recipe) -> Iterator[tuple[Make, bool]]:
    if linear_layers(recipe.model) is not None:
        yield Linears, False
    convolves = any(isinstance(module, nn.Conv2d) for module in recipe.model.modules())
    if convolves and recipe.device == CPU:  # which one client's fill already
        yield Single, True
    yield partial(Vmapped, fused=True), False
    yield Vmapped, False


def difference(make: Make, recipe: Recipe, job: Job, preprocess: nn.Module, *, single: bool) -> str:
    """How a stepper's steps differ from the device's, in one line; empty when they agree."""
    settings = replace(
        recipe.settings, epochs=min(recipe.settings.epochs, 2), batch_size=min(recipe.settings.batch_size, 4)
    )

    def alone(
        model: nn.Module, x: torch.Tensor, y: torch.Tensor, seed: int, pull: local.Pull
    ) -> tuple[Named, float]:
        result = local.train(model, x, y, settings, seed=seed, pull=pull, lesson=recipe.lesson)
        return model.state_dict(), result.loss

    far = distance(
        make, replace(recipe, settings=settings), job, preprocess, alone, single=single, moves=True
    )
    return "" if far <= TOLERANCE else f"its steps differ from a device's by {far:.1e}"


def distance(
    make: Make,
    recipe: Recipe,
    job: Job,
    preprocess: nn.Module,
    alone: Alone,
    *,
    single: bool = False,
    moves: bool = False,
) -> float:
    """How far a stack of two small clients in float64 is from what a device does, relative.

    They are of unequal size where such are stacked.

    Args:
        make: makes the stepper.
        recipe: what is trained, with settings that make several steps.
        job: gives the state, and examples to try with.
        preprocess: raw input to the model's.
        alone: what the device does.
        single: the stepper takes stacks of one.
        moves: what is compared moves from the state of the job, so that the way is the measure.
    """
    least = local.least_batch(recipe.model)
    with torch.no_grad():
        x = preprocess(torch.from_numpy(np.ascontiguousarray(job.examples.x)))
    x, y = x.double() if x.is_floating_point() else x, torch.from_numpy(job.examples.y)
    if (teacher := local.teacher_of(job)) is not None:
        y = answered(teacher.double(), x, y)
    device = recipe.device
    double = replace(recipe, model=copy.deepcopy(recipe.model).double())
    start = Layout.of(job.state).flat(job.state, torch.float64)
    sizes = [len(x)] if single else [len(x), len(x) if least > 1 else max(len(x) // 2, 1)]
    seeds = list(range(1, len(sizes) + 1))
    flat = start.to(device).expand(len(sizes), -1).clone()
    rows = torch.cat([torch.arange(n) for n in sizes])
    keys = draws.key(torch.tensor(seeds))
    data = Stacked(x.to(device), y.to(device), rows, torch.tensor(sizes), keys)
    pull = _some_pull(recipe, start, len(sizes))
    with torch.no_grad():
        losses = train(make(double), flat, data, recipe.settings, least, pull.to(device))
    flat = flat.cpu()
    far = []
    for i, (n, seed) in enumerate(zip(sizes, seeds, strict=True)):
        model = copy.deepcopy(double.model)
        _load(model, recipe.layout, start)
        state, loss = alone(model, x[:n], y[:n], seed, _pull_of(recipe, pull, i))
        expected = torch.cat([state[name].reshape(-1) for name in recipe.layout.shapes])
        length = (expected - start if moves else expected).norm().clamp(min=1e-12)
        far += [float((flat[i] - expected).norm() / length), abs(float(losses[i]) - loss) / max(1.0, loss)]
    return max(far, key=lambda value: math.inf if math.isnan(value) else value)


def _some_pull(recipe: Recipe, start: torch.Tensor, k: int) -> Pull:
    """Anchors and shifts of k clients that differ, where the recipe has such: (k, D) each."""
    by = torch.arange(1, k + 1, dtype=start.dtype)[:, None] / 10
    anchor = start * (1 - by) if recipe.mu else None
    if not recipe.shifted:
        return Pull(anchor)
    shift = torch.cos(torch.arange(len(start), dtype=start.dtype)) * by
    for name, value in recipe.layout.views(shift).items():
        if name not in recipe.trainable:
            value.zero_()
    return Pull(anchor, shift)


def _pull_of(recipe: Recipe, pull: Pull, client: int) -> local.Pull:
    """The pull of one of a stack's clients, as a device takes it."""

    def named(stacked: torch.Tensor | None) -> Named | None:
        if stacked is None:
            return None
        return {name: value[client] for name, value in recipe.layout.views(stacked).items()}

    return local.Pull(recipe.mu, named(pull.anchor), named(pull.shift))


def _load(model: nn.Module, layout: Layout, flat: torch.Tensor) -> None:
    state = model.state_dict()
    with torch.no_grad():
        for name, value in layout.views(flat[None]).items():
            state[name].copy_(value[0])


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
