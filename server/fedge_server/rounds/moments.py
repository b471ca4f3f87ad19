"""Moments of all clients' data for the standardisation: asked for once, kept with every round's model."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedge.config import Config
from fedge.errors import FormatError, RoundError
from fedge.learning import messages
from fedge.learning.messages import Instructions, NamedArrays
from fedge.learning.replies import moments_of
from fedge.statistics import Moments
from fedge_server.rounds.grids import Summing, nodes_of
from fedge_server.rounds.sampling import MANY, draw

_MOMENTS = "moments."


def federated_moments(grid: Grid, ask: Instructions, config: Config) -> Moments:
    """Moments of all clients' data together, from sums that each client computes alone.

    Of more than 1,000 clients a sample of 1,000 is asked, which the seed decides.

    Raises:
        RoundError: no client sent usable moments.
    """
    content = RecordDict({messages.CONFIG: ask.to_config()})
    nodes = sorted(draw(grid, nodes_of(grid), MANY, seed=config.seed, number=0, purpose="moments"))
    replies: Iterable[Message]
    if isinstance(grid, Summing) and grid.can_sum:
        asked = Message(content, nodes[0], messages.QUERY_MOMENTS)
        replies = grid.sum_moments(asked, nodes, timeout=config.rounds.deadline_s)
    else:
        sent = [Message(content, node, messages.QUERY_MOMENTS) for node in nodes]
        replies = grid.send_and_receive(sent, timeout=config.rounds.deadline_s)
    parts, faults, waiting = [], [], set(nodes)
    for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
        if reply.metadata.src_node_id not in waiting:
            continue  # not asked, or answered before
        waiting.discard(reply.metadata.src_node_id)
        if reply.has_error():
            faults.append(reply.error.reason or "unknown error")
            continue
        try:
            parts.append(moments_of(reply, ask.spec))
        except FormatError as error:
            faults.append(str(error))
    if not parts:
        reason = faults[0].strip().splitlines()[-1] if faults else "nobody answered"
        raise RoundError(f"moments: none of {len(nodes)} clients sent any ({reason})")
    return Moments.sum(parts)


def moments_arrays(moments: Moments | None) -> NamedArrays:
    """Moments as they stand beside a model's weights."""
    if moments is None:
        return {}
    return {f"{_MOMENTS}{name}": getattr(moments, name) for name in ("count", "total", "squares")}


def is_moment(name: str) -> bool:
    """Whether an array of a model's file is one of `moments_arrays`."""
    return name.startswith(_MOMENTS)


def kept_moments(arrays: NamedArrays) -> Moments | None:
    """The federated moments that a committed model's file carries, if it was standardised."""
    if f"{_MOMENTS}count" not in arrays:
        return None
    names = ("count", "total", "squares")
    return Moments(*(arrays[f"{_MOMENTS}{name}"].astype(np.float64) for name in names))
