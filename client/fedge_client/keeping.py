"""What a client keeps between rounds for its strategy: in `Context.state`, which never leaves the device.

- **own** (FedBN, FedPer): entries of the model that do not travel; at first those of the run's first model.
- **control** (SCAFFOLD): this client's control variate, with the one before it. The server may have counted
  the later one or not: it says from which round on it has not, and a round that is asked again was not.
- **personal** (Ditto): a whole model, which is pulled towards the global one while it trains.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord

from fedge.errors import FormatError
from fedge.learning import local, messages
from fedge.learning.local import Job, Trained, Trainer
from fedge.learning.messages import Instructions
from fedge.learning.state import NamedArrays, arrays_of
from fedge.learning.terms import CONTROL, accumulated
from fedge.task import Task
from fedge.wire.arrays import records_of

OWN: Final = "own"
PERSONAL: Final = "personal"
BEFORE: Final = "control-before"  # this client's control variate before its last training
KEPT: Final = "control-kept"  # the round of that training


def whole_state(
    task: Task, instructions: Instructions, context: Context, travelled: NamedArrays
) -> NamedArrays:
    """The model's state: what came in the message, and this client's own entries.

    Raises:
        FormatError: they do not make up the model.
    """
    own = instructions.terms.own
    if not own:
        return travelled
    model = local.first(task, instructions.model, instructions.spec, instructions.seed)
    everything: NamedArrays = arrays_of(model)
    kept = _arrays(context, OWN) or everything
    if set(own) | set(travelled) != set(everything) or not set(own) <= set(kept):
        raise FormatError("message: its arrays and the entries that stay on the device are not the model's")
    return {name: kept[name] if name in own else travelled[name] for name in everything}


def personal_state(instructions: Instructions, context: Context, state: NamedArrays) -> NamedArrays:
    """What this client answers with: its personal model, where it has one, else the state."""
    found = _arrays(context, PERSONAL) if instructions.terms.pull else None
    return state if found is None else found


def begun(job: Job, message: Message, context: Context) -> Job:
    """The job, with what this client's memory adds to its steps.

    Raises:
        FormatError: the server's control variate is absent.
    """
    if not job.instructions.terms.control:
        return job
    control = messages.from_record(messages.arrays_named(message.content, CONTROL))
    own = _control(job.instructions, context, control)
    return replace(job, shift={name: np.subtract(control[name], own[name]) for name in control})


def done(
    job: Job, trained: Trained, message: Message, context: Context, trainer: Trainer
) -> NamedArrays | None:
    """Remember what the strategy's terms ask for; what is sent besides the update, if anything.

    Args:
        job: as `begun` made it.
        trained: what it gave.
        message: that asked for it.
        context: of this client in this run.
        trainer: does a further job.
    """
    terms = job.instructions.terms
    if terms.own:
        _keep(context, OWN, {name: trained.arrays[name] for name in terms.own})
    if terms.pull:
        plain = replace(job.instructions, proximal_mu=terms.pull, guard=None)  # it is never sent
        start = personal_state(job.instructions, context, job.state)
        found = trainer(replace(job, instructions=plain, state=start, anchor=job.state))
        _keep(context, PERSONAL, found.arrays)
    return _new_control(job, trained, message, context) if terms.control else None


def _new_control(job: Job, trained: Trained, message: Message, context: Context) -> NamedArrays:
    """SCAFFOLD, option II: c_i+ = c_i - c + (x - y_i) / (K eta); its change is what is sent.

    With momentum K steps go as far as |a|_1 of them do without (`terms.accumulated`), so that the quotient
    is a mean of the gradients in either case.
    """
    instructions = job.instructions
    control = messages.from_record(messages.arrays_named(message.content, CONTROL))
    own = _control(instructions, context, control)
    way = accumulated(trained.steps, instructions.train) * instructions.train.learning_rate
    change = {
        name: np.subtract(np.subtract(job.state[name], trained.arrays[name]) / way, c).astype(c.dtype)
        for name, c in control.items()
    }
    _keep(context, BEFORE, own)
    _keep(context, CONTROL, {name: np.add(own[name], change[name]) for name in control})
    context.state[KEPT] = MetricRecord({"round": instructions.round})
    return change


def _control(instructions: Instructions, context: Context, like: NamedArrays) -> NamedArrays:
    """This client's control variate, as the server has counted it; 0 at first."""
    kept = records_of(context.state, MetricRecord).get(KEPT)
    void = min(instructions.round, instructions.round if instructions.void is None else instructions.void)
    counted = kept is None or int(kept["round"]) < void  # type: ignore[arg-type]  # written by `_new_control`
    found = _arrays(context, CONTROL if counted else BEFORE)
    if found is None:
        return {name: np.zeros_like(value) for name, value in like.items()}
    if set(found) != set(like):
        raise FormatError(
            "message: the control variate is not of the model that this client has kept one for"
        )
    return found


def _arrays(context: Context, name: str) -> NamedArrays | None:
    record = records_of(context.state, ArrayRecord).get(name)
    return None if record is None else messages.from_record(record)


def _keep(context: Context, name: str, arrays: NamedArrays) -> None:
    context.state.pop(name, None)  # Flower warns where a record of another class is replaced
    context.state[name] = messages.to_record(arrays)
