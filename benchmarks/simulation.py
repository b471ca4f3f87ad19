"""Simulated clients per second: fedge beside a plain torch loop, pfl-research and Flower on Ray.

Everybody makes rounds of federated averaging: one epoch of SGD in batches of 10 for each client, the
weighted mean of what comes back, and again. The work is the same, and checked: so many optimiser steps, and
the loss after the first round, from the same first weights, agrees (the order of examples differs, and
pfl-research keeps it as it is).

    tiny  perceptron 64-32-10, 1,000 clients with 60 examples
    mlp   perceptron 784-200-200-10, 199,210 parameters, 600 examples a client
    cnn   McMahan's CNN, 1,663,370 parameters, 600 examples a client

A figure of fedge is that of a run as a user starts it: choosing clients, training, aggregation, evaluation on
the server's test data and the commit to the database; the others do not evaluate. "built-in" is fedge's own
network, "own" the same network as a user's nn.Module, in which there is nothing to recognise; "messages"
means a full message for each client, which the server clips. All contestants run on one core with
one thread, in turns; speeds count the CPU seconds of all processes of a contestant, ratios are medians over
turns of each turn with its neighbour's. Flower on Ray has all cores, as many actors as cores. "s" is from the
start of the process until its first round is done. Memory is that of all processes, shared pages counted
once; "above" is what comes on top of libraries and data set.

pfl-research and Ray are installed into environments of their own in --cache, at first use; where they cannot
be had, the rows say so and their claims are left out.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _harness import Options, Row, machine, options, publish, usable_cpus
from _sim_turns import Absent, Contestant, environment, median, ratio, started, take_turns

PFL = "pfl==0.6.*"
RAY = f"flwr[simulation]=={version('flwr')}"
WARM_UP_S = 8.0
CLIENTS = {"tiny": (1000, 1000), "mlp": (32, 16), "cnn": (8, 4)}  # of a round; with --quick
# Next to no noise, so that the loss can be compared.
CLIPPED = {"mod": "clip"}  # a client mod, so that each client sends a message of its own
OWN_MODULE = {"model": {"name": "own"}}
SAME_LOSS = 0.1, 0.05  # share of the loss, and so much: order of examples, and which of them the test has

Figures = tuple[dict[str, float], list[Row]]


class Bench:
    """What all parts share."""

    def __init__(self, asked: Options, folder: Path) -> None:
        self.asked, self.folder = asked, folder
        self.count = 3 if asked.quick else 9  # turns
        self.seconds = 0.5 if asked.quick else 2.0  # a turn, at least

    def clients(self, work: str) -> int:
        """In a round."""
        return CLIENTS[work][self.asked.quick]

    def peer(self, name: str, work: str, clients: int, python: Path | str, cores: int = 1) -> Contestant:
        """A contestant of `_sim_peers`."""
        return self._start(name, python, "_sim_peers", [name, work, str(clients)], cores)

    def fedge(
        self,
        name: str,
        work: str,
        clients: int,
        changes: Mapping[str, Any] | None = None,
        *,
        cores: int = 1,
        examples: int | None = None,
    ) -> Contestant:
        """A run of fedge, with changes to its configuration."""
        arguments = [work, str(clients), json.dumps(changes or {})]
        arguments += [] if examples is None else [str(examples)]
        return self._start(name, sys.executable, "_sim_fedge", arguments, cores)

    def _start(
        self, name: str, python: Path | str, module: str, arguments: Sequence[str], cores: int
    ) -> Contestant:
        code = f"import sys, {module}; {module}.main(sys.argv[1:])"
        return Contestant.start(name, [python, "-c", code, *arguments], self.folder, cores=cores)


def _row(
    part: str, who: str, *, speed: Sequence[float] = (), times: float | None = None, **further: str | float
) -> Row:
    """A row; what was not measured stays empty."""
    per_cpu_s, per_s = speed or ("", "")
    row: dict[str, str | float] = {"part": part, "who": who, "clients/CPU-s": per_cpu_s, "clients/s": per_s}
    row |= {"times the loop": "" if times is None else times, "MB": "", "MB above": "", "s": "", "note": ""}
    return row | further


def _speeds(contestant: Contestant) -> tuple[float, float]:
    return median(contestant, "per_cpu_s"), median(contestant, "per_s")


def measure_speed(bench: Bench, work: str) -> Figures:
    """Ratios to the plain loop and to pfl-research, in turns."""
    clients, rows = bench.clients(work), []
    making = [
        bench.peer("loop", work, clients, sys.executable),
        bench.fedge("fedge, built-in", work, clients),
        bench.fedge("fedge, own", work, clients, OWN_MODULE),
    ]
    if work == "tiny":
        making.append(bench.fedge("fedge, messages", work, clients, CLIPPED))
    try:
        making.append(bench.peer("pfl", work, clients, environment("pfl", PFL, bench.asked.cache)))
    except Absent as error:
        rows.append(_row(work, "pfl-research", note=f"not to be had: {error}"))
    with started(*making) as contestants:
        _agree(contestants)
        take_turns(contestants, bench.count, bench.seconds)
        loop, *others = contestants
        for contestant in reversed(contestants):
            peak = contestant.peak_mb(0.0)
            rows.insert(
                0,
                _row(
                    work,
                    contestant.name,
                    speed=_speeds(contestant),
                    times=ratio(contestant, loop),
                    **{"MB": peak, "MB above": peak - contestant.resting_mb, "s": contestant.first_s},
                    note=f"{clients:,} clients a round",
                ),
            )
        by_name = {contestant.name: contestant for contestant in others}
        claims = {
            f"{work}_ratio": ratio(by_name["fedge, built-in"], loop),
            f"generic_{work}_ratio": ratio(by_name["fedge, own"], loop),
        }
        if "fedge, messages" in by_name:
            claims[f"{work}_message_ratio"] = ratio(by_name["fedge, messages"], loop)
        if "pfl" in by_name:
            claims[f"ratio_to_pfl_{work}"] = ratio(by_name["fedge, built-in"], by_name["pfl"])
    return claims, rows


def _agree(contestants: Sequence[Contestant]) -> None:
    """The first round of each: as many steps, and nearly the same loss.

    Raises:
        RuntimeError: somebody did other work.
    """
    first = [contestant.turn(0.0) for contestant in contestants]
    for contestant, turn in zip(contestants[1:], first[1:], strict=True):
        assert turn.loss is not None
        assert first[0].loss is not None
        share, constant = SAME_LOSS
        apart = abs(turn.loss - first[0].loss)
        if turn.steps != first[0].steps or apart > share * first[0].loss + constant:
            raise RuntimeError(f"{contestant.name} did other work: {turn}, the loop {first[0]}")


def measure_ray(bench: Bench) -> Figures:
    """Flower's simulation beside fedge and the plain loop: its speed once it runs, and its start."""
    try:
        python = environment("ray", RAY, bench.asked.cache)
    except Absent as error:
        return {}, [_row("ray", "Flower on Ray", note=f"not to be had: {error}")]
    claims: dict[str, float] = {}
    rows: list[Row] = []
    for work in CLIENTS:
        times, more = _beside_ray(bench, work, python)
        rows += more
        if work == "tiny":
            claims["ratio_to_flower_1000"] = times
    return claims, rows


def _beside_ray(bench: Bench, work: str, python: Path | str) -> tuple[float, list[Row]]:
    clients, part = CLIENTS[work][0], f"ray {work}"
    with started(bench.peer("flower", work, clients, python, cores=usable_cpus())) as (flower,):
        first = flower.turn(0.0)
        making = [bench.peer("loop", work, clients, sys.executable), bench.fedge("fedge", work, clients)]
        with started(*making) as (loop, fedge):
            take_turns([loop, fedge, flower], 2 if bench.asked.quick else 5, bench.seconds)
            times = ratio(fedge, flower)
            note = f"{times:.3g} times Flower on Ray"
            rows = [
                _row(part, "loop", speed=_speeds(loop), times=1.0),
                _row(part, "fedge, built-in", speed=_speeds(fedge), times=ratio(fedge, loop), note=note),
            ]
        peak = flower.peak_mb(0.0)
        memory = {"MB": peak, "MB above": peak - flower.resting_mb}
        note = f"{clients:,} clients a round, {usable_cpus()} actors; loss after a round {first.loss:.3f}"
        times_loop = ratio(flower, loop)
        further = {**memory, "s": flower.first_s, "note": note}
        rows.append(_row(part, "Flower on Ray", speed=_speeds(flower), times=times_loop, **further))
    return times, rows


def measure_startup(bench: Bench) -> Figures:
    """From the start of `fedge-sim run` until it says that the first round is done; 1,000 tiny clients."""
    path = bench.folder / "startup.toml"
    path.write_text(
        'task = "_sim_fedge:TINY"\ndata = "60000"\n[model]\nstandardise = false\n[clients]\ncount = 1000\n'
        '[rounds]\ncount = 1\n[train]\nbatch_size = 10\nlearning_rate = 0.1\nmomentum = 0.0\n'
        '[evaluate]\nproxy_fraction = 0.0\n'
    )  # fmt: skip
    found = []
    for number in range(2 if bench.asked.quick else 5):
        command = [
            Path(sys.executable).parent / "fedge-sim",
            "run",
            path,
            "--out",
            bench.folder / f"run-{number}",
        ]
        begun, heard = time.perf_counter(), {}
        with subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                heard[line.split(maxsplit=1)[0] if line.strip() else ""] = time.perf_counter() - begun
        if process.returncode != 0 or "round" not in heard:
            raise RuntimeError(f"fedge-sim run {path} ended with {process.returncode}, after {list(heard)}")
        found.append(heard["round"])
    seconds = statistics.median(found)
    note = f"process start to first round done; {min(found):.2f} to {max(found):.2f}"
    return {"startup_s": seconds}, [_row("startup", "fedge-sim run", s=seconds, note=note)]


def measure_workers(bench: Bench) -> Figures:
    """Two worker processes on two cores beside one on one core, by wall time."""
    claims, rows = {}, []
    for work in CLIENTS:
        clients = CLIENTS[work][0]
        making = [
            bench.fedge("one worker", work, clients, {"simulation": {"workers": 1}}),
            bench.fedge("two workers", work, clients, {"simulation": {"workers": 2}}, cores=2),
        ]
        with started(*making) as (one, two):
            two.turn(WARM_UP_S)  # its second process loads torch and proves the model beside the first rounds
            take_turns([one, two], bench.count, bench.seconds)
            times = ratio(two, one, "per_s")
            for contestant in (one, two):
                note = f"{clients:,} clients a round"
                if contestant is two:
                    note += f"; {times:.2f} times one worker"
                rows.append(_row(f"workers {work}", contestant.name, speed=_speeds(contestant), note=note))
        if work == "mlp":
            claims["two_workers_ratio"] = times
    return claims, rows


def measure_memory(bench: Bench) -> Figures:
    """Peak memory above libraries and data set with thousands of clients in a round, and with a quarter."""
    claims, rows = {}, []
    for work, many, examples in (("tiny", 10_000, 60_000), ("mlp", 4_000, 12_000)):
        for clients in (many // 4, many):
            changes = {"clients": {"partition": f"draw:{600 if work == 'mlp' else 60}"}}
            with started(bench.fedge("fedge", work, clients, changes, examples=examples)) as (fedge,):
                peak = fedge.peak_mb(0.0)
                above = peak - fedge.resting_mb
            note = f"{clients:,} clients a round, drawn from {examples:,} examples"
            rows.append(_row("memory", f"fedge, {work}", **{"MB": peak, "MB above": above}, note=note))
            if clients == many:
                claims[f"mb_{work}_{many}"] = above
    return claims, rows


def measure_unequal(bench: Bench) -> Figures:
    """Log-normal sizes (sigma 1) beside equal ones, by examples per CPU second; tiny clients."""
    clients = CLIENTS["tiny"][0]
    equal = {"clients": {"partition": "draw:60"}}
    unequal = {"clients": {"partition": "draw:60", "size_sigma": 1.0}}
    making = [
        bench.fedge("equal", "tiny", clients, equal, examples=60_000),
        bench.fedge("unequal", "tiny", clients, unequal, examples=60_000),
    ]
    with started(*making) as (even, uneven):
        take_turns([even, uneven], bench.count, bench.seconds)
        times = ratio(uneven, even, "examples_per_cpu_s")
        rows = [
            _row("unequal", "equal sizes", speed=_speeds(even)),
            _row("unequal", "log-normal", speed=_speeds(uneven), note=f"{times:.2f} of it, per example"),
        ]
    return {"unequal_ratio": times}, rows


def measure_population(bench: Bench) -> Figures:
    """A round of 100 clients out of a million beside one of 100 out of a thousand."""
    changes = {"clients": {"partition": "draw:60"}, "rounds": {"cohort": 100}}
    making = [
        bench.fedge("1,000", "tiny", 1_000, changes, examples=60_000),
        bench.fedge("1,000,000", "tiny", 1_000_000, changes, examples=60_000),
    ]
    with started(*making) as (small, large):
        take_turns([small, large], bench.count, bench.seconds)
        times = 1 / ratio(large, small)
        rows = [
            _row("population", f"100 out of {c.name}", speed=_speeds(c), s=c.start_s) for c in (small, large)
        ]
    return {"population_ratio": times}, rows


PARTS: Mapping[str, Callable[[Bench], Figures]] = {
    "tiny": lambda bench: measure_speed(bench, "tiny"),
    "mlp": lambda bench: measure_speed(bench, "mlp"),
    "cnn": lambda bench: measure_speed(bench, "cnn"),
    "ray": measure_ray,
    "startup": measure_startup,
    "workers": measure_workers,
    "memory": measure_memory,
    "unequal": measure_unequal,
    "population": measure_population,
}


def main(asked: Options) -> None:
    """Measure, print, write."""
    before = machine()
    claims: dict[str, float] = {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fedge-benchmark-") as folder:
        for name, measure in PARTS.items():
            if not asked.only or name in asked.only:
                found, more = measure(Bench(asked, Path(folder)))
                claims |= found
                rows += more
                print(
                    f"{name}: {', '.join(f'{key} {value:.3g}' for key, value in found.items())}", flush=True
                )
    publish(asked, before, claims, rows)


if __name__ == "__main__":
    main(options(__doc__ or "", parts=list(PARTS), cache=True))
