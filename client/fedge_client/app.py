"""The Flower ClientApp: answers moments, train and evaluate with data that stays where it is.

The same app runs in every world; only where its examples come from differs, so that is its one argument.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from torch import nn

from fedge.dataset import Examples
from fedge.errors import ConfigError, DataError
from fedge.learning import local, messages
from fedge.learning.messages import Instructions
from fedge.learning.metrics import evaluate as evaluate_metrics
from fedge.learning.state import arrays_of, load_arrays
from fedge.spec import Spec
from fedge.statistics import Moments
from fedge.task import Source, Task, resolve

ExamplesOf = Callable[[Context, Instructions, Task], Examples]
"""The examples of the client that this context belongs to; raises DataError when there are none."""

ClientCall = Callable[[Message, Context], Message]


def own_examples(context: Context, instructions: Instructions, task: Task) -> Examples:
    """A device's examples: the file or folder that the device's own settings name for this task.

    The node's settings hold `task` and `data`; the server names a task and never a path.

    Raises:
        ConfigError: this device does not offer the task.
        DataError: its data cannot be used, or does not fit the run.
    """
    offered, path = context.node_config.get("task"), context.node_config.get("data")
    if offered != instructions.task:
        raise ConfigError(f"task {instructions.task!r} is not offered here; this device offers {offered!r}")
    labels = instructions.spec.labels
    dataset = task.read(Source(Path(str(path)) if path is not None else None, labels=labels))
    if dataset.spec.shape != instructions.spec.shape or dataset.spec.dtype != instructions.spec.dtype:
        raise DataError(
            f"data: examples are {dataset.spec.dtype} {dataset.spec.shape}, "
            f"but the run takes {instructions.spec.dtype} {instructions.spec.shape}"
        )
    return dataset.with_labels(labels).examples


def build(examples_of: ExamplesOf) -> ClientApp:
    """A ClientApp whose examples come from `examples_of`."""
    client = ClientApp()

    @client.query("moments")
    def moments(message: Message, context: Context) -> Message:
        instructions = Instructions.of(message)
        examples = examples_of(context, instructions, resolve(instructions.task))
        return messages.moments_reply(message, Moments.of(examples.x, instructions.spec), len(examples))

    @client.train(mods=[_clip_when_asked])
    def train(message: Message, context: Context) -> Message:
        instructions = Instructions.of(message)
        task = resolve(instructions.task)
        model, x, y = _prepare(message, instructions, task, examples_of(context, instructions, task))
        seed = client_seed(instructions.seed, instructions.round, context.node_id)
        if instructions.update == "gradient":
            gradients, result = local.gradient(model, x, y, instructions.train, seed=seed)
            arrays = {**arrays_of(model), **{name: value.numpy() for name, value in gradients.items()}}
        else:
            mu = instructions.proximal_mu
            result = local.train(model, x, y, instructions.train, seed=seed, proximal_mu=mu)
            arrays = arrays_of(model)
        return messages.train_reply(message, arrays, examples=result.examples, loss=result.loss)

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        instructions = Instructions.of(message)
        task = resolve(instructions.task)
        model, x, y = _prepare(message, instructions, task, examples_of(context, instructions, task))
        found = evaluate_metrics(local.logits(model, x).softmax(1).numpy(), y.numpy(), ("accuracy",))
        loss, accuracy = found["loss"], found["accuracy"]
        assert isinstance(loss, float)  # noqa: S101 - narrows the union for the type checker
        assert isinstance(accuracy, float)  # noqa: S101 - likewise
        return messages.evaluate_reply(message, examples=len(y), loss=loss, accuracy=accuracy)

    return client


def client_seed(run_seed: int, server_round: int, node_id: int) -> int:
    """A seed for one client in one round, independent of who else takes part and in which order."""
    sequence = np.random.SeedSequence([run_seed, server_round, node_id])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def _clip_when_asked(message: Message, context: Context, call_next: ClientCall) -> Message:
    """Flower's client-side clipping mods, switched on by the keys their server-side halves send."""
    config = message.content.config_records.get(messages.CONFIG, ConfigRecord())
    if "clipping_norm" not in config:
        return call_next(message, context)
    mod = adaptiveclipping_mod if config.get("clipping") == "adaptive" else fixedclipping_mod
    return mod(message, context, call_next)


def _prepare(
    message: Message, instructions: Instructions, task: Task, examples: Examples
) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The global model with its weights loaded, and this client's pre-processed data."""
    model = _blank(task, instructions.model, instructions.spec)
    load_arrays(model, messages.from_record(message.content.array_records[messages.ARRAYS]))
    preprocess = task.preprocess(instructions.spec, instructions.moments, instructions.noise_filter)
    with torch.no_grad():
        x = preprocess(torch.from_numpy(np.ascontiguousarray(examples.x)))
    return model, x, torch.from_numpy(examples.y)


@lru_cache(maxsize=4)
def _cached_blank(build_model: Callable[[Spec], nn.Module], spec: Spec) -> nn.Module:
    return build_model(spec)


def _blank(task: Task, name: str, spec: Spec) -> nn.Module:
    """A model whose weights are about to be overwritten, so that one instance serves all rounds."""
    return _cached_blank(task.model(name), spec)


app = build(own_examples)
