"""What features of an early layer would cost to send, and how much of the input they give away.

The teacher's own layers up to a pooling run on the device; what they give is rounded to eight bits. Whoever
receives it knows the layers and the mean image, and looks for the image by gradient descent from there, among
smooth ones within the range of pixels (He, Zhang and Lee 2019, white box). Beside it the mean image alone.
A longer search, or a trained decoder, finds more.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from _harness import Options, Row
from compression import config_of, whole
from torch import Tensor, nn

from fedge.task import resolve
from fedge_server.data import server_part, source_of, split_of
from fedge_server.rounds.starting import whole_model

IMAGES, STEPS, RATE, SMOOTH = 8, 500, 0.1, 0.003


def rounded(features: Tensor) -> Tensor:
    """To 256 levels between the least and the largest, as they would travel."""
    low, high = features.min(), features.max()
    return (features - low).div((high - low) / 255).round() * ((high - low) / 255) + low


def inverted(layers: nn.Module, features: Tensor, start: Tensor, low: float, high: float) -> Tensor:
    """Inputs whose features are these, as nearly as descent finds."""
    found, scale = start.clone().requires_grad_(), features.square().mean()
    optimizer = torch.optim.Adam([found], RATE)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        within = found.clamp(low, high)
        steps = (within.diff(dim=-1).abs().mean() + within.diff(dim=-2).abs().mean()) * SMOOTH
        loss = (layers(found) - features).square().mean() / scale + steps + (found - within).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found.detach()


def correlation(found: Tensor, wanted: Tensor) -> float:
    """Of pixels, median over images."""
    pairs = zip(found.flatten(1).numpy(), wanted.flatten(1).numpy(), strict=True)
    return float(np.median([np.corrcoef(a, b)[0, 1] for a, b in pairs]))


def measured(asked: Options) -> tuple[dict[str, float], list[Row]]:
    """For each depth of the teacher's convolutions."""
    with tempfile.TemporaryDirectory() as scratch:
        config = config_of(whole(asked.data, Path(scratch)), 0, "cnn", quick=asked.quick)
        task = resolve(config.task)
        dataset = task.read(source_of(config))
        server = server_part(dataset, split_of(config, dataset))
    folder = asked.cache / f"{'quick-' if asked.quick else ''}cnn-0"
    teacher, _ = whole_model(str(folder), config, task, server.spec, None)
    with torch.no_grad():
        x = teacher.preprocess(torch.from_numpy(server.gate.x[:IMAGES]))
        mean = teacher.preprocess(torch.from_numpy(server.proxy.x[:2000])).mean(0, keepdim=True)
    layers = list(teacher.network.children())  # one after the other: McMahan's CNN
    rows: list[Row] = [
        {"sent": "mean image, nothing sent", "bytes": 0, "correlation": correlation(mean.expand_as(x), x)},
        {"sent": "the image", "bytes": int(np.prod(server.spec.shape)), "correlation": 1.0},
    ]
    claims = {}
    depths = [i + 1 for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
    for number, depth in enumerate(depths, 1):
        part = nn.Sequential(*layers[:depth]).eval()
        with torch.no_grad():
            features = rounded(part(x))
        start, low, high = mean.expand_as(x), float(x.min()), float(x.max())
        found = correlation(inverted(part, features, start, low, high), x)
        rows.append({"sent": f"after ReLU {number}", "bytes": features[0].numel(), "correlation": found})
        claims[f"features_{number}_correlation"] = found
    return claims, rows
