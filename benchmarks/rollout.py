"""How often a rollout halts, by how bad the release is: exact, and through the decision core.

1,000 devices, the default plan: 5, 25 and 100 % of them; install, health and confidence are watched; at most
one false halt in a hundred rollouts. Devices report one after the other in a random order, and the rule looks
after each. Beside it, on installs alone, what looks right and is not: the lower bound of Clopper and
Pearson's interval (Biometrika 26, 1934) at the same level, also looked at after each device; and the same
bound looked at once, at the end of a stage, which is allowed and shows what it costs to look always.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
from _harness import Row, machine, options, publish
from scipy.stats import binom

from fedge_server.rollout.assignment import stage_of
from fedge_server.rollout.deciding import decide
from fedge_server.rollout.evidence import Criterion, Tally, chance_of_halt
from fedge_server.rollout.fleet import default_plan, devices_by_stage
from fedge_server.rollout.plan import Plan
from fedge_server.rollout.state import Started, State, Status, Tallied, Tallies, TimePassed

FLEET = [f"device-{number:04}" for number in range(1000)]
RATES = (0.02, 0.03, 0.05, 0.07, 0.12, 0.22)  # of installs that fail; the first is what is tolerated
WEEK_S = 7 * 86400.0
Floats = npt.NDArray[np.float64]


def through(plan: Plan, draw: random.Random, rates: Mapping[str, float]) -> tuple[State, int]:
    """One rollout through the decision core; with how many devices were reached."""
    state = State("micro-2", "micro", 2, 1, plan)
    state, _ = decide(state, Started("benchmark"), 0.0)
    order = draw.sample(FLEET, len(FLEET))
    places = {device: stage_of(plan, state.id, device) for device in order}
    bad, judged, installed = dict.fromkeys(rates, 0), dict.fromkeys(rates, 0), 0
    for stage in range(len(plan.stages)):
        for device in order:
            if places[device] != stage:
                continue
            failed = draw.random() < rates["install"]
            installed += not failed
            for kind in rates:
                if kind == "install" or not failed:
                    judged[kind] += 1
                    bad[kind] += failed if kind == "install" else draw.random() < rates[kind]
            tallies = {kind: Tally(judged[kind], bad[kind]) for kind in rates}
            state, _ = decide(state, Tallied(Tallies(tallies, installed)), 0.0)
            if not state.offers:
                return state, judged["install"]
        state, _ = decide(state, TimePassed(), (stage + 1) * WEEK_S)
        if state.status is Status.DONE:
            break
    return state, judged["install"]


def looking_always(bad: npt.NDArray[np.int64], criterion: Criterion, level: float) -> float:
    """Share of rows in which Clopper and Pearson's bound is above what is tolerated after any device."""
    judged = np.arange(1, bad.shape[1] + 1)
    convicts_at = binom.isf(level, judged, criterion.tolerated) + 1
    return float((bad >= convicts_at).any(axis=1).mean())


def looking_once(criterion: Criterion, level: float, rate: float, devices: int) -> float:
    """Power of the same bound, looked at once."""
    counts = np.arange(devices + 1)
    convicts = binom.sf(counts - 1, devices, criterion.tolerated) <= level
    return float(binom.pmf(counts, devices, rate)[convicts].sum())


def main() -> None:
    """Measure, print, write."""
    asked = options(__doc__ or "")
    before = machine()
    times, simulated = (60, 1000) if asked.quick else (200, 4000)
    plan = default_plan("micro-2", FLEET)
    install, level = plan.criterion("install"), plan.false_halts_each
    if install is None:
        raise SystemExit("the default plan watches no installs")
    tolerated = {criterion.kind: criterion.tolerated for criterion in plan.criteria}
    stages = devices_by_stage(plan, "micro-2", FLEET)
    chance = partial(chance_of_halt, install, level)
    rows: list[Row] = []
    claims: dict[str, float] = {}
    for rate in RATES:
        fair = dict.fromkeys(tolerated, 0.0) if rate > RATES[0] else tolerated
        found = [through(plan, random.Random(n), {**fair, "install": rate}) for n in range(times)]
        halted = [reached for state, reached in found if state.status is Status.AWAITING_SIGNATURE]
        draws = np.cumsum(np.random.default_rng(0).random((simulated, len(FLEET))) < rate, axis=1)
        rows.append(
            {
                "installs that fail": f"{rate:.0%}",
                **{
                    f"{s.name}, {n} devices": chance(rate, n)
                    for s, n in zip(plan.stages, stages, strict=True)
                },
                "simulated, all criteria": len(halted) / times,
                "median devices reached": float(np.median(halted)) if halted else "-",
                "a bound looked at always": looking_always(draws, install, level),
                "once, after the quarter": looking_once(install, level, rate, stages[1]),
            }
        )
        if rate == RATES[0]:
            claims["false_halts_stated"] = plan.false_halts
            claims["false_halts_simulated"] = len(halted) / times
            claims["false_halts_exact_install"] = chance(rate, len(FLEET))
            claims["false_halts_of_a_bound_looked_at_always"] = looking_always(draws, install, level)
    claims["halted_of_five_points_worse"] = chance(0.07, len(FLEET))
    claims["halted_of_five_points_worse_by_the_quarter"] = chance(0.07, stages[1])
    worse = [
        through(plan, random.Random(n), {"install": 0.0, "health": 0.0, "confidence": 0.9})
        for n in range(times)
    ]
    claims["degraded_halted_in_canary"] = (
        sum(s.stage == 0 and s.status is Status.AWAITING_SIGNATURE for s, _ in worse) / times
    )
    claims["degraded_median_devices"] = float(np.median([reached for _, reached in worse]))
    publish(asked, before, claims, rows)


if __name__ == "__main__":
    main()
