"""The same batches whatever the number of processes: which part of each of them is whose.

Goyal et al. 2017, "Accurate, Large Minibatch SGD", arXiv:1706.02677: a step over N processes is one step over
the batch that they share if each weighs its examples by the whole batch. DistributedDataParallel means over
processes instead of examples, so each multiplies its part of the loss by N.

Legend: n examples of a pass, B of a batch, N processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedge.config import Train
from fedge.errors import ConfigError
from fedge.learning import local


@dataclass(frozen=True, slots=True)
class Part:
    """What one process does of one batch."""

    indices: Tensor  # of its examples
    first: int  # position of the first of them in the batch
    batch: int  # B


def batches_of(n: int, size: int) -> int:
    """Steps of one pass: batches of at most `size`, all of nearly the same."""
    return -(-n // size)


def parts(order: Tensor, size: int, rank: int, processes: int) -> Iterator[Part]:
    """One process's part of each batch of a pass, in the order (n,) of its examples."""
    for batch in order.tensor_split(batches_of(len(order), size)):
        shares = batch.tensor_split(processes)
        yield Part(shares[rank], sum(map(len, shares[:rank])), len(batch))


def check_shares(network: nn.Module, n: int, settings: Train, processes: int) -> None:
    """Refuse batches in which a process would have nothing to do.

    Raises:
        ConfigError: the smallest batch has too few examples.
    """
    smallest = n // batches_of(n, settings.batch_size)
    needed = max(processes, local.least_batch(network))
    if smallest < needed:
        raise ConfigError(
            f"train.batch_size = {settings.batch_size}: of {n} examples it makes batches of {smallest}, too "
            f"few for {processes} processes (at least {needed}); raise it, or ask for fewer --processes"
        )


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation (Ioffe and Szegedy 2015) by the whole batch, of which each process has a part.

    Torch's SyncBatchNorm is for GPUs alone. Means come first and squares around them then, since the
    difference of two sums of squares loses what float32 has of it.
    """

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        pass

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """(B / N, C, ...) to the same shape."""
        if not self.training:
            return super().forward(input)
        dims = [0, *range(2, input.dim())]
        shape = [1, -1, *[1] * (input.dim() - 2)]
        count = _total(input.new_tensor([input.numel() / input.shape[1]]))
        mean = _total(input.sum(dims)) / count
        centred = input - mean.view(shape)
        variance = _total(centred.square().sum(dims)) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1))
        normed = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            normed = normed * self.weight.view(shape) + self.bias.view(shape)
        return normed

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def shared_norms(network: nn.Module) -> nn.Module:
    """The network, whose batch normalisation is changed in place to that of the whole batch."""
    for name, module in network.named_children():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            shared = SharedBatchNorm(
                module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
            )
            shared._parameters, shared._buffers = module._parameters, module._buffers
            setattr(network, name, shared.train(module.training))
        else:
            shared_norms(module)
    return network


class _Total(torch.autograd.Function):
    """The sum over all processes; what each makes of it flows back to all of them."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return _summed(values)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(values: Tensor) -> Tensor:
    found = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(found)
    return found


def _total(values: Tensor) -> Tensor:
    found: Tensor = _Total.apply(values)  # type: ignore[no-untyped-call]
    return found
