"""Runs that learn something new and hold to an earlier model: alike on engines, and after a kill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from fedge import tensors
from fedge.config import Config
from fedge.errors import ConfigError
from fedge.learning.local import logits
from fedge_simulations import run
from fedge_simulations.simulate import Result

BASE = {
    "task": "images",
    "model": {"name": "mlp"},
    "clients": {"count": 3},
    "rounds": {"count": 3},
    "simulation": {"engine": "sequential"},
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The folder of a run on digits, and the files of these, and of moved ones."""
    folder = tmp_path_factory.mktemp("worlds")
    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8) * 15).astype(np.uint8)
    for name, images in (("upright", x), ("moved", np.roll(x, 1, axis=2))):
        np.savez(folder / f"{name}.npz", x=images, y=y)
    config = {**BASE, "data": str(folder / "upright.npz"), "rounds": {"count": 8}}
    run(Config.from_mapping(config), folder / "earlier")
    return folder / "earlier", folder / "upright.npz", folder / "moved.npz"


def config_of(worlds: tuple[Path, Path, Path], remember: float, **sections: object) -> Config:
    model = {"name": "mlp", "start": str(worlds[0]), "remember": remember}
    model |= sections.pop("model", {})  # type: ignore[call-overload]
    return Config.from_mapping({**BASE, "data": str(worlds[2]), "model": model, **sections})


def accuracy(result: Result, data: Path) -> float:
    model = result.learned.model
    with np.load(data) as file:
        x, y = torch.from_numpy(file["x"].copy()), file["y"]
    with torch.no_grad():
        answers = logits(model.network, model.preprocess(x))
    return float((answers.argmax(1).numpy() == y).mean())


@pytest.mark.slow
def test_what_was_learned_before_is_forgotten_less(worlds: tuple[Path, Path, Path]) -> None:
    plain, held = (run(config_of(worlds, remember)) for remember in (0.0, 0.8))
    assert accuracy(held, worlds[1]) > accuracy(plain, worlds[1]) + 0.05
    assert accuracy(held, worlds[2]) > 0.9


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_without_the_earlier_model(
    worlds: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    start = tmp_path / "start.safetensors"
    start.write_bytes((worlds[0] / "model.safetensors").read_bytes())
    config = config_of((start, *worlds[1:]), 0.5)
    whole = run(config, tmp_path / "whole")

    def after_two(record: object) -> None:
        if getattr(record, "round", 0) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut", observe=after_two)
    start.unlink()
    assert run(config, tmp_path / "cut").learned.model_sha256 == whole.learned.model_sha256


@pytest.mark.slow
def test_engines_agree(worlds: tuple[Path, Path, Path]) -> None:
    sequential, vector = (
        run(config_of(worlds, 0.5, simulation={"engine": engine})) for engine in ("sequential", "vector")
    )
    one, two = (
        np.concatenate([p.detach().numpy().ravel() for p in each.learned.model.network.parameters()])
        for each in (sequential, vector)
    )
    start, _ = tensors.load(worlds[0] / "model.safetensors")
    names = [name for name, _ in sequential.learned.model.network.named_parameters()]
    moved = np.linalg.norm(one - np.concatenate([start[name].ravel() for name in names]))
    assert np.linalg.norm(two - one) < 1e-3 * moved


@pytest.mark.slow
def test_a_step_is_that_of_both_losses_worked_out_apart(
    worlds: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """One client, one step of plain SGD, against autograd in float64."""
    train = {"epochs": 1, "batch_size": 100_000, "momentum": 0.0, "learning_rate": 0.1}
    config = config_of(worlds, 0.3, clients={"count": 1}, rounds={"count": 1}, train=train)
    result = run(config, tmp_path / "out")
    arrays, _ = tensors.load(worlds[0] / "model.safetensors")
    after, _ = tensors.load(tmp_path / "out" / "model.safetensors")

    from fedge_simulations.world import prepare

    world = prepare(config)
    examples = world.dataset.examples.take(world.clients[0])
    model = result.learned.model
    x = model.preprocess(torch.from_numpy(np.ascontiguousarray(examples.x))).double()
    network = model.network.double().train()
    names = [name for name, _ in network.named_parameters()]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(torch.from_numpy(arrays[name].copy()))
    answers = network(x)
    teacher, y = answers.detach(), torch.from_numpy(examples.y)
    own = F.cross_entropy(answers, y, reduction="none")
    log_p, log_q = (teacher / 2).log_softmax(1), (answers / 2).log_softmax(1)
    soft = 4 * (log_p.exp() * (log_p - log_q)).sum(1)
    right = teacher.argmax(1) == y
    loss = torch.where(right, 0.7 * own + 0.3 * soft, own).mean()
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    for name, gradient in zip(names, gradients, strict=True):
        wanted = arrays[name] - 0.1 * gradient.numpy()
        np.testing.assert_allclose(after[name], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"strategy": {"name": "fedsgd"}}, "only sends gradients"),
        (
            {"privacy": {"mechanism": "local"}, "model": {"standardise": False}},
            "protect plain training",
        ),
    ],
)
@pytest.mark.slow
def test_what_it_does_not_go_with_is_refused(
    worlds: tuple[Path, Path, Path], sections: dict[str, object], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        run(config_of(worlds, 0.5, **sections))


@pytest.mark.slow
def test_other_classes_have_no_answers_to_hold_to(worlds: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with np.load(worlds[2]) as file:
        np.savez(tmp_path / "few.npz", x=file["x"][file["y"] < 5], y=file["y"][file["y"] < 5])
    with pytest.raises(ConfigError, match=r"classes of model\.start are others"):
        run(config_of((worlds[0], worlds[1], tmp_path / "few.npz"), 0.5))


def test_without_an_earlier_model_there_is_nothing_to_remember() -> None:
    with pytest.raises(ConfigError, match="remember needs start"):
        Config.from_mapping({"model": {"remember": 0.5}})
