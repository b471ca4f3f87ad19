"""Many clients' answers as one: what the Grid does where nobody needs to see single ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flwr.app import Error, Message, MetricRecord
from flwr.common.constant import ErrorCode

from fedge.dataset import Examples, Indices
from fedge.holdout import Places, kept_back
from fedge.learning import local, messages, replies
from fedge.learning.local import Job
from fedge.learning.messages import CLIENTS, METRICS, Instructions
from fedge.statistics import Moments
from fedge.task import Task
from fedge.wire.arrays import records_of
from fedge_client.app import client_seeds
from fedge_simulations.course import Course
from fedge_simulations.population import Population
from fedge_simulations.trainers import Client, Trainers


@dataclass(frozen=True, slots=True)
class Holders:
    """Who holds what: nodes count from 1, clients of the population from 0."""

    task: Task
    examples: Examples  # the whole data set
    population: Population
    course: Course  # may say that a client does not hold all of it yet
    held_out: Places | None = None  # of the examples, where clients keep some back from training
    holdout: float = 0.0  # share of them

    def size(self, node_id: int) -> int:
        """How many examples a node ever holds."""
        return self.population.size(node_id - 1)

    def indices(self, node_id: int, number: int, clock_s: float) -> Indices:
        """Positions of the examples that a node holds in a round."""
        own = self.population[node_id - 1]
        return self.course.examples(node_id, own, round=number, clock_s=clock_s)

    def trained_on(self, node_id: int, number: int, clock_s: float) -> Indices:
        """Those of them that the node does not keep back, as its app leaves them out too."""
        own = self.indices(node_id, number, clock_s)
        if self.held_out is None:
            return own
        found: Indices = own[~kept_back(self.held_out[own], self.holdout)]
        return found


def sum_of(
    message: Message,
    node_ids: Sequence[int],
    holders: Holders,
    trainers: Trainers,
    number: int,
    clock_s: float,
) -> Iterator[Message]:
    """The sum of these nodes' updates, if any is in it, and an error for each that is not.

    Args:
        message: what each of them was sent.
        node_ids: one at least.
        holders: what they hold.
        trainers: does their jobs.
        number: of the round.
        clock_s: simulated seconds of the run when the message was sent.
    """
    instructions = Instructions.of(message)
    shared = messages.from_record(messages.arrays_named(message.content, messages.ARRAYS))
    state = {**shared, **messages.frozen_of(message, instructions.terms)}
    seeds = client_seeds(instructions.seed, instructions.round, node_ids)
    clients = [
        Client(node_id, holders.trained_on(node_id, number, clock_s), seed)
        for node_id, seed in zip(node_ids, seeds, strict=True)
    ]
    teacher = messages.teacher_of(message, instructions.terms)
    job = Job(holders.task, instructions, state, holders.examples, 0, teacher=teacher)
    groups = _by_steps(clients, job) if instructions.terms.steps else [(None, clients)]
    for steps, group in groups:
        found = trainers.sum(job, group)
        for node_id, reason in found.failed.items():
            yield failure(message, node_id, reason)
        if found.clients:
            yield replies.sum_reply(
                message,
                instructions.terms.shared(found.mean),
                examples=found.examples,
                loss=found.loss,
                clients=found.clients,
                steps=steps,
            )


def _by_steps(clients: Sequence[Client], job: Job) -> list[tuple[int | None, list[Client]]]:
    """Clients that make equally many steps: what weighs by steps (FedNova) is linear within a group."""
    instructions, train = job.instructions, job.instructions.train
    least = local.least_batch(local.blank(job.task, instructions.model, instructions.spec))
    groups: dict[int | None, list[Client]] = {}
    for client in clients:
        steps = train.epochs * len(local.batch_sizes(len(client.indices), train.batch_size, least=least))
        groups.setdefault(steps, []).append(client)
    return sorted(groups.items(), key=lambda item: item[0] or 0)


def sum_of_moments(
    message: Message, node_ids: Sequence[int], holders: Holders, number: int, clock_s: float
) -> Message:
    """The moments of these nodes' data together; one node's examples are in memory at a time."""
    spec, parts, total = Instructions.of(message).spec, [], 0
    for node_id in node_ids:
        own = holders.examples.take(holders.trained_on(node_id, number, clock_s))
        parts.append(Moments.of(own.x, spec))
        total += len(own)
    return replies.moments_reply(message, Moments.sum(parts), total)


def failure(message: Message, node_id: int, reason: str) -> Message:
    """The error reply of one of the nodes that the message was sent to."""
    own = Message(message.content, node_id, message.metadata.message_type)
    return Message(Error(ErrorCode.UNKNOWN, reason), reply_to=own)


def clients_in(reply: Message) -> int:
    """How many clients' updates a partial sum holds."""
    return int(records_of(reply.content, MetricRecord)[METRICS][CLIENTS])  # type: ignore[arg-type]  # a number
