"""When training ends: a pure decision over the records so far, so that a resumed run decides the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedge.config import Rounds, Target
from fedge.errors import ConfigError, RoundError
from fedge_server.rounds.record import RoundRecord

MAX_FAILED_ROUNDS = 3  # in a row without enough valid updates: something is wrong that waiting does not mend


def reached_target_at(records: Sequence[RoundRecord], rounds: Rounds) -> int | None:
    """The first round that reached the target, if any; with `rounds.target_confidence`, whose bound did."""
    if rounds.target is None:
        return None
    target, sure = Target.parse(rounds.target), rounds.target_confidence is not None

    def reached(record: RoundRecord) -> bool:
        if not sure:
            return target.reached(_scalars(record))
        return record.target_bound is not None and target.reached({target.metric: record.target_bound})

    return next((record.round for record in records if record.round > 0 and reached(record)), None)


def check_target(rounds: Rounds, measured: Sequence[str], classes: int) -> None:
    """Refuse a target that no round could ever reach.

    Raises:
        ConfigError: its metric is not measured, or is `auc` with other than two classes.
    """
    if rounds.target is None:
        if rounds.target_confidence is not None:
            raise ConfigError("rounds.target_confidence: there is no rounds.target to be sure of; set one")
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
        sure = (
            "" if rounds.target_confidence is None else f" at {100 * rounds.target_confidence:g} % confidence"
        )
        return f"target {rounds.target} reached in round {at}{sure}"
    if rounds.patience is not None and (since := _rounds_without_gain(records, rounds)) >= rounds.patience:
        over = "" if rounds.smooth == 1 else f" (means of {rounds.smooth})"
        return f"no gain of {rounds.min_gain} in {since} rounds{over}"
    if records and records[-1].round >= rounds.count:
        return f"all {rounds.count} rounds done"
    return None


def check_hope(records: Sequence[RoundRecord]) -> None:
    """Stop when several rounds in a row did not count.

    Raises:
        RoundError: they did not; the line says why, as far as can be told.
    """
    tail = records[-MAX_FAILED_ROUNDS:]
    if len(tail) < MAX_FAILED_ROUNDS or any(record.counted for record in tail):
        return
    raise RoundError(
        f"round {tail[-1].round}: {MAX_FAILED_ROUNDS} rounds in a row did not count; "
        f"the last: {why_not_counted(tail[-1])}"
    )


def why_not_counted(last: RoundRecord) -> str:
    """The likeliest reason why a round did not count."""
    if "aborted" in last.privacy:
        return str(last.privacy["aborted"])
    if last.rejected:
        return f"{len(last.rejected)} of {last.asked} rejected, such as: {last.rejected[0].reason}"
    if last.asked and last.bytes_up == 0:
        return "no answer before the deadline"
    return (
        "too few updates, or the strategy made no sound model of them; lower the learning rates, or see "
        "what the strategy needs (strategy, rounds.min_updates)"
    )


def _scalars(record: RoundRecord) -> dict[str, float]:
    return {name: value for name, value in record.metrics.items() if isinstance(value, (int, float))}


def _rounds_without_gain(records: Sequence[RoundRecord], rounds: Rounds) -> int:
    """Rounds since the last gain, where a round stands for the mean of the `smooth` rounds up to it.

    A lucky round would otherwise be a mark that the next ones cannot pass, and end a run that still learns,
    or one of many that drift up and down would count as a gain and prolong one that does not.
    """
    target = Target.parse(rounds.target) if rounds.target is not None else Target("accuracy", True, 1.0)
    sign = 1.0 if target.at_least else -1.0
    best, since = float("-inf"), 0
    counted = [record for record in records if record.counted]  # an outage is no lack of gain
    values = [sign * _scalars(record).get(target.metric, float("-inf")) for record in counted]
    for end in range(rounds.smooth, len(values) + 1):
        last = values[end - rounds.smooth : end]
        value = math.fsum(last) / len(last) if len(last) > 1 else last[0]
        if value >= best + rounds.min_gain or best == float("-inf"):
            best, since = max(best, value), 0
        else:
            since += 1
    return since
