"""One client's local step and local training: the only definition, whoever runs it.

The six steps of distributed training are spread over three places: data is *partitioned* among clients,
the server *initialises*; `gradient_step` here does *forward and backward*; a strategy *aggregates* and
*updates the global model*; the round loop *repeats*.

Legend: B batch, N examples of this client, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from fedge.config import Train
from fedge.dataset import Examples
from fedge.errors import FormatError
from fedge.learning import draws
from fedge.learning.augment import augment
from fedge.learning.dpsgd import train_privately
from fedge.learning.freezing import freeze, training
from fedge.learning.guard import Guard
from fedge.learning.lessons import answered
from fedge.learning.messages import Instructions, Update
from fedge.learning.objective import losses, optimizer
from fedge.learning.state import NamedArrays, arrays_of, load_arrays
from fedge.learning.terms import Lesson
from fedge.learning.threads import fitted
from fedge.spec import Spec
from fedge.task import Task

Named = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Job:
    """One client's training in one round, as the server instructed it."""

    task: Task
    instructions: Instructions
    state: NamedArrays  # the global model's, as the message brought it
    examples: Examples  # the client's own, raw
    seed: int  # decides order, augmentation and dropout of this client in this round
    secret: bytes = b""  # decides noise, and the batches of DP-SGD; of a client that guards something
    anchor: NamedArrays | None = None  # what the proximal term pulls to; None: the state
    shift: NamedArrays | None = None  # added to each step's gradient, by parameter (SCAFFOLD's c - c_i)
    teacher: NamedArrays | None = None  # the state of the network whose answers are learned, in a lesson


@dataclass(frozen=True, slots=True)
class Trained:
    """What a job gave."""

    arrays: NamedArrays  # the new state, or gradients where the instructions ask for them
    loss: float  # mean training loss over the examples seen
    examples: int  # N, the weight of this client's update
    steps: int  # optimiser steps made


Trainer = Callable[[Job], Trained]
"""Does a job: `fit` on a device; a simulation does many jobs together."""

GRADIENT_BATCH = 256  # examples that a gradient over all of them is computed from at a time, at least


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What one client's training gave, besides the changed model."""

    loss: float  # mean training loss over the examples seen
    examples: int  # N, the weight of this client's update
    steps: int  # optimiser steps made


@dataclass(frozen=True, slots=True)
class Pull:
    """What is added to each step's gradient: mu (w - anchor) + shift.

    The first is FedProx's (Li et al. 2020, Federated Optimization in Heterogeneous Networks), which stands in
    the loss as mu / 2 |w - anchor|^2; the second SCAFFOLD's c - c_i.
    """

    mu: float = 0.0
    anchor: Named | None = None  # by parameter; None: the model as it is at first
    shift: Named | None = None  # by parameter; None: nothing


NO_PULL = Pull()
_ORDER, _STEP = 0, 1  # streams of a client's key


def order_keys(client: torch.Tensor, epoch: int) -> torch.Tensor:
    """What decides the order of the examples in one pass, of one client or of many."""
    return draws.derive(draws.derive(client, _ORDER), epoch)


def step_keys(client: torch.Tensor, step: int | torch.Tensor) -> torch.Tensor:
    """What decides augmentation and dropout of step number `step`, counted over all passes."""
    return draws.derive(draws.derive(client, _STEP), step)


def example_keys(step: torch.Tensor, count: int) -> torch.Tensor:
    """One key for each example of a step's batch: (..., count)."""
    return draws.derive(step[..., None], torch.arange(count, device=step.device))


def batch_sizes(n: int, size: int, *, least: int = 1) -> list[int]:
    """Examples of each step of one pass over n of them: batches of at most `size`.

    A last batch of fewer than `least` examples joins the one before it.
    """
    sizes = [size] * (n // size) + ([n % size] if n % size else [])
    if len(sizes) > 1 and sizes[-1] < least:
        sizes[-2:] = [sizes[-2] + sizes[-1]]
    return sizes


def least_batch(model: nn.Module) -> int:
    """Batch normalisation has no variance of a single example: torch refuses it in training."""
    return 2 if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) else 1


def train(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    settings: Train,
    *,
    seed: int,
    pull: Pull = NO_PULL,
    lesson: Lesson | None = None,
    teacher: nn.Module | None = None,
) -> LocalResult:
    """Train the model in place on one client's data.

    Args:
        model: a network on pre-processed inputs, at the global weights.
        x: (N, ...) pre-processed float32.
        y: (N,) class indices; in a lesson without a `teacher`, targets (N, 1 + K).
        settings: the run's `[train]`.
        seed: decides order, augmentation and dropout of this client in this round.
        pull: what is added to each step's gradient.
        lesson: what else is learned.
        teacher: answers each batch as it was altered; None: y holds its answers.
    """
    loss_of = losses(settings, lesson)
    opt = optimizer([p for p in model.parameters() if p.requires_grad], settings)
    anchors = _anchors(model, pull.anchor) if pull.mu else []
    shifted = [(p, pull.shift[n]) for n, p in model.named_parameters() if pull.shift and p.requires_grad]
    total, steps, client = 0.0, 0, draws.key(seed)
    sizes = batch_sizes(len(y), settings.batch_size, least=least_batch(model))
    with _seeded(model, seed), fitted(model, settings.batch_size):
        for epoch in range(settings.epochs):
            order = draws.permutation(order_keys(client, epoch), len(y))
            for indices in torch.split(order, sizes):
                own = step_keys(client, steps)
                inputs = augment(x[indices], settings.augment, example_keys(own, len(indices)))
                truth = y[indices] if teacher is None else answered(teacher, inputs, y[indices])
                opt.zero_grad(set_to_none=True)
                with draws.keyed_dropout(model, own):
                    loss = loss_of(model(inputs), truth).mean()  # forward
                objective = loss + pull.mu / 2 * _distance(model, anchors) if anchors else loss
                objective.backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
                for p, value in shifted:
                    p.grad = value.clone() if p.grad is None else p.grad.add_(value)
                opt.step()
                total, steps = total + loss.item() * len(indices), steps + 1
    # Rounding may take a teacher's own divergence from itself below 0.
    return LocalResult(max(total, 0.0) / (len(y) * settings.epochs), len(y), steps)


def fit(job: Job) -> Trained:
    """Do one client's job with torch's own modules and optimisers, as a device does.

    Raises:
        FormatError: a lesson is asked for beside what it does not go with, or without its teacher.
    """
    instructions = job.instructions
    model, x, y = prepared(job)
    guard, lesson, teacher = instructions.guard, instructions.terms.lesson, teacher_of(job)
    if lesson is not None and (guard is not None or instructions.update == "gradient"):
        raise FormatError("lesson: is for plain training, without a guard, of weights")
    if teacher is not None and not instructions.train.augment:
        y, teacher = answered(teacher, x, y), None
    if guard is not None and guard.kind == "example":
        result = _train_privately(model, x, y, job, guard)
        arrays = arrays_of(model)
    elif instructions.update == "gradient":
        gradients, result = gradient(model, x, y, instructions.train, seed=job.seed)
        arrays = {**arrays_of(model), **{name: value.numpy() for name, value in gradients.items()}}
    else:
        pull = Pull(instructions.proximal_mu, _tensors(job.anchor), _tensors(job.shift))
        result = train(
            model, x, y, instructions.train, seed=job.seed, pull=pull, lesson=lesson, teacher=teacher
        )
        arrays = arrays_of(model)
    return Trained(arrays, result.loss, result.examples, result.steps)


def _train_privately(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, job: Job, guard: Guard
) -> LocalResult:
    """`train` by DP-SGD; it tells no loss, which no noise covers."""
    settings, mu = job.instructions.train, job.instructions.proximal_mu
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    opt, anchors = (
        optimizer(parameters.values(), settings),
        {n: p.detach().clone() for n, p in parameters.items()},
    )

    def step(gradients: dict[str, torch.Tensor]) -> None:
        for name, p in parameters.items():
            p.grad = gradients[name].to(p.dtype) + mu * (p.detach() - anchors[name])
        opt.step()

    with _seeded(model, job.seed), fitted(model, settings.batch_size):
        steps = train_privately(
            model, x, y, settings, guard,
            loss_of=losses(settings), step=step, seed=job.seed, secret=job.secret,
        )  # fmt: skip
    return LocalResult(0.0, len(y), steps)


def prepared(job: Job) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The global model with its weights loaded, and the client's pre-processed data."""
    instructions = job.instructions
    model = blank(job.task, instructions.model, instructions.spec, instructions.terms.frozen)
    load_arrays(model, job.state)
    preprocess = job.task.preprocess(instructions.spec, instructions.moments, instructions.noise_filter)
    with torch.no_grad():
        x = preprocess(torch.from_numpy(np.ascontiguousarray(job.examples.x)))
    return model, x, torch.from_numpy(job.examples.y)


def teacher_of(job: Job) -> nn.Module | None:
    """The network whose answers are learned, in evaluation mode; None: this is no lesson.

    Raises:
        FormatError: its state is not there, or not of its architecture.
    """
    lesson = job.instructions.terms.lesson
    if lesson is None:
        return None
    if job.teacher is None:
        raise FormatError("lesson: its teacher was not sent")
    network = copy.deepcopy(blank(job.task, lesson.model, job.instructions.spec))
    try:
        load_arrays(network, job.teacher)
    except (KeyError, RuntimeError) as error:
        raise FormatError(f"lesson: the teacher is no {lesson.model!r} ({error})") from error
    return network.eval().requires_grad_(False)


@lru_cache(maxsize=4)
def _cached_blank(build_model: Callable[[Spec], nn.Module], spec: Spec, frozen: tuple[str, ...]) -> nn.Module:
    return freeze(build_model(spec), frozen)


def blank(task: Task, name: str, spec: Spec, frozen: tuple[str, ...] = ()) -> nn.Module:
    """A model whose weights are about to be overwritten, so that one instance serves all rounds.

    Args:
        task: that has it.
        name: of the model.
        spec: of its input and classes.
        frozen: parameters that take no gradient.
    """
    return _cached_blank(task.model(name), spec, frozen)


@lru_cache(maxsize=4)
def _cached_first(build_model: Callable[[Spec], nn.Module], spec: Spec, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(spec)


def first(task: Task, name: str, spec: Spec, seed: int) -> nn.Module:
    """A model with a run's first weights, which its seed alone decides; one instance serves all: copy it."""
    return _cached_first(task.model(name), spec, seed)


@contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Training mode, with what a model draws by itself decided by the seed too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        training(model)
        yield


def gradient(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    settings: Train,
    *,
    seed: int,
    at_least: int = GRADIENT_BATCH,
) -> tuple[dict[str, torch.Tensor], LocalResult]:
    """The gradient of the mean loss over all N examples at the model's weights, which stay as they are.

    McMahan et al. 2017, algorithm FedSGD (C = 1, B = infinity, E = 1): computed in batches to bound memory,
    summed, divided by N. Buffers such as batch statistics move as they would in a step.

    Args:
        model: a network on pre-processed inputs, at the global weights.
        x: (N, ...) pre-processed float32.
        y: (N,) class indices.
        settings: the run's `[train]`.
        seed: as in `train`.
        at_least: examples of a batch, where the settings say fewer.
    """
    loss_of = losses(settings)
    model.zero_grad(set_to_none=True)
    total, client, least = 0.0, draws.key(seed), least_batch(model)
    size = max(settings.batch_size, at_least)
    order = draws.permutation(order_keys(client, 0), len(y))
    with _seeded(model, seed), fitted(model, size):
        for step, indices in enumerate(torch.split(order, batch_sizes(len(y), size, least=least))):
            own = step_keys(client, step)
            inputs = augment(x[indices], settings.augment, example_keys(own, len(indices)))
            with draws.keyed_dropout(model, own):
                loss = loss_of(model(inputs), y[indices]).sum() / len(y)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
            total += loss.item()
    decay = settings.weight_decay
    gradients = {
        name: p.grad + decay * p.detach() if p.grad is not None else torch.zeros_like(p)
        for name, p in model.named_parameters()
    }
    return gradients, LocalResult(total, len(y), 0)


def gradients_of(model: nn.Module, update: Update) -> frozenset[str]:
    """Entries of a model's state in whose place a client sends a gradient."""
    return parameters_of(model) if update == "gradient" else frozenset()


def parameters_of(model: nn.Module) -> frozenset[str]:
    """Entries of a model's state that are trained; the others are buffers."""
    return frozenset(name for name, _ in model.named_parameters())


def _tensors(arrays: NamedArrays | None) -> Named | None:
    return None if arrays is None else {name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}


def _anchors(model: nn.Module, anchor: Named | None) -> list[torch.Tensor]:
    if anchor is None:
        return [p.detach().clone() for p in model.parameters()]
    return [anchor[name] for name, _ in model.named_parameters()]


def _distance(model: nn.Module, anchors: list[torch.Tensor]) -> torch.Tensor:
    """Squared Euclidean distance of the weights from their anchors."""
    terms = [(p - a).square().sum() for p, a in zip(model.parameters(), anchors, strict=True)]
    return torch.stack(terms).sum()


@torch.no_grad()
def logits(model: nn.Module, x: torch.Tensor, *, batch_size: int = 1024) -> torch.Tensor:
    """The model's outputs (N, K) in evaluation mode; the mode of each of its parts is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with fitted(model, batch_size):
            return torch.cat([model(part) for part in torch.split(x, batch_size)])
    finally:
        for module, was_training in modes:
            module.training = was_training
