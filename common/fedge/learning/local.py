"""One client's local step and local training: the only definition, whoever runs it.

The six steps of distributed training are spread over three places: data is *partitioned* among clients,
the server *initialises*; `gradient_step` here does *forward and backward*; a strategy *aggregates* and
*updates the global model*; the round loop *repeats*.

Legend: B batch, N examples of this client, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fedge.config import Train
from fedge.dataset import Examples
from fedge.learning.augment import augment
from fedge.learning.messages import Instructions
from fedge.learning.state import NamedArrays, arrays_of, load_arrays
from fedge.learning.threads import fitted
from fedge.spec import Spec
from fedge.task import Task

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits (B, K) and class indices (B,) to the mean loss, a scalar."""


@dataclass(frozen=True, slots=True)
class Job:
    """One client's training in one round, as the server instructed it."""

    task: Task
    instructions: Instructions
    state: NamedArrays  # the global model's, as the message brought it
    examples: Examples  # the client's own, raw
    seed: int  # decides order, augmentation and dropout of this client in this round


@dataclass(frozen=True, slots=True)
class Trained:
    """What a job gave."""

    arrays: NamedArrays  # the new state, or gradients where the instructions ask for them
    loss: float  # mean training loss over the examples seen
    examples: int  # N, the weight of this client's update
    steps: int  # optimiser steps made


Trainer = Callable[[Job], Trained]
"""Does a job: `fit` on a device; a simulation does many jobs together."""

FOCAL_GAMMA = 2.0  # Lin et al. 2017, Focal Loss for Dense Object Detection


def loss_function(settings: Train) -> Loss:
    """The loss that the settings name: cross_entropy (smoothed), focal (Lin et al. 2017), multi_margin."""

    def cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, y, label_smoothing=settings.label_smoothing)

    def focal(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        log_p = F.log_softmax(logits, dim=1).gather(1, y[:, None]).squeeze(1)  # (B,)
        return (-((1 - log_p.exp()) ** FOCAL_GAMMA) * log_p).mean()

    def multi_margin(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.multi_margin_loss(logits, y)

    named: dict[str, Loss] = {"cross_entropy": cross_entropy, "focal": focal, "multi_margin": multi_margin}
    return named[settings.loss]


def optimizer(model: nn.Module, settings: Train) -> torch.optim.Optimizer:
    """A fresh torch optimiser over the trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=settings.momentum, weight_decay=decay)
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, momentum=settings.momentum, weight_decay=decay)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    return torch.optim.Adam(parameters, lr=lr, weight_decay=decay)


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What one client's training gave, besides the changed model."""

    loss: float  # mean training loss over the examples seen
    examples: int  # N, the weight of this client's update
    steps: int  # optimiser steps made


def batches(n: int, size: int, generator: torch.Generator, *, least: int = 1) -> Iterator[torch.Tensor]:
    """Positions of one pass over n examples in random order, in batches of at most `size`.

    A last batch of fewer than `least` examples joins the one before it.
    """
    parts = list(torch.split(torch.randperm(n, generator=generator), size))
    if len(parts) > 1 and len(parts[-1]) < least:
        parts[-2:] = [torch.cat(parts[-2:])]
    yield from parts


def _least_batch(model: nn.Module) -> int:
    """Batch normalisation has no variance of a single example: torch refuses it in training."""
    return 2 if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) else 1


def train(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    settings: Train,
    *,
    seed: int,
    proximal_mu: float = 0.0,
) -> LocalResult:
    """Train the model in place on one client's data.

    Args:
        model: a network on pre-processed inputs, at the global weights.
        x: (N, ...) pre-processed float32.
        y: (N,) class indices.
        settings: the run's `[train]`.
        seed: decides order and augmentation of this client in this round.
        proximal_mu: FedProx's term mu/2 * ||w - w_global||^2 is added to the loss when it is not 0
            (Li et al. 2020, Federated Optimization in Heterogeneous Networks).
    """
    loss_of, opt = loss_function(settings), optimizer(model, settings)
    anchors = [p.detach().clone() for p in model.parameters()] if proximal_mu else []
    total, seen, steps, least = 0.0, 0, 0, _least_batch(model)
    with _seeded(model, seed) as generator, fitted(model, settings.batch_size):
        for _ in range(settings.epochs):
            for indices in batches(len(y), settings.batch_size, generator, least=least):
                inputs = augment(x[indices], settings.augment, generator)
                opt.zero_grad(set_to_none=True)
                loss = loss_of(model(inputs), y[indices])  # forward
                objective = loss + proximal_mu / 2 * _distance(model, anchors) if anchors else loss
                objective.backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
                opt.step()
                total, seen, steps = total + loss.item() * len(indices), seen + len(indices), steps + 1
    return LocalResult(total / seen, len(y), steps)


def fit(job: Job) -> Trained:
    """Do one client's job with torch's own modules and optimisers, as a device does."""
    instructions = job.instructions
    model, x, y = prepared(job)
    if instructions.update == "gradient":
        gradients, result = gradient(model, x, y, instructions.train, seed=job.seed)
        arrays = {**arrays_of(model), **{name: value.numpy() for name, value in gradients.items()}}
    else:
        result = train(model, x, y, instructions.train, seed=job.seed, proximal_mu=instructions.proximal_mu)
        arrays = arrays_of(model)
    return Trained(arrays, result.loss, result.examples, result.steps)


def prepared(job: Job) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The global model with its weights loaded, and the client's pre-processed data."""
    instructions = job.instructions
    model = blank(job.task, instructions.model, instructions.spec)
    load_arrays(model, job.state)
    preprocess = job.task.preprocess(instructions.spec, instructions.moments, instructions.noise_filter)
    with torch.no_grad():
        x = preprocess(torch.from_numpy(np.ascontiguousarray(job.examples.x)))
    return model, x, torch.from_numpy(job.examples.y)


@lru_cache(maxsize=4)
def _cached_blank(build_model: Callable[[Spec], nn.Module], spec: Spec) -> nn.Module:
    return build_model(spec)


def blank(task: Task, name: str, spec: Spec) -> nn.Module:
    """A model whose weights are about to be overwritten, so that one instance serves all rounds."""
    return _cached_blank(task.model(name), spec)


@contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[torch.Generator]:
    """Training mode with all randomness from one seed: ours by the generator, dropout's by torch's own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed ^ 0x5DEECE66D)  # another stream than the generator's
        model.train()
        yield torch.Generator().manual_seed(seed)


def gradient(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, settings: Train, *, seed: int
) -> tuple[dict[str, torch.Tensor], LocalResult]:
    """The gradient of the mean loss over all N examples at the model's weights, which stay as they are.

    McMahan et al. 2017, algorithm FedSGD (C = 1, B = infinity, E = 1): computed in batches to bound memory,
    summed, divided by N. Buffers such as batch statistics move as they would
    in a step.
    """
    loss_of = loss_function(settings)
    model.zero_grad(set_to_none=True)
    total = 0.0
    size = max(settings.batch_size, 256)
    with _seeded(model, seed) as generator, fitted(model, size):
        for indices in batches(len(y), size, generator, least=_least_batch(model)):
            inputs = augment(x[indices], settings.augment, generator)
            loss = loss_of(model(inputs), y[indices]) * (len(indices) / len(y))
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
            total += loss.item()
    decay = settings.weight_decay
    gradients = {
        name: p.grad + decay * p.detach() if p.grad is not None else torch.zeros_like(p)
        for name, p in model.named_parameters()
    }
    return gradients, LocalResult(total, len(y), 0)


def _distance(model: nn.Module, anchors: list[torch.Tensor]) -> torch.Tensor:
    """Squared Euclidean distance of the weights from their anchors."""
    terms = [(p - a).square().sum() for p, a in zip(model.parameters(), anchors, strict=True)]
    return torch.stack(terms).sum()


@torch.no_grad()
def logits(model: nn.Module, x: torch.Tensor, *, batch_size: int = 1024) -> torch.Tensor:
    """The model's outputs (N, K) in evaluation mode; the mode is put back."""
    was_training = model.training
    model.eval()
    try:
        with fitted(model, batch_size):
            return torch.cat([model(part) for part in torch.split(x, batch_size)])
    finally:
        model.train(was_training)
