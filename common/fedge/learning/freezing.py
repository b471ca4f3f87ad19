"""Parts of a model that a run leaves as they are: named by patterns, sent to clients, and never sent back."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from fedge.config import suggestion
from fedge.errors import ConfigError


def entries(network: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """The entries of a model's state that patterns freeze, in the state's order.

    Besides the parameters that a pattern matches these are the floating-point buffers of modules whose own
    parameters are all frozen: batch normalisation would otherwise go on moving its means.

    Args:
        network: the global model.
        patterns: such as 'conv*' or '0.*', on the names of parameters.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    parameters = [name for name, p in network.named_parameters() if p.requires_grad]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise ConfigError(
                f"train.freeze: {pattern!r} matches no parameter of this model; "
                f"{suggestion(pattern, parameters)}"
            )
    frozen = {name for name in parameters if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if frozen and len(frozen) == len(parameters):
        raise ConfigError(
            f"train.freeze = {list(patterns)}: freezes all of this model; nothing is left to train"
        )
    for prefix, module in network.named_modules():
        own = [_joined(prefix, name) for name, _ in module.named_parameters(recurse=False)]
        if own and all(name in frozen for name in own):
            frozen |= {
                _joined(prefix, name)
                for name, buffer in module.named_buffers(recurse=False)
                if buffer.is_floating_point()
            }
    return tuple(name for name in network.state_dict() if name in frozen)


def freeze(network: nn.Module, frozen: Sequence[str]) -> nn.Module:
    """The same network, whose frozen parameters take no gradient."""
    names = frozenset(frozen)
    for name, parameter in network.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    return network


def training(network: nn.Module) -> nn.Module:
    """The same network in training mode, but for batch normalisation that is wholly frozen."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            own = list(module.parameters(recurse=False))
            module.train(not own or any(p.requires_grad for p in own))
    return network


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
