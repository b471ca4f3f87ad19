"""The vector engine: trains many clients together, each as the device would train it alone.

`train` gives every client's result (for full messages); `sum` gives one weighted mean of them (for
strategies that are linear in the updates), and keeps no client's model. Each step is the device's own up to
rounding. Sums are formed in float64 in one fixed order (`lanes`), so that neither the number of clients that
are batched together nor the number of processes (`workers`) enters into them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import torch

from fedge.config import Simulation, Train
from fedge.dataset import Examples, Indices
from fedge.errors import ConfigError
from fedge.learning import draws, local
from fedge.learning.local import Job, Trained
from fedge.learning.state import NamedArrays, cast_like
from fedge.learning.threads import limited
from fedge_simulations.engine.lanes import Part, Sums, cut
from fedge_simulations.engine.measured import Plan, fastest
from fedge_simulations.engine.prepared import Key, Prepared, Say, key_of
from fedge_simulations.engine.stack import CPU, NO_PULL, Layout, Pull, Stacked, in_order, rows_of, train
from fedge_simulations.engine.steppers import Recipe
from fedge_simulations.engine.workers import PAYS_S, Workers
from fedge_simulations.trainers import Client, Sum, attempt

_LOG = logging.getLogger("fedge.simulation")

STACK_BYTES = 13 * 2**19  # of the models that are batched together, until it is measured
GPU_STACK_BYTES = 2**30  # the same on a GPU, which has no cache to fit into
ROWS_BYTES = 32 * 1024**2  # of their data
MOST_AT_ONCE = 512  # clients; above it nothing is gained (benchmarks/simulation.py)


class Engine:
    """Does the jobs of simulated clients; each model is checked against the device's code at first use."""

    can_sum = True

    def __init__(
        self,
        settings: Simulation,
        data: Examples,
        *,
        rounds: int = 1,
        folder: Path | None = None,
        say: Say = _LOG.warning,
    ) -> None:
        """Keep what all clients' data are views of.

        Args:
            settings: the run's `[simulation]`.
            data: the whole data set, which clients index.
            rounds: of the run; says whether work enough lies ahead to measure, and for further processes.
            folder: the run's, where what was measured is kept; None: nowhere.
            say: hears once of each model that cannot be batched, and why.
        """
        self._settings, self.data, self._say, self._rounds = settings, data, say, rounds
        self._devices = devices_of(settings)
        if len(self._devices) > 1:  # one process drives the GPU
            settings = self._settings = replace(settings, workers=1)
        self.workers, self._plan = Workers(settings, data, say), Plan.of(folder)
        self._most_rows = ROWS_BYTES // (4 * prod(data.x.shape[1:]))  # examples of a stack
        self._prepared: dict[Key, Prepared] = {}

    def train(self, jobs: Sequence[Job]) -> list[Trained | Exception]:
        """Each job's result in their order; they share instructions, but for the model."""
        found: dict[int, Trained | Exception] = {}
        groups: dict[str, list[int]] = {}
        for i, job in enumerate(jobs):
            groups.setdefault(job.instructions.model, []).append(i)
        for own in groups.values():
            found |= zip(own, self._train_alike([jobs[i] for i in own]), strict=True)
        return [found[i] for i in range(len(jobs))]

    def _train_alike(self, jobs: Sequence[Job]) -> list[Trained | Exception]:
        prepared = self._prepare(jobs[0])
        if prepared.way.stepper is None:
            return [attempt(job) for job in jobs]
        found: dict[int, Trained | Exception] = {}
        sizes = [len(job.examples) for job in jobs]
        order = in_order(sizes, prepared.recipe.settings)
        k = self._at_once(prepared, jobs[0], -(-sum(sizes) // len(sizes)))
        for chosen in _chunks(order, [sizes[i] for i in order], k, self._most_rows, prepared.least):
            found |= zip(chosen, self._train_stack(prepared, [jobs[i] for i in chosen]), strict=True)
        return [found[i] for i in range(len(jobs))]

    def _train_stack(self, prepared: Prepared, jobs: Sequence[Job]) -> list[Trained | Exception]:
        layout, settings = prepared.recipe.layout, prepared.recipe.settings
        flat = rows_of(len(jobs), layout.size, prepared.way.device)
        layout.fill(flat, [job.state for job in jobs])
        own = Examples(
            np.concatenate([job.examples.x for job in jobs]), np.concatenate([job.examples.y for job in jobs])
        )
        lengths = [len(job.examples) for job in jobs]
        pull = _pull(prepared.recipe, jobs).to(prepared.way.device)
        seeds = [job.seed for job in jobs]
        losses = self._train(prepared, flat, own, np.arange(len(own)), lengths, seeds, pull)
        if losses is None:
            return [attempt(job) for job in jobs]
        return [
            Trained(layout.arrays(row, job.state), loss, n, _steps(job, settings, prepared.least))
            for row, job, loss, n in zip(flat.cpu().numpy(), jobs, losses, lengths, strict=True)
        ]

    def at_once(self, job: Job) -> int:
        """How many clients like this one are worth batching together."""
        return self._at_once(self._prepare(job), job, len(job.examples))

    def _at_once(self, prepared: Prepared, job: Job, examples: int) -> int:
        if prepared.way.stepper is None or prepared.way.single:
            return 1
        if self._settings.clients_at_once:
            return self._settings.clients_at_once
        measured = self._plan.at_once(job.instructions)
        here = STACK_BYTES if prepared.way.device == CPU else GPU_STACK_BYTES
        models = here // (4 * prepared.recipe.layout.size)
        return max(1, min(measured or min(models, MOST_AT_ONCE), self._rows_for(examples)))

    def _rows_for(self, examples: int) -> int:
        """Clients whose data are not too much to be held beside one another."""
        return max(1, self._most_rows // examples)

    def _look_ahead(self, prepared: Prepared, job: Job, clients: Sequence[Client], ahead_s: float) -> None:
        """Measure, and start further processes, where so much is to come that it pays.

        Args:
            prepared: of the job.
            job: of the round that is over.
            clients: of that round, those with most steps first.
            ahead_s: seconds that this process would take alone for the rounds to come.
        """
        self.workers.consider(job, ahead_s)
        way = prepared.way
        if ahead_s < PAYS_S or self._settings.clients_at_once or way.stepper is None or way.single:
            return
        if self._plan.at_once(job.instructions, ever=True):
            return
        middle = clients[len(clients) // 2].indices
        most = min(MOST_AT_ONCE, len(clients), self._rows_for(len(middle)))
        some, recipe = replace(job, examples=self.data.take(middle)), prepared.recipe
        try:
            k = fastest(
                recipe.layout,
                recipe.settings,
                way.stepper,
                prepared.preprocess,
                some,
                most=most,
                device=way.device,
            )
        except Exception:  # noqa: BLE001 - a user's module may raise anything: this client fails in its rounds
            k = self._at_once(prepared, job, len(middle))
        self._plan.keep(job.instructions, k)

    def sum(self, job: Job, clients: Sequence[Client]) -> Sum:
        """The weighted mean of what these clients' jobs give.

        Args:
            job: what they have in common; its examples and seed are not used.
            clients: at least one.
        """
        prepared = self._prepare(job)
        layout = prepared.recipe.layout
        order = in_order([len(client.indices) for client in clients], prepared.recipe.settings)
        ordered = [clients[i] for i in order]
        mean = -(-sum(len(client.indices) for client in clients) // len(clients))
        at_once = self._at_once(prepared, job, mean)
        parts = cut(ordered, at_once=at_once, processes=self.workers.processes)
        total = Sums.zero(1, layout.size)
        began, processes = time.perf_counter(), self.workers.processes
        self.workers.run(job, parts, lambda part: self.sums(job, part, at_once), at_once, total.take)
        spent = (time.perf_counter() - began) * processes
        self._look_ahead(prepared, job, ordered, spent * (self._rounds - job.instructions.round))
        return _result(total, layout, job)

    def close(self) -> None:
        """End the worker processes, if any were started."""
        self.workers.close()

    def prove(self, job: Job) -> None:
        """Choose how clients of such a job are trained, and prove it, before there are any."""
        self._prepare(job)

    def sums(self, job: Job, part: Part, at_once: int) -> Sums:
        """The sums of a part's lanes, by this process.

        Args:
            job: as in `sum`.
            part: of a round's clients.
            at_once: clients that are batched together, at most.
        """
        prepared = self._prepare(job)
        layout = prepared.recipe.layout
        found = Sums.zero(part.lanes, layout.size)
        if prepared.way.stepper is None:
            self._add_one_by_one(job, part, range(len(part.clients)), layout, found)
        else:
            self._add_stacked(job, part, prepared, at_once, found)
        return found

    def _add_one_by_one(
        self, job: Job, part: Part, chosen: Sequence[int], layout: Layout, found: Sums
    ) -> None:
        for i in chosen:
            client = part.clients[i]
            done = attempt(replace(job, examples=self.data.take(client.indices), seed=client.seed))
            if isinstance(done, Exception):
                found.failed[client.node_id] = f"{type(done).__name__}: {done}"
                continue
            row = layout.flat(done.arrays, torch.float32)[None]
            found.add(row, [client], [part.lane_of[i]], [done.loss])

    def _add_stacked(self, job: Job, part: Part, prepared: Prepared, at_once: int, found: Sums) -> None:
        lengths = [len(client.indices) for client in part.clients]
        stacks = -(-len(lengths) // at_once)
        k = -(-len(lengths) // stacks)  # stacks of equal size rather than a small one at the end
        start = prepared.recipe.layout.flat(job.state, torch.float32)
        buffer = rows_of(k, len(start), prepared.way.device)
        longest = 0 if prepared.way.single or prepared.least > 1 else part.longest  # no stack is filled up
        for chosen in _chunks(range(len(lengths)), lengths, k, self._most_rows, prepared.least):
            own = [part.clients[i] for i in chosen]
            flat = buffer[: len(own)].copy_(start)
            indices = np.concatenate([client.indices for client in own])
            sizes = [lengths[i] for i in chosen]
            seeds = [client.seed for client in own]
            losses = self._train(prepared, flat, self.data, indices, sizes, seeds, longest=longest)
            if losses is None:
                self._add_one_by_one(job, part, chosen, prepared.recipe.layout, found)
            else:
                found.add(flat.cpu(), own, [part.lane_of[i] for i in chosen], losses)

    def _train(
        self,
        prepared: Prepared,
        flat: torch.Tensor,
        examples: Examples,
        indices: Indices,
        lengths: Sequence[int],
        seeds: Sequence[int],
        pull: Pull = NO_PULL,
        longest: int = 0,
    ) -> list[float] | None:
        """Train a stack in place; its losses, or None when one of its clients spoilt it for all."""
        assert prepared.way.stepper is not None  # noqa: S101 - the callers have asked
        try:
            with torch.no_grad(), limited(1):
                keys = draws.key(torch.tensor(seeds, dtype=torch.int64))
                own = prepared.inputs(examples, indices)
                altered = prepared.teacher if prepared.recipe.settings.augment else None
                data = Stacked(*own, torch.tensor(lengths), keys, longest, altered)
                return train(
                    prepared.way.stepper, flat, data, prepared.recipe.settings, prepared.least, pull
                ).tolist()
        except Exception:  # noqa: BLE001 - a user's module may raise anything; whose fault it was shows one by one
            return None

    def _prepare(self, job: Job) -> Prepared:
        key = key_of(job.instructions)
        found = self._prepared.get(key)
        if found is None:
            found = self._prepared[key] = Prepared.of(job, self.data, self._devices, self._say)
        found.follow(job.instructions)
        return found


def devices_of(settings: Simulation) -> tuple[torch.device, ...]:
    """Where clients may be trained: a GPU first, if there is one and it is wanted; the CPU last.

    Raises:
        ConfigError: a GPU was asked for, and torch finds none.
    """
    found = settings.device != "cpu" and torch.cuda.is_available()
    if settings.device == "cuda" and not found:
        raise ConfigError(
            "simulation.device = 'cuda': torch finds no GPU here; install a build of it with CUDA, or "
            "set 'auto'"
        )
    return (torch.device("cuda"), CPU) if found else (CPU,)


def _pull(recipe: Recipe, jobs: Sequence[Job]) -> Pull:
    """What is added to the gradients of these jobs' clients."""

    def stacked(entries: Sequence[NamedArrays | None]) -> torch.Tensor | None:
        if all(arrays is None for arrays in entries):
            return None
        found = rows_of(len(entries), recipe.layout.size)
        for row, arrays in zip(found, entries, strict=True):
            row.copy_(recipe.layout.scattered(arrays or {}))
        return found

    return Pull(stacked([job.anchor for job in jobs]), stacked([job.shift for job in jobs]))


def _result(total: Sums, layout: Layout, job: Job) -> Sum:
    examples, clients = int(total.examples[0]), int(total.clients[0])
    if not clients:
        return Sum({}, 0, 0.0, 0, total.failed)
    mean = total.values / examples
    arrays = {name: view[0].numpy() for name, view in layout.views(mean).items()}
    loss = float(total.losses[0]) / examples
    return Sum(cast_like(arrays, job.state), examples, loss, clients, total.failed)


def _steps(job: Job, settings: Train, least: int) -> int:
    if job.instructions.update == "gradient":
        return 0
    return len(local.batch_sizes(len(job.examples), settings.batch_size, least=least)) * settings.epochs


def _chunks(
    order: Sequence[int], lengths: Sequence[int], k: int, rows: int, least: int
) -> Iterator[list[int]]:
    """`order` cut into stacks of at most k clients and so many rows, but one client at least.

    Where batches depend on their size, of equal lengths only.
    """
    part: list[int] = []
    before = held = 0
    for i, n in zip(order, lengths, strict=True):
        if part and (len(part) == k or held + n > rows or (least > 1 and n != before)):
            yield part
            part, held = [], 0
        part.append(i)
        before, held = n, held + n
    if part:
        yield part
