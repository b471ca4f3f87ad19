"""Codecs for updates: bytes up against accuracy, on Fashion-MNIST with McMahan's CNN and 20 unequal clients.

Every run is fedge's own (`fedge_simulations.run`), with the same seed, clients and settings of training; only
`[communication]` differs. Bytes are those of the round's record. So that it takes ten minutes of one core,
the clients hold 2,000 of the 60,000 images together, dealt out by Dirichlet 0.5 (`--data-dir DIR` with
`fashion_mnist.npz`). The picture lies beside the JSON file, as .svg. "Encode" and "decode": milliseconds of
one update of one client, after the run without a codec.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _harness import Options, Row, machine, options, publish

from fedge.codecs.layout import Layout
from fedge.codecs.update import decode, encode
from fedge.config import Config
from fedge.learning import local
from fedge.learning.local import Job
from fedge.learning.messages import Instructions
from fedge.learning.state import arrays_of
from fedge_server.page import draw
from fedge_simulations import Result, run
from fedge_simulations.world import prepare

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run is to do about communication."""

    up: str = ""  # stages of the codec
    down: str = ""  # likewise, of changes of the global state
    feedback: bool = True

    @property
    def name(self) -> str:
        down = f", down {self.down}" if self.down else ""
        return (self.up or "none") + down + ("" if self.feedback else ", no feedback")


SETTINGS = (
    Setting(),
    Setting("topk:0.01+int8"),
    Setting("topk:0.05+int8"),
    Setting("topk:0.01+int8", down="topk:0.1+int8"),
    Setting("int8"),
    Setting("topk:0.01+int8", feedback=False),
    Setting("topk:0.01+sign"),
    Setting("randomk:0.05+int8"),
)
QUICK = SETTINGS[:2] + SETTINGS[4:5]
WITHIN = 0.01  # accuracy that may be lost


@dataclass(frozen=True, slots=True)
class Measured:
    """One run, and what an update in its codec costs."""

    name: str
    bytes_up: tuple[int, ...]  # of each round
    bytes_down: float  # mean of a round
    accuracy: tuple[float, ...]  # after it

    @property
    def mean_bytes(self) -> float:
        return statistics.mean(self.bytes_up)

    @property
    def last(self) -> float:
        """Mean accuracy of the last three rounds: a single one swings by a point."""
        return statistics.mean(self.accuracy[-3:])


def main(asked: Options) -> None:
    """Measure, print, write."""
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        data = _subset(asked.data / "fashion_mnist.npz", Path(folder) / "some.npz", quick=asked.quick)
        found: list[Measured] = []
        costs: Callable[[Config], tuple[float, float]] | None = None
        rows: list[Row] = []
        for setting in QUICK if asked.quick else SETTINGS:
            config = config_of(data, setting, rounds=3 if asked.quick else 20)
            started = time.process_time()
            result = run(config, Path(folder) / f"run{len(found)}")
            costs = costs or _costs(config, result)
            found.append(_measured(setting, result))
            rows.append(_row(found[0], found[-1], costs(config), time.process_time() - started))
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    _plot(asked.json.with_suffix(".svg"), found)
    times = [found[0].mean_bytes / each.mean_bytes for each in found if each.last >= found[0].last - WITHIN]
    publish(asked, before, {"times_smaller_within_one_point": max(times)}, rows)


def config_of(data: Path, setting: Setting, rounds: int) -> Config:
    """The run with this codec."""
    return Config.from_mapping(
        {
            "task": "images",
            "data": str(data),
            "model": {"name": "cnn"},
            "clients": {"count": 20, "partition": "dirichlet:0.5"},
            "rounds": {"count": rounds},
            "train": {"epochs": 1, "batch_size": 16, "learning_rate": 0.1, "momentum": 0.0},
            "evaluate": {"metrics": ["accuracy"], "proxy_fraction": 0.0, "gate_fraction": 0.05},
            "communication": {
                "codec": list(filter(None, setting.up.split("+"))),
                "downlink": list(filter(None, setting.down.split("+"))),
                "error_feedback": setting.feedback,
            },
        }
    )


def _subset(whole: Path, some: Path, *, quick: bool) -> Path:
    """The first images of each part; their order is random in the file."""
    train, test = (600, 1000) if quick else (2000, 2000)
    with np.load(whole) as read:
        parts: dict[str, Any] = {
            f"{name}_{part}": read[f"{name}_{part}"][:count]
            for part, count in (("train", train), ("test", test))
            for name in ("x", "y")
        }
    np.savez(some, **parts)
    return some


def _measured(setting: Setting, result: Result) -> Measured:
    accuracy = tuple(float(record.metrics["accuracy"]) for record in result.history)  # type: ignore[arg-type]
    up = tuple(record.bytes_up for record in result.history)
    down = statistics.mean(record.bytes_down for record in result.history)
    return Measured(setting.name, up, down, accuracy)


def _costs(config: Config, result: Result) -> Callable[[Config], tuple[float, float]]:
    """Milliseconds to encode and decode one real update: that of client 1 from the run's last model."""
    world = prepare(config)
    state = arrays_of(result.model.network)
    told = Instructions(config.task, world.dataset.spec, "cnn", "none", None, config.train, 0, "weights", 99)
    examples = world.dataset.examples.take(world.clients[0])
    update = local.fit(Job(world.task, told, state, examples, 0)).arrays
    layout = Layout.of(state, local.parameters_of(result.model.network))

    def costs(config: Config) -> tuple[float, float]:
        if (codec := config.communication.uplink) is None:
            return 0.0, 0.0
        data = encode(update, layout, codec, key=1).data
        return (
            _ms(lambda: encode(update, layout, codec, key=1)),
            _ms(lambda: decode(data, layout, codec, key=1)),
        )

    return costs


def _ms(work: Callable[[], object]) -> float:
    found = []
    for _ in range(7):
        started = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - started))
    return statistics.median(found)


def _row(plain: Measured, found: Measured, cost: tuple[float, float], seconds: float) -> Row:
    return {
        "codec": found.name,
        "kB up a round": found.mean_bytes / 1e3,
        "times smaller": plain.mean_bytes / found.mean_bytes,
        "kB down a round": found.bytes_down / 1e3,
        "accuracy": found.accuracy[-1],
        "last three": found.last,
        "points lost": 100 * (plain.last - found.last),
        "encode ms": cost[0],
        "decode ms": cost[1],
        "CPU s": seconds,
    }


def _plot(path: Path, found: list[Measured]) -> None:
    def paint(axes: Axes) -> None:
        for each in found:
            axes.plot(np.cumsum(each.bytes_up) / 1e6, each.accuracy, label=each.name)
        axes.set_xscale("log")
        axes.set_xlabel("MB from all clients, added up over rounds")
        axes.set_ylabel("accuracy")
        axes.legend(fontsize=7)

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw("Accuracy against bytes up", "Fashion-MNIST, CNN, 20 unequal clients", paint)
    path.write_text(drawn.svg, encoding="utf-8")


if __name__ == "__main__":
    main(options(__doc__ or "", data=True))
