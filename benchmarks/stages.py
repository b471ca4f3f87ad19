"""Compression's stages side by side: criteria, schedules and kinds of pruning, hints, teachers, precision.

Each row trains from the same networks with the same seeds; accuracy is on data used for nothing else, bytes
are those of the packed float32 weights, seconds those of the processor for one network. Part `digits` needs
nothing; the parts `fashion`, `fashion-hints` and `fashion-precision` take `fashion_mnist.npz` in --data-dir.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from _harness import Options, Row, machine, options, publish
from torch import Tensor, nn

from fedge import artefact, tensors
from fedge.config import Compress, Distil, Prune
from fedge.learning.models import Builder, mlp, small_cnn
from fedge.spec import Spec
from fedge_server.compression.distil import Teacher, distil, logits
from fedge_server.compression.prune import prune
from fedge_server.compression.recovery import Cut, pruned_and_recovered
from fedge_server.compression.sparsify import sparsify

LABELS = tuple("0123456789")
PARTS = ("digits", "fashion", "fashion-hints", "fashion-precision")


@dataclass(frozen=True)
class Setting:
    """Data by purpose, a teacher for each seed, and how long is learned."""

    name: str
    spec: Spec
    teachers: list[nn.Module]
    x: Tensor  # proxy
    y: Tensor
    test: tuple[Tensor, Tensor]
    student: Builder
    epochs: int  # of a student
    recovery: int  # epochs after pruning
    cuts: tuple[Cut, ...]
    weak: list[nn.Module]  # that have each seen little
    precise: Builder | None = None  # what bfloat16 is tried on
    hints: tuple[float, ...] = (0.0, 0.1, 1.0, 10.0)
    others: bool = True  # whether other criteria are tried

    @property
    def seeds(self) -> range:
        """One for each teacher."""
        return range(len(self.teachers))


def fresh(build: Builder, spec: Spec, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build(spec)


def trained(build: Builder, spec: Spec, x: Tensor, y: Tensor, seed: int, **settings: Any) -> nn.Module:
    """A network that has learned labels alone."""
    nobody = torch.zeros(len(x), spec.classes)
    return distil(nobody, fresh(build, spec, seed), x, y, Distil(mode="hard", **settings), seed=seed)


def digits(quick: bool) -> Setting:
    from sklearn.datasets import load_digits

    spec, bunch = Spec("image", (8, 8), "uint8", LABELS), load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    x = torch.tensor(bunch.images[order].reshape(-1, 64) / 8 - 1).float()
    y = torch.tensor(bunch.target[order])
    train, proxy, test = slice(0, 700), slice(700, 1200), slice(1200, None)
    big = mlp(200, 200)
    seeds = range(1 if quick else 3)
    return Setting(
        "digits",
        spec,
        [trained(big, spec, x[train], y[train], s, epochs=30, learning_rate=0.005) for s in seeds],
        x[proxy],
        y[proxy],
        (x[test], y[test]),
        mlp(16),
        60,
        20,
        (
            Cut("structured", 0.75),
            Cut("structured", 0.9),
            Cut("unstructured", 0.95),
            Cut("unstructured", 0.98),
        ),
        [trained(mlp(32), spec, x[100 * i :][:100], y[100 * i :][:100], i, epochs=60) for i in range(6)],
    )


def fashion(asked: Options) -> Setting:
    spec, held = Spec("image", (28, 28), "uint8", LABELS), np.load(asked.data / "fashion_mnist.npz")

    def scaled(name: str) -> Tensor:
        return torch.from_numpy((held[name].astype(np.float32) / 255 - 0.286) / 0.353)[:, None]

    x, y = scaled("x_train"), torch.from_numpy(held["y_train"].astype(np.int64))
    test = scaled("x_test"), torch.from_numpy(held["y_test"].astype(np.int64))
    big, small = small_cnn(16, 64), small_cnn(8, 32)
    learning = {"batch_size": 128, "learning_rate": 0.004}
    seeds = range(1 if asked.quick else 2)
    return Setting(
        "fashion",
        spec,
        [trained(big, spec, x[:10_000], y[:10_000], s, epochs=4, **learning) for s in seeds],
        x[40_000:43_000],
        y[40_000:43_000],
        test,
        small,
        8,
        6,
        (Cut("structured", 0.5), Cut("unstructured", 0.95)),
        [trained(small, spec, x[1000 * i :][:1000], y[1000 * i :][:1000], i, epochs=8) for i in range(3)],
        big,
        (0.0, 1.0),
        others=False,
    )


def row(setting: Setting, what: str, how: str, make: Callable[[int], nn.Module]) -> Row:
    started, x, y = time.process_time(), *setting.test
    networks = [make(seed) for seed in setting.seeds]
    seconds = (time.process_time() - started) / len(networks)
    right = [100 * float((logits(network, x).argmax(1) == y).float().mean()) for network in networks]
    state = {name: value.numpy() for name, value in networks[0].state_dict().items()}
    found: Row = {
        "data": setting.name,
        "what": what,
        "how": how,
        "accuracy_percent": float(np.mean(right)),
        "sd": float(np.std(right, ddof=1)) if len(right) > 1 else 0.0,
        "packed_bytes": len(artefact.pack(tensors.dump(state))),
        "cpu_s": seconds,
    }
    print(" ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in found.values()), flush=True)
    return found


def pruning(setting: Setting) -> Iterator[Row]:
    plain = Prune(recovery_epochs=setting.recovery)
    for cut in setting.cuts:
        name = f"{cut.kind} {cut.share:g}"

        def bare(seed: int, cut: Cut = cut) -> nn.Module:
            teacher = setting.teachers[seed]
            if cut.kind == "structured":
                return prune(teacher, setting.x[:2], cut.share, plain, seed=seed).network
            return sparsify(teacher, cut.share, plain, seed=seed).network

        yield row(setting, name, "no recovery", bare)
        for criterion, schedule in (
            ("l2", "one_shot"), ("l2", "gradual"), ("l1", "one_shot"), ("random", "one_shot")
        ):  # fmt: skip
            if criterion != "l2" and not setting.others:
                continue
            if cut.kind == "unstructured" and criterion == "l1":
                continue  # the same as l2
            chosen = Compress(prune=replace(plain, criterion=criterion, schedule=schedule))  # type: ignore[arg-type]

            def recovered(seed: int, cut: Cut = cut, chosen: Compress = chosen) -> nn.Module:
                return pruned_and_recovered(
                    setting.teachers[seed], setting.x, setting.y, cut, chosen, seed=seed
                ).network

            yield row(setting, name, f"{criterion} {schedule}", recovered)


def student(
    setting: Setting, teacher: Callable[[int], Teacher], build: Builder, **settings: Any
) -> Callable[[int], nn.Module]:
    asked = Distil(epochs=setting.epochs, **settings)
    return lambda seed: distil(
        teacher(seed), fresh(build, setting.spec, seed), setting.x, setting.y, asked, seed=seed
    )


def distilling(setting: Setting) -> Iterator[Row]:
    def own(seed: int) -> Teacher:
        return setting.teachers[seed]

    def one(seed: int) -> Teacher:
        return setting.weak[seed % len(setting.weak)]

    def several(_: int) -> Teacher:
        return setting.weak

    for mode in ("hard", "soft", "both"):
        for weight in setting.hints:
            make = student(setting, own, setting.student, mode=mode, hint_weight=weight)
            yield row(setting, "student", f"{mode}, hints {weight:g}", make)
    for teacher, count in ((one, 1), (several, len(setting.weak))):
        make = student(setting, teacher, setting.student, mode="soft")
        yield row(setting, "student", f"soft, of {count} weak", make)


def precise(setting: Setting) -> Iterator[Row]:
    build = setting.precise or setting.student
    for precision in ("fp32", "bf16"):
        make = student(setting, lambda seed: setting.teachers[seed], build, precision=precision)
        yield row(setting, "student as large", precision, make)


def measured(part: str, asked: Options) -> list[Row]:
    if part != "digits" and not (asked.data / "fashion_mnist.npz").is_file():
        raise SystemExit(f"part {part} needs fashion_mnist.npz in --data-dir")
    setting = digits(asked.quick) if part == "digits" else fashion(asked)
    rows = [row(setting, "teacher", "", lambda seed: setting.teachers[seed])]
    if part in ("digits", "fashion-hints"):
        rows += [row(setting, "weak teacher", "mean", lambda seed: setting.weak[seed])]
        rows += distilling(setting)
    if part in ("digits", "fashion"):
        rows += pruning(setting)
    if part == "fashion-precision":
        rows += precise(setting)
    return rows


def claims(rows: list[Row]) -> dict[str, float]:
    """What the choices between methods rest on, in points of accuracy."""
    found = {(r["data"], r["what"], r["how"]): float(r["accuracy_percent"]) for r in rows}
    said: dict[str, float] = {}
    for data, what, how in found:
        if how == "both, hints 1":
            said[f"{data}_hints_points"] = found[data, what, how] - found[data, what, "both, hints 0"]
        if how == "l2 gradual":
            name = f"{data}_{str(what).replace(' ', '_')}_gradual_points"
            said[name] = found[data, what, how] - found[data, what, "l2 one_shot"]
        if how == "bf16":
            said[f"{data}_bf16_points"] = found[data, what, how] - found[data, what, "fp32"]
    return said


def main() -> None:
    asked = options(__doc__ or "", parts=PARTS, data=True, data_for="fashion")
    before = machine()
    torch.set_num_threads(1)
    rows = [each for part in asked.only or PARTS for each in measured(part, asked)]
    publish(asked, before, claims(rows), rows)


if __name__ == "__main__":
    main()
