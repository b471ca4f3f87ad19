"""How many threads a training step gets: all for large models, one for small ones.

A step of a small model is shorter than waking a second thread, and waiting threads spin: on a machine that
has other work, steps of the digits network were 14 to 18 times slower with two spinning threads than with
one, and 2 to 3 times with two that sleep (benchmarks/threads.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

WORTH_THREADS = 10_000_000  # parameters times examples of a step from which more threads pay (measured)


@contextmanager
def fitted(model: nn.Module, batch: int) -> Iterator[None]:
    """Torch's thread count fitted to steps of `batch` examples; put back afterwards."""
    work = sum(parameter.numel() for parameter in model.parameters()) * batch
    with limited(torch.get_num_threads() if work >= WORTH_THREADS else 1):
        yield


@contextmanager
def limited(count: int) -> Iterator[None]:
    """So many threads; put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
