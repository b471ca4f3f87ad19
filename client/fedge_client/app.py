"""The Flower ClientApp: answers moments, train and evaluate with data that stays where it is.

The same app runs in every world; only where its task and examples come from differs, so that is its one
argument.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedge.codecs.layout import Layout
from fedge.dataset import Dataset, Examples
from fedge.errors import ConfigError, DataError, FormatError
from fedge.holdout import kept_back, places
from fedge.learning import draws, local, replies
from fedge.learning.guard import guarded, noised_share, reference
from fedge.learning.local import Job, Trained, Trainer
from fedge.learning.messages import Instructions
from fedge.learning.metrics import evaluate as evaluate_metrics
from fedge.learning.state import NamedArrays
from fedge.noise import KEY_BYTES
from fedge.secagg.encoding import encode_whole, flat
from fedge.secagg.protocol import Signer
from fedge.statistics import Moments
from fedge.task import Source, Task, resolve
from fedge.task_digest import task_digest
from fedge_client import coding, keeping, masking, receiving
from fedge_client.memory.training import with_memory
from fedge_client.surveying import answer_surveys
from fedge_client.teaching import taught_by

Share = Callable[[Context, Instructions], tuple[Task, Examples]]
"""The task that this client offers and its own examples for it; raises ConfigError when it offers none of
that name, and DataError when there are no usable examples. What a server says is compared, never imported."""

Secret = Callable[[Instructions, int], bytes]
"""The key of a client's noise in a round, for the client of this node id."""

_SUBSET = 2  # stream of a client's key; `fedge.learning.local` has 0 and 1
NodeConfig = Mapping[str, bool | float | int | str]


def own_share(context: Context, instructions: Instructions) -> tuple[Task, Examples]:
    """What a device's own settings name: the task that it offers, and the file or folder with its examples.

    The node's settings hold `task` (what to load), `task-name` (how servers call it; the same when absent),
    `digest` (it must have that), `data`, `data-label`, `data-size` ("HEIGHTxWIDTH") and `memory` (a folder of
    examples that were kept here). The server names a task and its digest, and never code or a path.

    Raises:
        ConfigError: this device does not offer the task, or means something else by it.
        DataError: its data cannot be used, or does not fit the run.
    """
    node = context.node_config
    loaded = str(node.get("task"))
    offered = str(node.get("task-name", loaded))
    if offered != instructions.task:
        raise ConfigError(f"task {instructions.task!r} is not offered here; this device offers {offered!r}")
    task, digest = _own_task(loaded)
    for who, wanted in (("the server's", instructions.task_digest), ("its pin", str(node.get("digest", "")))):
        if wanted and wanted != digest:
            raise ConfigError(
                f"task {offered!r}: this device's has the digest {digest}, {who} is {wanted}; "
                "bring both to the same code"
            )
    labels = instructions.spec.labels
    dataset = _read(loaded, _source(node, labels))
    if dataset.spec.shape != instructions.spec.shape or dataset.spec.dtype != instructions.spec.dtype:
        raise DataError(
            f"data: examples are {dataset.spec.dtype} {dataset.spec.shape}, "
            f"but the run takes {instructions.spec.dtype} {instructions.spec.shape}"
        )
    examples = dataset.with_labels(labels).used_examples
    if "memory" in node:
        examples = with_memory(examples, Path(str(node["memory"])), instructions.spec)
    return task, examples


@lru_cache(maxsize=8)
def _own_task(name: str) -> tuple[Task, str]:
    """The task and the digest that its source had when it was loaded."""
    digest = task_digest(name)
    return resolve(name), digest


def _source(node: NodeConfig, labels: tuple[str, ...]) -> Source:
    path, size = node.get("data"), node.get("data-size")
    made = Source(Path(str(path)) if path is not None else None, labels=labels)
    if "data-label" in node:
        made = replace(made, label=str(node["data-label"]))
    if size is not None:
        height, _, width = str(size).partition("x")
        if not (height.isdecimal() and width.isdecimal()):
            raise ConfigError(f"data-size = {size!r}: must be HEIGHTxWIDTH, such as 28x28")
        made = replace(made, size=(int(height), int(width)))
    return made


def _read(task: str, source: Source) -> Dataset:
    """The data set, from memory when its files have not changed since the last message."""
    return _read_once(task, source, _state_of(source.path))


@lru_cache(maxsize=2)
def _read_once(task: str, source: Source, state: tuple[int, ...]) -> Dataset:
    return _own_task(task)[0].read(source)


def _state_of(path: Path | None) -> tuple[int, ...]:
    """What changes when the files at a path do: their number, bytes, and the time of the last change."""
    if path is None:
        return ()
    try:
        found = [path, *path.rglob("*")] if path.is_dir() else [path]
        states = [file.stat() for file in found]
    except OSError:
        return ()  # the task's reader says what is wrong
    return len(states), sum(state.st_size for state in states), max(state.st_mtime_ns for state in states)


def fresh_secret(instructions: Instructions, node_id: int) -> bytes:
    """A key that the operating system draws, so that neither the server nor the seed knows any noise."""
    return os.urandom(KEY_BYTES)


def build(
    share: Share,
    trainer: Trainer = local.fit,
    secret: Secret = fresh_secret,
    signer: Callable[[], Signer | None] = lambda: None,
) -> ClientApp:
    """A ClientApp whose task and examples come from `share`, and whose jobs `trainer` does.

    Args:
        share: what this client offers.
        trainer: does its jobs.
        secret: keys of its noise and its masks.
        signer: the device's identity, where it has one; then it answers only with others that have theirs.
    """
    client = ClientApp()

    @client.query("ping")
    def ping(message: Message, context: Context) -> Message:
        return replies.ping_reply(message)

    @client.query("moments")
    def moments(message: Message, context: Context) -> Message:
        instructions = Instructions.of(message)
        _, examples = trained_on(share(context, instructions), instructions)
        return replies.moments_reply(message, Moments.of(examples.x, instructions.spec), len(examples))

    answer_surveys(client, share)
    masking.answer_queries(
        client, lambda message, context: secret(Instructions.of(message), context.node_id), signer
    )

    @client.train()
    def train(message: Message, context: Context) -> Message:
        return _trained(message, context, share, trainer, secret)

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _evaluated(message, context, share)

    return client


def _trained(message: Message, context: Context, share: Share, trainer: Trainer, secret: Secret) -> Message:
    """The reply to `train`."""
    instructions = Instructions.of(message)
    if instructions.codec is not None and (sent := coding.answered(message, context, instructions)):
        return receiving.holding(sent, context, instructions)
    task, examples = trained_on(share(context, instructions), instructions)
    some = _some(examples, instructions, context.node_id)
    instructions = replace(instructions, most_examples=None)  # those of all clients are alike again
    job = keeping.begun(_job(message, context, instructions, task, some), message, context)
    if instructions.guard is not None:
        if instructions.guard.kind == "distributed" and not masking.is_asked_for(message):
            raise FormatError("guard distributed: a share of the noise hides nothing without masks")
        job = replace(job, secret=secret(instructions, context.node_id))
    done = trainer(job)
    control = keeping.done(job, done, message, context, trainer)
    return receiving.holding(_answer(message, context, job, done, control), context, instructions)


def _evaluated(message: Message, context: Context, share: Share) -> Message:
    """The reply to `evaluate`."""
    instructions = Instructions.of(message)
    own = evaluated_on(share(context, instructions), instructions)
    job = _job(message, context, instructions, *own)
    personal = keeping.personal_state(instructions, context, job.state)
    model, x, y = local.prepared(replace(job, state=personal))
    found = evaluate_metrics(local.logits(model, x).softmax(1).numpy(), y.numpy(), ("accuracy",))
    loss, accuracy = found["loss"], found["accuracy"]
    assert isinstance(loss, float)  # noqa: S101 - narrows the union for the type checker
    assert isinstance(accuracy, float)  # noqa: S101 - likewise
    return replies.evaluate_reply(
        message, examples=len(y), loss=loss, accuracy=accuracy, held_out=instructions.holdout > 0
    )


def trained_on(own: tuple[Task, Examples], instructions: Instructions) -> tuple[Task, Examples]:
    """The task and what is left of a client's examples to train on, and to take moments of."""
    return _divided(own, instructions, back=False) if instructions.holdout else own


def _some(examples: Examples, instructions: Instructions, node_id: int) -> Examples:
    """As many as the client is to train on in this round, drawn from all; each round has others."""
    most = instructions.most_examples
    if most is None or most >= len(examples):
        return examples
    seed = client_seed(instructions.seed, instructions.round, node_id)
    order = draws.permutation(draws.derive(draws.key(seed), _SUBSET), len(examples))
    return examples.take(order[:most].sort().values.numpy())


def evaluated_on(own: tuple[Task, Examples], instructions: Instructions) -> tuple[Task, Examples]:
    """The task and what a client evaluates on: what it keeps back, or else all that it trains with.

    Raises:
        DataError: it has so few examples that it keeps none back.
    """
    if not instructions.holdout:
        return own
    task, examples = _divided(own, instructions, back=True)
    if not len(examples):
        raise DataError(f"data: none of {len(own[1])} examples is kept back (evaluate.client_holdout)")
    return task, examples


def _divided(own: tuple[Task, Examples], instructions: Instructions, *, back: bool) -> tuple[Task, Examples]:
    task, examples = own
    held = kept_back(places(examples.x, instructions.seed), instructions.holdout)
    return task, examples.take(np.flatnonzero(held == back))


def _answer(
    message: Message, context: Context, job: Job, done: Trained, control: NamedArrays | None
) -> Message:
    """What leaves the device: protected as its guard says, then under masks or in a codec where asked for."""
    guard, terms = job.instructions.guard, job.instructions.terms
    done = replace(done, arrays=terms.shared(done.arrays))
    loss = done.loss if guard is None else 0.0
    if guard is not None and guard.kind == "distributed":
        origin = _origin(job)
        share = noised_share(done.arrays, origin, guard, job.secret, least=guard.least, step=guard.share_step)
        return masking.answer_masked(message, context, lambda _: encode_whole(share[name] for name in origin))
    if masking.is_asked_for(message):
        change = flat(done.arrays, _origin(job))
        return masking.answer_masked(message, context, lambda to: to.encode(change, done.examples, loss))
    arrays, examples = done.arrays, done.examples
    if guard is not None and guard.kind == "local":
        arrays, examples = guarded(done.arrays, _origin(job), guard, job.secret), 1
    said: replies.Said = {"examples": examples, "loss": loss, "guarded": guard is not None}
    if terms.steps:
        said["steps"] = done.steps
    if job.instructions.codec is not None:
        return coding.answer(message, context, _layout(job), arrays, **said)
    return replies.train_reply(message, arrays, control=control, **said)


def _origin(job: Job) -> Mapping[str, npt.NDArray[np.generic]]:
    """What the update's change is measured from."""
    state = job.instructions.terms.shared(job.state)
    return reference(state, local.gradients_of(_blank(job), job.instructions.update))


def _layout(job: Job) -> Layout:
    """What of the update a codec works on."""
    return Layout.of(_origin(job), local.parameters_of(_blank(job)))


def _blank(job: Job) -> torch.nn.Module:
    return local.blank(job.task, job.instructions.model, job.instructions.spec)


def client_seed(run_seed: int, server_round: int, node_id: int) -> int:
    """A seed for one client in one round, independent of who else takes part and in which order."""
    return draws.plain_key(run_seed, server_round, node_id) & (2**63 - 1)


def client_seeds(run_seed: int, server_round: int, node_ids: Sequence[int]) -> list[int]:
    """The same for many clients, at once."""
    keys = draws.key(run_seed, server_round, torch.tensor(node_ids, dtype=torch.int64)) & (2**63 - 1)
    return [int(key) for key in keys.tolist()]


def _job(
    message: Message, context: Context, instructions: Instructions, task: Task, examples: Examples
) -> Job:
    model = local.blank(task, instructions.model, instructions.spec)
    travelled = {
        **receiving.travelled(message, context, instructions, model),
        **receiving.frozen(message, context, instructions),
    }
    state = keeping.whole_state(task, instructions, context, travelled)
    seed = client_seed(instructions.seed, instructions.round, context.node_id)
    teacher = taught_by(message, context, instructions.terms)
    return Job(task, instructions, state, examples, seed, teacher=teacher)


app = build(own_share)
