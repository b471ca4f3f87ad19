"""What a client tells of its own examples once a model is trained: ranges of activations, and counts.

Neither an example nor an answer to one leaves it. Ranges come from what it trains on, counts from what it
keeps back, and of that the part that is asked about. Onnxruntime is loaded when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedge.counts import Counts, Truths, rightly
from fedge.dataset import Examples
from fedge.errors import ConfigError, DataError
from fedge.holdout import judged_on, kept_back, places
from fedge.learning import draws, local
from fedge.learning.messages import Instructions
from fedge.learning.surveys import (
    GRAPH,
    LEAST,
    MAX_CALIBRATED,
    VARIANT,
    Survey,
    counts_reply,
    ranges_reply,
    sent_bytes,
)
from fedge.ranges import observe
from fedge.task import Task
from fedge_client.teaching import taught_by

Own = Callable[[Context, Instructions], tuple[Task, Examples]]
"""The task and all of a client's examples, as for `fedge_client.app.Share`."""


def answer_surveys(client: ClientApp, share: Own) -> None:
    """Let an app answer both.

    Args:
        client: the app.
        share: what this client offers.
    """

    @client.query("ranges")
    def ranges(message: Message, context: Context) -> Message:
        return answer_ranges(message, context, share)

    @client.query("counts")
    def counts(message: Message, context: Context) -> Message:
        return answer_counts(message, context, share)


def answer_ranges(message: Message, context: Context, share: Own) -> Message:
    """Between which values the outputs of the graph lie, on what this client trains on.

    Raises:
        DataError: there are too few examples to tell.
        FormatError: the message or the graph is none.
    """
    instructions, survey = Instructions.of(message), Survey.of(message)
    _, examples = share(context, instructions)
    if instructions.holdout:
        held = kept_back(places(examples.x, instructions.seed), instructions.holdout)
        examples = examples.take(np.flatnonzero(~held))
    _check(len(examples), survey, "train on")
    order = draws.permutation(draws.key(instructions.seed), len(examples)).numpy()
    some = examples.take(np.sort(order[: min(survey.most, MAX_CALIBRATED)]))
    return ranges_reply(message, observe(sent_bytes(message, GRAPH), some.x).coarse())


def answer_counts(message: Message, context: Context, share: Own) -> Message:
    """What the teacher and the variant get right of the examples that are kept back for this.

    Raises:
        ConfigError: onnxruntime is not installed.
        DataError: there are too few examples to tell.
        FormatError: the message or the variant is none.
    """
    instructions, survey = Instructions.of(message), Survey.of(message)
    task, examples = share(context, instructions)
    own = judging(examples, instructions, survey)
    _check(len(own), survey, f"keep back for {survey.part}")
    right, unusable = _variant_right(message, own, instructions, survey)
    teacher_right = _teacher_right(message, context, own, instructions, task)
    counts = Counts.of(right, teacher_right, own.y, instructions.spec.classes)
    return counts_reply(message, counts, unusable)


def judging(examples: Examples, instructions: Instructions, survey: Survey) -> Examples:
    """The examples of the part that is asked about; of too many those that stand first."""
    where = places(examples.x, instructions.seed)
    found = np.flatnonzero(judged_on(where, instructions.holdout, survey.part, survey.selection))
    first = found[np.argsort(where[found], kind="stable")[: survey.most]]
    return examples.take(np.sort(first))


def _check(examples: int, survey: Survey, what: str) -> None:
    least = max(survey.least, LEAST)
    if examples < least:
        raise DataError(f"data: {examples} examples to {what} are fewer than the {least} of which to tell")


def _variant_right(
    message: Message, own: Examples, instructions: Instructions, survey: Survey
) -> tuple[Truths, int]:
    """By the bytes that ship, unpacked and run one by one as on a device that has installed them."""
    from fedge.artefact import unpack

    try:
        from fedge.inference import CompactModel
    except ImportError as error:
        raise ConfigError('onnxruntime is not installed here; pip install "fedge[device]"') from error
    installed = unpack(sent_bytes(message, VARIANT), survey.installed_bytes)
    answers = CompactModel(installed, instructions.spec).run_each(own.x)
    return rightly(answers, own.y), int((~np.isfinite(answers).all(axis=1)).sum())


def _teacher_right(
    message: Message, context: Context, own: Examples, instructions: Instructions, task: Task
) -> Truths:
    arrays = taught_by(message, context, instructions.terms)
    job = local.Job(task, instructions, {}, own, 0, teacher=arrays)
    teacher = local.teacher_of(job)
    if teacher is None:
        raise DataError("message: names no teacher to hold the variant against")
    preprocess = task.preprocess(instructions.spec, instructions.moments, instructions.noise_filter)
    with torch.no_grad():
        x = preprocess(torch.from_numpy(np.ascontiguousarray(own.x)))
    return rightly(local.logits(teacher, x).numpy(), own.y)
