"""Steps of any module that torch.func can batch, with linear layers that step inside the backward pass.

Legend as in `stack`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.func import functional_call, vjp, vmap

from fedge.learning import draws
from fedge_simulations.engine.stack import NO_PULL, Named, Pull
from fedge_simulations.engine.steppers import Optimised, Recipe, Stepping, output_error


class Vmapped:
    """Any module: forward through torch.func's vmap, backward by autograd over the whole stack."""

    def __init__(self, recipe: Recipe, *, fused: bool = False) -> None:
        """Prepare a model's steps.

        Args:
            recipe: what is trained.
            fused: linear layers step inside the backward pass; for plain SGD, and layers that are used once.

        Raises:
            NotImplementedError: there is nothing to be fused.
        """
        self.recipe = recipe
        self._loss = recipe.loss
        self._linear = _linear_parameters(recipe) if fused else {}
        if fused and not self._linear:
            raise NotImplementedError("no linear layer that could step by itself")
        self._parameters = recipe.trainable  # a walk through the model each time
        own = {name for pair in self._linear.items() for name in pair if name}
        self._trainable = tuple(name for name in self._parameters if name not in own)
        self._buffers = tuple(name for name in recipe.layout.shapes if name not in recipe.trainable)
        self._counters = {
            name: value.to(recipe.device)
            for name, value in recipe.model.named_buffers()
            if not value.is_floating_point()
        }
        # Else a first layer would have no backward pass.
        self._trigger = torch.zeros((), device=recipe.device, requires_grad=True)
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in recipe.model.modules())
        forward = self._decomposed if self._recurrent else self._logits
        self._forward = vmap(forward, in_dims=(0, 0, 0, 0), randomness="error")
        self._optimised: Optimised | None = None
        self._counts: Named = {}
        self._clients = 0  # of the step that is being made

    def _logits(
        self, parameters: Named, others: Named, x: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, Named]:
        stepping = Stepping(
            {id(parameters[w]): id(parameters[b]) if b else 0 for w, b in self._linear.items()},
            self._layer,
        )
        with draws.keyed_dropout(self.recipe.model, keys), stepping if self._linear else nullcontext():
            logits = functional_call(self.recipe.model, {**parameters, **others}, (x,))
        stepping.check()
        return logits, others

    def _decomposed(
        self, parameters: Named, others: Named, x: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, Named]:
        """The same; under a gradient's transform torch takes recurrent layers apart, as vmap needs them."""

        def forward(parameters: Named) -> tuple[torch.Tensor, Named]:
            own = {name: value.clone() for name, value in others.items()}  # what is changed in place
            return self._logits(parameters, own, x, keys)

        found: Any = vjp(forward, parameters, has_aux=True)
        return found[0], found[2]

    def _layer(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        """A layer of all clients, from within vmap, whose own way for such functions is slow."""
        level = functorch.maybe_current_level()
        assert level is not None  # noqa: S101 - it is called under vmap
        k = self._clients
        rows = _stacked(x, k)  # (k, ..., F)
        weight, bias = _stacked(w, k), None if b is None else _stacked(b, k)
        with temporarily_clear_interpreter_stack():
            lr = self.recipe.settings.learning_rate
            found = _StackedLinear.apply(  # type: ignore[no-untyped-call]
                rows.flatten(1, -2), weight, bias, lr, self._trigger
            )
            found = found.view(*rows.shape[:-1], weight.shape[1])
        made: torch.Tensor = functorch._add_batch_dim(found, 0, level)
        return made

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        """Recurrent layers of OneDNN and cuDNN have no batching rule; without them torch's own do it."""
        if not self._recurrent:
            yield
            return
        if self.recipe.device.type == "cuda":
            with torch.backends.cudnn.flags(enabled=False):
                yield
            return
        before = torch._C._get_mkldnn_enabled()
        # Not `torch.backends.mkldnn.flags`, which sets TF32 too and warns where there is none.
        torch._C._set_mkldnn_enabled(False)
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(before)

    def begin(self, flat: torch.Tensor, pull: Pull = NO_PULL) -> None:
        """Take over a stack."""
        self._optimised = Optimised(self.recipe, flat, pull)
        self._counts = {n: v.expand(len(flat), *v.shape).clone() for n, v in self._counters.items()}

    def step(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None, keys: torch.Tensor
    ) -> torch.Tensor:
        """One step of the first k clients."""
        assert self._optimised is not None  # noqa: S101 - `begin` has made it
        views = self._optimised.active(len(x))
        gradients, loss = self.gradients(views, x, y, weight, keys)
        if gradients:
            self._optimised.step(gradients)
        return loss

    def gradients(
        self, views: Named, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None, keys: torch.Tensor
    ) -> tuple[Named, torch.Tensor]:
        """Gradients of each client's mean loss at the weights in `views`, and these losses, (k,).

        Buffers move, and so do the layers that step by themselves, which are not among the gradients.
        """
        k = self._clients = len(x)
        others = {name: views[name] for name in self._buffers}
        others |= {name: value[:k] for name, value in self._counts.items()}
        # `.data`: the views share one version counter, so a step of one would spoil what is saved of another.
        parameters = {name: views[name].data for name in self._parameters}
        leaves = [parameters[name].requires_grad_() for name in self._trainable]
        with self._kernels():
            with torch.enable_grad():
                copies = {name: value.clone() for name, value in others.items()}
                logits, changed = self._forward(parameters, copies, x, keys)
            loss, error = output_error(self._loss, self.recipe.settings, logits.detach(), y, weight)
            found: tuple[torch.Tensor, ...] = ()
            if leaves:
                found = torch.autograd.grad(logits, leaves, error, materialize_grads=True)
            else:  # all that is left is what the layers do to themselves
                logits.backward(error)  # type: ignore[no-untyped-call]  # torch has no annotation here
        for name, value in others.items():
            value.copy_(changed[name])
        return dict(zip(self._trainable, found, strict=True)), loss

    def end(self) -> None:
        """Nothing is left to do."""
        self._optimised = None


def _linear_parameters(recipe: Recipe) -> dict[str, str]:
    """Name of the weight of each linear layer that steps change, and of its bias or ""."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in recipe.model.modules())
    if not recipe.plain_sgd or recurrent:  # the latter runs under a second transform
        return {}
    return {
        f"{name}.weight".lstrip("."): f"{name}.bias".lstrip(".") if module.bias is not None else ""
        for name, module in recipe.model.named_modules()
        if type(module) is nn.Linear and all(p.requires_grad for p in module.parameters())
    }


class _StackedLinear(torch.autograd.Function):
    """The same for a stack: (k, R, F) rows and weights of each client."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        b: torch.Tensor | None,
        lr: float,
        trigger: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.w, ctx.b, ctx.lr = w, b, lr
        return torch.baddbmm(b[:, None], x, w.mT) if b is not None else torch.bmm(x, w.mT)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        (x,), (g,) = ctx.saved_tensors, grads
        below = torch.bmm(g, ctx.w) if ctx.needs_input_grad[0] else None
        with torch.no_grad():
            ctx.w.baddbmm_(g.mT, x, alpha=-ctx.lr)
            if ctx.b is not None:
                ctx.b.add_(g.sum(1), alpha=-ctx.lr)
        return below, None, None, None, None


def _stacked(x: torch.Tensor, k: int) -> torch.Tensor:
    """What vmap shows as one client's, of all of them, (k, ...)."""
    if not functorch.is_batchedtensor(x):
        return x.expand(k, *x.shape)
    whole: torch.Tensor = functorch.get_unwrapped(x)
    return whole.movedim(functorch.maybe_get_bdim(x), 0)
