"""Inference at the edge: a device's process, what surrounds its model, device and cloud together.

The model is the smallest variant of Fashion-MNIST's search (cnn3-12); where only speed and memory matter,
with weights as they are drawn. Parts:

process   memory of `fedge-client serve` with the model open, after 500 requests; seconds of an `infer`
overhead  a request's time: onnxruntime's bare call, `Runtime.infer`, the local service over HTTP
hostile   the service with 1,000 silent connections, 50 stalled readers, 5 MB bodies: memory, others served
cloud     examples a second of the teacher, torch beside its ONNX export, by batch
joint     accuracy against the share that is sent, on data of your own copy (`--data-dir DIR` with
          `fashion_mnist.npz`); trains a teacher and searches, minutes each, kept in `--cache DIR`; draws a
          picture beside the JSON file
features  how much of an image the features of that teacher's layers give away; needs the same data and cache
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _faults  # noqa: F401 - makes federation importable
import numpy as np
import torch
from _edge import SPEC, Serving, ask, cold_start_s, install, npy, runtime_of, serving, student
from _harness import Options, Row, machine, options, publish
from federation import memory_mb

from fedge.inference import CompactModel
from fedge.learning.whole import WholeModel
from fedge.task import resolve
from fedge_server.compression.export import export

PARTS = ("process", "overhead", "hostile", "cloud", "joint", "features")
Found = tuple[dict[str, float], list[Row]]
X = np.random.default_rng(0).integers(0, 256, (1, 28, 28), dtype=np.uint8)


def process(asked: Options, home: Path) -> Found:
    """Memory and start."""
    file = home / "x.npy"
    np.save(file, X)
    starts = [cold_start_s(home, file) for _ in range(4 if asked.quick else 15)][1:]
    rows: list[Row] = [_row("`infer`, from start to end", statistics.median(starts), "s")]
    for name, given in (("HTTP alone", ("--grpc", "off")), ("HTTP and gRPC", ())):
        with serving(home, *given) as up:
            connection = up.connect()
            for _ in range(500):
                ask(connection, npy(X))
            rows.append(_row(f"`serve`, {name}", memory_mb(up.pid), "MB"))
            connection.close()
    return {"agent_mb": float(rows[-1]["value"]), "cold_start_s": statistics.median(starts)}, rows


def overhead(asked: Options, home: Path) -> Found:
    """What a request costs beside the model."""
    model = student()
    runtime, body = runtime_of(model), npy(X)
    session = CompactModel(model, SPEC)._session
    turns = 20 if asked.quick else 100
    ways: dict[str, Callable[[], Any]] = {
        "onnxruntime, bare": lambda: session.run(None, {"input": X}),
        "`Runtime.infer`": lambda: runtime.infer(X),
    }
    found = _in_turns(ways, turns=turns, calls=200)
    with serving(home, "--grpc", "off") as up:  # afterwards: another process empties the caches
        connection = up.connect()
        found |= _in_turns({"local service, HTTP": lambda: ask(connection, body)}, turns=turns, calls=20)
        connection.close()
    rows = [_row(name, 1e6 * seconds, "us a request") for name, seconds in found.items()]
    return {"warm_overhead_ratio": found["`Runtime.infer`"] / found["onnxruntime, bare"]}, rows


def _in_turns(ways: dict[str, Callable[[], Any]], *, turns: int, calls: int) -> dict[str, float]:
    """Seconds a call, median over turns."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, work in ways.items():
            began = time.perf_counter()
            for _ in range(calls):
                work()
            taken[name].append((time.perf_counter() - began) / calls)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def hostile(asked: Options, home: Path) -> Found:
    """Who sends nothing, reads nothing or sends too much, and who is served beside them."""
    rows: list[Row] = []
    with serving(home, "--grpc", "off") as up:
        connection = up.connect()
        ask(connection, npy(X))
        rows.append(_row("at rest", memory_mb(up.pid), "MB"))
        for name, trouble in (
            ("1,000 silent connections", _silent),
            ("50 that read nothing", _stalled),
            ("100 bodies of 4 MB that do not end", _endless),
            ("100 bodies of 5 MB", _oversized),
        ):
            held = trouble(up)
            taken = []
            for _ in range(50):  # each over a connection of its own, as a newcomer
                began = time.perf_counter()
                fresh = up.connect()
                status = ask(fresh, npy(X))
                fresh.close()
                if status != 200:
                    raise RuntimeError(f"{name}: another request got {status}")
                taken.append(time.perf_counter() - began)
            rows.append(_row(f"{name}: others, slowest of 50", 1e3 * max(taken), "ms"))
            rows.append(_row(f"{name}: memory", memory_mb(up.pid), "MB"))
            for each in held:
                each.close()
        peak = memory_mb(up.pid, "VmHWM")
        rows.append(_row("highest memory", peak, "MB"))
    return {"serving_peak_mb": peak}, rows


def _silent(up: Serving) -> list[Any]:
    return [up.socket() for _ in range(1000)]


def _stalled(up: Serving) -> list[Any]:
    """Ask for 256 answers again and again, and read none."""
    made = [up.socket() for _ in range(50)]  # more would fill the queue by right
    body = npy(np.zeros((256, 28, 28), np.uint8))
    head = (
        f"POST /v1/infer HTTP/1.1\r\nContent-Type: application/x-npy\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    for each in made:
        each.setblocking(False)
        try:
            each.send(head.encode() + body)
        except (BlockingIOError, ConnectionError):
            continue
    return made


def _endless(up: Serving) -> list[Any]:
    return _with_length(up, 4_000_000, b"x" * 60_000)


def _oversized(up: Serving) -> list[Any]:
    return _with_length(up, 5_000_000, b"x" * 60_000)


def _with_length(up: Serving, length: int, data: bytes) -> list[Any]:
    made = [up.socket() for _ in range(100)]
    head = f"POST /v1/infer HTTP/1.1\r\nContent-Type: application/x-npy\r\nContent-Length: {length}\r\n\r\n"
    for each in made:
        each.setblocking(False)
        try:
            each.send(head.encode() + data)
        except (BlockingIOError, ConnectionError):
            continue
    return made


def cloud(asked: Options, home: Path) -> Found:
    """The teacher in torch and in onnxruntime, one thread each."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    task = resolve("images")
    model = WholeModel(task.preprocess(SPEC, None, "none"), task.model("cnn")(SPEC)).eval()
    compact, rows, ratios = CompactModel(export(model, SPEC), SPEC), list[Row](), []
    for batch in (1, 16, 64):
        x = np.repeat(X, batch, 0)

        def in_torch(x: np.ndarray[Any, Any] = x) -> Any:
            with torch.inference_mode():
                return torch.softmax(model(torch.from_numpy(x)), 1).numpy()

        found = _in_turns(
            {"torch": in_torch, "onnxruntime": lambda x=x: compact.run(x)},
            turns=5 if asked.quick else 21,
            calls=max(64 // batch, 2),
        )
        for name, seconds in found.items():
            rows.append(_row(f"{name}, batch {batch}", batch / seconds, "examples a second"))
        ratios.append(found["torch"] / found["onnxruntime"])
    return {"cloud_onnx_over_torch_batch_1": ratios[0], "cloud_onnx_over_torch_batch_64": ratios[-1]}, rows


def joint(asked: Options, home: Path) -> Found:
    """Device and cloud together."""
    from _joint import measured

    return measured(asked)


def features(asked: Options, home: Path) -> Found:
    """What would be sent instead of the image."""
    from _features import measured

    return measured(asked)


def _row(what: str, value: float, unit: str) -> Row:
    return {"what": what, "value": value, "unit": unit}


def main(asked: Options) -> None:
    """Measure, print, write."""
    before, claims, rows = machine(), dict[str, float](), list[Row]()
    works = {
        "process": process,
        "overhead": overhead,
        "hostile": hostile,
        "cloud": cloud,
        "joint": joint,
        "features": features,
    }
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "device"
        install(home, student())
        for part in [each for each in PARTS if each in (asked.only or PARTS)]:
            found, lines = works[part](asked, home)
            claims |= found
            rows += lines
    publish(asked, before, claims, rows)


if __name__ == "__main__":
    main(options(__doc__ or "", parts=PARTS, cache=True, data=True, data_for="joint"))
