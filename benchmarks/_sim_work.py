"""What benchmarks/simulation.py measures with: three workloads, their data, and how a contestant is driven.

A contestant is a process that makes rounds of federated averaging when it is told to. It reads "go SECONDS"
from its standard input, makes rounds for at least so long (one at least), and answers with a line of JSON.
Everything else that it or its libraries print goes to stderr. This module needs torch and nothing else, so
that every contestant can import it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

BATCH, CLASSES = 10, 10
TEST = 200  # examples: fedge evaluates half of them after each round, which costs it a hundredth
SEED = 0


class Mlp(nn.Module):
    """A perceptron as a user writes it: a forward pass of their own, nothing to recognise it by."""

    def __init__(self, inputs: int, *hidden: int) -> None:
        super().__init__()
        sizes = (inputs, *hidden, CLASSES)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)  # (B, F)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)  # (B, K)


class Cnn(nn.Module):
    """McMahan's CNN for 28x28, 1,663,370 parameters, as a user writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 32, 5, padding=2), nn.Conv2d(32, 64, 5, padding=2)
        self.hidden, self.out = nn.Linear(64 * 7 * 7, 512), nn.Linear(512, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return self.out(F.relu(self.hidden(x.flatten(1))))  # (B, K)


@dataclass(frozen=True, slots=True)
class Work:
    """What is trained, by how many, on how much."""

    name: str
    side: int  # of a square input with one channel
    build: Callable[[], nn.Module]
    clients: int  # in a round
    samples: int  # of a client, at first
    learning_rate: float

    def net(self) -> nn.Module:
        """The network at the weights that every contestant begins with."""
        return seeded(self.build)

    @property
    def steps(self) -> int:
        """Optimiser steps of one client in one round."""
        return -(-self.samples // BATCH)


WORKS = {
    "tiny": Work("tiny", 8, lambda: Mlp(64, 32), clients=1000, samples=60, learning_rate=0.1),
    "mlp": Work("mlp", 28, lambda: Mlp(784, 200, 200), clients=32, samples=600, learning_rate=0.05),
    "cnn": Work("cnn", 28, Cnn, clients=8, samples=600, learning_rate=0.05),
}


def work(name: str, clients: int) -> Work:
    """A workload with another number of clients."""
    return replace(WORKS[name], clients=clients)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """What it builds, with the first weights that the seed decides; torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return build()


@dataclass(frozen=True, slots=True)
class Data:
    """Pictures of ten patterns with noise, so that there is something to learn."""

    x: npt.NDArray[np.float32]  # (N, side, side); the last TEST of them are for testing
    y: npt.NDArray[np.int64]  # (N,)

    @classmethod
    def made(cls, side: int, count: int) -> Data:
        """So many examples to train with, and TEST more."""
        rng = np.random.default_rng(SEED)
        patterns = rng.normal(size=(CLASSES, side, side)).astype(np.float32)
        y = rng.integers(0, CLASSES, count + TEST)
        x = rng.standard_normal((count + TEST, side, side), dtype=np.float32)
        x += 0.5 * patterns[y]
        return cls(x, y)

    def client(self, number: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 1, side, side) inputs and (N,) classes of a client: a view."""
        rows = slice(number * samples, (number + 1) * samples)
        return torch.from_numpy(self.x[rows]).unsqueeze(1), torch.from_numpy(self.y[rows])

    def loss(self, network: nn.Module) -> float:
        """Of a network on the test examples."""
        x, y = torch.from_numpy(self.x[-TEST:]).unsqueeze(1), torch.from_numpy(self.y[-TEST:])
        with torch.no_grad():
            return float(F.cross_entropy(network.eval()(x), y))


def train(network: nn.Module, x: torch.Tensor, y: torch.Tensor, learning_rate: float) -> tuple[int, float]:
    """One client's epoch as the tutorials write it; steps made and mean loss."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=learning_rate)
    steps, total = 0, 0.0
    for rows in torch.randperm(len(y)).split(BATCH):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        steps, total = steps + 1, total + loss.item()
    return steps, total / steps


def private_stdout() -> Any:
    """A stream to who started this process; whatever else is printed goes to stderr from now on."""
    stream = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return stream


def turns(answers: Any) -> Iterator[Turn]:
    """The turns that are asked for, until the standard input is closed."""
    print(json.dumps({"ready": True}), file=answers)
    for number, line in enumerate(sys.stdin):
        turn = Turn(float(line.split()[1]), first=number == 0)
        yield turn
        print(json.dumps(turn.answer()), file=answers)


class Turn:
    """Rounds for so many seconds, counted."""

    def __init__(self, seconds: float, *, first: bool) -> None:
        self._seconds, self._started, self._ended = seconds, time.perf_counter(), 0.0
        self.first = first  # only then the loss is wanted: what it costs would count
        self.rounds = 0
        self.found: dict[
            str, float
        ] = {}  # clients, steps, examples of all rounds; in the first turn the loss after it

    def done(self, **found: float) -> bool:
        """Count a round; whether it was the last one of this turn."""
        self._ended = time.perf_counter()
        self.rounds += 1
        for name, value in found.items():
            self.found[name] = self.found.get(name, 0.0) + value
        return self._ended - self._started >= self._seconds

    def answer(self) -> dict[str, float]:
        """What the turn was."""
        return {"seconds": self._ended - self._started, "rounds": self.rounds, **self.found}
