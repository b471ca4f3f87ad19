"""Training data out of gradients: exact where a linear layer comes first, by optimisation elsewhere.

Phong et al. 2017, Privacy-Preserving Deep Learning via Additively Homomorphic Encryption; Zhu et al. 2019,
Deep Leakage from Gradients; Zhao et al. 2020, iDLG; Geiping et al. 2020, Inverting Gradients.

Legend: H units of the first layer, F inputs, B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

Array = npt.NDArray[np.floating]
Gradients = Mapping[str, Array]


def gradients_of(
    before: Mapping[str, npt.NDArray[np.generic]],
    after: Mapping[str, npt.NDArray[np.generic]],
    learning_rate: float,
) -> dict[str, Array]:
    """The gradient that one step of SGD from `before` to `after` took: (w0 - w1) / learning_rate.

    After several steps it is their sum, each at other weights: for a client of one example still of rank one.
    """
    return {
        name: (np.asarray(value, np.float64) - np.asarray(after[name], np.float64)) / learning_rate
        for name, value in before.items()
    }


def analytic(weight: Array, bias: Array) -> Array:
    """The input of a linear first layer, from the gradients of a batch of one: (F,).

    Each unit's row is its bias's gradient times the input (Phong et al. 2017), dW = db x^T, so a single row
    gives x. All rows together by least squares, x = dW^T db / |db|^2, also see through much noise.

    Args:
        weight: (H, F) gradient of the layer's weights, or anything proportional to it.
        bias: (H,) that of its bias, likewise.
    """
    size = float(bias @ bias)
    return np.asarray(weight.T @ bias / size if size > 0 else np.zeros(weight.shape[1]))


def leading(weight: Array) -> Array:
    """The best input by the weights alone, up to scale and sign: the first right singular vector, (F,).

    Independent of the bias, whose gradient noise hits harder than that of the weights.
    """
    # eigh of (F, F): the layer is usually taller than wide.
    _, vectors = np.linalg.eigh(np.asarray(weight.T @ weight, np.float64))
    return np.asarray(vectors[:, -1])


def candidates(weight: Array, bias: Array, *, least: float = 1e-6) -> Array:
    """One candidate input for each unit, dW_i / db_i: (units, F).

    In a larger batch, or a sum of clients, a row is a mixture of those examples that make the unit active:
    where that is a single one, the row is that example exactly (Geiping et al. 2020, section 3).

    Args:
        weight: (H, F) gradient of the layer's weights.
        bias: (H,) that of its bias.
        least: units whose bias gradient is below this share of the largest are left out.
    """
    used = np.abs(bias) > least * np.abs(bias).max(initial=0.0)
    return np.asarray(weight[used] / bias[used][:, None])


def inferred_label(last_bias: Array) -> int:
    """The label of a batch of one: of a cross-entropy's gradients only its own is negative (iDLG)."""
    return int(np.argmin(last_bias))


@dataclass(frozen=True, slots=True)
class Matching:
    """How `matching` searches."""

    steps: int = 300  # of Adam
    learning_rate: float = 0.1  # in deviations of the standardised input; it decays at 3/8, 5/8 and 7/8
    total_variation: float = 1e-2  # weight of the mean absolute difference of neighbours; images only
    restarts: int = 1  # the one whose gradients match best is kept
    bounds: tuple[float, float] | None = None  # least and largest value of an input; None: any


def matching(
    network: nn.Module,
    gradients: Gradients,
    labels: Sequence[int],
    shape: Sequence[int],
    *,
    settings: Matching,
    seed: int,
) -> Array:
    """Inputs whose gradients point where the observed ones do: (B, *shape).

    Geiping et al. 2020: 1 - cosine of the two gradients plus total variation, minimised over the input by
    Adam on the sign of its gradient. The attacker needs the network, not the data.

    Args:
        network: at the weights that the client was sent; from pre-processed inputs to logits (B, K).
        gradients: by parameter name; others, such as batch statistics, are not looked at.
        labels: (B,) of the batch, known or inferred.
        shape: of one pre-processed input, such as (C, H, W).
        settings: of the search.
        seed: of the first guesses.
    """
    network.train()
    names = [name for name, _ in network.named_parameters()]
    observed = [torch.as_tensor(np.asarray(gradients[name], np.float32)) for name in names]
    length = torch.sqrt(torch.stack([part.square().sum() for part in observed]).sum())
    wanted = [part / length.clamp(min=1e-30) for part in observed]
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor(list(labels))
    found = [
        _search(network, wanted, y, torch.randn((len(y), *shape), generator=generator), settings)
        for _ in range(settings.restarts)
    ]
    best = min(found, key=lambda pair: pair[0])[1]
    return np.asarray(best.numpy(), np.float64)


def _search(
    network: nn.Module,
    wanted: Sequence[torch.Tensor],
    y: torch.Tensor,
    start: torch.Tensor,
    settings: Matching,
) -> tuple[float, torch.Tensor]:
    """The last distance, and the inputs (B, *shape)."""
    x, parameters = start.clone().requires_grad_(), list(network.parameters())
    optimizer = torch.optim.Adam([x], settings.learning_rate)
    marks = [settings.steps * part // 8 for part in (3, 5, 7)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, marks, gamma=0.1)
    distance = torch.tensor(1.0)
    for _ in range(settings.steps):
        loss = F.cross_entropy(network(x), y)
        own = torch.autograd.grad(loss, parameters, create_graph=True)
        distance = _distance(own, wanted)
        (slope,) = torch.autograd.grad(distance + settings.total_variation * _variation(x), [x])
        x.grad = slope.sign()
        optimizer.step()
        schedule.step()
        if settings.bounds is not None:
            with torch.no_grad():
                x.clamp_(*settings.bounds)
    return float(distance.detach()), x.detach()


def _distance(own: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> torch.Tensor:
    """1 - cosine over all parameters together; `wanted` has length 1."""
    product = torch.stack([(a * b).sum() for a, b in zip(own, wanted, strict=True)]).sum()
    length = torch.sqrt(torch.stack([a.square().sum() for a in own]).sum() + 1e-30)
    return 1 - product / length


def _variation(x: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbours in an image (B, C, H, W); 0 for other inputs."""
    if x.ndim != 4:
        return x.new_zeros(())
    return x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()
