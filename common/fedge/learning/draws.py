"""Random numbers as functions of a key: the same for a client whether it trains alone or beside thousands.

SplitMix64 (Steele, Lea, Flood 2014, Fast Splittable Pseudorandom Number Generators): number i of the
stream of key k is mix(k + i * gamma). A stream has no state, so a batch of keys gives a batch of streams in
one call, under `torch.func.vmap` too, and the order in which clients are trained changes nothing.

Keys are int64 tensors of any shape; arithmetic wraps around at 64 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod, tau
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_GAMMA: Final = 0x9E3779B97F4A7C15 - 2**64
_FIRST: Final = 0xBF58476D1CE4E5B9 - 2**64
_SECOND: Final = 0x94D049BB133111EB - 2**64
_WORD: Final = 2**64 - 1
_SINGLE: Final = 2.0**-24  # a float32 has 24 bits


def _mix(z: torch.Tensor) -> torch.Tensor:
    # `>>` keeps the sign of an int64: the masks make the shifts logical.
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _FIRST
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _SECOND
    return z ^ ((z >> 31) & (2**33 - 1))


def key(*words: int | torch.Tensor) -> torch.Tensor:
    """A key from whole numbers in their order; tensors are broadcast against each other.

    Args:
        words: from -2^63 to below 2^63; int64 tensors give as many keys.
    """
    found = torch.zeros((), dtype=torch.int64)
    for word in words:
        found = derive(found, word)
    return found


def plain_key(*words: int) -> int:
    """The same key as `key` gives, for one client: tensors of one value cost a hundred times as much."""
    found = 0
    for word in words:
        found = _mix_plain(_mix_plain(found + _GAMMA) + (word + 1) * _GAMMA)
    return found - 2**64 if found >= 2**63 else found


def _mix_plain(z: int) -> int:
    z &= _WORD
    z = (z ^ (z >> 30)) * _FIRST & _WORD
    z = (z ^ (z >> 27)) * _SECOND & _WORD
    return z ^ (z >> 31)


def derive(keys: torch.Tensor, word: int | torch.Tensor) -> torch.Tensor:
    """Keys of streams that belong to `keys`, told apart by a whole number."""
    step = torch.as_tensor(word, dtype=torch.int64) + 1
    return _mix(_mix(keys + _GAMMA) + step * _GAMMA)


def numbered(keys: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Number `index`, counted from 0, of each stream: int64 over its whole range; both are broadcast."""
    return _mix(keys + (index + 1) * _GAMMA)


def bits(keys: torch.Tensor, count: int) -> torch.Tensor:
    """The first numbers of each stream: (..., count) int64 over its whole range."""
    return numbered(keys[..., None], torch.arange(count, device=keys.device))


def uniform(keys: torch.Tensor, count: int, *, first: int = 0) -> torch.Tensor:
    """(..., count) float32, at least 0 and below 1; number `first` of each stream and those after it."""
    drawn = numbered(keys[..., None], torch.arange(first, first + count, device=keys.device))
    return ((drawn >> 40) & (2**24 - 1)).to(torch.float32) * _SINGLE


def normal(keys: torch.Tensor, count: int) -> torch.Tensor:
    """(..., count) float32 of the standard normal distribution (Box and Muller 1958)."""
    first, second = torch.split(uniform(keys, 2 * count), count, dim=-1)
    return torch.sqrt(-2 * torch.log(1 - first)) * torch.cos(tau * second)


def integers(keys: torch.Tensor, count: int, high: int) -> torch.Tensor:
    """(..., count) int64, from 0 to below `high`, which is far below 2^24."""
    return (uniform(keys, count) * high).to(torch.int64)


def permutation(keys: torch.Tensor, lengths: torch.Tensor | int) -> torch.Tensor:
    """A random order for each key: (..., longest), whose first `lengths` positions are an order of them.

    Args:
        keys: (...).
        lengths: how many positions each has; as many as keys, or one number for all.
    """
    if isinstance(lengths, int):
        return bits(keys, lengths).argsort(dim=-1, stable=True)
    longest = int(lengths.max())
    numbers = bits(keys, longest)
    beyond = torch.arange(longest) >= lengths[..., None]
    return numbers.masked_fill(beyond, torch.iinfo(torch.int64).max).argsort(dim=-1, stable=True)


def keys_from(generator: torch.Generator, count: int) -> torch.Tensor:
    """(count,) keys drawn from torch's own generator."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


_DROPOUTS: Final = {
    F.dropout: None,  # each value by itself
    F.dropout1d: 1,  # whole channels: so many dimensions behind them
    F.dropout2d: 2,
    F.dropout3d: 3,
}


class _Keyed(TorchFunctionMode):
    """Draws the masks of torch's dropouts from a key; each call of a forward pass has its own stream."""

    def __init__(self, keys: torch.Tensor, first: int) -> None:
        super().__init__()
        self._key, self._first, self._calls = keys, first, 0

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _DROPOUTS:
            return func(*args, **kwargs)
        return self._dropout(_DROPOUTS[func], *args, **kwargs)

    def _dropout(
        self,
        behind: int | None,
        x: torch.Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> torch.Tensor:
        if not training or p == 0:
            return x
        shape = x.shape if behind is None else (*x.shape[: x.dim() - behind], *([1] * behind))
        before = self._first * prod(shape[1:])
        drawn = uniform(derive(self._key, self._calls), prod(shape), first=before).reshape(shape)
        self._calls += 1
        kept = (drawn >= p).to(x.dtype) / (1 - p if p < 1 else 1)
        return x.mul_(kept) if inplace else x * kept


@contextmanager
def keyed_dropout(model: nn.Module, keys: torch.Tensor, *, first: int = 0) -> Iterator[None]:
    """Within it the model's dropout layers draw from this key; for a model without any it costs nothing.

    Args:
        model: whose dropouts.
        keys: of one step.
        first: position in the step's batch of the first example that goes through the model: who has a part
            of a batch draws what he would have drawn for the whole of it.
    """
    if not any(isinstance(module, nn.modules.dropout._DropoutNd) for module in model.modules()):
        yield
        return
    with _Keyed(keys, first):
        yield
