"""A run in one JSON object, the same whoever ran it: `summary.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fedge import tensors
from fedge.config import Config
from fedge.learning.models import parameters
from fedge.learning.state import names_of
from fedge_server.compression import TierOutcome
from fedge_server.privacy.report import PrivacyReport
from fedge_server.rounds.loop import Learned
from fedge_server.rounds.stopping import reached_target_at


def summarise(
    config: Config,
    learned: Learned,
    outcomes: Sequence[TierOutcome],
    *,
    travels: Callable[[int], int],
    clients: int,
    seconds: float,
    privacy: PrivacyReport,
    intervals: dict[str, Any],
    further: dict[str, Any],
) -> dict[str, Any]:
    """What `summary.json` holds; absent parts are left out.

    Args:
        config: of the run.
        learned: its rounds and global model.
        outcomes: one per tier.
        travels: how many bytes a variant of so many takes on the network.
        clients: how many there were.
        seconds: wall time of the whole run.
        privacy: who could see what.
        intervals: of the global model's metrics, as `evaluation.intervals.stated` gives them.
        further: parts that only some worlds have, such as devices.
    """
    last = learned.records[-1]
    scalars = {key: value for key, value in last.metrics.items() if isinstance(value, float)}
    busy = sum(record.seconds for record in learned.records)
    summary = {
        "task": config.task,
        "seed": config.seed,
        "rounds": last.round,
        "stopped": learned.reason,
        "origin": dict(learned.origin),
        "reached_target_at": reached_target_at(learned.records, config.rounds),
        "clients": clients,
        "clients_per_second": round(sum(r.clients for r in learned.records) / busy, 1) if busy else None,
        "simulated_s": last.simulated_s,
        "bytes_up": sum(record.bytes_up for record in learned.records),
        "bytes_down": sum(record.bytes_down for record in learned.records),
        "global_model": {
            **scalars,
            **({"intervals": intervals} if intervals else {}),
            "parameters": parameters(learned.model.network),
            "bytes": fp32_bytes(learned.model.network),
            "sha256": learned.model_sha256,
        },
        "on_clients": dict(last.client_metrics),
        "privacy": privacy.to_json(),
        **further,
        "variants": [tier_row(outcome, travels) for outcome in outcomes],
        "seconds": round(seconds, 2),
    }
    return {key: value for key, value in summary.items() if value not in (None, [], {})}


def fp32_bytes(network: nn.Module) -> int:
    """Bytes of the network's state as safetensors: what variants are compared with."""
    state = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    return sum(map(len, tensors.dump_chunks({name: state[name] for name in names_of(network)})))


def tier_row(outcome: TierOutcome, travels: Callable[[int], int] = int) -> dict[str, Any]:
    """A tier's variant, or why it has none, as plain JSON values.

    Args:
        outcome: of the tier.
        travels: how many bytes a variant of so many takes on the network.
    """
    variant = outcome.variant
    if variant is None:
        return {"tier": outcome.tier, "gate": f"failed: {outcome.reason}"}
    return {
        "tier": outcome.tier,
        "recipe": variant.recipe,
        "wire_bytes": travels(len(variant.wire)),
        "installed_bytes": len(variant.installed),
        "memory_bytes": variant.memory_bytes,
        "parameters": variant.parameters,
        "accuracy": variant.accuracy,
        "drop": variant.gate.drop,
        "drop_upper": variant.gate.drop_upper,
        "worst_class_drop": variant.gate.worst_class_drop,
        "latency_us": round(variant.latency_us, 1),
        **({} if variant.delta_bytes is None else {"delta_bytes": variant.delta_bytes}),
        **({} if variant.changed is None else {"changed_codes": round(variant.changed, 6)}),
        "gate": "passed",
        "routing": variant.routing.describe(),
    }
