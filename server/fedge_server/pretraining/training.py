"""Rounds of training on the server's own data, each step of it shared out among processes.

A round makes `train.epochs` passes with the client's own step (`fedge.learning.local`): the same loss, order,
augmentation and dropout keys, and an optimiser that lasts for the whole run. All of it is decided by the seed
and the round's number, so the global batches are the same for any number of processes, and a run that is
taken up again goes on as if nothing had happened.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fedge import tensors
from fedge.config import Config
from fedge.dataset import Examples
from fedge.errors import FormatError, RoundError
from fedge.learning import draws, local, objective
from fedge.learning.augment import augment
from fedge.learning.freezing import entries, freeze, training
from fedge.learning.state import NamedArrays, arrays_of, load_arrays, names_of
from fedge.learning.threads import fitted
from fedge_server.pretraining.sharing import Part, batches_of, parts, shared_norms

_STATE: Final = "pretraining"  # key of the saved state's metadata
_TOLD_S: Final = 30.0  # between two lines about a long pass

Say = Callable[[str], None]


@dataclass(slots=True)
class Trainer:
    """One process's network and optimiser between two rounds."""

    config: Config
    network: nn.Module  # on `device`
    preprocess: nn.Module
    examples: Examples  # all of them: each process takes its part of each batch
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    say: Say = lambda _: None
    optimizer: torch.optim.Optimizer = field(init=False)
    _shared: DistributedDataParallel = field(init=False)

    def __post_init__(self) -> None:
        """Join the other processes; the group is there already."""
        settings = self.config.train
        freeze(self.network, entries(self.network, settings.freeze))
        if dist.get_world_size() > 1:
            self.network = shared_norms(self.network)
        self.network.to(self.device)
        self.preprocess.to(self.device)
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = objective.optimizer(trained, settings)
        # Without `find_unused_parameters` gradients are put into other groups after the first step, so that a
        # run that is taken up again would add them up in another order.
        self._shared = DistributedDataParallel(
            self.network, forward_sync_buffers=False, find_unused_parameters=True
        )

    def round(self, number: int) -> float:
        """All passes of a round, from 1; the mean training loss over its examples.

        Raises:
            RoundError: the loss ceased to be finite.
        """
        settings, n = self.config.train, len(self.examples)
        epochs, steps = settings.epochs, batches_of(n, settings.batch_size)
        client, total = draws.key(self.config.seed), torch.zeros((), dtype=torch.float64)
        with (
            torch.random.fork_rng(devices=[]),
            fitted(self.network, -(-settings.batch_size // dist.get_world_size())),
        ):
            torch.manual_seed(draws.plain_key(self.config.seed, number) & (2**63 - 1))
            training(self.network)
            for epoch in range((number - 1) * epochs, number * epochs):
                order = draws.permutation(local.order_keys(client, epoch), n)
                told = time.monotonic()
                mine = parts(order, settings.batch_size, dist.get_rank(), dist.get_world_size())
                for step, part in enumerate(mine):
                    total += self._step(part, local.step_keys(client, epoch * steps + step))
                    if time.monotonic() > told + _TOLD_S:
                        told = time.monotonic()
                        self.say(f"  round {number}: pass {epoch + 1}, step {step + 1} of {steps}")
        total = total.to(self.device)
        dist.all_reduce(total)
        loss = float(total) / (n * epochs)
        if not np.isfinite(loss):
            raise RoundError(
                f"round {number}: the loss became {loss}; lower train.learning_rate "
                f"({settings.learning_rate:g})"
            )
        return loss

    def _step(self, part: Part, own: Tensor) -> Tensor:
        """One step on the whole batch; the sum of this process's losses before it."""
        settings = self.config.train
        raw = torch.from_numpy(np.ascontiguousarray(self.examples.x[part.indices.numpy()])).to(self.device)
        y = torch.from_numpy(self.examples.y[part.indices.numpy()]).to(self.device)
        keys = local.example_keys(own, part.batch)[part.first : part.first + len(y)].to(self.device)
        with torch.no_grad():
            inputs = augment(self.preprocess(raw), settings.augment, keys)
        self.optimizer.zero_grad(set_to_none=True)
        with draws.keyed_dropout(self.network, own.to(self.device), first=part.first):
            losses = objective.losses(settings)(self._shared(inputs), y)
        total = losses.sum()
        (total * (dist.get_world_size() / part.batch)).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return total.detach().double().cpu()

    @torch.no_grad()
    def answers(self, raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Probabilities (N, K) for raw examples, each process's part of them, put together on all."""
        size, rank = dist.get_world_size(), dist.get_rank()
        rows = -(-len(raw) // size)
        whole = nn.Sequential(self.preprocess, self.network)
        mine = np.ascontiguousarray(raw[rank * rows : (rank + 1) * rows])
        found = local.logits(whole, torch.from_numpy(mine).to(self.device)).softmax(1) if len(mine) else None
        width = torch.tensor([0 if found is None else found.shape[1]], device=self.device)
        dist.all_reduce(width, dist.ReduceOp.MAX)
        padded = torch.zeros(rows, int(width), device=self.device)
        if found is not None:
            padded[: len(found)] = found
        gathered = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(gathered, padded)
        return torch.cat(gathered)[: len(raw)].cpu().numpy()

    def arrays(self) -> NamedArrays:
        """The network's state, as rounds keep it."""
        return arrays_of(copy.deepcopy(self.network).cpu())

    def load(self, arrays: NamedArrays, state: bytes) -> None:
        """Go on from a committed round.

        Raises:
            FormatError: the state is not what `state` gave.
        """
        load_arrays(self.network, {name: arrays[name] for name in names_of(self.network)})
        if not state:
            return
        saved, about = tensors.parse(state)
        if _STATE not in about:
            raise FormatError("pretraining: the saved state is another strategy's")
        buffers = dict(self.network.named_buffers())
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in saved.items():
            kind, _, rest = name.partition("|")
            if kind == "buffer":
                buffers[rest].copy_(torch.from_numpy(value))
                continue
            number, _, key = rest.partition("|")
            moments.setdefault(int(number), {})[key] = torch.from_numpy(value)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def state(self) -> bytes:
        """What the next round needs besides the network: the optimiser's memory, and whole-number buffers."""
        held = self.optimizer.state_dict()["state"]
        arrays = {
            f"optimizer|{number}|{key}": value.cpu().numpy()
            for number, values in held.items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
        arrays |= {
            f"buffer|{name}": value.cpu().numpy()
            for name, value in self.network.named_buffers()
            if not value.is_floating_point()
        }
        return tensors.dump(arrays, {_STATE: json.dumps(sorted(held))})
