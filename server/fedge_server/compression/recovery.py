"""Prune and recover, at once or in steps (Zhu and Gupta 2017).

"To prune, or not to prune: exploring the efficacy of pruning for model compression", arXiv:1710.01878: the
share s that is pruned after step t of n grows as

    s_t = s_n (1 - (1 - t / n)^3),

fast while there is much to spare and slowly in the end, and the network learns between the steps. It
recovers by distillation from the unpruned network. Half of the epochs lie between the steps, the rest after
the last, so that schedules of any number of steps cost the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from fedge.config import Compress, Distil, Prune, PruneKind
from fedge.learning import draws
from fedge_server.compression.distil import Tell, distil
from fedge_server.compression.prune import Channels, Pruned
from fedge_server.compression.sparsify import sparsify


@dataclass(frozen=True, slots=True)
class Cut:
    """How much of what is removed."""

    kind: PruneKind
    share: float  # structured: of the channels of each layer; unstructured: of all weights


def pruned_and_recovered(
    network: nn.Module,
    x: Tensor,
    y: Tensor | None,
    cut: Cut,
    settings: Compress,
    *,
    seed: int,
    tell: Tell | None = None,
    deadline: float | None = None,
) -> Pruned:
    """A pruned copy of the network that has learned to answer as it does; the network is not changed.

    Args:
        network: pre-processed inputs to logits.
        x: pre-processed inputs (N, ...), which it learns from.
        y: true classes (N,); None where mode "soft" needs none.
        cut: what goes in the end.
        settings: criterion and schedule; and of `distil` everything but epochs and learning rate.
        seed: decides everything random.
        tell: told of each epoch, counted over all steps.
        deadline: as for `distil`.

    Raises:
        CompressionError: it cannot be pruned so, or could not learn.
        TimeUpError: the deadline has passed.
    """
    shares = schedule(cut.share, settings.prune)
    epochs = epochs_of(settings.prune.recovery_epochs, len(shares))
    learning = _learning(settings)
    channels = Channels(network, x[:2], shares, settings.prune) if cut.kind == "structured" else None
    current = Pruned(network, 0, 0, 0.0)
    for step, share in enumerate(shares):
        own = draws.plain_key(seed, step) & (2**63 - 1)
        if channels is None:
            current = sparsify(current.network, share, settings.prune, seed=own)
        else:
            channels.remove(own)
            last = step == len(shares) - 1  # the first may be too small to remove anything
            current = channels.pruned() if last else replace(current, network=channels.network)
        recovered = distil(
            network,
            current.network,
            x,
            y,
            replace(learning, epochs=epochs[step]),
            seed=own,
            keep_zeros=channels is None,
            tell=_counted(tell, sum(epochs[:step]), sum(epochs)),
            deadline=deadline,
        )
        current = replace(current, network=recovered)
        if channels is not None:
            channels.learned(recovered)
    return current


def schedule(share: float, settings: Prune) -> tuple[float, ...]:
    """What is gone after each step; one step where the schedule is "one_shot"."""
    steps = settings.steps if settings.schedule == "gradual" else 1
    return tuple(share * (1 - (1 - step / steps) ** 3) for step in range(1, steps + 1))


def epochs_of(total: int, steps: int) -> tuple[int, ...]:
    """Epochs after each step: half of all between the steps, the rest after the last, at least one each."""
    if steps == 1:
        return (total,)
    between = max(total // 2 // (steps - 1), 1)
    return (*[between] * (steps - 1), max(total - between * (steps - 1), 1))


def _learning(settings: Compress) -> Distil:
    return replace(settings.distil, learning_rate=settings.prune.recovery_learning_rate)


def _counted(tell: Tell | None, before: int, total: int) -> Tell | None:
    if tell is None:
        return None
    return lambda epoch, _epochs, loss: tell(before + epoch, total, loss)
