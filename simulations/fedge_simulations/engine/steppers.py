"""Ways to make one step of many stacked models; each gives what the device's own step gives.

`Linears` is for stacks of linear layers: the weight gradient and the step are one product (baddbmm), so no
gradient is ever written down. `Single` trains one client at a time with linear layers that step inside their
backward pass, convolutions in channels-last order. `vmapped` takes any other module.

Legend as in `stack`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedge.config import Train
from fedge.learning import draws, objective
from fedge.learning.lessons import Loss
from fedge.learning.terms import Lesson
from fedge_simulations.engine.stack import CPU, NO_PULL, Layout, Named, Pull

# Weights of a linear layer from which on a few rows are multiplied the other way round: by size and not by
# measurement, since it rounds otherwise and the same seed shall give the same result.
LARGE = 2**19


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is trained, and how: the same for all clients of a round."""

    model: nn.Module  # in training mode; its own weights are not used
    layout: Layout
    settings: Train
    mu: float = 0.0  # FedProx's
    shifted: bool = False  # something is added to each client's gradients (SCAFFOLD)
    device: torch.device = CPU  # where the stacks lie
    lesson: Lesson | None = None  # what is learned besides the classes

    @property
    def loss(self) -> Loss:
        """Of each example."""
        return objective.losses(self.settings, self.lesson)

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the parameters that steps change."""
        return tuple(name for name, p in self.model.named_parameters() if p.requires_grad)

    @property
    def plain_sgd(self) -> bool:
        """Whether a step is w <- w - lr * gradient of the loss and nothing else."""
        return self.bare and not self.mu and not self.shifted

    @property
    def bare(self) -> bool:
        """Whether the optimiser keeps nothing and adds nothing."""
        settings = self.settings
        return (settings.optimizer, settings.momentum, settings.weight_decay) == ("sgd", 0, 0)


class Optimised:
    """The run's torch optimiser over the first k of the stacked parameters, with its state as k shrinks."""

    def __init__(self, recipe: Recipe, flat: torch.Tensor, pull: Pull = NO_PULL) -> None:
        self.recipe, self._flat = recipe, flat
        views, trainable = recipe.layout.views, recipe.trainable
        anchors = views(flat.clone() if pull.anchor is None else pull.anchor) if recipe.mu else {}
        self._anchors = {name: anchors[name] for name in trainable} if anchors else {}
        shifts = {} if pull.shift is None else views(pull.shift)
        self._shifts = {name: shifts[name] for name in trainable} if shifts else {}
        self.views: Named = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self.active(len(flat))

    def active(self, k: int) -> Named:
        """All state of the first k clients, as (k, *shape)."""
        if self.views and len(next(iter(self.views.values()))) == k:
            return self.views
        before, old = self._optimizer, [self.views[n] for n in self.recipe.trainable] if self.views else []
        self.views = self.recipe.layout.views(self._flat[:k])
        if self.recipe.bare:  # `step` needs no optimiser
            return self.views
        fresh = [self.views[name] for name in self.recipe.trainable]
        self._optimizer = objective.optimizer(fresh, self.recipe.settings)
        if before is not None:
            for gone, here in zip(old, fresh, strict=True):
                if gone in before.state:
                    self._optimizer.state[here] = {
                        key: value[:k] if isinstance(value, torch.Tensor) and value.dim() else value
                        for key, value in before.state[gone].items()
                    }
        return self.views

    def step(self, gradients: Named) -> None:
        """One step of the active clients along their gradients, to which the pull is added."""
        for name, value in gradients.items():
            if self._anchors:
                value.add_(self.views[name] - self._anchors[name][: len(value)], alpha=self.recipe.mu)
            if self._shifts:
                value.add_(self._shifts[name][: len(value)])
        if self.recipe.bare:  # the same values, without the optimiser's own bookkeeping
            torch._foreach_add_(
                [self.views[name] for name in gradients],
                list(gradients.values()),
                alpha=-self.recipe.settings.learning_rate,
            )
            return
        assert self._optimizer is not None  # noqa: S101 - `active` has made it
        for name, value in gradients.items():
            self.views[name].grad = value
        self._optimizer.step()


def output_error(
    loss_of: Loss, settings: Train, logits: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss (k,) and its derivative by the logits (k, R, C).

    Args:
        loss_of: of each example.
        settings: the run's `[train]`.
        logits: (k, R, C).
        y: (k, R); in a lesson (k, R, 1 + C).
        weight: (k, R) 1 for an example and 0 for padding; None: there is no padding.
    """
    k, rows, classes = logits.shape
    share = (
        torch.full((1, 1), 1 / rows, dtype=logits.dtype, device=logits.device)
        if weight is None
        else weight / weight.sum(1, keepdim=True)
    )  # (k or 1, R or 1)
    if settings.loss == "cross_entropy" and settings.label_smoothing == 0 and y.dim() == 2:
        # Written out: torch's log_softmax over a short last dimension takes five times as long.
        shifted = logits - logits.amax(2, keepdim=True)
        error = shifted.exp()
        norm = error.sum(2, keepdim=True)
        each = norm.log().squeeze(2) - shifted.gather(2, y[:, :, None]).squeeze(2)  # (k, R)
        error.div_(norm).scatter_add_(2, y[:, :, None], error.new_full((1, 1, 1), -1.0).expand(k, rows, 1))
        return (each * share).sum(1), error.mul_(share[:, :, None])
    leaf = logits.detach().reshape(-1, classes).requires_grad_()
    with torch.enable_grad():
        each = loss_of(leaf, y.flatten(0, 1)).view(k, rows)
        loss = (each * share).sum(1)
        (error,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), error.view(k, rows, classes)


class Linears:
    """Linear layers with ReLU between them, their backward pass written out."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._loss = recipe.loss
        layers = linear_layers(recipe.model)
        assert layers is not None  # noqa: S101 - the caller has asked
        self._layers = layers
        self._optimised: Optimised | None = None

    def begin(self, flat: torch.Tensor, pull: Pull = NO_PULL) -> None:
        """Take over a stack."""
        self._optimised = Optimised(self.recipe, flat, pull)

    def step(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None, keys: torch.Tensor
    ) -> torch.Tensor:
        """One step of the first k clients."""
        assert self._optimised is not None  # noqa: S101 - `begin` has made it
        views = self._optimised.active(len(x))
        inputs, h = [], x.flatten(2)  # (k, R, F)
        for name, bias, relu in self._layers:
            inputs.append(h)
            w = views[name]  # (k, out, in)
            h = torch.baddbmm(views[bias][:, None], h, w.mT) if bias else torch.bmm(h, w.mT)
            if relu:
                h = h.relu_()
        loss, error = output_error(self._loss, self.recipe.settings, h, y, weight)
        gradients: Named = {}
        for i in range(len(self._layers) - 1, -1, -1):
            name, bias, _ = self._layers[i]
            below = torch.bmm(error, views[name]) if i else None
            self._change(gradients, views, name, bias, error, inputs[i])
            if below is not None:
                error = below.mul_(inputs[i] > 0) if self._layers[i - 1][2] else below
        if gradients:
            self._optimised.step({name: gradients[name] for name in self.recipe.trainable})
        return loss

    def _change(
        self, gradients: Named, views: Named, name: str, bias: str, error: torch.Tensor, x: torch.Tensor
    ) -> None:
        """Step this layer at once where a step is plain; else write its gradient down."""
        if self.recipe.plain_sgd:
            lr = self.recipe.settings.learning_rate
            views[name].baddbmm_(error.mT, x, alpha=-lr)
            if bias:
                views[bias].add_(error.sum(1), alpha=-lr)
            return
        gradients[name] = torch.bmm(error.mT, x)
        if bias:
            gradients[bias] = error.sum(1)

    def end(self) -> None:
        """Nothing is left to do."""
        self._optimised = None


def linear_layers(model: nn.Module) -> list[tuple[str, str, bool]] | None:
    """(weight, bias or "", followed by ReLU) of each layer of a flat stack of them; None: it is none."""
    if type(model) is not nn.Sequential or not all(p.requires_grad for p in model.parameters()):
        return None
    found: list[tuple[str, str, bool]] = []
    for name, module in model.named_children():
        if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1) and not found:
            continue
        if type(module) is nn.Linear:
            found.append((f"{name}.weight", f"{name}.bias" if module.bias is not None else "", False))
        elif type(module) is nn.ReLU and found and not found[-1][2]:
            found[-1] = (*found[-1][:2], True)
        else:
            return None
    return found if found and not found[-1][2] else None


class _Linear(torch.autograd.Function):
    """A linear layer that makes its own step of plain SGD in its backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, lr: float
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.w, ctx.b, ctx.lr = w, b, lr
        if w.numel() < LARGE:
            return F.linear(x, w, b)
        found = torch.mm(w, x.t()).t().contiguous()  # half the time where w does not fit into the cache
        return found if b is None else found.add_(b)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (x,), (g,) = ctx.saved_tensors, grads
        below = g @ ctx.w if ctx.needs_input_grad[0] else None
        with torch.no_grad():
            ctx.w.addmm_(g.t(), x, alpha=-ctx.lr)
            if ctx.b is not None:
                ctx.b.add_(g.sum(0), alpha=-ctx.lr)
        return below, None, None, None


class Stepping(TorchFunctionMode):
    """Lets linear layers over these weights step by themselves; each may be used once in a pass."""

    def __init__(self, weights: dict[int, int], layer: Callable[..., torch.Tensor]) -> None:
        """Know the layers.

        Args:
            weights: id of each weight, and of its bias or 0.
            layer: (input, weight, bias or None) to output.
        """
        super().__init__()
        self._weights, self._layer = weights, layer
        self._used: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) >= 2 and id(args[1]) in self._weights and args[0].dim() >= 2:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            self._used.append(id(args[1]))
            if (id(bias) if bias is not None else 0) != self._weights[id(args[1])]:
                raise NotImplementedError("a linear layer with another's bias")
            return self._layer(args[0], args[1], bias)
        return func(*args, **kwargs)

    def check(self) -> None:
        """Refuse a pass that did not use each once.

        Raises:
            NotImplementedError: it did not.
        """
        if sorted(self._used) != sorted(self._weights):
            raise NotImplementedError("a linear layer is used twice, or not as a layer")


class Single:
    """One client at a time, for models whose convolutions already fill the processor."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._loss = recipe.loss
        self._model = copy.deepcopy(recipe.model).to(recipe.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._flat: torch.Tensor | None = None
        # A layer steps in its backward pass, which there is none of where all before it is frozen.
        fused = recipe.plain_sgd and all(p.requires_grad for p in recipe.model.parameters())
        modules = [m for m in self._model.modules() if type(m) is nn.Linear] if fused else []
        self._stepping = {id(m.weight): id(m.bias) if m.bias is not None else 0 for m in modules}
        own = {id(p) for m in modules for p in m.parameters()}
        self._parameters = [p for p in self._model.parameters() if p.requires_grad and id(p) not in own]
        for module in modules:
            module.requires_grad_(False)
        self._optimizer: torch.optim.Optimizer | None = None
        self._names = [
            n for n, p in self._model.named_parameters() if any(p is own for own in self._parameters)
        ]
        self._anchors: list[torch.Tensor] = []
        self._shifts: list[torch.Tensor] = []

    def _layer(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        if x.dim() != 2:
            raise NotImplementedError("a linear layer over more than rows")
        lr = self.recipe.settings.learning_rate
        made: torch.Tensor = _Linear.apply(x, w, b, lr)  # type: ignore[no-untyped-call]
        return made

    def begin(self, flat: torch.Tensor, pull: Pull = NO_PULL) -> None:
        """Take over a stack of one."""
        self._flat = flat
        with torch.no_grad():
            state = self._model.state_dict()
            for name, value in self.recipe.layout.views(flat).items():
                state[name].copy_(value[0])
        if not self.recipe.bare:
            self._optimizer = objective.optimizer(self._parameters, self.recipe.settings)
        views, mu = self.recipe.layout.views, self.recipe.mu
        anchors = views(flat.clone() if pull.anchor is None else pull.anchor) if mu else {}
        self._anchors = [anchors[name][0] for name in self._names] if anchors else []
        shifts = {} if pull.shift is None else views(pull.shift)
        self._shifts = [shifts[name][0] for name in self._names] if shifts else []

    def step(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None, keys: torch.Tensor
    ) -> torch.Tensor:
        """One step of the one client."""
        inputs, labels = x[0], y[0]
        if weight is not None:
            inputs, labels = inputs[weight[0] > 0], labels[weight[0] > 0]
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        stepping = Stepping(self._stepping, self._layer)
        with torch.enable_grad(), draws.keyed_dropout(self._model, keys[0]), stepping:
            loss = self._loss(self._model(inputs), labels).mean()
        stepping.check()
        gradients = torch.autograd.grad(loss, self._parameters)
        with torch.no_grad():
            if self._anchors:
                away = torch._foreach_sub(self._parameters, self._anchors)
                gradients = torch._foreach_add(gradients, away, alpha=self.recipe.mu)
            if self._shifts:
                gradients = torch._foreach_add(gradients, self._shifts)
            if self._optimizer is None:
                lr = self.recipe.settings.learning_rate
                torch._foreach_add_(self._parameters, list(gradients), alpha=-lr)
            else:
                for p, value in zip(self._parameters, gradients, strict=True):
                    p.grad = value
                self._optimizer.step()
        return loss.detach()[None]

    def end(self) -> None:
        """Put the trained model back into the stack."""
        assert self._flat is not None  # noqa: S101 - `begin` has set it
        with torch.no_grad():
            state = self._model.state_dict()
            for name, value in self.recipe.layout.views(self._flat).items():
                value[0].copy_(state[name])
