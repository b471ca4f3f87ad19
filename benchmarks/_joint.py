"""Joint inference on Fashion-MNIST: a small variant, and its teacher in the cloud.

The variant is the architecture that the search for the smallest one ends with (cnn3-12, four bits a weight),
taught here in a short way, without augmentation, so that it takes a minute and not several.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from _harness import Options, Row
from compression import Setting, setting_of, whole

from fedge.artefact import pack
from fedge.inference import CompactModel
from fedge.learning.whole import WholeModel
from fedge.routing import DOUBTS, Calibrated, Rule, for_gap, for_share
from fedge_server.compression.distil import distil, logits, preprocessed
from fedge_server.compression.export import export
from fedge_server.compression.lowbit import frozen, prepared
from fedge_server.page import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FAMILY, WIDTH = "cnn3", 12
EPOCHS, GRID_EPOCHS, GRID_RATE = 7, 4, 0.003
MOST = 0.2  # share of requests that may be sent
GAP = 0.002  # in fractions of 1
SHARES = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
SPLITS = 100  # of the data into two halves, to see how often a promise is kept

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Answers:
    """What device and cloud say of the gate's data, and what is right."""

    device: Rows  # (N, classes)
    cloud: Rows
    y: npt.NDArray[np.int64]
    bytes: int  # of the variant on the wire

    def half(self, chosen: npt.NDArray[Any]) -> Answers:
        """Some of them."""
        return Answers(self.device[chosen], self.cloud[chosen], self.y[chosen], self.bytes)

    @property
    def right(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Whether the device's answers are right, and the cloud's."""
        return self.device.argmax(1) == self.y, self.cloud.argmax(1) == self.y


def answers_of(data: Path, cache: Path, seed: int, *, quick: bool) -> Answers:
    """From the cache, or of a variant that is taught now; its teacher takes a quarter of an hour."""
    begun = Made(
        setting_of(data, cache, seed, "cnn", quick=quick), cache / f"{'quick-' if quick else ''}joint-{seed}"
    )
    return begun.answers()


@dataclass(frozen=True, slots=True)
class Made:
    """What is made under one teacher, each part kept in a folder."""

    setting: Setting
    folder: Path

    def kept(self, name: str, make: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """An array from the folder, or made now."""
        path = self.folder / f"{name}.npy"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            np.save(path, make())
        found: npt.NDArray[Any] = np.load(path)
        return found

    def says(self, name: str) -> npt.NDArray[np.float32]:
        """The teacher's logits on the proxy or the gate data (N, classes)."""
        examples = {"proxy": self.setting.data.proxy, "gate": self.setting.data.gate}[name]
        teacher = self.setting.teacher
        return self.kept(name, lambda: logits(teacher, torch.from_numpy(examples.x)).numpy())

    def variant(self, *, on_grid: bool = True) -> npt.NDArray[np.uint8]:
        """The variant's ONNX file as bytes, or that of the student before its weights have four bits."""
        return self.kept("variant" if on_grid else "student", lambda: self._taught(on_grid=on_grid))

    def _taught(self, *, on_grid: bool) -> npt.NDArray[np.uint8]:
        setting, settings = self.setting, self.setting.config.compress.distil
        proxy, spec, preprocess = setting.data.proxy, setting.data.spec, setting.teacher.preprocess
        network = setting.task.families[FAMILY].of(WIDTH)(spec)
        state = self.folder / "student.pt"
        short = replace(settings, augment=(), epochs=EPOCHS)
        if on_grid:
            self.variant(on_grid=False)
            network.load_state_dict(torch.load(state, weights_only=True))
            network = prepared(network.eval(), "int4")
            short = replace(short, epochs=GRID_EPOCHS, learning_rate=GRID_RATE)
        x, y = preprocessed(preprocess, proxy.x), torch.from_numpy(proxy.y)
        taught = distil(torch.from_numpy(self.says("proxy")), network, x, y, short, seed=setting.config.seed)
        if on_grid:
            taught = frozen(taught)
        else:
            torch.save(taught.state_dict(), state)
        return np.frombuffer(export(WholeModel(preprocess, taught), spec), np.uint8)

    def answers(self) -> Answers:
        """Of device and cloud on the gate's data, which taught neither."""
        gate = self.setting.data.gate
        onnx = self.variant().tobytes()
        model = CompactModel(onnx, self.setting.data.spec)
        device = self.kept("device", lambda: model.run_each(gate.x))
        cloud = torch.softmax(torch.from_numpy(self.says("gate")), 1).numpy()
        return Answers(device, cloud, gate.y.astype(np.int64), len(pack(onnx)))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a threshold brings on data that it was not calibrated on."""

    sent: float  # share
    accuracy: float
    worse: float  # than the cloud alone; fractions of 1


def outcome_of(answers: Answers, rule: Rule) -> Outcome:
    """Device below the threshold, cloud above it."""
    sent = rule.doubts(answers.device) > rule.threshold
    device, cloud = answers.right
    accuracy = float(np.where(sent, cloud, device).mean())
    return Outcome(float(sent.mean()), accuracy, float(cloud.mean()) - accuracy)


SHARE, POINTS = PROMISES = ("a fifth sent", "0.2 points")


def calibrated(answers: Answers, doubt: str, promise: str) -> Calibrated:
    """The threshold of one of the promises."""
    doubts = DOUBTS[doubt](answers.device)
    if promise == SHARE:
        return for_share(doubts, MOST, doubt=doubt)
    return for_gap(doubts, *answers.right, GAP, doubt=doubt)


def rows_of(seed: int, answers: Answers) -> list[Row]:
    """Calibrated on one half, measured on the other; and how often that kept the promise over many halves."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(answers.y))
    first, second = answers.half(order[::2]), answers.half(order[1::2])
    device, cloud = second.right
    rows: list[Row] = []
    for doubt in DOUBTS:
        for promise in PROMISES:
            found = calibrated(first, doubt, promise)
            got = outcome_of(second, found.rule)
            rows.append(
                {
                    "seed": seed,
                    "bytes": answers.bytes,
                    "doubt": doubt,
                    "promise": promise,
                    "threshold": found.rule.threshold,
                    "sent %": 100 * got.sent,
                    "device %": 100 * float(device.mean()),
                    "cloud %": 100 * float(cloud.mean()),
                    "joint %": 100 * got.accuracy,
                    "points below the cloud": 100 * got.worse,
                    "broken, % of halves": 100 * broken(answers, doubt, promise, seed),
                }
            )
    return rows


def broken(answers: Answers, doubt: str, promise: str, seed: int) -> float:
    """How often a threshold from one half breaks its promise on the other; both halves are samples.

    So this counts some that are kept in truth as broken, and is above what is promised.
    """
    rng = np.random.default_rng((seed, 1))
    count = 0
    for _ in range(SPLITS):
        order = rng.permutation(len(answers.y))
        rule = calibrated(answers.half(order[::2]), doubt, promise).rule
        got = outcome_of(answers.half(order[1::2]), rule)
        count += got.sent > MOST if promise == SHARE else got.worse > GAP
    return count / SPLITS


def curve(answers: Answers, order: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Accuracy when the first 0, 1, ..., N of an order go to the cloud (N + 1,)."""
    device, cloud = answers.right
    gains = cloud[order].astype(np.int64) - device[order]
    return np.concatenate([[device.sum()], device.sum() + np.cumsum(gains)]) / len(order)


def orders(answers: Answers) -> dict[str, npt.NDArray[Any]]:
    """By each measure; and by who is right, which nobody can know."""
    device, cloud = answers.right
    found = {name: np.argsort(-of(answers.device), kind="stable") for name, of in DOUBTS.items()}
    found["oracle"] = np.argsort(device.astype(np.int64) - cloud, kind="stable")
    return found


def points_of(seed: int, answers: Answers) -> list[Row]:
    """Accuracy at some shares, by who is sent first."""
    device, cloud = (float(right.mean()) for right in answers.right)
    rows: list[Row] = []
    for name, order in orders(answers).items():
        accuracy = curve(answers, order)
        at = {f"{100 * share:g} % sent": 100 * float(accuracy[int(share * len(order))]) for share in SHARES}
        rows.append({"seed": seed, "first": name, **at})
    at = {f"{100 * share:g} % sent": 100 * (device + share * (cloud - device)) for share in SHARES}
    return [*rows, {"seed": seed, "first": "at random", **at}]


def plot(path: Path, all_answers: list[Answers]) -> None:
    """Accuracy against the share that is sent, seed 0."""
    answers = all_answers[0]
    device, cloud = (float(right.mean()) for right in answers.right)

    def paint(axes: Axes) -> None:
        share = 100 * np.arange(len(answers.y) + 1) / len(answers.y)
        for name, order in orders(answers).items():
            axes.plot(share, 100 * curve(answers, order), label=name)
        axes.plot([0, 100], [100 * device, 100 * cloud], "--", label="at random")
        axes.axhline(100 * cloud, color="0.6", linewidth=0.8)
        axes.set_xlabel("% of requests sent to the cloud")
        axes.set_ylabel("% right")
        axes.legend(fontsize=7)

    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"Fashion-MNIST: a variant of {answers.bytes:,} bytes and its teacher"
    path.write_text(draw("Accuracy against share sent", title, paint).svg, encoding="utf-8")


def measured(asked: Options) -> tuple[dict[str, float], list[Row]]:
    """Claims and rows."""
    seeds = (0,) if asked.quick else (0, 1)
    with tempfile.TemporaryDirectory() as scratch:
        data = whole(asked.data, Path(scratch))
        all_answers = [answers_of(data, asked.cache, seed, quick=asked.quick) for seed in seeds]
    plot(asked.json.with_suffix(".svg"), all_answers)
    rows = [row for seed, answers in zip(seeds, all_answers, strict=True) for row in rows_of(seed, answers)]
    points = [row for seed, found in zip(seeds, all_answers, strict=True) for row in points_of(seed, found)]
    claimed = [row for row in rows if row["doubt"] == "confidence" and row["promise"] == SHARE]
    claims = {
        "joint_share_sent": max(float(row["sent %"]) for row in claimed) / 100,
        "joint_gap_points": max(float(row["points below the cloud"]) for row in claimed),
    }
    return claims, [*rows, *points]
