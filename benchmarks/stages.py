"""Compression's stages side by side: pruning in its kinds, hints, teachers, precision, training under int8.

Each row trains from the same networks with the same seeds; accuracy is on data used for nothing else, bytes
are those of the packed float32 weights (part `fashion-aware`: of the int8 graph), seconds those of the
processor for one network. Part `digits` needs nothing; the others take `fashion_mnist.npz` in --data-dir.
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
from fedge.inference import CompactModel
from fedge.learning.models import Builder, mlp, small_cnn
from fedge.learning.whole import WholeModel
from fedge.spec import Spec
from fedge_server.compression import aware
from fedge_server.compression.distil import Teacher, distil, logits
from fedge_server.compression.export import export
from fedge_server.compression.prune import prune
from fedge_server.compression.quantise import quantise
from fedge_server.compression.recovery import Cut, pruned_and_recovered
from fedge_server.compression.sparsify import sparsify

LABELS = tuple("0123456789")
PARTS = ("digits", "fashion", "fashion-hints", "fashion-precision", "fashion-aware")


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
    first = networks[0]
    state = {name: value.numpy() for name, value in first.state_dict().items()}
    installed = first.installed if isinstance(first, Int8) else tensors.dump(state)
    found: Row = {
        "data": setting.name,
        "what": what,
        "how": how,
        "accuracy_percent": float(np.mean(right)),
        "sd": float(np.std(right, ddof=1)) if len(right) > 1 else 0.0,
        "packed_bytes": len(artefact.pack(installed)),
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


class WithChannel(nn.Module):
    """Images (B, H, W), prepared but for their one channel."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W)."""
        return x[:, None]


class Int8(nn.Module):
    """A network as onnxruntime answers for it in int8."""

    def __init__(self, network: nn.Module, calibration: Tensor) -> None:
        super().__init__()
        spec = Spec("image", (28, 28), "float32", LABELS)
        graph = export(WholeModel(WithChannel(), network), spec)
        self.installed = quantise(graph, calibration[:, 0].numpy())
        self._model = CompactModel(self.installed, spec)

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities (B, classes) of prepared images (B, 1, H, W)."""
        return torch.from_numpy(self._model.run(x[:, 0].numpy())[1])


def rounding(setting: Setting) -> Iterator[Row]:
    """A student in float, rounded as it is, after further epochs, and after as many under simulated int8."""
    further = Distil(epochs=max(setting.epochs // 2, 1), learning_rate=0.001)
    for name, build in (("student", setting.student), ("tiny student", small_cnn(2, 8))):
        made = [student(setting, lambda s: setting.teachers[s], build)(seed) for seed in setting.seeds]

        def on(seed: int, network: nn.Module) -> nn.Module:
            return distil(setting.teachers[seed], network, setting.x, setting.y, further, seed=seed)

        def plain(seed: int, made: list[nn.Module] = made) -> nn.Module:
            return on(seed, made[seed])

        def simulated(seed: int, made: list[nn.Module] = made) -> nn.Module:
            return aware.frozen(on(seed, aware.prepared(made[seed])))

        yield row(setting, name, "float", lambda seed, made=made: made[seed])  # type: ignore[misc]
        yield row(setting, name, "int8", lambda seed, made=made: Int8(made[seed], setting.x))  # type: ignore[misc]
        yield row(setting, name, "int8, further epochs", lambda seed, on=plain: Int8(on(seed), setting.x))  # type: ignore[misc]
        yield row(setting, name, "int8, aware", lambda seed, on=simulated: Int8(on(seed), setting.x))  # type: ignore[misc]


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
    if part == "fashion-aware":
        rows += rounding(setting)
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
        if how == "int8, aware":
            name = f"{data}_{str(what).replace(' ', '_')}_aware_points"
            said[name] = found[data, what, how] - found[data, what, "int8, further epochs"]
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
