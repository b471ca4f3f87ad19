"""When training ends: a pure decision over the records so far, so that a resumed run decides the same."""

from __future__ import annotations

from collections.abc import Sequence

from fedge.config import Rounds, Target
from fedge.errors import ConfigError
from fedge_server.rounds.record import RoundRecord


def reached_target_at(records: Sequence[RoundRecord], rounds: Rounds) -> int | None:
    """The first round that reached the target, if any."""
    if rounds.target is None:
        return None
    target = Target.parse(rounds.target)
    return next((r.round for r in records if r.round > 0 and target.reached(_scalars(r))), None)


def check_target(rounds: Rounds, measured: Sequence[str], classes: int) -> None:
    """Refuse a target that no round could ever reach.

    Raises:
        ConfigError: its metric is not measured, or is `auc` with other than two classes.
    """
    if rounds.target is None:
        return
    metric = Target.parse(rounds.target).metric
    if metric not in (*measured, "loss", "accuracy") or (metric == "auc" and classes != 2):
        raise ConfigError(
            f"rounds.target = {rounds.target!r}: {metric} is not measured in this run "
            f"(evaluate.metrics; {classes} classes, and auc needs two)"
        )


def why_stop(records: Sequence[RoundRecord], rounds: Rounds) -> str | None:
    """Why no further round should run, or None."""
    if (at := reached_target_at(records, rounds)) is not None:
        return f"target {rounds.target} reached in round {at}"
    if rounds.patience is not None and (since := _rounds_without_gain(records, rounds)) >= rounds.patience:
        return f"no gain of {rounds.min_gain} in {since} rounds"
    if records and records[-1].round >= rounds.count:
        return f"all {rounds.count} rounds done"
    return None


def _scalars(record: RoundRecord) -> dict[str, float]:
    return {name: value for name, value in record.metrics.items() if isinstance(value, (int, float))}


def _rounds_without_gain(records: Sequence[RoundRecord], rounds: Rounds) -> int:
    target = Target.parse(rounds.target) if rounds.target is not None else Target("accuracy", True, 1.0)
    sign = 1.0 if target.at_least else -1.0
    best, since = float("-inf"), 0
    for record in records:
        if not record.counted:
            continue  # an outage is no lack of gain
        value = sign * _scalars(record).get(target.metric, float("-inf"))
        if value >= best + rounds.min_gain or best == float("-inf"):
            best, since = max(best, value), 0
        else:
            since += 1
    return since
